"""The worker's lease: held no longer than the ledger says, told once when it lapses, and found again."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from proxy.core.usage import Usage
from proxy.ledger.lease import WorkerLease
from proxy.ledger.records import Mark
from tests.fakes.ledger import FakeLedger

LEASE_SECONDS = 1.0


@dataclass(slots=True)
class Owner:
    """Whoever has the lease: counts how often it was told of a lapse, and what of its marks was stored.

    ``trouble``: what happens when it is next asked for marks. ``slept``: how long the machine was suspended, in all.
    """

    lapses: int = 0
    marks: list[Mark] = field(default_factory=list)
    stored_holds: list[UUID] = field(default_factory=list)
    trouble: list[BaseException | float] = field(default_factory=list)
    asked: int = 0
    slept: float = 0.0

    def lapsed(self) -> None:
        self.lapses += 1

    async def gather(self) -> Sequence[Mark]:
        self.asked += 1
        if self.trouble:
            trouble = self.trouble.pop()
            if isinstance(trouble, BaseException):
                raise trouble
            await asyncio.sleep(trouble)
        return self.marks

    def stored(self, holds: Collection[UUID]) -> None:
        self.stored_holds += holds

    def lease(self, fake: FakeLedger) -> WorkerLease:
        return WorkerLease(
            fake.open_line,
            hostname="h",
            release="0.1",
            marks=self,
            on_lapse=self.lapsed,
            clock=lambda: time.monotonic() + self.slept,
            lease_seconds=LEASE_SECONDS,
            renew_seconds=0.05,
            retry_seconds=0.02,
        )


@asynccontextmanager
async def leased(fake: FakeLedger, owner: Owner) -> AsyncIterator[WorkerLease]:
    """A lease that ends without a trace."""
    before = asyncio.all_tasks()
    lease = owner.lease(fake)
    await lease.start()
    try:
        yield lease
    finally:
        await lease.stop()
    assert not lease.held()
    assert asyncio.all_tasks() == before
    assert fake.lines_open == 0


async def test_it_is_held_from_the_start_renewed_with_marks_and_ended() -> None:
    fake, owner = FakeLedger(), Owner()
    mark = Mark(uuid4(), Usage(output=7))
    async with leased(fake, owner) as lease:
        assert lease.held()
        owner.marks.append(mark)
        await asyncio.sleep(LEASE_SECONDS * 1.3)
        assert lease.held()
        assert fake.oracle.leases[lease.worker_id]
        assert owner.lapses == 0
    assert len(fake.beats) >= 4
    assert fake.beats[-1] == (lease.worker_id, (mark,))
    assert lease.worker_id not in fake.oracle.leases, "stopped in the ledger, too"


def test_every_start_has_an_id_of_its_own() -> None:
    fake, owner = FakeLedger(), Owner()
    assert owner.lease(fake).worker_id != owner.lease(fake).worker_id


async def test_it_lapses_while_the_database_is_gone_and_is_held_again_after() -> None:
    fake, owner = FakeLedger(), Owner()
    async with leased(fake, owner) as lease:
        fake.down, fake.lose = True, "request"
        await fake.until(lambda: owner.lapses)
        assert not lease.held()
        fake.down = False
        await fake.until(lease.held)
        assert owner.lapses == 1


async def test_it_counts_from_before_the_renewal_was_sent() -> None:
    fake, owner = FakeLedger(), Owner()
    loop = asyncio.get_running_loop()
    async with leased(fake, owner) as lease:
        fake.seconds = 0.6
        beats = len(fake.beats)
        await fake.until(lambda: len(fake.beats) > beats + 1)
        answered = loop.time()
        fake.down, fake.lose = True, "request"
        await fake.until(lambda: not lease.held())
        # The renewal took 0.6 s of the lease's second.
        assert loop.time() - answered < 0.7


async def test_a_worker_that_the_ledger_has_stopped_is_not_renewed() -> None:
    fake, owner = FakeLedger(), Owner()
    async with leased(fake, owner) as lease:
        fake.oracle.leases[lease.worker_id] = False
        await fake.until(lambda: owner.lapses)
        assert not lease.held()


async def test_a_worker_that_the_ledger_has_forgotten_is_registered_again() -> None:
    """As a failover to a standby that lacks the last commits forgets it."""
    fake, owner = FakeLedger(), Owner()
    async with leased(fake, owner) as lease:
        del fake.oracle.leases[lease.worker_id]
        await fake.until(lambda: fake.oracle.leases.get(lease.worker_id, False))
        await fake.until(lease.held)
        beats = len(fake.beats)
        await fake.until(lambda: len(fake.beats) > beats + 2)
        assert (lease.held(), owner.lapses) == (True, 0)


async def test_one_bad_beat_does_not_stop_the_heart() -> None:
    fake, owner = FakeLedger(), Owner(trouble=[ZeroDivisionError()], marks=[Mark(uuid4(), Usage())])
    async with leased(fake, owner) as lease:
        await fake.until(lambda: len(fake.beats) > 1)
        assert not owner.trouble
        assert [len(marks) for _, marks in fake.beats[:2]] == [0, 1]
        assert lease.held()


async def test_marks_that_waited_for_something_cancelled_do_not_stop_the_heart() -> None:
    """A cancellation that isn't ours ends a task without a word, and with it every call of this process."""
    fake, owner = FakeLedger(), Owner(trouble=[asyncio.CancelledError()], marks=[Mark(uuid4(), Usage())])
    async with leased(fake, owner) as lease:
        await fake.until(lambda: len(fake.beats) > 1)
        assert [len(marks) for _, marks in fake.beats[:2]] == [0, 1]
        assert lease.held()


