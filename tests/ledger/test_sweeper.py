"""The sweeper: every so often, never just after a connection was made, and through failures."""

import asyncio
import time
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


async def test_nothing_is_swept_for_a_while_after_the_ledgers_clock_has_jumped() -> None:
    """Because the machine slept, or somebody set the clock: every lease looks lapsed until it is renewed."""
    fake = FakeLedger()
    sweeper = Sweeper(fake.open_line, sweep_seconds=0.02, settled_seconds=0.0, jumped_seconds=0.4)
    sweeper.start()
    await fake.until(lambda: len(fake.swept_at) > 1)
    fake.clock = lambda: time.time() + 3600
    jumped_at = asyncio.get_running_loop().time()
    await asyncio.sleep(0.1)
    swept = len(fake.swept_at)
    await fake.until(lambda: len(fake.swept_at) > swept)
    # One sweep may have been on its way.
    assert swept <= 2 + sum(at < jumped_at for at in fake.swept_at)
    assert fake.swept_at[swept] - jumped_at >= 0.4
    fake.clock = time.time
    swept = len(fake.swept_at)
    await fake.until(lambda: len(fake.swept_at) > swept)
    assert fake.swept_at[swept] - fake.swept_at[swept - 1] < 0.4, "a clock set back only makes leases longer"
    await sweeper.stop()


async def test_a_jump_between_the_look_and_the_sweep_is_the_ledgers_to_notice() -> None:
    fake = FakeLedger()
    fake.jump_after_now = 3600.0
    sweeper = Sweeper(fake.open_line, sweep_seconds=0.02, settled_seconds=0.0, jumped_seconds=3600.0)
    sweeper.start()
    await fake.until(lambda: fake.looks > 3)
    assert fake.swept_at == []
    await sweeper.stop()


async def test_a_jump_before_the_first_sweep_is_seen() -> None:
    fake = FakeLedger()
    sweeper = Sweeper(fake.open_line, sweep_seconds=0.02, settled_seconds=0.2, jumped_seconds=3600.0)
    sweeper.start()
    await fake.until(lambda: fake.looks)
    fake.clock = lambda: time.time() + 3600
    await fake.until(lambda: fake.looks > 20)
    assert fake.swept_at == []
    await sweeper.stop()
