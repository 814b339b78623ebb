"""Migrations: once, in order, all or nothing, by an owner who is nobody special; and what a server may run on."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from enum import StrEnum

import asyncpg
import pytest

from proxy.ledger import migrate as migrations
from proxy.ledger.connect import Role, connect
from proxy.ledger.errors import MissingRole, SchemaMismatch
from proxy.ledger.migrate import Migration, SchemaState, known_migrations, migrate, schema_state
from proxy.local.postgres import APP, OWNER, SUPERUSER, ClusterAddress
from tests.postgres import Database

NUMBERS = [migration.number for migration in known_migrations()]


@asynccontextmanager
async def superuser(
    cluster: ClusterAddress, database: str = "postgres"
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(cluster.dsn(SUPERUSER, database))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def empty(cluster: ClusterAddress) -> AsyncIterator[str]:
    """The name of a database with nothing in it, which the owner owns."""
    name = f"t_{secrets.token_hex(6)}"
    async with superuser(cluster) as connection:
        await connection.execute(f"CREATE DATABASE {name} OWNER {OWNER}")
        yield name
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def state_of(dsn: str, role: Role | None = None) -> SchemaState:
    connection = await connect(dsn, role)
    try:
        return await schema_state(connection)
    finally:
        await connection.close()


async def test_an_empty_database_is_migrated_once(cluster: ClusterAddress, empty: str) -> None:
    owner = cluster.dsn(OWNER, empty)
    before = await state_of(owner)
    assert (before.word, before.applied, before.serves) == ("behind", 0, False)
    with pytest.raises(SchemaMismatch, match="farebox migrate"):
        before.require()
    assert await migrate(owner) == NUMBERS
    assert await migrate(owner) == []
    after = await state_of(owner)
    assert (after.word, after.applied, after.serves) == ("current", len(NUMBERS), True)
    after.require()


async def test_many_at_once_migrate_once(cluster: ClusterAddress, empty: str) -> None:
    applied = await asyncio.gather(*(migrate(cluster.dsn(OWNER, empty)) for _ in range(5)))
    assert sorted(applied) == [[]] * 4 + [NUMBERS]


@pytest.mark.parametrize("role", list(Role))
async def test_every_role_can_ask_how_far_the_schema_is(module_database: Database, role: Role) -> None:
    assert (await state_of(module_database.app, role)).word == "current"


async def test_a_schema_ahead_serves_as_long_as_it_says_so(database: Database) -> None:
    owner = await connect(database.owner)
    last = NUMBERS[-1]
    insert = "INSERT INTO farebox.schema_migrations (number, name, checksum, serves_from) VALUES ($1, 'next', 'x', $2)"
    await owner.execute(insert, last + 1, last)
    ahead = await state_of(database.owner)
    assert (ahead.word, ahead.serves) == ("ahead", True)
    ahead.require()
    with pytest.raises(SchemaMismatch, match="ahead of this release"):
        await migrate(database.owner)
    await owner.execute(insert, last + 2, last + 1)
    too_far = await state_of(database.owner)
    assert (too_far.word, too_far.serves) == ("ahead", False)
    with pytest.raises(SchemaMismatch, match="upgrade Farebox"):
        too_far.require()
    await owner.close()


async def test_a_migration_that_was_edited_after_it_was_applied_is_told(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = [replace(migration, sql=migration.sql + "\n-- later") for migration in known_migrations()]
    monkeypatch.setattr(migrations, "known_migrations", lambda: edited)
    with pytest.raises(SchemaMismatch, match="never edited"):
        await migrate(database.owner)


async def test_a_migration_that_fails_leaves_nothing_of_itself(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = NUMBERS[-1]
    good = Migration(last + 1, "good", "CREATE TABLE farebox.good (x integer)", 1)
    bad = Migration(last + 2, "bad", "CREATE TABLE farebox.bad (x integer); SELECT 1/0", 1)
    known = [*known_migrations(), good, bad]
    monkeypatch.setattr(migrations, "known_migrations", lambda: known)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(database.owner)
    owner = await connect(database.owner)
    assert await owner.fetchval("SELECT max(number) FROM farebox.schema_migrations") == last + 1
    assert await owner.fetchval("SELECT to_regclass('farebox.good') IS NOT NULL AND to_regclass('farebox.bad') IS NULL")
    await owner.close()
    known[-1] = Migration(last + 2, "bad", "CREATE TABLE farebox.bad (x integer)", 1)
    assert await migrate(database.owner) == [last + 2]


async def test_calls_go_on_while_money_in_waits_for_its_tables(
    cluster: ClusterAddress, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call locks its account, and then writes transfers: what wants both tables must take them in that order, and
    must not stand in everybody's way while somebody reads for long."""
    owner = cluster.dsn(OWNER, empty)
    before = known_migrations()[:6]
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "known_migrations", lambda: before)
        await migrate(owner)
    call, other = await asyncpg.connect(owner), await connect(owner, lock_ms=30_000, statement_seconds=30)
    async with call.transaction():
        await call.execute("SELECT FROM farebox.accounts FOR NO KEY UPDATE")
        migrating = asyncio.create_task(migrate(owner))
        while not await other.fetchval(_WANTED):  # noqa: ASYNC110 - Postgres tells nobody
            await asyncio.sleep(0.01)
        # As an INSERT.
        await call.execute("LOCK TABLE farebox.transfers IN ROW EXCLUSIVE MODE")
        assert await other.fetchval("SELECT count(*) FROM farebox.accounts") == 0
        assert not migrating.done()
    assert await asyncio.wait_for(migrating, 60) == NUMBERS[6:]
    await call.close()
    await other.close()


