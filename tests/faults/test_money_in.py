"""kill -9 at every step of money in: started again and reconciled, what was paid is credited, once.

One test a family of points, in one shop; half of its rounds lose their events for good (`make chaos`: 1,000 rounds).
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.local.postgres import ClusterAddress
from tests.faults.money_in.points import FAMILIES, MONEY_IN
from tests.faults.money_in.rounds import run_batch
from tests.faults.money_in.stories import STORIES
from tests.faults.nursery import Nursery, running_nursery

SEED = 20261122
POINTS_MIN = 30

pytestmark = pytest.mark.timeout(300)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    async with running_nursery() as running:
        yield running


def test_there_are_enough_points_and_each_has_its_story() -> None:
    assert len(MONEY_IN) >= POINTS_MIN
    assert {point.scene for point in MONEY_IN.values()} == set(STORIES)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("family", FAMILIES)
async def test_dying_there_loses_no_payment_and_makes_no_second(
    family: str, cluster: ClusterAddress, nursery: Nursery, state_path: Path
) -> None:
    points = [point for point in MONEY_IN.values() if point.label.startswith(f"{family}.")]
    found = await run_batch(cluster, nursery, state_path / family, points, SEED)
    assert not found.wrongs, "\n".join(found.wrongs)
