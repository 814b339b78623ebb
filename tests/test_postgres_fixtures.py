"""The fixtures themselves: databases are separate, owned by a non-superuser, and the app login is nobody special."""

import asyncpg

from tests.postgres import Database


async def test_a_database_belongs_to_an_owner_who_is_no_superuser(database: Database) -> None:
    connection = await asyncpg.connect(database.owner)
    try:
        row = await connection.fetchrow(
            "SELECT current_database(), rolname, rolsuper, rolcreaterole FROM pg_roles WHERE rolname = current_user"
        )
        assert row is not None
        assert tuple(row) == (database.name, "farebox_owner", False, True)
        await connection.execute("CREATE TABLE mark (n int)")
    finally:
        await connection.close()


async def test_the_app_login_may_make_nothing(database: Database) -> None:
    connection = await asyncpg.connect(database.app)
    try:
        assert await connection.fetchval("SELECT to_regclass('mark')") is None, "another test's table"
        assert not await connection.fetchval("SELECT rolcreaterole FROM pg_roles WHERE rolname = current_user")
    finally:
        await connection.close()


async def test_a_module_shares_a_database(module_database: Database, database: Database) -> None:
    assert module_database.name != database.name
