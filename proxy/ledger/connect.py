"""Connections to the ledger's database: which role they act as, how long they wait, and what their failures are called.

A connection logs in as whoever the DSN says and then acts as one of three group roles, each with its own few rights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeAlias

import asyncpg

from proxy.ledger.errors import InvalidValue, LedgerUnavailable, MissingRole

__all__ = ["Connection", "Database", "Pool", "Role", "connect", "create_pool", "translated"]

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Database: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.Pool[asyncpg.Record]"
"""What a single query can be put to."""

# SQLSTATE classes that mean "not now": connection, authorization, rollback, resources, operator intervention, system.
_NOT_NOW_CLASSES = frozenset({"08", "28", "40", "53", "57", "58"})
# A lock that somebody else holds; a database that takes no connections.
_NOT_NOW_STATES = frozenset({"55P03", "55000"})


class Role(StrEnum):
    """The group roles. GATEWAY moves holds, CONTROL does what an operator does, READER sees one account's own rows."""

    GATEWAY = "farebox_gateway"
    CONTROL = "farebox_control"
    READER = "farebox_reader"


async def connect(
    dsn: str,
    role: Role | None = None,
    *,
    lock_ms: int = 2000,
    statement_seconds: float = 5.0,
    connect_seconds: float = 5.0,
) -> Connection:
    """One connection that acts as ``role`` (None: as whoever logs in).

    Raises LedgerUnavailable, and MissingRole where there is no such role, or the login may not act as it.
    ``lock_ms``: how long a call waits for a lock that somebody else holds. ``statement_seconds`` 0: no limit.
    """
    settings = _settings(role, lock_ms, statement_seconds)
    try:
        with translated():
            return await asyncpg.connect(dsn, timeout=connect_seconds, server_settings=settings)
    except (asyncpg.InsufficientPrivilegeError, InvalidValue) as error:
        if role is None:
            raise
        raise MissingRole(
            f"the database's login may not act as {role.value}: "
            "run `farebox migrate --grant-to LOGIN` as the owner of the schema"
        ) from error


async def create_pool(
    dsn: str,
    role: Role,
    *,
    size: int,
    lock_ms: int = 2000,
    statement_seconds: float = 5.0,
    connect_seconds: float = 5.0,
) -> Pool:
    """At most ``size`` connections acting as ``role``, opened when first needed. Raises LedgerUnavailable."""
    with translated():
        return await asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=size,
            timeout=connect_seconds,
            server_settings=_settings(role, lock_ms, statement_seconds),
            reset=_keep_as_it_is,
        )


@contextmanager
def translated() -> Iterator[None]:
    """Turns what asyncpg and the socket raise into LedgerUnavailable or InvalidValue; faults of ours pass through."""
    try:
        yield
    except asyncpg.DataError as error:
        raise InvalidValue(str(error)) from error
    except (OSError, TimeoutError, asyncpg.InterfaceError) as error:
        if isinstance(error, ValueError):  # asyncpg could not encode an argument
            raise InvalidValue(str(error)) from error
        raise LedgerUnavailable(f"the ledger's database can't be asked: {type(error).__name__}: {error}") from error
    except asyncpg.PostgresError as error:
        code = error.sqlstate or ""
        if code[:2] in _NOT_NOW_CLASSES or code in _NOT_NOW_STATES:
            raise LedgerUnavailable(f"the ledger's database refused for now ({code}): {error}") from error
        raise


def _settings(role: Role | None, lock_ms: int, statement_seconds: float) -> dict[str, str]:
    settings = {
        "application_name": "farebox",
        "timezone": "UTC",
        "lock_timeout": str(lock_ms),
        "statement_timeout": str(int(statement_seconds * 1000)),
        "idle_in_transaction_session_timeout": "5000",
        # What the ledger's functions need, whatever this database's default is.
        "default_transaction_isolation": "read committed",
        # Compiling costs more than any of these queries takes.
        "jit": "off",
    }
    return settings if role is None else settings | {"role": role.value}


async def _keep_as_it_is(connection: "Connection") -> None:
    # Nothing here leaves state in a session: the reset that asyncpg sends at each release would be a wasted round trip.
    pass