_WANTED = """
    SELECT count(*)
      FROM pg_locks
     WHERE relation IN ('farebox.accounts'::regclass, 'farebox.transfers'::regclass) AND NOT granted
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def test_migrations_are_numbered_without_a_gap_and_never_empty() -> None:
    found = known_migrations()
    assert list(range(1, len(found) + 1)) == NUMBERS
    for migration in found:
        assert 1 <= migration.serves_from <= migration.number
        assert "CREATE" in migration.sql


# Roles: they belong to the whole cluster


@pytest.fixture
async def other_roles(cluster: ClusterAddress, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """Names of group roles that don't exist in this cluster yet."""
    names = [f"farebox_test_{secrets.token_hex(4)}" for _ in Role]
    made = StrEnum("Made", {f"R{n}": name for n, name in enumerate(names)})  # type: ignore[misc]
    monkeypatch.setattr(migrations, "Role", made)
    yield names
    async with superuser(cluster) as connection:
        for name in names:
            await connection.execute(f"DROP ROLE IF EXISTS {name}")


async def test_databases_that_are_migrated_at_once_make_the_roles_once(
    cluster: ClusterAddress, empty: str, database: Database, other_roles: list[str]
) -> None:
    connections = [await connect(cluster.dsn(OWNER, name)) for name in (empty, database.name) * 4]
    for _ in range(5):
        await asyncio.gather(*map(migrations._ensure_roles, connections))
        async with superuser(cluster) as admin:
            found = await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = ANY ($1)", other_roles)
            assert found == len(other_roles)
            for name in other_roles:
                await admin.execute(f"DROP ROLE {name}")
    for connection in connections:
        await connection.close()


async def test_an_owner_that_may_not_make_roles_is_told_what_to_run(
    cluster: ClusterAddress, database: Database, other_roles: list[str]
) -> None:
    connection = await connect(cluster.dsn(APP, database.name))
    with pytest.raises(MissingRole) as raised:
        await migrations._ensure_roles(connection)
    for name in other_roles:
        assert f"CREATE ROLE {name} NOLOGIN;" in str(raised.value)
    # And once somebody has run it, that is enough.
    async with superuser(cluster) as admin:
        await admin.execute(str(raised.value).split("\n", 1)[1])
    await migrations._ensure_roles(connection)
    await connection.close()


async def test_a_login_that_may_not_make_the_schema_is_told_what_to_run(cluster: ClusterAddress, empty: str) -> None:
    with pytest.raises(MissingRole, match=f"GRANT CREATE ON DATABASE {empty} TO {APP};"):
        await migrate(cluster.dsn(APP, empty))
    await migrate(cluster.dsn(OWNER, empty))
    with pytest.raises(MissingRole, match="run as its owner"):
        await migrate(cluster.dsn(APP, empty))


async def test_a_login_gets_the_roles_and_no_right_of_its_own(cluster: ClusterAddress, empty: str) -> None:
    login = f"serve-{secrets.token_hex(4)}"
    async with superuser(cluster) as admin:
        password = secrets.token_hex(8)
        await admin.execute(f"CREATE ROLE \"{login}\" LOGIN PASSWORD '{password}'")
        await migrate(cluster.dsn(OWNER, empty), grant_to=login)
        assert await migrate(cluster.dsn(OWNER, empty), grant_to=login) == []
        granted = await admin.fetch(
            """
            SELECT m.roleid::regrole::text AS role, m.inherit_option, m.set_option, m.admin_option
              FROM pg_auth_members m WHERE m.member = (SELECT oid FROM pg_roles WHERE rolname = $1)
            """,
            login,
        )
        assert {row["role"]: tuple(row)[1:] for row in granted} == {role.value: (False, True, False) for role in Role}
        dsn = cluster.dsn(OWNER, empty).replace(
            cluster.dsn(OWNER, empty).split("//")[1].split("@")[0], f"{login}:{password}"
        )
        assert (await state_of(dsn, Role.GATEWAY)).word == "current"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await state_of(dsn)
        await admin.execute(f'DROP ROLE "{login}"')


async def test_granting_what_isnt_the_owners_to_grant_says_what_to_run(
    cluster: ClusterAddress, database: Database, other_roles: list[str]
) -> None:
    async with superuser(cluster) as admin:
        for name in other_roles:
            await admin.execute(f"CREATE ROLE {name} NOLOGIN")
    connection = await connect(database.owner)
    with pytest.raises(MissingRole, match=f"GRANT {other_roles[0]} TO .* WITH INHERIT FALSE, SET TRUE;"):
        await migrations._grant_roles(connection, APP)
    await connection.close()
