"""Natural batching, against a ledger in memory that misbehaves on demand; test_batch_postgres.py has the real one."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from proxy.ledger.batch import (
    BatchedLedger,
    BatchLimits,
    LedgerBusy,
    LedgerStopped,
    LedgerTimeout,
    Remains,
    RowRejected,
)
from proxy.ledger.errors import MissingRole
from proxy.ledger.records import FinalizeOutcome, Reserved, ReserveOutcome
from tests.fakes.ledger import FakeLedger

GRANTED = ReserveOutcome.GRANTED
QUICK = BatchLimits(reserve_seconds=0.3, call_seconds=0.2, lock_ms=20)


@asynccontextmanager
async def running(fake: FakeLedger, limits: BatchLimits | None = None) -> AsyncIterator[BatchedLedger]:
    """A ledger that stops cleanly: nothing waits, no connection stays open and no task is left."""
    before = asyncio.all_tasks()
    ledger = BatchedLedger(fake.open_line, limits=limits)
    await ledger.start()
    try:
        yield ledger
        assert await ledger.stop(2.0) == Remains()
    finally:
        await ledger.stop(0.0)
    assert ledger.waiting == (0, 0)
    assert asyncio.all_tasks() == before
    assert fake.lines_open == 0


def begin(work: Coroutine[Any, Any, Reserved]) -> "asyncio.Task[Reserved]":
    return asyncio.create_task(work)


# Batching


async def test_one_call_goes_at_once_and_the_rest_go_together() -> None:
    fake = FakeLedger(seconds=0.01)
    async with running(fake) as ledger:
        first = begin(ledger.reserve(fake.a_reserve(1)))
        await fake.until(lambda: fake.calls)
        others = [begin(ledger.reserve(fake.a_reserve(1))) for _ in range(50)]
        results = await asyncio.gather(first, *others)
    assert [result.outcome for result in results] == [GRANTED] * 51
    assert [call.rows for call in fake.calls] == [1, 50]


async def test_results_go_to_who_asked() -> None:
    fake = FakeLedger()
    async with running(fake) as ledger:
        rows = [fake.a_reserve(want) for want in (10, 20, 30)]
        granted = await asyncio.gather(*map(ledger.reserve, rows))
        assert [reserved.granted for reserved in granted] == [10, 20, 30]
        last = fake.a_reserve(5)
        waiting = begin(ledger.reserve(last))
        await asyncio.sleep(0)
        final_0, final_1, released = await asyncio.gather(
            ledger.finalize(fake.a_finalize(rows[0], 7)),
            ledger.finalize(fake.a_finalize(rows[1], 8)),
            ledger.release(rows[2].hold_id, rows[2].account_id, rows[2].worker_id),
        )
        reserved = await waiting
    assert (final_0.charge, final_1.charge, released.released, reserved.granted) == (7, 8, 30, 5)
    together = fake.calls[-1]
    assert (len(together.finalizes), len(together.releases), together.reserves) == (2, 1, (last.hold_id,))
    assert (fake.account.balance, fake.account.held) == (985, 5)


async def test_what_is_given_back_in_a_call_can_be_held_again_in_it() -> None:
    fake = FakeLedger()
    async with running(fake) as ledger:
        first = fake.a_reserve(1000)
        assert (await ledger.reserve(first)).outcome is GRANTED
        again = begin(ledger.reserve(fake.a_reserve(990)))
        finalized = ledger.finalize(fake.a_finalize(first, 10))
        assert (await again).outcome is GRANTED
        assert (await finalized).outcome is FinalizeOutcome.FINAL
    assert [call.rows for call in fake.calls] == [1, 2]


async def test_a_call_has_at_most_so_many_rows() -> None:
    fake = FakeLedger()
    async with running(fake, BatchLimits(rows_max=10)) as ledger:
        await asyncio.gather(*(ledger.reserve(fake.a_reserve(1)) for _ in range(35)))
    assert [call.rows for call in fake.calls] == [10, 10, 10, 5]


async def test_a_full_queue_refuses_and_empties_again() -> None:
    fake = FakeLedger()
    fake.gate.clear()
    async with running(fake, BatchLimits(waiting_max=3)) as ledger:
        waiting = [begin(ledger.reserve(fake.a_reserve(1))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy):
            await ledger.reserve(fake.a_reserve(1))
        fake.gate.set()
        await asyncio.gather(*waiting)
        assert (await ledger.reserve(fake.a_reserve(1))).outcome is GRANTED


async def test_settlements_are_always_taken_but_keep_reserves_out_while_they_pile_up() -> None:
    fake = FakeLedger()
    async with running(fake, BatchLimits(waiting_max=2)) as ledger:
        rows = [fake.a_reserve(1), fake.a_reserve(1), fake.a_reserve(1)]
        for row in rows:
            await ledger.reserve(row)
        fake.gate.clear()
        futures = [ledger.finalize(fake.a_finalize(row, 1)) for row in rows]
        with pytest.raises(LedgerBusy):
            await ledger.reserve(fake.a_reserve(1))
        fake.gate.set()
        assert [final.charge for final in await asyncio.gather(*futures)] == [1, 1, 1]


# Rows that fail


async def test_a_poison_row_fails_alone() -> None:
    fake = FakeLedger()
    rows = [fake.a_reserve(1) for _ in range(64)]
    fake.poison.add(rows[37].hold_id)
    async with running(fake) as ledger:
        results = await asyncio.gather(*map(ledger.reserve, rows), return_exceptions=True)
        assert isinstance(results[37], RowRejected)
        others = results[:37] + results[38:]
        assert all(isinstance(result, Reserved) and result.outcome is GRANTED for result in others)
        await fake.until(lambda: ledger.waiting == (0, 0))
    assert fake.account.held == 63
    assert len(fake.calls) < 16, "halves, not one call a row"


async def test_a_poison_finalize_is_told_and_does_not_come_back() -> None:
    fake = FakeLedger()
    row = fake.a_reserve(10)
    async with running(fake) as ledger:
        await ledger.reserve(row)
        fake.poison.add(row.hold_id)
        with pytest.raises(RowRejected):
            await ledger.finalize(fake.a_finalize(row, 1))


async def test_a_row_that_ends_its_connection_stops_no_other_account() -> None:
    fake = FakeLedger()
    other, key = fake.another_account(1000)
    row = fake.a_reserve(10)
    async with running(fake, BatchLimits(reserve_seconds=3)) as ledger:
        await ledger.reserve(row)
        fake.deadly.add(row.hold_id)
        settled = ledger.finalize(fake.a_finalize(row, 1))
        results = await asyncio.gather(
            *(ledger.reserve(fake.a_reserve(1, account_id=other, key_id=key)) for _ in range(20))
        )
        assert {result.outcome for result in results} == {GRANTED}
        await fake.until(lambda: fake.calls[-1].finalizes == (row.hold_id,) and not fake.calls[-1].reserves)
        assert (await ledger.reserve(fake.a_reserve(1, account_id=other, key_id=key))).outcome is GRANTED
        assert not settled.done()
        fake.deadly.clear()
        assert (await settled).charge == 1


# Callers that go


async def test_a_caller_gone_before_its_row_was_sent_leaves_no_trace() -> None:
    fake = FakeLedger()
    fake.gate.clear()
    async with running(fake) as ledger:
        first = begin(ledger.reserve(fake.a_reserve(1)))
        await fake.until(lambda: fake.calls)
        gone = fake.a_reserve(500)
        waiting = begin(ledger.reserve(gone))
        await asyncio.sleep(0)
        waiting.cancel()
        fake.gate.set()
        assert (await first).outcome is GRANTED
    assert gone.hold_id not in fake.oracle.holds
    assert fake.account.held == 1


async def test_a_caller_gone_while_its_row_is_in_flight_leaves_nothing_held() -> None:
    fake = FakeLedger()
    fake.gate.clear()
    row = fake.a_reserve(500)
    async with running(fake) as ledger:
        waiting = begin(ledger.reserve(row))
        await fake.until(lambda: fake.calls)
        waiting.cancel()
        fake.gate.set()
        await fake.until(lambda: row.hold_id in fake.oracle.holds and ledger.waiting == (0, 0))
    assert fake.oracle.holds[row.hold_id].state == "released"
    assert fake.account.held == 0


async def test_a_caller_cancelled_in_the_moment_of_its_answer_leaves_nothing_held() -> None:
    fake = FakeLedger()
    taken = 0
    async with running(fake) as ledger:
        # Cancelled at every step of the loop that a call takes: one of them is the moment of the answer.
        for steps in range(40):
            row = fake.a_reserve(1)
            waiting = begin(ledger.reserve(row))
            for _ in range(steps):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            if not waiting.cancelled():
                taken += 1
                await ledger.release(row.hold_id, row.account_id, row.worker_id)
        await fake.until(lambda: ledger.waiting == (0, 0))
    assert 0 < taken < 40
    assert fake.account.held == 0


async def test_a_call_that_hangs_fails_in_time_and_holds_nothing_later() -> None:
    fake = FakeLedger()
    fake.gate.clear()
    row = fake.a_reserve(500)
    async with running(fake, QUICK) as ledger:
        with pytest.raises(LedgerTimeout):
            await ledger.reserve(row)
        fake.gate.set()
        await fake.until(lambda: ledger.waiting == (0, 0))
        # The connections were cut, but the server had got the calls, and does them now.
        for straggler in fake.stragglers:
            straggler()
    assert fake.stragglers
    assert fake.account.held == 0
    assert fake.oracle.holds[row.hold_id].state == "released"


async def test_a_refusal_after_a_lost_call_cannot_turn_into_a_hold() -> None:
    fake = FakeLedger()
    async with running(fake, QUICK) as ledger:
        big = fake.a_reserve(1000)
        await ledger.reserve(big)
        fake.gate.clear()
        row = fake.a_reserve(500)
        waiting = begin(ledger.reserve(row))
        await fake.until(lambda: fake.stragglers)
        fake.gate.set()
        assert (await waiting).outcome is ReserveOutcome.CREDITS_HELD
        await ledger.release(big.hold_id, big.account_id, big.worker_id)
        await fake.until(lambda: ledger.waiting == (0, 0))
        for straggler in fake.stragglers:
            straggler()
    assert fake.account.held == 0


# Connections that break


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_a_lost_call_is_said_again_with_the_same_id(lost: str) -> None:
    fake = FakeLedger()
    row = fake.a_reserve(100)
    async with running(fake) as ledger:
        fake.lose = lost
        assert (await ledger.reserve(row)).granted == 100
        fake.lose = lost
        assert (await ledger.finalize(fake.a_finalize(row, 40))).charge == 40
    assert [call.reserves for call in fake.calls[:2]] == [(row.hold_id,)] * 2
    assert (fake.account.balance, fake.account.held) == (960, 0)
    assert fake.lines_opened == 3


async def test_a_call_that_is_cut_off_is_said_again_whatever_error_that_gives() -> None:
    """asyncpg fails with an AttributeError where the connection is cut before the call has gone out."""
    fake = FakeLedger(confused=True)
    row = fake.a_reserve(100)
    async with running(fake, QUICK) as ledger:
        await ledger.reserve(row)
        fake.gate.clear()
        settled = ledger.finalize(fake.a_finalize(row, 60))
        await fake.until(lambda: fake.lines_opened > 1)
        fake.gate.set()
        assert (await asyncio.wait_for(settled, 3)).charge == 60
    assert (fake.account.balance, fake.account.held) == (940, 0)


async def test_a_finalize_that_the_stop_cuts_off_remains_whatever_error_that_gives() -> None:
    fake = FakeLedger(confused=True)
    ledger = BatchedLedger(fake.open_line)
    await ledger.start()
    row = fake.a_reserve(100)
    await ledger.reserve(row)
    fake.gate.clear()
    settlement = fake.a_finalize(row, 60)
    settled = ledger.finalize(settlement)
    await fake.until(lambda: len(fake.calls) > 1)
    assert await ledger.stop(0.0) == Remains(finalizes=(settlement,))
    with pytest.raises(LedgerStopped):
        await settled


@pytest.mark.parametrize("apart", [False, True])
async def test_a_login_that_may_not_act_for_a_while_ends_nothing(apart: bool) -> None:
    """Its role is taken away and given again: whatever keeps a line from being opened, it is tried again."""
    fake = FakeLedger(why_down=MissingRole("the database's login may not act as farebox_gateway"))
    row = fake.a_reserve(100)
    async with running(fake) as ledger:
        await ledger.reserve(row)
        fake.down = True
        if apart:
            fake.locked.add(fake.account_id)
        else:
            fake.lose = "request"
        settled = ledger.finalize(fake.a_finalize(row, 60))
        await asyncio.sleep(0.1)
        assert not settled.done()
        fake.locked.clear()
        fake.down = False
        assert (await asyncio.wait_for(settled, 3)).charge == 60


async def test_a_caller_gone_while_its_call_is_in_doubt_leaves_a_tombstone() -> None:
    fake = FakeLedger()
    row = fake.a_reserve(100)
    async with running(fake) as ledger:
        fake.gate.clear()
        fake.lose = "reply"
        waiting = begin(ledger.reserve(row))
        await fake.until(lambda: fake.calls)
        waiting.cancel()
        fake.gate.set()
        await fake.until(lambda: row.hold_id in fake.oracle.holds and ledger.waiting == (0, 0))
    assert fake.oracle.holds[row.hold_id].state == "released"
    assert [call.releases for call in fake.calls] == [(), (row.hold_id,)]


async def test_while_the_database_is_down_reserves_fail_in_time_and_settlements_wait() -> None:
    fake = FakeLedger()
    row = fake.a_reserve(100)
    async with running(fake, QUICK) as ledger:
        await ledger.reserve(row)
        fake.down = True
        fake.lose = "request"
        settled = ledger.finalize(fake.a_finalize(row, 60))
        results = await asyncio.gather(*(ledger.reserve(fake.a_reserve(1)) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(result, LedgerTimeout) for result in results)
        assert not ledger.connected
        assert ledger.waiting[0] == 0, "nobody waits for them, so they don't fill the queue"
        assert ledger.waiting[1] >= 1
        fake.down = False
        assert (await asyncio.wait_for(settled, 3)).charge == 60
        assert (await ledger.reserve(fake.a_reserve(1))).outcome is GRANTED
    assert (fake.account.balance, fake.account.held) == (940, 1)


async def test_a_finalize_is_carried_out_though_nobody_waits_for_it() -> None:
    fake = FakeLedger()
    row = fake.a_reserve(100)
    async with running(fake) as ledger:
        await ledger.reserve(row)
        fake.gate.clear()
        ledger.finalize(fake.a_finalize(row, 60)).cancel()
        fake.gate.set()
    assert (fake.account.balance, fake.account.held) == (940, 0)


async def test_a_call_that_was_answered_is_not_cut_off_later() -> None:
    fake = FakeLedger()
    async with running(fake, BatchLimits(call_seconds=0.05)) as ledger:
        for _ in range(10):
            assert (await ledger.reserve(fake.a_reserve(1))).outcome is GRANTED
            await asyncio.sleep(0.02)
    assert fake.lines_opened == 1


# Accounts that somebody else has locked


async def test_a_locked_account_stops_no_other() -> None:
    fake = FakeLedger(seconds=0.001)
    other, key = fake.another_account(1000)
    fake.locked.add(fake.account_id)
    async with running(fake) as ledger:
        stuck = [begin(ledger.reserve(fake.a_reserve(1))) for _ in range(20)]
        for _ in range(50):
            assert (await ledger.reserve(fake.a_reserve(1, account_id=other, key_id=key))).outcome is GRANTED
        assert not any(task.done() for task in stuck)
        # Once its lock is known, a row of it goes nowhere near the others.
        late, free = fake.a_reserve(1), fake.a_reserve(1, account_id=other, key_id=key)
        stuck.append(begin(ledger.reserve(late)))
        await ledger.reserve(free)
        assert not any({late.hold_id, free.hold_id} <= set(call.reserves) for call in fake.calls)
        await fake.until(lambda: sum(late.hold_id in call.reserves for call in fake.calls) > 2)
        assert [call.wait_ms for call in fake.calls if late.hold_id in call.reserves][1:] == [0] * (
            sum(late.hold_id in call.reserves for call in fake.calls) - 1
        ), "it waited for the lock once; from then on it only looks"
        fake.locked.clear()
        assert {(await task).outcome for task in stuck} == {GRANTED}


async def test_many_locked_accounts_stop_no_other_and_all_are_served_in_the_end() -> None:
    fake = FakeLedger()
    locked = [fake.another_account(10) for _ in range(30)]
    fake.locked.update(account_id for account_id, _ in locked)
    async with running(fake, BatchLimits(lock_ms=20)) as ledger:
        stuck = [begin(ledger.reserve(fake.a_reserve(1, account_id=a, key_id=k))) for a, k in locked]
        async with asyncio.timeout(0.5):
            for _ in range(20):
                assert (await ledger.reserve(fake.a_reserve(1))).outcome is GRANTED
        fake.locked.clear()
        assert {(await task).outcome for task in stuck} == {GRANTED}
        assert fake.lines_open <= 1 + BatchLimits().side_lines


async def test_a_locked_account_keeps_the_order_settlements_first() -> None:
    fake = FakeLedger()
    first = fake.a_reserve(1000)
    async with running(fake) as ledger:
        await ledger.reserve(first)
        fake.locked.add(fake.account_id)
        waiting = begin(ledger.reserve(fake.a_reserve(990)))
        await asyncio.sleep(0.05)
        settled = ledger.finalize(fake.a_finalize(first, 10))
        await asyncio.sleep(0.05)
        fake.locked.clear()
        assert (await settled).charge == 10
        assert (await waiting).outcome in {GRANTED, ReserveOutcome.CREDITS_HELD}


async def test_an_account_locked_for_long_refuses_what_it_cannot_queue() -> None:
    fake = FakeLedger()
    fake.locked.add(fake.account_id)
    async with running(fake, BatchLimits(account_waiting_max=5, reserve_seconds=0.3)) as ledger:
        results = await asyncio.gather(*(ledger.reserve(fake.a_reserve(1)) for _ in range(12)), return_exceptions=True)
    kinds = [type(result) for result in results]
    assert set(kinds) == {LedgerBusy, LedgerTimeout}
    assert kinds.count(LedgerBusy) >= 5
    assert fake.account.held == 0


# The end


async def test_stop_carries_out_what_waits() -> None:
    fake = FakeLedger(seconds=0.01)
    ledger = BatchedLedger(fake.open_line)
    await ledger.start()
    row = fake.a_reserve(10)
    await ledger.reserve(row)
    settled = ledger.finalize(fake.a_finalize(row, 4))
    assert await ledger.stop() == Remains()
    assert settled.result().charge == 4
    with pytest.raises(LedgerStopped):
        await ledger.reserve(fake.a_reserve(1))
    with pytest.raises(LedgerStopped):
        ledger.finalize(fake.a_finalize(row, 4))


async def test_stop_reports_what_remains_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    fake = FakeLedger()
    ledger = BatchedLedger(fake.open_line, limits=BatchLimits(reserve_seconds=5))
    await ledger.start()
    row = fake.a_reserve(10)
    await ledger.reserve(row)
    fake.down = True
    fake.lose = "request"
    settlement = fake.a_finalize(row, 4)
    settled = ledger.finalize(settlement)
    lost = fake.a_reserve(1)
    reserve = begin(ledger.reserve(lost))
    remains = await ledger.stop(0.1)
    assert remains == Remains(finalizes=(settlement,), holds=_in(remains, lost.hold_id))
    with pytest.raises(LedgerStopped):
        await settled
    with pytest.raises(LedgerStopped):
        await reserve
    assert asyncio.all_tasks() == before
    assert fake.lines_open == 0


async def test_stop_ends_in_time_though_a_call_hangs() -> None:
    before = asyncio.all_tasks()
    fake = FakeLedger()
    other, key = fake.another_account(10)
    fake.locked.add(other)
    ledger = BatchedLedger(fake.open_line)
    await ledger.start()
    apart = begin(ledger.reserve(fake.a_reserve(1, account_id=other, key_id=key)))
    await fake.until(lambda: len(fake.calls) > 2)
    fake.gate.clear()
    row = fake.a_reserve(10)
    reserve = begin(ledger.reserve(row))
    await fake.until(lambda: fake.calls[-1].reserves == (row.hold_id,))
    remains = await asyncio.wait_for(ledger.stop(0.05), 1.0)
    assert row.hold_id in remains.holds
    results = await asyncio.gather(reserve, apart, return_exceptions=True)
    assert [type(result) for result in results] == [LedgerStopped] * 2
    assert asyncio.all_tasks() == before


def _in(remains: Remains, hold_id: UUID) -> tuple[UUID, ...]:
    """Whether the reserve had been sent before the connection broke depends on the moment; both are right."""
    return (hold_id,) if hold_id in remains.holds else ()
