"""Where a command's database is, and the objects that work on it.

``--database-url`` or DATABASE_URL names one. Without either it is the embedded PostgreSQL in the state directory: the
one that runs already, or one started for as long as the command takes; it alone is migrated without being asked.
"""

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import SecretStr

from proxy.control.operations import Operations
from proxy.ledger.connect import Connection, Pool, Role, connect, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.migrate import migrate, schema_state
from proxy.local.postgres import APP, Cluster
from proxy.local.state import StateDirectory
from proxy.settings import Settings, load

__all__ = ["Access", "actor", "ask_control", "database_access", "operate", "require_schema", "with_control"]

Result = TypeVar("Result")

CONNECTIONS = 60
WORKER_CONNECTIONS = 50
"""What a worker may open at most, twice: during a restart there are two in its place."""
LINGER_SECONDS = 15.0
"""For workers whose supervisor was killed: beside what their answers get, to settle in."""


@dataclass(frozen=True, slots=True)
class Access:
    """A database that can be asked, and what its keys are hashed under (None: not set). The DSNs hold passwords."""

    owner: str = field(repr=False)
    """Owns the schema. With DATABASE_URL it is the same as ``login``, and may turn out not to be the owner."""
    login: str = field(repr=False)
    settings: Settings
    """With the database and the pepper in them, wherever these came from."""
    embedded: bool
    failed: Callable[[], str | None] = lambda: None
    """Why the database is gone, for whoever stays: the embedded one may end by itself."""

    def login_of(self, role: Literal["gateway", "control", "reader"]) -> str:
        """Where to log in to act as this role."""
        return self.settings.database_url_of(role) or self.login


@contextmanager
def database_access(
    settings: Settings, *, purpose: str, serving: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Iterator[Access]:
    """The database that the settings mean, running for as long as this lasts. Raises LocalError, LedgerError.

    ``serving``: this process stays, and runs the embedded database itself rather than use one that another runs.
    """
    if settings.database_url is not None:
        url = settings.database_url
        yield Access(url, url, settings, embedded=False)
        return
    state = StateDirectory(settings.state_dir)
    cluster = (
        _serving_cluster(settings, purpose, progress) if serving else Cluster(state, purpose=purpose, progress=progress)
    )
    address = cluster.start() if serving else cluster.open()
    try:
        asyncio.run(migrate(address.owner, grant_to=APP))
        pepper = settings.key_pepper or SecretStr(state.pepper())
        own = settings.model_copy(update={"database_url": address.app, "key_pepper": pepper})
        yield Access(address.owner, address.app, own, embedded=True, failed=lambda: _failure(cluster))
    finally:
        cluster.close()


def _serving_cluster(settings: Settings, purpose: str, progress: Callable[[str], None]) -> Cluster:
    """The embedded database for a server: connections for all its workers, and time for theirs to end should it die."""
    return Cluster(
        StateDirectory(settings.state_dir),
        purpose=purpose,
        serving=True,
        linger_seconds=settings.shutdown_seconds + LINGER_SECONDS,
        settings={"max_connections": str(CONNECTIONS + WORKER_CONNECTIONS * (settings.workers or 1))},
        progress=progress,
    )


def operate(work: Callable[[Operations], Awaitable[Result]], database_url: str | None, *, purpose: str) -> Result:
    """Run one of the operator's functions. ``purpose`` is what others are told who wait for the embedded database.

    Raises refusals, LedgerError, LocalError and SettingsError.
    """
    with database_access(load(database_url=database_url), purpose=purpose) as access:
        return asyncio.run(_operate(work, access))


def ask_control(work: Callable[[Connection], Awaitable[Result]], database_url: str | None, *, purpose: str) -> Result:
    """Run ``work`` on one connection that acts as the operator's role. Raises as ``operate`` does."""
    with database_access(load(database_url=database_url), purpose=purpose) as access:
        return asyncio.run(_ask_control(work, access))


def with_control(work: Callable[[Pool], Awaitable[Result]], database_url: str | None, *, purpose: str) -> Result:
    """Run ``work`` on a pool that acts as the operator's role. Raises as ``operate`` does."""
    with database_access(load(database_url=database_url), purpose=purpose) as access:
        return asyncio.run(_with_control(work, access))


def actor() -> str:
    """Who is at the keyboard, for the book: the login name of this process's user."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    return f"cli:{name}"


def _failure(cluster: Cluster) -> str | None:
    return f"The embedded PostgreSQL ended by itself; its log is {cluster.log}." if cluster.stopped() else None


async def _operate(work: Callable[[Operations], Awaitable[Result]], access: Access) -> Result:
    peppers = access.settings.peppers()
    return await _with_control(lambda pool: work(Operations(ControlLedger(pool), peppers)), access)


async def _with_control(work: Callable[[Pool], Awaitable[Result]], access: Access) -> Result:
    login = access.login_of("control")
    await require_schema(login, Role.CONTROL)
    pool = await create_pool(login, Role.CONTROL, size=1)
    try:
        return await work(pool)
    finally:
        await pool.close()


async def _ask_control(work: Callable[[Connection], Awaitable[Result]], access: Access) -> Result:
    login = access.login_of("control")
    await require_schema(login, Role.CONTROL)
    connection = await connect(login, Role.CONTROL)
    try:
        return await work(connection)
    finally:
        await connection.close()


async def require_schema(dsn: str, role: Role) -> None:
    """Raise SchemaMismatch, which says what to run, unless this release can run on the schema; MissingRole as well."""
    connection = await connect(dsn, role)
    try:
        (await schema_state(connection)).require()
    finally:
        await connection.close()
