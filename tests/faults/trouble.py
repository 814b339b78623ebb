"""Trouble at random, by a seed: callers who never rest, and somebody who kills what serves them.

A *round* is trouble, and then quiet: nobody calls any more, every hold ends, and the judge looks at what there was.
"""

import asyncio
import json
import random
from dataclasses import dataclass, field, fields
from typing import Any

from proxy.core.money import parse_credits
from tests.faults.judge import Verdict, judge
from tests.faults.nursery import Process
from tests.faults.provider import Answer
from tests.faults.restarting import RestartingPostgres
from tests.faults.scene import Customer, Scene

__all__ = ["Crowd", "Found", "kill_round", "quiet", "restart_round"]

ACCOUNTS = 10
QUIET_SECONDS_MAX = 60.0
"""What the calls that run at the end of the trouble may take to end."""


@dataclass
class Found:
    """What came of so many rounds. Times are seconds, amounts microcredits."""

    rounds: int = 0
    blows: int = 0
    """Kills, or restarts."""
    calls: int = 0
    whole: int = 0
    exact: int = 0
    disturbed: int = 0
    cut_short: int = 0
    """Streams that had begun to speak when their worker was killed."""
    acknowledged: int = 0
    """Charges that the ledger had confirmed to a worker."""
    settled_seconds_max: float = 0.0
    lag_seconds_max: float = 0.0
    """How far, before the kill, what was charged lay behind what had been delivered: at the most."""
    undercharged: int = 0
    """The most that one call was charged below what had been delivered."""
    wrongs: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.rounds += 1
        self.calls += verdict.calls
        self.exact += verdict.exact
        self.disturbed += verdict.disturbed
        self.undercharged = max(self.undercharged, verdict.undercharged)
        self.lag_seconds_max = max(self.lag_seconds_max, verdict.lag_seconds)
        self.wrongs += verdict.wrongs

    def told(self) -> str:
        """On one line, without the wrongs."""
        parts = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if f.name != "wrongs"]
        return ", ".join(part if "." not in part else part[: part.index(".") + 3] for part in parts)


class Crowd:
    """``size`` callers at once, each making one call after the other to workers that it picks at random.

    ``slower``: by how much answers come slower, so that as many streams make fewer calls. ``accounts``: how many they
    share.
    """

    def __init__(
        self,
        scene: Scene,
        random_: random.Random,
        size: int,
        workers: dict[str, Process],
        *,
        slower: float = 1.0,
        accounts: int = ACCOUNTS,
    ) -> None:
        self._scene = scene
        self._random = random_
        self._size = size
        self._slower = slower
        self._accounts = accounts
        self._workers = workers
        self._running = False
        self._tasks: list[asyncio.Task[None]] = []
        self.customers: list[Customer] = []

    async def start(self) -> None:
        """Open accounts, several callers to each, and begin."""
        self.customers = [await self._scene.customer() for _ in range(self._accounts)]
        self._running = True
        self._tasks = [asyncio.create_task(self._call_on(number)) for number in range(self._size)]

    async def stop(self) -> None:
        """No new calls; those that run are waited for."""
        self._running = False
        async with asyncio.timeout(QUIET_SECONDS_MAX):
            await asyncio.gather(*self._tasks)

    def under_way(self, process: Process) -> int:
        """How many streams of that worker have begun to speak and haven't ended."""
        served_by = self._scene.served_by
        return sum(
            1
            for call in self._scene.calls
            if call.outcome == "running" and call.words and served_by[call.name] is process
        )

    async def busy(self, seconds: float = 30.0) -> list[str]:
        """The workers that have streams under way, once there is one: to kill another would prove nothing."""
        async with asyncio.timeout(seconds):
            while True:
                busy = [name for name in sorted(self._workers) if self.under_way(self._workers[name])]
                if busy:
                    return busy
                await asyncio.sleep(0.05)

    async def _call_on(self, number: int) -> None:
        while self._running:
            process = self._workers[self._random.choice(sorted(self._workers))]
            answer, how = self._wish()
            stream = self._random.random() > 0.1
            customer = self.customers[number % len(self.customers)]
            call = self._scene.plan(customer, answer, stream=stream)
            try:
                await self._scene.make(process, customer, call, **(how if stream else {}))
            except AssertionError:
                # The worker was killed before it served: nobody was reached.
                call.outcome = "unreached"
            if call.outcome in ("unreached", "refused"):
                await asyncio.sleep(0.1)

    def _wish(self) -> tuple[Answer, dict[str, Any]]:
        """An answer, and how it is listened to."""
        dice = self._random.random()
        words, pace = self._random.randint(5, 40), self._random.uniform(0.03, 0.15) * self._slower
        if dice < 0.05:
            return Answer(status=503), {}
        if dice < 0.1:
            return Answer(words, pace, breaks=True), {}
        if dice < 0.2:
            return Answer(words, pace), {"leave_after": self._random.randint(1, words)}
        return Answer(words, pace, reports=dice > 0.4), {}


