"""The fixtures themselves: databases are separate, owned by a non-superuser, and the app login is nobody special."""

import os
import time
from pathlib import Path

import asyncpg
import pytest

from proxy.local.locks import FileLock
from tests import postgres
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


def test_what_killed_runs_have_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "fast_directory", lambda: tmp_path)
    old, young, running = (postgres.run_directory(name) for name in ("old", "young", "running"))
    for directory in (old, young, running):
        (directory / "postgres").mkdir(parents=True)
    other = tmp_path / "somebody-else-s"
    other.mkdir()
    lock = FileLock(running / "lock")
    assert lock.acquire()
    long_ago = time.time() - postgres.ABANDONED_SECONDS - 60
    for directory in (old, running, other):
        os.utime(directory, (long_ago, long_ago))
    postgres.remove_abandoned_clusters()
    assert set(tmp_path.iterdir()) == {young, running, other}
    lock.close()
