"""The worker's lease: held no longer than the ledger says, told once when it lapses, and found again."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import pytest

from proxy.core.usage import Usage
from proxy.ledger.lease import WorkerLease
from proxy.ledger.records import Mark
from tests.fakes.ledger import FakeLedger

LEASE_SECONDS = 1.0


@dataclass(slots=True)
class Owner:
    """Whoever has the lease: counts how often it was told of a lapse."""

    lapses: int = 0
    marks: list[Mark] = field(default_factory=list)

    def lapsed(self) -> None:
        self.lapses += 1

    def lease(self, fake: FakeLedger, marks: Callable[[], Sequence[Mark]] | None = None) -> WorkerLease:
        return WorkerLease(
            fake.open_line,
            hostname="h",
            release="0.1",
            marks=marks or (lambda: self.marks),
            on_lapse=self.lapsed,
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


async def test_one_bad_beat_does_not_stop_the_heart() -> None:
    fake, owner = FakeLedger(), Owner()
    broken = [True]

    def marks() -> Sequence[Mark]:
        if broken:
            raise ZeroDivisionError(broken.pop())
        return ()

    lease = owner.lease(fake, marks)
    await lease.start()
    await fake.until(lambda: fake.beats)
    assert not broken
    assert lease.held()
    await lease.stop()


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
