"""A ledger without a database: the oracle behind the calls of a line, with the troubles that a test wants.

What ``BatchedLedger`` and ``WorkerLease`` must live with happens on demand: locked accounts, rows that fail, replies
that are lost, servers that are down or hang.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg

from proxy.core.usage import Usage
from proxy.ledger.lines import Line
from proxy.ledger.records import (
    Expired,
    Extend,
    Extended,
    ExtendOutcome,
    Finalize,
    Finalized,
    FinalizeOutcome,
    Mark,
    Release,
    Released,
    Renewed,
    Reserve,
    Reserved,
    ReserveOutcome,
)
from tests.fakes.oracle import Oracle, OracleAccount, OracleKey

__all__ = ["Call", "FakeLedger"]


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call that arrived: its rows' hold ids by kind."""

    finalizes: tuple[UUID, ...]
    reserves: tuple[UUID, ...]
    releases: tuple[UUID, ...]
    wait_ms: int
    extends: tuple[UUID, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.finalizes) + len(self.reserves) + len(self.releases) + len(self.extends)


@dataclass(slots=True)
class FakeLedger:
    """One account with 1,000 microcredits, one key, one worker; and knobs.

    ``seconds``: how long a call takes. ``locked``: accounts that somebody else holds. ``poison``: holds whose rows
    raise; ``deadly``: holds whose rows end the connection. ``down``: no connection can be opened, for the reason
    ``why_down``. ``confused``: a call that is cut off fails as asyncpg does where it had not sent it yet. ``lose``:
    "request" or "reply", what gets lost of the next call, with its connection. ``unmarkable``: holds that take no mark.
    ``clock``: the server's; ``jump_after_now``: by how much it jumps once it has
    been read. ``gate``: calls wait for it once they have arrived; those whose connection is cut meanwhile
    are ``stragglers``, which the server carries out when the test says so.
    """

    oracle: Oracle = field(default_factory=Oracle)
    account_id: UUID = field(default_factory=uuid4)
    worker_id: UUID = field(default_factory=uuid4)
    seconds: float = 0.0
    locked: set[UUID] = field(default_factory=set)
    poison: set[UUID] = field(default_factory=set)
    deadly: set[UUID] = field(default_factory=set)
    down: bool = False
    why_down: Exception = field(default_factory=lambda: ConnectionRefusedError("the fake server is down"))
    confused: bool = False
    lose: str | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    stragglers: list[Callable[[], object]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    lines_open: int = 0
    opened_at: list[float] = field(default_factory=list)
    swept_at: list[float] = field(default_factory=list)
    beats: list[tuple[UUID, tuple[Mark, ...]]] = field(default_factory=list)
    beat_numbers: list[int] = field(default_factory=list)
    unmarkable: set[UUID] = field(default_factory=set)
    clock: Callable[[], float] = time.time
    jump_after_now: float = 0.0
    looks: int = 0
    expired: list[Expired] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self.oracle.leases[self.worker_id] = True
        self.oracle.prices.add(("v", "m", "standard"))
        self.oracle.accounts[self.account_id] = OracleAccount()
        self.oracle.keys["k"] = OracleKey(self.account_id, "k")
        self.oracle.grant(self.account_id, 1000, "first")

    @property
    def lines_opened(self) -> int:
        return len(self.opened_at)

    @property
    def account(self) -> OracleAccount:
        return self.oracle.accounts[self.account_id]

    def another_account(self, balance: int) -> tuple[UUID, str]:
        """One more account; its id and its key's."""
        account_id = uuid4()
        self.oracle.accounts[account_id] = OracleAccount()
        self.oracle.keys[account_id.hex] = OracleKey(account_id, account_id.hex)
        self.oracle.grant(account_id, balance, account_id.hex)
        return account_id, account_id.hex

    def a_reserve(self, want: int, *, account_id: UUID | None = None, key_id: str = "k") -> Reserve:
        """A row that wants all of it or nothing."""
        return Reserve(
            *(uuid4(), account_id or self.account_id, key_id, 1, self.worker_id, want, want),
            *("v", "m", "standard", "{}", b"r"),
        )

    def a_finalize(self, row: Reserve, charge: int) -> Finalize:
        """The end of that reserve."""
        return Finalize(
            *(row.hold_id, row.account_id, row.key_id, row.worker_id, charge, Usage(output=charge), "reported"),
            *("v", "m", "standard", "stop", "{}", b"f%d" % charge),
        )

    def an_extend(self, row: Reserve, total: int, at_least: int | None = None) -> Extend:
        """That hold's growth to ``total``, all of it unless ``at_least`` says less."""
        return Extend(row.hold_id, row.account_id, row.worker_id, total, total if at_least is None else at_least)

    async def until(self, true: Callable[[], object], seconds: float = 5.0) -> None:
        """Wait until ``true()`` is."""
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def open_line(self) -> Line:
        """What BatchedLedger opens."""
        await asyncio.sleep(0)
        if self.down:
            raise self.why_down
        self.opened_at.append(asyncio.get_running_loop().time())
        self.lines_open += 1
        calls = _FakeCalls(self)
        return Line(calls, calls.close, calls.terminate, calls.is_closed)


class _FakeCalls:
    """One connection. One call at a time, as asyncpg insists."""

    def __init__(self, ledger: FakeLedger) -> None:
        self._ledger = ledger
        self._cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._busy = False

    async def close(self) -> None:
        self.terminate()

    def is_closed(self) -> bool:
        return self._cut.done()

    def terminate(self) -> None:
        if not self._cut.done():
            self._cut.set_result(None)
            self._ledger.lines_open -= 1

    async def batch(
        self,
        finalizes: Sequence[Finalize],
        reserves: Sequence[Reserve],
        releases: Sequence[Release] = (),
        *,
        wait_ms: int = 0,
    ) -> tuple[Sequence[Finalized], Sequence[Reserved], Sequence[Released]]:
        ledger = self._ledger
        call = Call(_ids(finalizes), _ids(reserves), _ids(releases), wait_ms)
        ledger.calls.append(call)
        if ledger.deadly.intersection((*call.finalizes, *call.reserves, *call.releases)):
            ledger.lose = "request"
        return await self._say(lambda: self._carry_out(finalizes, reserves, releases), wait_ms)

    def _carry_out(
        self, finalizes: Sequence[Finalize], reserves: Sequence[Reserve], releases: Sequence[Release]
    ) -> tuple[Sequence[Finalized], Sequence[Reserved], Sequence[Released]]:
        ledger = self._ledger
        if ledger.poison.intersection((*_ids(finalizes), *_ids(reserves), *_ids(releases))):
            raise asyncpg.CheckViolationError("a fake constraint is violated")
        busy, oracle = ledger.locked, ledger.oracle
        finalized = [
            Finalized(FinalizeOutcome.BUSY) if row.account_id in busy else oracle.finalize(row) for row in finalizes
        ]
        released = [Released(0, "busy") if row.account_id in busy else oracle.release(row) for row in releases]
        reserved = [
            Reserved(ReserveOutcome.BUSY) if row.account_id in busy else oracle.reserve(row) for row in reserves
        ]
        return finalized, reserved, released

    async def extend_batch(self, rows: Sequence[Extend], *, wait_ms: int = 0) -> Sequence[Extended]:
        ledger = self._ledger
        call = Call((), (), (), wait_ms, _ids(rows))
        ledger.calls.append(call)
        if ledger.deadly.intersection(call.extends):
            ledger.lose = "request"
        return await self._say(lambda: self._carry_out_extends(rows), wait_ms)

    def _carry_out_extends(self, rows: Sequence[Extend]) -> Sequence[Extended]:
        ledger = self._ledger
        if ledger.poison.intersection(_ids(rows)):
            raise asyncpg.CheckViolationError("a fake constraint is violated")
        return [
            Extended(ExtendOutcome.BUSY) if row.account_id in ledger.locked else ledger.oracle.extend(row)
            for row in rows
        ]

    async def start_worker(self, worker_id: UUID, hostname: str, release: str) -> bool:
        return await self._say(lambda: self._ledger.oracle.leases.setdefault(worker_id, True))

    async def heartbeat(self, worker_id: UUID, marks: Sequence[Mark], *, beat: int) -> Renewed:
        def renew() -> Renewed:
            self._ledger.beats.append((worker_id, tuple(marks)))
            self._ledger.beat_numbers.append(beat)
            held = self._ledger.oracle.leases.get(worker_id, False)
            marked = {mark.hold_id for mark in marks} - self._ledger.unmarkable
            return Renewed(held, frozenset(marked if held else ()))

        return await self._say(renew)

    async def stop_worker(self, worker_id: UUID) -> bool:
        return await self._say(lambda: self._ledger.oracle.leases.pop(worker_id))

    async def now(self) -> datetime:
        ledger = self._ledger

        def tell() -> datetime:
            ledger.looks += 1
            now = ledger.clock()
            if ledger.jump_after_now:
                jumped, ledger.jump_after_now = ledger.jump_after_now, 0.0
                ledger.clock = lambda: time.time() + jumped
            return datetime.fromtimestamp(now, UTC)

        return await self._say(tell)

    async def expire_holds(self, limit: int, *, not_after: datetime | None = None) -> Sequence[Expired]:
        def expire() -> list[Expired]:
            if not_after is not None and self._ledger.clock() > not_after.timestamp():
                return []
            self._ledger.swept_at.append(asyncio.get_running_loop().time())
            taken, self._ledger.expired = self._ledger.expired[:limit], self._ledger.expired[limit:]
            return taken

        return await self._say(expire)

    async def _say(self, carry_out: Callable[[], T], wait_ms: int = 0) -> T:
        """Over the wire and back, with whatever goes wrong on the way."""
        ledger = self._ledger
        assert not self._busy, "another operation is in progress"
        self._busy = True
        try:
            lost = ledger.lose
            ledger.lose = None
            if lost == "request":
                self.terminate()
            await self._unless_cut(asyncio.sleep(ledger.seconds))
            try:
                await self._unless_cut(ledger.gate.wait())
            except asyncpg.ConnectionDoesNotExistError:
                ledger.stragglers.append(carry_out)
                raise
            until = asyncio.get_running_loop().time() + wait_ms / 1000
            while ledger.locked and asyncio.get_running_loop().time() < until:
                await self._unless_cut(asyncio.sleep(0.005))
            result = carry_out()
            if lost == "reply":
                self.terminate()
            await self._unless_cut(asyncio.sleep(0))
            return result
        finally:
            self._busy = False

    async def _unless_cut(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._cut}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if self._cut.done() and self._ledger.confused:
            raise AttributeError("'NoneType' object has no attribute 'bind_execute'")
        if self._cut.done():
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def _ids(rows: Iterable[Finalize | Reserve | Release | Extend]) -> tuple[UUID, ...]:
    return tuple(row.hold_id for row in rows)
