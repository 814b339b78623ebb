"""Natural batching: while one call to the ledger is in flight, what arrives gathers and goes as the next. No timer.

The rules it keeps:
- Every call runs in a task of this object, never in the caller's: a caller may be cancelled at any moment.
- A reserve whose caller has gone (cancelled, or told "too late") leaves nothing held. Not yet sent: it is dropped.
  Sent: it is released when its answer comes, or by a tombstone where the answer is lost.
- An extension is absolute, so it is said again like all else; one whose caller has gone ends with its hold.
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
from typing import Any
from uuid import UUID

import structlog

from proxy.ledger.lines import PAUSE_SECONDS_MAX, Keeper, Line, OpenLine, Verdict, judge
from proxy.ledger.records import (
    Extend,
    Extended,
    Finalize,
    Finalized,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveOutcome,
)
from proxy.ledger.waiting import (
    BatchLimits,
    Item,
    Kind,
    Lane,
    LedgerBusy,
    LedgerStopped,
    LedgerTimeout,
    Remains,
    RowRejected,
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


class _Broken(Exception):
    """The line broke while a call was in flight."""


Observe = Callable[[int, float], None]


def _observe_nothing(rows: int, seconds: float) -> None:
    """Takes the place of an observer that isn't given."""


class BatchedLedger:
    """reserve, extend, finalize and release, batched. Use it in one event loop, between ``start`` and ``stop``.

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
        self._settlements: deque[Item] = deque()
        self._extends: deque[Item] = deque()
        self._reserves: deque[Item] = deque()
        self._awaited: set[Item] = set()
        self._settling: set[Item] = set()
        self._lanes: dict[UUID, Lane] = {}
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
        if len(self._awaited) >= limits.waiting_max or len(self._settling) >= limits.waiting_max:
            raise LedgerBusy("too many calls are waiting for the ledger")
        item = self._await(Kind.RESERVE, row)
        try:
            result: Reserved = await item.future
        except asyncio.CancelledError:
            # The answer may have come in the very moment of the cancel; then nobody else will release it.
            if _is_granted(item.future):
                self._give_back(row)
            raise
        return result

    async def extend(self, row: Extend) -> Extended:
        """Let an open hold grow. Raises LedgerUnavailable or RowRejected.

        Where it raises or is cancelled the hold may have grown all the same: whatever ends the hold gives that back.
        """
        if not self._taking:
            raise LedgerStopped("the ledger takes no calls: it is stopping, or was not started")
        # However many wait: there are never more than holds that are open.
        result: Extended = await self._await(Kind.EXTEND, row).future
        return result

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]":
        """Settle a hold. Taken at once, whether or not anybody awaits the future, and repeated until it is answered.

        The future raises RowRejected, or LedgerStopped where the process ended first; after ``stop`` this method does.
        """
        return self._settle(Kind.FINALIZE, row)

    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]":
        """Give a hold back, or leave a tombstone where it is unknown. Taken at once and repeated like ``finalize``."""
        return self._settle(Kind.RELEASE, Release(hold_id, account_id, worker_id))

    @property
    def waiting(self) -> tuple[int, int]:
        """Reserves and extensions, and settlements (finalizes and releases), that have no answer yet."""
        return len(self._awaited), len(self._settling)

    @property
    def connected(self) -> bool:
        """Whether the main line is open."""
        return self._main.is_open

    async def stop(self, limit_seconds: float = 10.0) -> Remains:
        """Take no more reserves, carry out what waits within the limit, end every task, and say what remains."""
        self._taking = False
        until = time.monotonic() + limit_seconds
        # Looked for, since an event would have to be set by every call.
        while (self._awaited or self._settling) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._running = False
        keepers = (self._main, *self._sides)
        if self._awaited or self._settling:
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

    def _await(self, kind: Kind, row: Reserve | Extend) -> Item:
        """Queue a row that is of use only as long as somebody waits for it, and only so long."""
        item = Item(kind, row, self._loop.create_future(), self._loop.time() + self._limits.reserve_seconds)
        self._awaited.add(item)
        self._queue(kind).append(item)
        self._work.set()
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_SECONDS, self._tick)
        return item

    def _queue(self, kind: Kind) -> deque[Item]:
        if kind is Kind.RESERVE:
            return self._reserves
        return self._extends if kind is Kind.EXTEND else self._settlements

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

    def _take(self) -> list[Item]:
        """The next batch, settlements first. What belongs to a locked account goes to its lane instead."""
        items: list[Item] = []
        for queue in (self._settlements, self._extends, self._reserves):
            room = self._limits.rows_max
            while queue and room:
                item = queue.popleft()
                if item.unwanted:
                    self._drop(item)
                elif self._lanes and item.row.account_id in self._lanes:
                    self._to_lane(item)
                else:
                    items.append(item)
                    room -= 1
        if not (self._settlements or self._extends or self._reserves):
            self._work.clear()
        return items

    def _put_back(self, items: Iterable[Item]) -> None:
        """To the front of the queues, in their order, with the same ids: the ledger knows what it has done already."""
        for item in reversed(list(items)):
            if item.unwanted:
                self._drop(item)
            else:
                self._queue(item.kind).appendleft(item)
                self._work.set()

    def _after_break(self, items: list[Item]) -> None:
        """Once more, with the same ids. What was there each time may be what breaks the connection: to its lane."""
        again = []
        for item in items:
            item.breaks += 1
            if item.breaks < BREAKS_BEFORE_LANE:
                again.append(item)
            else:
                self._to_lane(item)
        self._put_back(again)

    def _set_apart(self, items: list[Item]) -> None:
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

    def _to_lane(self, item: Item) -> None:
        account_id = item.row.account_id
        lane = self._lanes.get(account_id)
        if lane is None:
            lane = self._lanes[account_id] = Lane(account_id)
            self._own(self._drain(lane))
        if item.kind is Kind.RESERVE and len(lane.items) >= self._limits.account_waiting_max:
            self._fail(item, LedgerBusy("too many calls are waiting for this account"))
        else:
            lane.items.append(item)

    async def _drain(self, lane: Lane) -> None:
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
                apart: list[Item] = []
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

    def _take_from(self, lane: Lane) -> list[Item]:
        """The lane's next call."""
        taken: list[Item] = []
        while lane.items and len(taken) < self._limits.rows_max:
            item = lane.items.popleft()
            if item.unwanted:
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

    async def _carry_out(self, line: Line, items: list[Item], *, wait_ms: int) -> list[Item]:
        """Carry out the items. Returns those to be tried again apart. Raises _Broken."""
        apart: list[Item] = []
        # The last is the first: what streams that run ask for comes before what new ones do.
        parts = [part for part in _by_call(items) if part]
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

    async def _call(self, line: Line, items: list[Item], wait_ms: int, apart: list[Item]) -> None:
        """One call for all items. What met a lock is added to ``apart``; the others' answers are on their way."""
        cut = self._loop.call_later(self._limits.call_seconds, line.terminate)
        began = time.perf_counter()
        try:
            results = await _ask(line, items, wait_ms)
        finally:
            cut.cancel()
        self._observe(len(items), time.perf_counter() - began)
        answered = []
        for item, result in results:
            if (result.state if item.kind is Kind.RELEASE else result.outcome) == _BUSY:
                apart.append(item)
            else:
                item.done = True
                answered.append((item, result))
        # Delivered a moment later, so that the next call is under way while the callers wake up.
        self._loop.call_soon(self._deliver, answered)

    def _deliver(self, answered: "list[tuple[Item, Any]]") -> None:
        for item, result in answered:
            self._settling.discard(item)
            self._awaited.discard(item)
            claimed = not item.future.done()
            if claimed:
                item.future.set_result(result)
            if item.kind is Kind.RESERVE and (item.in_doubt or not claimed):
                granted = result.outcome is ReserveOutcome.GRANTED
                # Refused, after a call that broke: that one may yet arrive, and get what was not to be had before.
                if not claimed if granted else item.in_doubt and result.outcome in _MAY_PASS:
                    self._give_back(item.row)

    def _reject(self, item: Item, error: Exception) -> None:
        log.error("the ledger rejects a row", call=item.kind.value, hold=str(item.row.hold_id), reason=str(error))
        rejected = RowRejected(f"the ledger rejects this {item.kind.value}: {error}")
        rejected.__cause__ = error
        self._fail(item, rejected)

    def _fail(self, item: Item, error: Exception) -> None:
        """The item is over without an answer."""
        if not item.future.done():
            item.future.set_exception(error)
        self._drop(item)

    def _drop(self, item: Item) -> None:
        """The item is over. A reserve that may have been carried out without our knowing is released."""
        item.done = True
        self._settling.discard(item)
        self._awaited.discard(item)
        if item.in_doubt and item.kind is Kind.RESERVE:
            self._give_back(item.row)

    def _give_back(self, row: Reserve) -> None:
        """Nobody takes what this reserve holds, or may hold: release it, or leave a tombstone for it."""
        if not self._running:
            log.error("a hold is left to the sweeper", hold=str(row.hold_id), account=str(row.account_id))
            return
        self.release(row.hold_id, row.account_id, row.worker_id).add_done_callback(_retrieve)

    # Time, and the end.

    def _settle(self, kind: Kind, row: Finalize | Release) -> "asyncio.Future[Any]":
        if not self._running:
            raise LedgerStopped("the ledger takes no calls: it has stopped, or was not started")
        item = Item(kind, row, self._loop.create_future(), 0.0)
        self._settling.add(item)
        self._settlements.append(item)
        self._work.set()
        return item.future

    def _tick(self) -> None:
        """Tell the callers whose time is over. The items themselves are dropped, or released, where they wait."""
        now = self._loop.time()
        late = [item for item in self._awaited if item.deadline <= now and not item.future.done()]
        for item in late:
            item.future.set_exception(LedgerTimeout("the ledger did not answer in time"))
        if late:
            log.warning("calls were not answered in time", count=len(late))
            waiting = [*self._extends, *self._reserves]
            self._extends.clear()
            self._reserves.clear()
            self._put_back(waiting)
        self._ticking = bool(self._awaited)
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
        reserves = [item for item in self._awaited if item.kind is Kind.RESERVE]
        unclear = [item for item in reserves if item.in_doubt or item not in queued]
        finalizes = [item for item in self._settling if item.kind is Kind.FINALIZE]
        releases = [item for item in self._settling if item.kind is Kind.RELEASE]
        for item in (*self._awaited, *self._settling):
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


async def _ask(line: Line, items: list[Item], wait_ms: int) -> list[tuple[Item, Any]]:
    """One call, either for extensions or for everything else; each item with its answer."""
    if items[0].kind is Kind.EXTEND:
        extended = await line.calls.extend_batch([item.row for item in items], wait_ms=wait_ms)
        return list(zip(items, extended, strict=True))
    finalizes = [item for item in items if item.kind is Kind.FINALIZE]
    releases = [item for item in items if item.kind is Kind.RELEASE]
    reserves = [item for item in items if item.kind is Kind.RESERVE]
    finalized, reserved, released = await line.calls.batch(
        [item.row for item in finalizes],
        [item.row for item in reserves],
        [item.row for item in releases],
        wait_ms=wait_ms,
    )
    return list(zip(finalizes + releases + reserves, [*finalized, *released, *reserved], strict=True))


def _by_call(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Settlements and reserves go as one call, extensions as another."""
    extends = [item for item in items if item.kind is Kind.EXTEND]
    return ([item for item in items if item.kind is not Kind.EXTEND], extends) if extends else (items, [])


def _in_doubt(items: list[Item]) -> list[Item]:
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
