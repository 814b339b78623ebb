"""PostgreSQL stopped at once, again and again, under load: what it had acknowledged is there (``make chaos``: 200)."""

import random
from pathlib import Path

import pytest

from tests.faults.nursery import running_nursery
from tests.faults.provider import running_provider
from tests.faults.restarting import RestartingPostgres
from tests.faults.scene import open_scene
from tests.faults.trouble import Found, restart_round

SEED = 20261122
FACTOR = 5.0
"""Leases of six seconds: an outage of one must not end them, as one of five doesn't end one of thirty."""
ROUNDS = 2
RESTARTS_A_ROUND = 5


@pytest.mark.timeout(400)
async def test_a_crash_of_postgres_loses_no_charge_that_it_acknowledged(state_path: Path) -> None:
    random_ = random.Random(SEED)
    found = Found()
    postgres = RestartingPostgres(state_path / "pg")
    try:
        database = await postgres.start()
        async with (
            running_provider() as provider,
            running_nursery() as nursery,
            open_scene(database, provider, nursery, state_path / "scene", factor=FACTOR) as scene,
        ):
            for _ in range(ROUNDS):
                await restart_round(scene, random_, found, postgres, workers=2, streams=40, restarts=RESTARTS_A_ROUND)
                assert found.wrongs == [], f"seed {SEED}, leases divided by {FACTOR}: {found.told()}"
    finally:
        await postgres.stop()
    print(f"leases divided by {FACTOR}: {found.told()}")
    assert found.blows == ROUNDS * RESTARTS_A_ROUND
    # There was something to be lost: streams under way at each crash, and charges acknowledged before and after.
    assert found.cut_short >= 3 * found.blows
    assert found.acknowledged >= 5 * found.blows
    assert found.exact >= found.acknowledged
