"""kill -9 at every labelled point: the process dies there, is started again, and when all is quiet the money is right.

One test a family of points; its points die side by side, each on a ledger of its own, since most of the time is spent
waiting for leases to lapse. A point that isn't reached, or that leaves the ledger otherwise than its label says, fails.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.local.postgres import ClusterAddress
from tests.faults.drive import die_and_recover
from tests.faults.judge import judge
from tests.faults.nursery import Nursery, running_nursery
from tests.faults.points import POINTS, Point
from tests.faults.provider import Provider, running_provider
from tests.faults.scene import Scene, open_scene
from tests.postgres import fresh_database

FAMILIES = sorted({label.partition(".")[0] for label in POINTS})
AT_ONCE = 6
POINTS_MIN = 40

ALONE = ("seal", "sweep")
"""Families whose points need a ledger each: one process would do what another is to die of."""
WITHOUT_CALLS = ("grant", "migrate", "reverse", "seal", "start", "word")
ATTEMPTS = 3
"""Where a machine is so busy that a living process loses its lease of three seconds, another gets to the point."""
POINT_SECONDS_MAX = 120.0

pytestmark = pytest.mark.timeout(300)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    async with running_nursery() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def provider() -> AsyncIterator[Provider]:
    async with running_provider() as running:
        yield running


def test_there_are_enough_points_and_each_belongs_to_a_family() -> None:
    assert len(POINTS) >= POINTS_MIN
    assert {"reserve", "stream", "finalize", "sweep", "migrate", "grant", "heartbeat"} <= set(FAMILIES)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("family", FAMILIES)
async def test_dying_there_costs_nobody_a_credit(
    family: str, cluster: ClusterAddress, nursery: Nursery, provider: Provider, state_path: Path
) -> None:
    for attempt in range(ATTEMPTS):
        wrongs, starved = await _died(family, cluster, nursery, provider, state_path / f"{attempt}")
        if not wrongs or not starved:
            break
    assert not wrongs, "\n".join(wrongs)


async def _died(
    family: str, cluster: ClusterAddress, nursery: Nursery, provider: Provider, directory: Path
) -> tuple[list[str], bool]:
    """At each of the family's points: what is wrong, and whether a worker was too slow to keep its lease. What that one
    had cut off is no undisturbed call, and its death may come before it has settled it."""
    points = [point for point in POINTS.values() if point.label.startswith(f"{family}.")]
    ledgers = [[point] for point in points] if family in ALONE else [points]
    places = asyncio.Semaphore(AT_ONCE)

    async def die(scene: Scene, point: Point) -> list[str]:
        for _ in range(ATTEMPTS):
            try:
                async with places, asyncio.timeout(POINT_SECONDS_MAX):
                    wrongs = await die_and_recover(scene, point)
            except Exception as error:  # noqa: BLE001 - one point's trouble may not hide another's
                wrongs = [f"{point.label}: {error!r}\n{traceback.format_exc()[-2000:]}"]
            if not wrongs or not scene.lost_lease(point.label):
                break
        return wrongs

    async with AsyncExitStack() as stack:
        scenes = []
        for number, _ in enumerate(ledgers):
            database = stack.enter_context(fresh_database(cluster))
            opened = open_scene(database, provider, nursery, directory / f"{family}{number}")
            scenes.append(await stack.enter_async_context(opened))
        pairs = list(zip(scenes, ledgers, strict=True))
        wrongs = await asyncio.gather(*(die(scene, point) for scene, those in pairs for point in those))
        said = [wrong for found in wrongs for wrong in found]
        for scene in scenes if not said else []:
            verdict = await judge(scene)
            said += verdict.wrongs
            # Where points die on calls (which aren't made again), there was something to be wrong about.
            if not (verdict.disturbed or family in WITHOUT_CALLS):
                said.append(f"nothing was disturbed: {verdict}")
        return said, any(scene.lost_lease(point.label) for scene, those in pairs for point in those)
