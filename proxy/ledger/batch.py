"""Natural batching: while one call to the ledger is in flight, what arrives gathers and goes as the next. No timer.

The rules it keeps:
- Every call runs in a task of this object, never in the caller's: a caller may be cancelled at any moment.
- A reserve whose caller has gone (cancelled, or told "too late") leaves nothing held. Not yet sent: it is dropped.
  Sent: it is released when its answer comes, or by a tombstone where the answer is lost.
- A finalize, once taken, is said again with the same id until the ledger has answered or this process stops.
- One row that can't be carried out fails alone: a batch that fails is replayed in halves down to that row.
- An account that somebody else has locked, or whose row was there whenever the connection broke, goes to a lane of
  its own, so that it stops no other account.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

import structlog

from proxy.ledger.errors import LedgerError, LedgerUnavailable
from proxy.ledger.lines import PAUSE_SECONDS_MAX, Keeper, Line, OpenLine, Verdict, judge
from proxy.ledger.records import (
    Finalize,
    Finalized,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveOutcome,
)

__all__ = [
    "BatchLimits",
    "BatchedLedger",
    "LedgerBusy",
    "LedgerStopped",
    "LedgerTimeout",
    "Remains",
    "RowRejected",
]

log = structlog.get_logger("farebox.ledger")

TICK_SECONDS = 0.1
POLL_SECONDS_MIN = 0.05
POLL_SECONDS_MAX = 0.4
TRIES_BEFORE_LANE = 2
BREAKS_BEFORE_LANE = 4


class LedgerBusy(LedgerUnavailable):
    """Too many calls are waiting for the ledger, or for this account: nothing was held."""


class LedgerTimeout(LedgerUnavailable):
    """The ledger didn't answer in time: whatever it does with the call yet, nothing stays held."""


class LedgerStopped(LedgerUnavailable):
    """This process is stopping, or hasn't started: nothing was held."""


class RowRejected(LedgerError):
    """The database will never carry out this row, for what it says. Nothing was done."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much may wait, and how long. Seconds are real time."""

    rows_max: int = 128
    """Reserves, and settlements, in one call. More would keep the accounts locked for longer and gain nothing: it is
    better that Postgres works on one call while this process hands out the answers of the last."""
    waiting_max: int = 16_384
    """Reserves without an answer, and settlements without one, above which no reserve is taken."""
    account_waiting_max: int = 8_192
    """Reserves waiting for one account that somebody else has locked."""
    reserve_seconds: float = 5.0
    """After this a reserve that has no answer fails with LedgerTimeout."""
    call_seconds: float = 10.0
    """A call without an answer is cut off with its connection. Keep it above the server's statement_timeout."""
    lock_ms: int = 250
    """How long a side line stands in the queue for a locked account's lock."""
    side_lines: int = 4
    """Connections for locked accounts, opened when they are first needed."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What was not carried out when the ledger was stopped. Empty (false) in all but the worst case."""

    finalizes: tuple[Finalize, ...] = ()
    holds: tuple[UUID, ...] = ()
    """Holds that may still be open, left to the sweeper."""

    def __bool__(self) -> bool:
        return bool(self.finalizes or self.holds)


class _Kind(Enum):
    FINALIZE = "finalize"
    RELEASE = "release"
    RESERVE = "reserve"


class _Item:
    """One row and who waits for it.

    ``done``: it is over, answered or dropped; the future may be done long before.
    ``in_doubt``: a call that carried it broke, so the ledger may have carried it out. ``breaks``: how many did.
    """

    __slots__ = ("breaks", "deadline", "done", "future", "in_doubt", "kind", "row", "tries")

    def __init__(self, kind: _Kind, row: Any, future: "asyncio.Future[Any]", deadline: float) -> None:
        self.kind = kind
        self.row = row
        self.future = future
        self.deadline = deadline
        self.in_doubt = False
        self.done = False
        self.tries = 0
        self.breaks = 0


