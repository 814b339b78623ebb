"""A worker that is stopped (SIGSTOP) for longer than its lease under running streams, and then goes on.

Meanwhile another worker settles its holds at their last mark. When it goes on it finds its lease gone, and says what
it had delivered: one true-up, and what is charged is what was delivered, to the unit.
"""

import asyncio
import signal
import time

from tests.faults.judge import counted, judge
from tests.faults.provider import Answer
from tests.faults.scene import LEASE_SECONDS, Scene

__all__ = ["stopped_and_continued"]

WORDS_BEFORE = 60


async def stopped_and_continued(scene: Scene, *, streams: int, stopped_seconds: float) -> list[str]:
    """Stop a worker under so many streams for so long, let it go on, and return what is wrong.

    ``stopped_seconds`` is above the scene's lease and the sweep after it.
    """
    customer = await scene.customer()
    stopped, _ = await asyncio.gather(scene.worker("stopped"), scene.worker("other"))
    # Some of the streams are still being sent when the worker goes on.
    answer = Answer(words=int(100 * stopped_seconds) + 20 * WORDS_BEFORE, pace=0.03, reports=False)
    calls = [scene.plan(customer, answer) for _ in range(streams)]
    for call in calls:
        # Above the answer: what is counted is never charged beyond its hold.
        call.cap += answer.words
    tasks = [asyncio.create_task(scene.make(stopped, customer, call)) for call in calls]
    scene.background += tasks
    async with asyncio.timeout(60):
        while min(len(call.words) for call in calls) < WORDS_BEFORE:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await _until_sweeping(scene)
    wrongs: list[str] = []
    stopped.signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        await scene.settled(customer)
        await asyncio.sleep(max(0.0, stopped_seconds - (time.monotonic() - began)))
        for hold in await scene.holds(customer):
            said = len(next(call.words for call in calls if call.cap == hold["cap"]))
            if hold["state"] != "provisional" or not 0 < hold["charge"] <= counted(said):
                wrongs.append(f"swept: {hold['state']} at {hold['charge']}, where {said} words were delivered")
    finally:
        stopped.signal(signal.SIGCONT)
    await asyncio.gather(*tasks)
    async with asyncio.timeout(20 + LEASE_SECONDS):
        while {hold["state"] for hold in await scene.holds(customer)} != {"final"}:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    for hold in await scene.holds(customer):
        said = len(next(call.words for call in calls if call.cap == hold["cap"]))
        if (hold["ending"], hold["charge"]) != ("lease_lapsed", counted(said)):
            wrongs.append(f"in the end: {hold['ending']} at {hold['charge']}, where {said} words were delivered")
    if len(await scene.holds(customer)) != streams:
        wrongs.append(f"{len(await scene.holds(customer))} holds of {streams} streams")
    return wrongs + (await judge(scene)).wrongs


async def _until_sweeping(scene: Scene) -> None:
    """Nothing is swept while PostgreSQL has run for less than two leases."""
    left = await scene.sql.fetchval(
        "SELECT extract(epoch FROM pg_postmaster_start_time() + 2 * farebox.lease_length() - clock_timestamp())::float8"
    )
    await asyncio.sleep(max(0.0, left))
