"""Extensions in the batch, against a ledger in memory that misbehaves on demand."""

import asyncio
import contextlib

import pytest

from proxy.ledger.batch import BatchedLedger, LedgerStopped, LedgerTimeout, Remains, RowRejected
from proxy.ledger.records import Extended, ExtendOutcome, Reserve
from tests.fakes.ledger import FakeLedger
from tests.ledger.test_batch import QUICK, running

EXTENDED = ExtendOutcome.EXTENDED


def held(fake: FakeLedger, row: Reserve) -> int:
    """What the server knows that hold to hold."""
    return fake.oracle.holds[row.hold_id].amount


async def test_extensions_that_wait_go_together_and_before_new_reserves() -> None:
    fake = FakeLedger(seconds=0.01)
    async with running(fake) as ledger:
        rows = [fake.a_reserve(10) for _ in range(20)]
        await asyncio.gather(*map(ledger.reserve, rows))
        first = asyncio.create_task(ledger.reserve(fake.a_reserve(1)))
        await fake.until(lambda: len(fake.calls) == 2)
        extends = [asyncio.create_task(ledger.extend(fake.an_extend(row, 40))) for row in rows]
        greedy = asyncio.create_task(ledger.reserve(fake.a_reserve(500)))
        settled = ledger.finalize(fake.a_finalize(rows[0], 5))
        said = await asyncio.gather(*extends)
        assert [each.outcome for each in said] == [EXTENDED] * 20
        assert {each.total for each in said} == {40}
        assert (await greedy).granted == 0, "what runs comes first"
        await asyncio.gather(first, settled)
    assert [(len(call.extends), call.rows) for call in fake.calls[2:4]] == [(20, 20), (0, 2)]


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_a_lost_extension_is_said_again_and_adds_nothing_twice(lost: str) -> None:
    fake = FakeLedger()
    async with running(fake) as ledger:
        row = fake.a_reserve(100)
        await ledger.reserve(row)
        fake.lose = lost
        extended = await ledger.extend(fake.an_extend(row, 300))
        assert (extended.outcome, extended.total, extended.held) == (EXTENDED, 300, 300)
        await ledger.finalize(fake.a_finalize(row, 10))
    assert (fake.account.balance, fake.account.held) == (990, 0)


async def test_a_caller_gone_before_its_extension_was_sent_leaves_no_trace() -> None:
    fake = FakeLedger()
    async with running(fake) as ledger:
        row = fake.a_reserve(100)
        await ledger.reserve(row)
        fake.gate.clear()
        blocker = asyncio.create_task(ledger.reserve(fake.a_reserve(1)))
        await fake.until(lambda: len(fake.calls) == 2)
        gone = asyncio.create_task(ledger.extend(fake.an_extend(row, 300)))
        await asyncio.sleep(0)
        gone.cancel()
        fake.gate.set()
        await blocker
        await asyncio.gather(gone, return_exceptions=True)
    assert [call.extends for call in fake.calls] == [(), ()]
    assert held(fake, row) == 100


async def test_a_caller_gone_while_it_is_in_flight_leaves_nothing_once_the_hold_ends() -> None:
    fake = FakeLedger()
    async with running(fake) as ledger:
        row = fake.a_reserve(100)
        await ledger.reserve(row)
        fake.gate.clear()
        gone = asyncio.create_task(ledger.extend(fake.an_extend(row, 300)))
        await fake.until(lambda: len(fake.calls) == 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        fake.gate.set()
        assert (await ledger.finalize(fake.a_finalize(row, 100))).charge == 100
    assert (fake.account.balance, fake.account.held) == (900, 0)


async def extended_soon(ledger: BatchedLedger, fake: FakeLedger, row: Reserve) -> int:
    """To 300, at an attempt that finds the connection there again."""
    for _ in range(40):
        with contextlib.suppress(LedgerTimeout):
            return (await ledger.extend(fake.an_extend(row, 300))).total
    raise AssertionError("the connection did not come back")


async def test_an_extension_that_gets_no_answer_fails_in_time() -> None:
    fake = FakeLedger()
    async with running(fake, QUICK) as ledger:
        row = fake.a_reserve(100)
        await ledger.reserve(row)
        fake.down = True
        fake.lose = "request"
        with pytest.raises(LedgerTimeout):
            await ledger.extend(fake.an_extend(row, 300))
        fake.down = False
        assert await extended_soon(ledger, fake, row) == 300
        assert ledger.waiting == (0, 0)


async def test_a_poison_extension_fails_alone() -> None:
    fake = FakeLedger()
    async with running(fake) as ledger:
        rows = [fake.a_reserve(1) for _ in range(16)]
        await asyncio.gather(*map(ledger.reserve, rows))
        fake.poison.add(rows[5].hold_id)
        said = await asyncio.gather(*(ledger.extend(fake.an_extend(row, 2)) for row in rows), return_exceptions=True)
        assert isinstance(said[5], RowRejected)
        others = said[:5] + said[6:]
        assert all(isinstance(each, Extended) and each.total == 2 for each in others)


async def test_a_locked_account_stops_no_others_extension() -> None:
    fake = FakeLedger()
    other, key_id = fake.another_account(1000)
    async with running(fake) as ledger:
        locked, free = fake.a_reserve(10), fake.a_reserve(10, account_id=other, key_id=key_id)
        await asyncio.gather(ledger.reserve(locked), ledger.reserve(free))
        fake.locked.add(fake.account_id)
        waiting = asyncio.create_task(ledger.extend(fake.an_extend(locked, 20)))
        assert (await ledger.extend(fake.an_extend(free, 20))).total == 20
        await asyncio.sleep(0.05)
        assert not waiting.done()
        fake.locked.clear()
        assert (await waiting).total == 20


async def test_a_ledger_that_stops_says_so() -> None:
    fake = FakeLedger()
    ledger = BatchedLedger(fake.open_line)
    await ledger.start()
    row = fake.a_reserve(10)
    await ledger.reserve(row)
    fake.gate.clear()
    waiting = asyncio.create_task(ledger.extend(fake.an_extend(row, 20)))
    await fake.until(lambda: len(fake.calls) == 2)
    assert await ledger.stop(0.0) == Remains(), "the hold is its exchange's to settle"
    with pytest.raises(LedgerStopped):
        await waiting
    with pytest.raises(LedgerStopped):
        await ledger.extend(fake.an_extend(row, 20))