class _Lane:
    """What waits for one account that somebody else has locked."""

    __slots__ = ("account_id", "items")

    def __init__(self, account_id: UUID) -> None:
        self.account_id = account_id
        self.items: deque[_Item] = deque()


class _Broken(Exception):
    """The line broke while a call was in flight."""


Observe = Callable[[int, float], None]


def _observe_nothing(rows: int, seconds: float) -> None:
    """Takes the place of an observer that isn't given."""


class BatchedLedger:
    """reserve, finalize and release, batched. Use it in one event loop, between ``start`` and ``stop``.

    ``open_line`` opens a connection and the ledger on it: one for the batches, and some for locked accounts.
    ``observe(rows, seconds)`` is told of every call that was answered.
    """

    def __init__(
        self,
        open_line: OpenLine,
        *,
        limits: BatchLimits | None = None,
        observe: Observe = _observe_nothing,
    ) -> None:
        self._limits = limits or BatchLimits()
        self._observe = observe
        self._main = Keeper(open_line, "main")
        self._sides = [Keeper(open_line, f"side {number}") for number in range(self._limits.side_lines)]
        self._free_sides: asyncio.LifoQueue[Keeper] = asyncio.LifoQueue()
        self._reserves: deque[_Item] = deque()
        self._settlements: deque[_Item] = deque()
        self._reserving: set[_Item] = set()
        self._settling: set[_Item] = set()
        self._lanes: dict[UUID, _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()
        self._ticking = False
        self._taking = False
        self._running = False
        self._loop: asyncio.AbstractEventLoop

    # What callers use.

    async def start(self) -> None:
        """Begin. Doesn't wait for the database: reserves do, as long as they may."""
        self._loop = asyncio.get_running_loop()
        for side in reversed(self._sides):
            self._free_sides.put_nowait(side)
        self._taking = self._running = True
        self._own(self._pump())

    async def reserve(self, row: Reserve) -> Reserved:
        """Hold credits. Raises LedgerUnavailable or RowRejected; then, and when it is cancelled, nothing stays held."""
        if not self._taking:
            raise LedgerStopped("the ledger takes no calls: it is stopping, or was not started")
        limits = self._limits
        if len(self._reserving) >= limits.waiting_max or len(self._settling) >= limits.waiting_max:
            raise LedgerBusy("too many calls are waiting for the ledger")
        deadline = self._loop.time() + limits.reserve_seconds
        item = _Item(_Kind.RESERVE, row, self._loop.create_future(), deadline)
        self._reserving.add(item)
        self._reserves.append(item)
        self._work.set()
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_SECONDS, self._tick)
        try:
            result: Reserved = await item.future
        except asyncio.CancelledError:
            # The answer may have come in the very moment of the cancel; then nobody else will release it.
            if _is_granted(item.future):
                self._give_back(row)
            raise
        return result

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]":
        """Settle a hold. Taken at once, whether or not anybody awaits the future, and repeated until it is answered.

        The future raises RowRejected, or LedgerStopped where the process ended first; after ``stop`` this method does.
        """
        return self._settle(_Kind.FINALIZE, row)

    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]":
        """Give a hold back, or leave a tombstone where it is unknown. Taken at once and repeated like ``finalize``."""
        return self._settle(_Kind.RELEASE, Release(hold_id, account_id, worker_id))

    @property
    def waiting(self) -> tuple[int, int]:
        """Reserves, and settlements (finalizes and releases), that have no answer yet."""
        return len(self._reserving), len(self._settling)

    @property
    def connected(self) -> bool:
        """Whether the main line is open."""
        return self._main.is_open

    async def stop(self, limit_seconds: float = 10.0) -> Remains:
        """Take no more reserves, carry out what waits within the limit, end every task, and say what remains."""
        self._taking = False
        until = time.monotonic() + limit_seconds
        # Looked for, since an event would have to be set by every call.
        while (self._reserving or self._settling) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._running = False
        keepers = (self._main, *self._sides)
        if self._reserving or self._settling:
            # Cut the lines first: a task that is cancelled inside asyncpg asks the server to cancel, and waits for it.
            for keeper in keepers:
                keeper.terminate()
            await asyncio.sleep(0)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for keeper in keepers:
            await keeper.close()
        return self._remains()

    # The main line.

    async def _pump(self) -> None:
        while self._running:
            await self._work.wait()
            line = await self._line(self._main)
            items = self._take()
            if not items:
                continue
            try:
                apart = await self._carry_out(line, items, wait_ms=0)
            except _Broken as error:
                self._main.broke(error)
                self._after_break(_in_doubt(items))
            else:
                self._main.worked()
                self._set_apart(apart)

    def _take(self) -> list[_Item]:
        """The next batch, settlements first. What belongs to a locked account goes to its lane instead."""
        items: list[_Item] = []
        for queue in (self._settlements, self._reserves):
            room = self._limits.rows_max
            while queue and room:
                item = queue.popleft()
                if item.kind is _Kind.RESERVE and item.future.done():
                    self._drop(item)
                elif self._lanes and item.row.account_id in self._lanes:
                    self._to_lane(item)
                else:
                    items.append(item)
                    room -= 1
        if not self._settlements and not self._reserves:
            self._work.clear()
        return items

    def _put_back(self, items: Iterable[_Item]) -> None:
        """To the front of the queues, in their order, with the same ids: the ledger knows what it has done already."""
        for item in reversed(list(items)):
            if item.kind is _Kind.RESERVE and item.future.done():
                self._drop(item)
            else:
                (self._reserves if item.kind is _Kind.RESERVE else self._settlements).appendleft(item)
                self._work.set()

    def _after_break(self, items: list[_Item]) -> None:
        """Once more, with the same ids. What was there each time may be what breaks the connection: to its lane."""
        again = []
        for item in items:
            item.breaks += 1
            if item.breaks < BREAKS_BEFORE_LANE:
                again.append(item)
            else:
                self._to_lane(item)
        self._put_back(again)

    def _set_apart(self, items: list[_Item]) -> None:
        """These met a lock. Mostly that is another process's batch, gone a moment later: one more try, then a lane."""
        again = []
        for item in items:
            item.tries += 1
            if item.tries < TRIES_BEFORE_LANE and item.row.account_id not in self._lanes:
                again.append(item)
            else:
                self._to_lane(item)
        self._put_back(again)

    # The lanes of locked accounts.

    def _to_lane(self, item: _Item) -> None:
        account_id = item.row.account_id
        lane = self._lanes.get(account_id)
        if lane is None:
            lane = self._lanes[account_id] = _Lane(account_id)
            self._own(self._drain(lane))
        if item.kind is _Kind.RESERVE and len(lane.items) >= self._limits.account_waiting_max:
            self._fail(item, LedgerBusy("too many calls are waiting for this account"))
        else:
            lane.items.append(item)

    async def _drain(self, lane: _Lane) -> None:
        """Carry out what is in the lane until it is empty: wait for the lock once, then look for it now and then."""
        pause = 0.0
        while lane.items and self._running:
            if pause:
                await asyncio.sleep(pause)
            async with self._side() as keeper:
                line = await self._line(keeper)
                items = self._take_from(lane)
                if not items:
                    continue
                apart: list[_Item] = []
                try:
                    apart = await self._carry_out(line, items, wait_ms=0 if pause else self._limits.lock_ms)
                except _Broken as error:
                    keeper.broke(error)
                    apart = _in_doubt(items)
                else:
                    keeper.worked()
                    pause = min(POLL_SECONDS_MAX, max(POLL_SECONDS_MIN, 2 * pause)) if apart else 0.0
                lane.items.extendleft(reversed(apart))
        if not lane.items:
            del self._lanes[lane.account_id]

    def _take_from(self, lane: _Lane) -> list[_Item]:
        """The lane's next call."""
        taken: list[_Item] = []
        while lane.items and len(taken) < self._limits.rows_max:
            item = lane.items.popleft()
            if item.kind is _Kind.RESERVE and item.future.done():
                self._drop(item)
            else:
                taken.append(item)
        return taken

    async def _line(self, keeper: Keeper) -> Line:
        """An open line. What stands against it may be mended while we run (a role that was taken away): try on."""
        while True:
            try:
                return await keeper.line()
            except Exception as error:  # noqa: BLE001 - the pump lives on
                log.error("the ledger can't be used", reason=str(error))
                await asyncio.sleep(PAUSE_SECONDS_MAX)

    @asynccontextmanager
    async def _side(self) -> AsyncIterator[Keeper]:
        keeper = await self._free_sides.get()
        try:
            yield keeper
        finally:
            self._free_sides.put_nowait(keeper)

    # Calls and their answers.

    async def _carry_out(self, line: Line, items: list[_Item], *, wait_ms: int) -> list[_Item]:
        """Carry out the items. Returns those to be tried again apart. Raises _Broken."""
        apart: list[_Item] = []
        parts = [items]
        while parts:
            part = parts.pop()
            try:
                await self._call(line, part, wait_ms, apart)
            except Exception as error:  # Judged here: whatever a row does, the pump lives on.
                verdict, half = judge(error), len(part) // 2
                if line.is_closed() or verdict is Verdict.REOPEN:
                    raise _Broken(str(error)) from error
                if half:
                    parts += [part[half:], part[:half]]
                elif verdict is Verdict.APART:
                    part[0].tries = TRIES_BEFORE_LANE
                    apart += part
                else:
                    self._reject(part[0], error)
        return apart

    async def _call(self, line: Line, items: list[_Item], wait_ms: int, apart: list[_Item]) -> None:
        """One call for all items. What met a lock is added to ``apart``; the others' answers are on their way."""
        finalizes = [item for item in items if item.kind is _Kind.FINALIZE]
        releases = [item for item in items if item.kind is _Kind.RELEASE]
        reserves = [item for item in items if item.kind is _Kind.RESERVE]
        cut = self._loop.call_later(self._limits.call_seconds, line.terminate)
        began = time.perf_counter()
        try:
            finalized, reserved, released = await line.calls.batch(
                [item.row for item in finalizes],
                [item.row for item in reserves],
                [item.row for item in releases],
                wait_ms=wait_ms,
            )
        finally:
            cut.cancel()
        self._observe(len(items), time.perf_counter() - began)
        answered = []
        results: list[Any] = [*finalized, *released, *reserved]
        for item, result in zip(finalizes + releases + reserves, results, strict=True):
            if (result.state if item.kind is _Kind.RELEASE else result.outcome) == _BUSY:
                apart.append(item)
            else:
                item.done = True
                answered.append((item, result))
        # Delivered a moment later, so that the next call is under way while the callers wake up.
        self._loop.call_soon(self._deliver, answered)

    def _deliver(self, answered: "list[tuple[_Item, Any]]") -> None:
        for item, result in answered:
            self._settling.discard(item)
            self._reserving.discard(item)
            claimed = not item.future.done()
            if claimed:
                item.future.set_result(result)
            if item.kind is _Kind.RESERVE and (item.in_doubt or not claimed):
                granted = result.outcome is ReserveOutcome.GRANTED
                # Refused, after a call that broke: that one may yet arrive, and get what was not to be had before.
                if not claimed if granted else item.in_doubt and result.outcome in _MAY_PASS:
                    self._give_back(item.row)

    def _reject(self, item: _Item, error: Exception) -> None:
        log.error("the ledger rejects a row", call=item.kind.value, hold=str(item.row.hold_id), reason=str(error))
        rejected = RowRejected(f"the ledger rejects this {item.kind.value}: {error}")
        rejected.__cause__ = error
        self._fail(item, rejected)

    def _fail(self, item: _Item, error: Exception) -> None:
        """The item is over without an answer."""
        if not item.future.done():
            item.future.set_exception(error)
        self._drop(item)

    def _drop(self, item: _Item) -> None:
        """The item is over. A reserve that may have been carried out without our knowing is released."""
        item.done = True
        self._settling.discard(item)
        self._reserving.discard(item)
        if item.in_doubt and item.kind is _Kind.RESERVE:
            self._give_back(item.row)

    def _give_back(self, row: Reserve) -> None:
        """Nobody takes what this reserve holds, or may hold: release it, or leave a tombstone for it."""
        if not self._running:
            log.error("a hold is left to the sweeper", hold=str(row.hold_id), account=str(row.account_id))
            return
        self.release(row.hold_id, row.account_id, row.worker_id).add_done_callback(_retrieve)

    # Time, and the end.

    def _settle(self, kind: _Kind, row: Finalize | Release) -> "asyncio.Future[Any]":
        if not self._running:
            raise LedgerStopped("the ledger takes no calls: it has stopped, or was not started")
        item = _Item(kind, row, self._loop.create_future(), 0.0)
        self._settling.add(item)
        self._settlements.append(item)
        self._work.set()
        return item.future

    def _tick(self) -> None:
        """Tell the callers whose time is over. The items themselves are dropped, or released, where they wait."""
        now = self._loop.time()
        late = [item for item in self._reserving if item.deadline <= now and not item.future.done()]
        for item in late:
            item.future.set_exception(LedgerTimeout("the ledger did not answer in time"))
        if late:
            log.warning("reserves were not answered in time", count=len(late))
            waiting, self._reserves = self._reserves, deque()
            self._put_back(waiting)
        self._ticking = bool(self._reserving)
        if self._ticking:
            self._loop.call_later(TICK_SECONDS, self._tick)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it in a task that is held here until it ends."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a task of the ledger failed", reason=str(error), exc_info=error)

    def _remains(self) -> Remains:
        """Collect and report what has no answer, and tell whoever waits for it."""
        queued = set(self._reserves).union(*(lane.items for lane in self._lanes.values()))
        # A reserve that is neither queued nor answered was in flight when the lines were cut.
        unclear = [item for item in self._reserving if item.in_doubt or item not in queued]
        finalizes = [item for item in self._settling if item.kind is _Kind.FINALIZE]
        releases = [item for item in self._settling if item.kind is _Kind.RELEASE]
        for item in (*self._reserving, *self._settling):
            if not item.future.done():
                item.future.set_exception(LedgerStopped("the process stopped before the ledger answered"))
                _retrieve(item.future)
        for item in (*finalizes, *releases, *unclear):
            log.error("not carried out before the stop", call=item.kind.value, hold=str(item.row.hold_id))
        self._lanes.clear()
        return Remains(
            finalizes=tuple(item.row for item in finalizes),
            holds=tuple(item.row.hold_id for item in (*releases, *unclear)),
        )


_BUSY = "busy"
# Refusals that the same row may not meet a moment later. The others stand: keys change forwards only.
_MAY_PASS = frozenset(
    {
        ReserveOutcome.INSUFFICIENT,
        ReserveOutcome.CREDITS_HELD,
        ReserveOutcome.SPEND_LIMIT,
        ReserveOutcome.WORKER_LAPSED,
    }
)


def _in_doubt(items: list[_Item]) -> list[_Item]:
    """Those of a broken call that have no answer, marked as such."""
    unanswered = [item for item in items if not item.done]
    for item in unanswered:
        item.in_doubt = True
    return unanswered


def _is_granted(future: "asyncio.Future[Reserved]") -> bool:
    if not future.done() or future.cancelled() or future.exception() is not None:
        return False
    return future.result().outcome is ReserveOutcome.GRANTED


def _retrieve(future: "asyncio.Future[Any]") -> None:
    """Nobody awaits this future; what went wrong has been logged."""
    if not future.cancelled():
        future.exception()
