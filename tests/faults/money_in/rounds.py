"""Rounds of deaths in one shop: each at its point, then everything started again, and the judge.

Rounds of a *batch* share a shop, each with an account of its own: most of what a round costs is processes that start.
"""

import asyncio
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from proxy.local.postgres import ClusterAddress
from tests.fakes.stripe import (
    Delay,
    ErrorAfter,
    ErrorBefore,
    Fault,
    LostReply,
    LostRequest,
    RateLimited,
    Unavailable,
)
from tests.faults.money_in.judge import judge, judge_credits
from tests.faults.money_in.points import MONEY_IN
from tests.faults.money_in.shop import LOOPS, Shop, open_shop
from tests.faults.money_in.stories import RECONCILE, STORIES, Round
from tests.faults.nursery import Nursery, Process
from tests.faults.points import Point
from tests.postgres import fresh_database

__all__ = ["Found", "Weather", "run_batch", "run_batches"]

AT_ONCE = 3
ROUNDS_A_BATCH = 10
NOT_REACHED = "was not reached"
SETTLED_SECONDS = 3.0
"""What is under way when the faults have ended, has mostly come to its end by then."""
ROUND_SECONDS_MAX = 90.0
FAULTS: tuple[Fault, ...] = (
    Unavailable(),
    RateLimited(),
    ErrorBefore(),
    ErrorAfter(),
    LostRequest(),
    LostReply(),
    Delay(0.3),
    Delay(0.3, after=True),
)


@dataclass(frozen=True)
class Weather:
    """What else goes wrong in a batch. ``faults``: the chance that a request to Stripe meets one; ``workers``: how many
    processes serve afterwards; ``copies``: how often each event may come."""

    faults: float = 0.0
    workers: int = 1
    copies: int = 2


@dataclass
class Found:
    """What came of so many rounds."""

    rounds: int = 0
    kept: int = 0
    """Processes that a fault of Stripe's kept from their point; they were killed later, or ended."""
    points: Counter[str] = field(default_factory=Counter)
    """How often each was died at."""
    paid: int = 0
    """Payments that succeeded at Stripe."""
    refunds: int = 0
    disputes: int = 0
    faults: int = 0
    """Requests to Stripe that met one."""
    wrongs: list[str] = field(default_factory=list)

    def told(self) -> str:
        """On one line, without the wrongs."""
        return (
            f"{self.rounds} rounds at {len(self.points)} of {len(MONEY_IN)} points, {self.kept} kept from their point, "
            f"{self.paid} payments, {self.refunds} refunds, {self.disputes} disputes, {self.faults} faults of Stripe's"
        )


