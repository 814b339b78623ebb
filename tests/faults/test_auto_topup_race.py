"""Fifty workers at one automatic top-up, cut off and unheard: never two charges (`make chaos`: 1,000 rounds)."""

import random

import pytest

from tests.faults.money_in.races import open_race
from tests.postgres import Database

SEED = 20261122
ROUNDS = 8


@pytest.mark.timeout(120)
async def test_fifty_workers_charge_once(database: Database) -> None:
    random_ = random.Random(SEED)
    async with open_race(database) as race:
        for _ in range(ROUNDS):
            await race.round(random_)
            assert race.raced.wrongs == [], f"seed {SEED}: {race.raced.told()}"
        raced = race.raced
    print(raced.told())
    # It was paid most times, and there was something to be wrong about.
    assert raced.charged >= ROUNDS / 2
    assert raced.cut >= ROUNDS
    assert raced.faults >= ROUNDS
