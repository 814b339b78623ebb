"""The sweeper: every so often, never just after a connection was made, and through failures."""

import asyncio
from collections.abc import Sequence
from uuid import uuid4

from proxy.ledger.records import Expired
from proxy.ledger.sweeper import HOLDS_MAX, Sweeper
from tests.fakes.ledger import FakeLedger


async def test_it_sweeps_until_nothing_is_left_and_tells() -> None:
    before = asyncio.all_tasks()
    fake = FakeLedger(expired=[Expired(uuid4(), uuid4(), 3) for _ in range(HOLDS_MAX + 5)])
    told: list[Sequence[Expired]] = []
    sweeper = Sweeper(fake.open_line, on_expired=told.append, sweep_seconds=0.03, settled_seconds=0.0)
    sweeper.start()
    await fake.until(lambda: len(fake.swept_at) > 3)
    await sweeper.stop()
    assert [len(expired) for expired in told] == [HOLDS_MAX, 5]
    assert asyncio.all_tasks() == before
    assert fake.lines_open == 0


async def test_it_waits_until_its_connection_has_stood_for_a_while() -> None:
    fake = FakeLedger()
    sweeper = Sweeper(fake.open_line, sweep_seconds=0.02, settled_seconds=0.2)
    sweeper.start()
    await fake.until(lambda: fake.swept_at)
    assert fake.swept_at[0] - fake.opened_at[0] >= 0.2
    fake.lose = "request"
    await fake.until(lambda: fake.lines_opened == 2)
    swept = len(fake.swept_at)
    await fake.until(lambda: len(fake.swept_at) > swept)
    assert fake.swept_at[swept] - fake.opened_at[1] >= 0.2
    await sweeper.stop()


async def test_a_failing_sweep_is_not_the_last() -> None:
    fake = FakeLedger()
    sweeper = Sweeper(fake.open_line, sweep_seconds=0.02, settled_seconds=0.0)
    sweeper.start()
    await fake.until(lambda: fake.swept_at)
    fake.down, fake.lose = True, "reply"
    await fake.until(lambda: not fake.lines_open)
    fake.down = False
    swept = len(fake.swept_at)
    await fake.until(lambda: len(fake.swept_at) > swept)
    await sweeper.stop()