async def kill_round(
    scene: Scene, random_: random.Random, found: Found, *, workers: int, streams: int, kills: int
) -> None:
    """So many workers, that many streams, and kills at random moments; then quiet, and the judge."""
    serving = {name: await scene.worker(name) for name in (f"worker{number}" for number in range(workers))}
    await asyncio.gather(*(process.url() for process in serving.values()))
    crowd = Crowd(scene, random_, streams, serving)
    await crowd.start()
    for _ in range(kills):
        await asyncio.sleep(random_.uniform(0.3, 1.2))
        name = random_.choice(await crowd.busy())
        under_way = crowd.under_way(serving[name])
        await scene.kill(serving[name])
        found.blows += 1
        found.cut_short += under_way
        serving[name] = await scene.worker(name)
    await quiet(scene, found, crowd)
    for process in serving.values():
        await process.kill()
    scene.forget()


async def quiet(scene: Scene, found: Found, crowd: Crowd) -> None:
    """The end of the trouble: every hold ends, and the judge looks."""
    await crowd.stop()
    found.whole += sum(1 for call in scene.calls if call.outcome == "whole")
    try:
        found.settled_seconds_max = max(found.settled_seconds_max, await scene.settled())
    except TimeoutError:
        found.wrongs.append("holds were still open when the time was over")
    found.add(await judge(scene))


async def restart_round(
    scene: Scene,
    random_: random.Random,
    found: Found,
    postgres: RestartingPostgres,
    *,
    workers: int,
    streams: int,
    restarts: int,
) -> None:
    """So many immediate stops of PostgreSQL under load, each followed by a start; then quiet, and the judge."""
    serving = {name: await scene.worker(name) for name in (f"worker{number}" for number in range(workers))}
    await asyncio.gather(*(process.url() for process in serving.values()))
    crowd = Crowd(scene, random_, streams, serving)
    await crowd.start()
    for _ in range(restarts):
        await asyncio.sleep(random_.uniform(0.5, 1.5))
        found.cut_short += sum(crowd.under_way(serving[name]) for name in await crowd.busy())
        await postgres.crash()
        await asyncio.sleep(random_.uniform(0.0, 0.5))
        await postgres.recover()
        found.blows += 1
    await quiet(scene, found, crowd)
    holds = await scene.holds()
    kept = {str(hold["id"]): hold["charge"] for hold in holds}
    for process in serving.values():
        for request_id, charge in charges_told(process):
            found.acknowledged += 1
            if kept.get(request_id) != charge:
                found.wrongs.append(f"{request_id} was charged {charge}, and is now at {kept.get(request_id)}")
    # The workers lived all the time: nobody else may have settled for them.
    found.wrongs += [f"{hold['id']} was swept" for hold in holds if hold["ending"] == "worker_gone"]
    for process in serving.values():
        await process.kill()
    scene.forget()


def charges_told(process: Process) -> list[tuple[str, int]]:
    """What a worker's log says that the ledger has confirmed: the request and its charge."""
    lines = (json.loads(line) for line in process.errors.splitlines() if line.startswith("{"))
    return [(line["request_id"], parse_credits(line["charge"])) for line in lines if line.get("event") == "charged"]
