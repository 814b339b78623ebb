"""kill -9 at random, under load: 30 kills of two to four workers with 50 live streams (``make chaos``: 1,000)."""

import random
from pathlib import Path

import pytest

from tests.faults.nursery import running_nursery
from tests.faults.provider import running_provider
from tests.faults.scene import FACTOR, SETTLED_SECONDS_MAX, open_scene
from tests.faults.trouble import Found, kill_round
from tests.postgres import Database

SEED = 20261122
ROUNDS = 5
KILLS_A_ROUND = 6
STREAMS = 50


@pytest.mark.timeout(400)
async def test_kills_at_random_cost_nobody_a_credit(database: Database, state_path: Path) -> None:
    random_ = random.Random(SEED)
    found = Found()
    async with (
        running_provider() as provider,
        running_nursery() as nursery,
        open_scene(database, provider, nursery, state_path) as scene,
    ):
        for _ in range(ROUNDS):
            await kill_round(scene, random_, found, workers=random_.randint(2, 4), streams=STREAMS, kills=KILLS_A_ROUND)
            assert found.wrongs == [], f"seed {SEED}, leases divided by {FACTOR}: {found.told()}"
    print(f"leases divided by {FACTOR}: {found.told()}")
    assert found.blows == ROUNDS * KILLS_A_ROUND
    assert found.settled_seconds_max <= SETTLED_SECONDS_MAX
    # Each kill hit streams that were speaking; and many calls, in all, went well.
    assert found.cut_short >= 3 * found.blows
    assert found.disturbed >= found.cut_short * 0.9
    assert found.whole > found.blows
