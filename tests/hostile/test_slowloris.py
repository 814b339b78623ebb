"""Connections that never finish asking, in every manner."""

from pathlib import Path

import pytest

from tests.hostile.slowloris import MANNERS, measure
from tests.postgres import Database


@pytest.mark.timeout(180)
async def test_who_never_finishes_asking_is_closed_while_others_are_served(database: Database, tmp_path: Path) -> None:
    """A small crowd; ``python -m tests.hostile.slowloris`` sends two thousand against the real limit of 30 s."""
    limit, connections = 3.0, 210
    found = await measure(database, tmp_path, connections=connections, receive_seconds=limit, trickle_seconds=0.2)
    print(found.report())
    assert {name: len(times) for name, times in found.closed_after.items()} == dict.fromkeys(MANNERS, connections // 7)
    # A body has a limit of its own behind the head's, and a refused one five seconds in which its answer can be read.
    assert max(max(times) for times in found.closed_after.values()) < 2 * limit + 5 + 20
    assert set(found.good) == {200}
    assert found.good[200] > 3
    assert found.descriptors_after < 20
