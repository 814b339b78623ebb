"""One PostgreSQL for a whole test run, and a fresh migrated database for each test that asks.

The first worker that needs the cluster starts it, the others attach; it stops when the last has left, by whatever
means. Databases are copies of a template that is migrated once a run.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from proxy.ledger.migrate import migrate
from proxy.local.locks import FileLock
from proxy.local.postgres import APP, OWNER, SUPERUSER, Cluster, ClusterAddress
from proxy.local.state import StateDirectory
from tests.memory import fast_directory

TEMPLATE = "farebox_template"
LINGER_SECONDS = 900.0
SETTINGS = {"max_connections": "300"}
ABANDONED_SECONDS = 3_600.0
"""No run takes as long to start its server, which then holds the lock."""

_PREFIX = f"farebox-test-{os.getuid()}-"


@dataclass(frozen=True, slots=True)
class Database:
    """A migrated database of a test's own."""

    name: str
    owner: str
    """DSN of the role that owns the schema: not a superuser."""
    app: str
    """DSN of the server's login, a member of the group roles."""
    superuser: str
    """DSN that sees and may do everything: for looking at what the others can't."""


def run_directory(run_id: str) -> Path:
    """Where a run's cluster lies; the same for all its workers. Short, because a socket's path must be."""
    return fast_directory() / f"{_PREFIX}{run_id[:12]}"


@contextlib.contextmanager
def running_cluster(run_id: str) -> Iterator[ClusterAddress]:
    """The run's cluster, started or attached to, with the template in it."""
    directory = run_directory(run_id)
    cluster = Cluster(StateDirectory(directory), purpose="tests", linger_seconds=LINGER_SECONDS, settings=SETTINGS)
    address = cluster.open()
    try:
        once = FileLock(directory / "template.lock")
        assert once.acquire(timeout_seconds=60)
        in_thread(_make_template(address))
        once.close()
        yield address
    finally:
        cluster.close()


def remove_cluster(run_id: str) -> None:
    """Remove what the run has left, once its server is gone."""
    _remove(run_directory(run_id), timeout_seconds=20)


def remove_abandoned_clusters() -> None:
    """Remove what runs have left that were killed: it lies in memory."""
    for directory in fast_directory().glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - directory.stat().st_mtime > ABANDONED_SECONDS:
                _remove(directory, timeout_seconds=0)


def _remove(directory: Path, *, timeout_seconds: float) -> None:
    if not directory.is_dir():
        return
    lock = FileLock(directory / "lock")
    if lock.acquire(timeout_seconds=timeout_seconds):
        shutil.rmtree(directory, ignore_errors=True)
        lock.close()


@contextlib.contextmanager
def fresh_database(address: ClusterAddress) -> Iterator[Database]:
    """A copy of the template, dropped at the end."""
    name = f"t_{secrets.token_hex(6)}"
    in_thread(run_as_superuser(address, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY OWNER {OWNER}"))
    # A copy is the same ledger; a test's is one of its own.
    in_thread(run_as_superuser(address, "UPDATE farebox.ledger_identity SET id = DEFAULT", database=name))
    try:
        yield Database(name, address.dsn(OWNER, name), address.dsn(APP, name), address.dsn(SUPERUSER, name))
    finally:
        in_thread(run_as_superuser(address, f"DROP DATABASE {name} WITH (FORCE)"))


def in_thread(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` on a loop of its own, so that a fixture of any scope can, whether or not a loop is running."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as threads:
        threads.submit(asyncio.run, work).result()


async def run_as_superuser(address: ClusterAddress, *statements: str, database: str = "postgres") -> None:
    connection = await asyncpg.connect(address.dsn(SUPERUSER, database))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _make_template(address: ClusterAddress) -> None:
    connection = await asyncpg.connect(address.superuser)
    try:
        if await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", TEMPLATE):
            return
    finally:
        await connection.close()
    unfinished = f"{TEMPLATE}_tmp"
    await run_as_superuser(
        address, f"DROP DATABASE IF EXISTS {unfinished}", f"CREATE DATABASE {unfinished} OWNER {OWNER}"
    )
    await migrate(address.dsn(OWNER, unfinished), grant_to=APP)
    await run_as_superuser(address, f"ALTER DATABASE {unfinished} RENAME TO {TEMPLATE}")