async def test_it_doesnt_wait_for_marks_that_dont_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.ledger.lease.MARKS_SECONDS", 0.05)
    fake, owner = FakeLedger(), Owner(trouble=[3600.0] * 1000)
    async with leased(fake, owner) as lease:
        await fake.until(lambda: len(fake.beats) > 3)
        assert lease.held()
    assert owner.lapses == 0


async def test_beats_are_numbered_and_what_was_stored_is_told() -> None:
    fake, owner = FakeLedger(), Owner()
    taken, refused = Mark(uuid4(), Usage(output=7)), Mark(uuid4(), Usage(output=8))
    owner.marks, fake.unmarkable = [taken, refused], {refused.hold_id}
    async with leased(fake, owner):
        await fake.until(lambda: len(fake.beats) > 2)
    assert fake.beat_numbers == sorted(set(fake.beat_numbers))
    assert set(owner.stored_holds) == {taken.hold_id}


async def test_after_a_renewal_that_failed_the_next_one_carries_no_marks() -> None:
    """Whatever it is in a mark that the ledger can't take, it may cost progress, not the lease."""
    fake, owner = FakeLedger(), Owner(marks=[Mark(uuid4(), Usage(output=7))])
    async with leased(fake, owner):
        await fake.until(lambda: fake.beats)
        fake.lose = "reply"
        await fake.until(lambda: fake.lines_opened == 2)
        beats = len(fake.beats)
        await fake.until(lambda: len(fake.beats) > beats + 1)
    carried = [len(marks) for _, marks in fake.beats]
    bare = carried.index(0)
    assert carried == [1] * bare + [0] + [1] * (len(carried) - bare - 1)
    assert 0 < bare < len(carried) - 1


async def test_a_machine_that_slept_has_lost_its_lease_though_no_timer_ran() -> None:
    fake, owner = FakeLedger(), Owner()
    async with leased(fake, owner) as lease:
        # A long lease, whose own timer wouldn't run for an hour; and no renewal, that it would be saved by.
        lease._lease_seconds = 3600.0
        await fake.until(lambda: len(fake.beats) > 1)
        lease._renew_seconds = 3600.0
        await asyncio.sleep(0.1)
        assert lease.held()
        owner.slept += 7200
        assert not lease.held(), "known at once, by the clock"
        await fake.until(lambda: owner.lapses)
    assert owner.lapses == 1


async def test_a_start_without_a_database_fails_in_time() -> None:
    lease = Owner().lease(FakeLedger(down=True))
    with pytest.raises(TimeoutError):
        await lease.start(0.2)
    await lease.stop()


async def test_a_stop_without_a_database_ends_in_time() -> None:
    fake, owner = FakeLedger(), Owner()
    async with leased(fake, owner) as lease:
        fake.down = True
        async with asyncio.timeout(4):
            await lease.stop()
