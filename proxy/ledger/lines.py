"""Lines: single database connections of their own, which reopen by themselves, and what an error on one means.

Hot calls don't go through a pool: its reset query costs more than the call. A line carries one call at a time, always
from a task that the ledger owns: a request's task that is cancelled inside asyncpg leaves a connection in doubt.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Protocol, TypeVar
from uuid import UUID

import asyncpg
import structlog

from proxy.ledger.connect import Role, connect
from proxy.ledger.errors import LedgerError, LedgerUnavailable
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import (
    Expired,
    Extend,
    Extended,
    Finalize,
    Finalized,
    Mark,
    Release,
    Released,
    Renewed,
    Reserve,
    Reserved,
)

__all__ = ["PAUSE_SECONDS_MAX", "Calls", "Keeper", "Line", "OpenLine", "Verdict", "judge", "lines_to"]

log = structlog.get_logger("farebox.ledger")

T = TypeVar("T")

NO_CONNECTION = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, LedgerUnavailable)
OPEN_SECONDS = 5.0
PAUSE_SECONDS_MIN = 0.05
PAUSE_SECONDS_MAX = 1.0


class Calls(Protocol):
    """The ledger's functions on one connection: what ``HoldLedger`` gives, and what a test can fake."""

    async def batch(
        self,
        finalizes: Sequence[Finalize],
        reserves: Sequence[Reserve],
        releases: Sequence[Release] = (),
        *,
        wait_ms: int = 0,
    ) -> tuple[Sequence[Finalized], Sequence[Reserved], Sequence[Released]]: ...
    async def extend_batch(self, rows: Sequence[Extend], *, wait_ms: int = 0) -> Sequence[Extended]: ...
    async def start_worker(self, worker_id: UUID, hostname: str, release: str, /) -> object: ...
    async def heartbeat(self, worker_id: UUID, marks: Sequence[Mark], /, *, beat: int) -> Renewed: ...
    async def stop_worker(self, worker_id: UUID, /) -> object: ...
    async def now(self) -> datetime: ...
    async def expire_holds(self, limit: int, /, *, not_after: datetime | None = None) -> Sequence[Expired]: ...


@dataclass(frozen=True, slots=True)
class Line:
    """An open connection. ``terminate`` is at once and never raises; a call in flight fails, with whatever error.

    ``is_closed``: it was terminated or lost. What a call on it raises then tells nothing about the call.
    """

    calls: Calls
    close: Callable[[], Awaitable[None]]
    terminate: Callable[[], None]
    is_closed: Callable[[], bool]


OpenLine = Callable[[], Awaitable[Line]]


def lines_to(dsn: str) -> OpenLine:
    """Opens lines to the ledger at ``dsn``, as the gateway's role."""

    async def open_line() -> Line:
        connection = await connect(dsn, Role.GATEWAY)
        return Line(HoldLedger(connection), connection.close, connection.terminate, connection.is_closed)

    return open_line


class Verdict(Enum):
    """What to do after a call has failed."""

    REOPEN = "reopen"
    """The connection or the server is in trouble: the call may have been carried out. Repeat it on a new one."""
    APART = "apart"
    """A lock, or trouble that may belong to this row. Nothing was done: try again later, apart from the others."""
    REJECT = "reject"
    """The row itself can't be carried out, now or later. Nothing was done."""


_BY_CLASS = {
    "08": Verdict.REOPEN,  # connection exception
    "0A": Verdict.REOPEN,  # a cached plan that a migration has outdated
    "25": Verdict.REOPEN,  # read-only: a failover has left us on a standby
    "28": Verdict.REOPEN,  # a role that is being changed
    "3D": Verdict.REOPEN,  # no such database
    "42": Verdict.REOPEN,  # a function that isn't there (yet): the schema's trouble, no row's
    "53": Verdict.REOPEN,  # out of disk, memory or connections
    "57": Verdict.REOPEN,  # shutting down, crashed, starting
    "58": Verdict.REOPEN,  # a system error
    "40": Verdict.APART,  # deadlock or serialization failure
    "55": Verdict.APART,  # lock not available
    "XX": Verdict.APART,  # internal error, damaged data
}
_BY_STATE = {"57014": Verdict.APART}  # statement timeout: it waited for something


def judge(error: BaseException) -> Verdict:
    """What the failure of a call means for it."""
    if isinstance(error, LedgerError) and error.__cause__ is not None:
        return judge(error.__cause__)
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return _BY_STATE.get(state) or _BY_CLASS.get(state[:2], Verdict.REJECT)
    if isinstance(error, ValueError):  # asyncpg's DataError, too: the value can't be encoded
        return Verdict.REJECT
    if isinstance(error, NO_CONNECTION):
        return Verdict.REOPEN
    return Verdict.REJECT


class Keeper:
    """Keeps one line: opens it when it is first asked for, and again after it broke, with growing pauses."""

    def __init__(self, open_line: OpenLine, name: str) -> None:
        self._open_line = open_line
        self._name = name
        self._line: Line | None = None
        self._failures = 0

    @property
    def is_open(self) -> bool:
        return self._line is not None

    async def line(self) -> Line:
        """The line, opened if need be, as long as that takes. Raises what no patience helps against, as MissingRole."""
        while self._line is None:
            if self._failures:
                await asyncio.sleep(self._pause_seconds())
            try:
                # Not wait_for: before Python 3.12 it loses a cancel that comes when the line has just been opened.
                async with asyncio.timeout(OPEN_SECONDS):
                    self._line = await self._open_line()
            except NO_CONNECTION as error:
                self._failures += 1
                log.warning("no connection to the ledger", line=self._name, failures=self._failures, reason=str(error))
        return self._line

    async def call(self, make: Callable[[Calls], Awaitable[T]], *, seconds: float) -> T:
        """One call on the line, cut off after ``seconds``. Raises what the call raised; reopens the line later."""
        line = await self.line()
        cut = asyncio.get_running_loop().call_later(seconds, line.terminate)
        try:
            result = await make(line.calls)
        except Exception as error:
            if line.is_closed() or judge(error) is Verdict.REOPEN:
                self.broke(error)
            raise
        finally:
            cut.cancel()
        self.worked()
        return result

    def worked(self) -> None:
        """A call was answered: the next break reopens without a pause."""
        self._failures = 0

    def broke(self, error: BaseException) -> None:
        """The line is of no more use: it is opened again after a pause that grows until a call has worked."""
        if self._line is not None:
            log.warning("connection to the ledger lost", line=self._name, failures=self._failures, reason=str(error))
            self.terminate()
            self._failures += 1

    def terminate(self) -> None:
        """Cut the line off at once; a call in flight fails."""
        line, self._line = self._line, None
        if line is not None:
            line.terminate()

    async def close(self) -> None:
        """Close the line politely, within a second."""
        line, self._line = self._line, None
        if line is not None:
            try:
                await asyncio.wait_for(line.close(), 1.0)
            except NO_CONNECTION:
                line.terminate()

    def _pause_seconds(self) -> float:
        longest = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN * 2.0 ** min(self._failures, 10))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - so that workers don't come back all at once
