"""A loop goes on whatever becomes of one round, and ends when it is told to."""

import asyncio

import pytest

from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.rounds import Rounds

COMPLAINT = "nothing was done"


class Work:
    """Meets these troubles, one a round, and then none."""

    def __init__(self, *troubles: BaseException) -> None:
        self.troubles = list(troubles)
        self.done = asyncio.Event()
        self.rounds = 0

    async def __call__(self) -> None:
        self.rounds += 1
        if self.troubles:
            raise self.troubles.pop(0)
        self.done.set()


@pytest.mark.parametrize(
    "trouble", [LedgerUnavailable("away"), ZeroDivisionError(), TimeoutError(), asyncio.CancelledError()], ids=repr
)
async def test_no_trouble_ends_it(trouble: BaseException) -> None:
    work = Work(trouble, trouble)
    rounds = Rounds(work, seconds=0.001, complaint=COMPLAINT)
    rounds.start()
    async with asyncio.timeout(10):
        await work.done.wait()
    await rounds.stop()
    assert work.rounds >= 3


async def test_what_it_waited_for_may_be_cancelled_and_it_goes_on() -> None:
    begun, done = asyncio.Event(), asyncio.Event()
    waits: list[asyncio.Future[None]] = []

    async def work() -> None:
        if waits:
            done.set()
            return
        waits.append(asyncio.get_running_loop().create_future())
        begun.set()
        await waits[0]

    rounds = Rounds(work, seconds=0.001, complaint=COMPLAINT)
    rounds.start()
    async with asyncio.timeout(10):
        await begun.wait()
        waits[0].cancel()
        await done.wait()
    await rounds.stop()


async def test_it_ends_in_the_middle_of_a_round_and_leaves_no_task() -> None:
    before, begun = asyncio.all_tasks(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    rounds = Rounds(work, seconds=3600, complaint=COMPLAINT, at_once=True)
    rounds.start()
    async with asyncio.timeout(10):
        await begun.wait()
        await rounds.stop()
    assert asyncio.all_tasks() == before
    await rounds.stop()