async def run_batches(
    cluster: ClusterAddress,
    nursery: Nursery,
    directory: Path,
    *,
    rounds: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """So many rounds, at random points and in any weather, until something is wrong."""
    random_, found, batch = random.Random(seed), Found(), 0
    while found.rounds < rounds and not found.wrongs:
        points = _some_points(random_, min(ROUNDS_A_BATCH, rounds - found.rounds))
        weather = Weather(random_.choice((0.0, 0.05, 0.15)), random_.randint(1, 3), random_.randint(1, 3))
        place = directory / f"{batch}"
        await run_batch(cluster, nursery, place, points, random_.randrange(2**31), weather, found)
        shutil.rmtree(place)
        batch += 1
        say(f"  {found.told()}")
    return found


def _some_points(random_: random.Random, count: int, *, alone: int = 1) -> list[Point]:
    """Any, some maybe twice; at most so many that only one process at a time may die at."""
    points: list[Point] = []
    while len(points) < count:
        point = random_.choice(list(MONEY_IN.values()))
        if not STORIES[point.scene].alone or sum(STORIES[one.scene].alone for one in points) < alone:
            points.append(point)
    return points


async def run_batch(
    cluster: ClusterAddress,
    nursery: Nursery,
    directory: Path,
    points: Sequence[Point],
    seed: int,
    weather: Weather = Weather(),
    found: Found | None = None,
) -> Found:
    """Die at each of the points, half of the rounds with their events lost for good."""
    random_, found = random.Random(seed), found or Found()
    async with AsyncExitStack() as stack:
        database = stack.enter_context(fresh_database(cluster))
        shop = await stack.enter_async_context(open_shop(database, nursery, directory))
        if weather.faults:
            shop.fake.faults.seeded(seed, weather.faults, FAULTS)
        rounds = []
        for number, point in enumerate(points):
            lost = (number + seed) % 2 == 0
            rounds.append(Round(point, await shop.buyer(), random.Random(random_.random()), lost))
        wrongs, kept = await _trouble(shop, rounds), 0
        if weather.faults:
            wrongs, kept = (
                [wrong for wrong in wrongs if NOT_REACHED not in wrong],
                sum(NOT_REACHED in w for w in wrongs),
            )
        if not wrongs:
            wrongs = await _recovery(shop, rounds, random_, weather)
            wrongs += await judge(shop)
        found.wrongs += [f"seed {seed}: {wrong}" for wrong in wrongs]
        found.rounds += len(points)
        found.kept += kept
        found.points.update(point.label for point in points)
        _count(shop, found)
    return found


def _count(shop: Shop, found: Found) -> None:
    with shop.fake.state.lock:
        found.paid += len(shop.fake.payments.charges())
        found.refunds += sum(1 for _ in shop.fake.state.all("refund"))
        found.disputes += sum(1 for _ in shop.fake.state.all("dispute"))
        found.faults += len(shop.fake.faults.hit)


async def _trouble(shop: Shop, rounds: Sequence[Round]) -> list[str]:
    """What comes before, by a process that lives, and that does nothing by itself; then the deaths."""
    host = await shop.serve("host")
    places = asyncio.Semaphore(AT_ONCE)

    async def one(round: Round) -> list[str]:
        async with places:
            return await _die(shop, round, host)

    alone = [round for round in rounds if STORIES[round.point.scene].alone]
    found = await asyncio.gather(*(one(round) for round in rounds if round not in alone))
    found += [await one(round) for round in alone]
    await host.kill()
    return [wrong for wrongs in found for wrong in wrongs]


async def _die(shop: Shop, round: Round, host: Process) -> list[str]:
    point, story = round.point, STORIES[round.point.scene]
    try:
        async with asyncio.timeout(ROUND_SECONDS_MAX):
            await story.before(shop, round, host)
            doomed = await story.death(shop, round)
    except Exception as error:  # noqa: BLE001 - one round's trouble may not hide another's
        return [f"{point.label}: {error!r}\n{traceback.format_exc()[-3000:]}"]
    if doomed.status.result() != -signal.SIGKILL or doomed.note != point.label:
        said = doomed.output[-500:] + doomed.errors[-2500:]
        return [f"{point.label} {NOT_REACHED}: {doomed.note}, status {doomed.status.result()}: {said}"]
    return []


async def _recovery(shop: Shop, rounds: Sequence[Round], random_: random.Random, weather: Weather) -> list[str]:
    """Started again, told again (or not), reconciled; until nothing waits any more."""
    names = [round.point.label for round in rounds[: weather.workers]]
    workers = [await shop.serve(name, swift=LOOPS) for name in names]
    wrongs = []
    for round in rounds:
        try:
            await STORIES[round.point.scene].after(shop, round, random_.choice(workers))
        except Exception as error:  # noqa: BLE001 - as above
            wrongs.append(f"after {round.point.label}: {error!r}\n{traceback.format_exc()[-3000:]}")
    told = [
        shop.deliver(
            random_.choice(workers), round.unheard(shop), round.random, copies=random_.randint(1, weather.copies)
        )
        for round in rounds
        if not round.lost
    ]
    untaken = [wrong for found in await asyncio.gather(*told) for wrong in found]
    # Where Stripe can't be asked, what it tells is written down, and seen to by a loop.
    wrongs += untaken if not weather.faults else []
    for round in rounds:
        if round.lost and random_.random() < 0.5:
            shop.lose(round.unheard(shop))
    shop.fake.faults.clear()
    wrongs += await _settled(shop, rounds)
    await shop.time_passes()
    wrongs += await _reconciled(shop)
    wrongs += await shop.settled()
    for worker in workers:
        worker.signal(signal.SIGTERM)
    for worker in workers:
        if (status := await worker.ended()) != 0:
            wrongs.append(f"a process that came after ended with {status}: {worker.errors[-2000:]}")
    return wrongs


async def _settled(shop: Shop, rounds: Sequence[Round]) -> list[str]:
    """Who was told of everything has everything right by now, before anybody reconciles."""
    if shop.fake.faults.hit and await shop.settled(SETTLED_SECONDS):
        # A key remembers a 500, so that nobody can say before tomorrow what became of it.
        await shop.a_day_passes()
    wrongs = await shop.settled()
    heard = [round.buyer.id for round in rounds if not (round.lost or STORIES[round.point.scene].unheard)]
    return wrongs + [f"before it is reconciled: {wrong}" for wrong in await judge_credits(shop, heard)]


async def _reconciled(shop: Shop) -> list[str]:
    """`farebox stripe reconcile`, and once more: then there is no difference."""
    for last in (False, True):
        process = await shop.run("reconcile", RECONCILE)
        status = await process.ended()
        if status not in (0, 1) or (last and status != 0):
            return [f"reconcile ended with {status}: {process.output[-3000:]} {process.errors[-2000:]}"]
    return []
