"""Holds that grow: what each outcome is and leaves, that it may be said again, and that it races with everything."""

import asyncio
import random
from dataclasses import replace
from uuid import uuid4

import pytest

from proxy.core.money import AMOUNT_MAX
from proxy.ledger.audit import audit
from proxy.ledger.batch import BatchedLedger
from proxy.ledger.errors import InvalidValue
from proxy.ledger.lines import lines_to
from proxy.ledger.records import Extend, ExtendOutcome, FinalizeOutcome, ReserveOutcome
from tests.ledger.bank import Bank

EXTENDED = ExtendOutcome.EXTENDED


async def test_a_hold_grows_to_a_total_and_may_be_told_so_again(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 400)
    for _ in range(3):
        extended = await bank.extend(row, 900)
        assert (extended.outcome, extended.total, extended.balance, extended.held) == (EXTENDED, 900, 1000, 900)
    # What was asked earlier and comes late takes nothing back.
    assert (await bank.extend(row, 500)).total == 900
    assert await bank.money(account.id) == (1000, 900, 0)
    assert (await bank.finalize(row, 850, usage_source="counted")).charge == 850
    assert await bank.money(account.id) == (150, 0, 0)


async def test_it_grows_by_what_there_is_down_to_at_least(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 400)
    other, _ = await bank.reserve(key, 300)
    partly = await bank.extend(row, 900, 650)
    assert (partly.outcome, partly.total, partly.held) == (EXTENDED, 700, 1000)
    held = await bank.extend(row, 900, 701)
    assert (held.outcome, held.total) == (ExtendOutcome.CREDITS_HELD, 700)
    short = await bank.extend(row, 1001)
    assert (short.outcome, short.total) == (ExtendOutcome.INSUFFICIENT, 700)
    await bank.release(other)
    assert (await bank.extend(row, 900, 701)).total == 900
    assert await bank.money(account.id) == (1000, 900, 0)


async def test_a_limit_that_siblings_hold_is_worth_waiting_for_and_a_spent_one_is_not(bank: Bank) -> None:
    account, key = await bank.open_account(10_000, spend_limit=500)
    row, _ = await bank.reserve(key, 100)
    sibling, _ = await bank.reserve(key, 300)
    held = await bank.extend(row, 250)
    assert (held.outcome, held.total, held.spend_limit_left) == (ExtendOutcome.CREDITS_HELD, 100, 100)
    assert (await bank.extend(row, 501)).outcome is ExtendOutcome.SPEND_LIMIT
    await bank.finalize(sibling, 50)
    extended = await bank.extend(row, 460, 250)
    assert (extended.outcome, extended.total, extended.spend_limit_left) == (EXTENDED, 450, 0)
    assert (await bank.extend(row, 451)).outcome is ExtendOutcome.SPEND_LIMIT
    await bank.finalize(row, 450)
    assert (await bank.control.find_key(key.id)).spent == 500
    assert await bank.money(account.id) == (9_500, 0, 0)


async def test_debt_keeps_a_hold_as_it_is(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 400)
    overrun, _ = await bank.reserve(key, 600)
    await bank.finalize(overrun, 700)
    indebted = await bank.extend(row, 401)
    assert (indebted.outcome, indebted.total, indebted.debt) == (ExtendOutcome.INSUFFICIENT, 400, 100)
    assert (await bank.extend(row, 500, 400)).outcome is EXTENDED, "it holds what is needed"
    await bank.control.grant(account.id, 150, reference=uuid4().hex, actor="test")
    paid = await bank.extend(row, 500, 401)
    assert (paid.outcome, paid.total, paid.debt) == (EXTENDED, 450, 0)


async def test_only_an_open_hold_of_the_workers_own_grows(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    thief, _ = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 400)
    assert (await bank.extend(row, 500, worker_id=uuid4())).outcome is ExtendOutcome.CONFLICT
    stolen = await bank.extend(row, 500, account_id=thief.id)
    assert (stolen.outcome, stolen.total, stolen.balance) == (ExtendOutcome.CONFLICT, 0, 1000)
    assert (await bank.extend(row, 500, account_id=uuid4())).outcome is ExtendOutcome.UNKNOWN
    assert (await bank.extend(row, 500, hold_id=uuid4())).outcome is ExtendOutcome.UNKNOWN
    await bank.finalize(row, 10)
    assert (await bank.extend(row, 500)).outcome is ExtendOutcome.ENDED
    assert await bank.money(account.id) == (990, 0, 0)
    assert await bank.money(thief.id) == (1000, 0, 0)


async def test_a_lapsed_worker_grows_nothing_and_a_swept_hold_has_ended(own_bank: Bank) -> None:
    account, key = await own_bank.open_account(1000)
    row, _ = await own_bank.reserve(key, 400)
    await own_bank.lapse()
    lapsed = await own_bank.extend(row, 500)
    assert (lapsed.outcome, lapsed.total) == (ExtendOutcome.WORKER_LAPSED, 400)
    assert await own_bank.expire() == {row.hold_id: 0}
    assert (await own_bank.extend(row, 500)).outcome is ExtendOutcome.ENDED
    assert await own_bank.money(account.id) == (1000, 0, 0)


async def test_many_in_one_call_are_as_one_after_the_other(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    other, other_key = await bank.open_account(1000)
    first, _ = await bank.reserve(key, 100)
    second, _ = await bank.reserve(key, 100)
    third, _ = await bank.reserve(other_key, 100)
    rows = [
        bank.an_extend(third, 300),
        bank.an_extend(first, 600),
        bank.an_extend(first, 700),
        bank.an_extend(second, 900, 100),
        bank.an_extend(first, 650),
        bank.an_extend(first, 800, account_id=other.id),
    ]
    said = await bank.holds.extend_batch(rows)
    assert [each.total for each in said] == [300, 600, 700, 300, 700, 0]
    assert said[-1].outcome is ExtendOutcome.CONFLICT
    assert await bank.money(account.id) == (1000, 1000, 0)
    assert await bank.money(other.id) == (1000, 300, 0)
    assert (await bank.finalize(first, 700, usage_source="counted")).charge == 700
    assert await bank.holds.extend_batch([]) == []


async def test_a_locked_account_is_busy_and_its_neighbours_are_not(bank: Bank) -> None:
    locked, key = await bank.open_account(1000)
    _, other_key = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 100)
    other, _ = await bank.reserve(other_key, 100)
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", locked.id)
        said = await bank.holds.extend_batch([bank.an_extend(row, 200), bank.an_extend(other, 200)])
        assert [each.outcome for each in said] == [ExtendOutcome.BUSY, EXTENDED]
        waited = await bank.holds.extend(bank.an_extend(row, 200), wait_ms=50)
        assert waited.outcome is ExtendOutcome.BUSY
    assert (await bank.extend(row, 200)).total == 200


async def test_the_release_before_this_one_still_extends(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 400)
    call = "SELECT granted, total, state FROM farebox.extend($1, $2, $3, $4, $5)"
    for by, at_least, expected in ((500, 500, (500, 900, "open")), (500, 50, (100, 1000, "open"))):
        said = await bank.pool.fetchrow(call, row.hold_id, account.id, bank.worker_id, by, at_least)
        assert said is not None
        assert tuple(said) == expected
    assert (await bank.extend(row, 1000)).outcome is EXTENDED


def test_totals_that_cant_be_are_refused_when_made() -> None:
    good = Extend(uuid4(), uuid4(), uuid4(), 10, 5)
    for total, at_least in ((AMOUNT_MAX + 1, 5), (10, -1), (10, 11), (-1, -1)):
        with pytest.raises(InvalidValue):
            replace(good, total=total, at_least=at_least)


@pytest.mark.parametrize("seed", range(4))
async def test_growing_races_with_reserves_finalizes_and_releases(own_bank: Bank, seed: int) -> None:
    """40 calls on one account that can't carry them all, from two processes' ledgers: never below 0, all true after."""
    chance = random.Random(seed)
    bank = own_bank
    account, key = await bank.open_account(3_000)
    ledgers = [BatchedLedger(lines_to(bank.database.app)) for _ in range(2)]
    for ledger in ledgers:
        await ledger.start()

    async def call(ledger: BatchedLedger) -> int:
        row = bank.a_reserve(key, chance.randrange(20, 120), 10)
        reserved = await ledger.reserve(row)
        if reserved.outcome is not ReserveOutcome.GRANTED:
            return 0
        holds = reserved.granted
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(chance.random() * 0.01)
            total = holds + chance.randrange(1, 150)
            extended = await ledger.extend(bank.an_extend(row, total, holds + 1))
            assert extended.balance - extended.held >= 0
            assert extended.total >= holds
            assert (extended.outcome is EXTENDED) == (extended.total > holds)
            holds = extended.total
        if chance.random() < 0.2:
            await ledger.release(row.hold_id, row.account_id, row.worker_id)
            return 0
        charge = chance.randrange(holds + 1)
        # An extension that is still on its way when the hold ends must change nothing.
        late = asyncio.create_task(ledger.extend(bank.an_extend(row, holds + 50, holds)))
        finalized = await ledger.finalize(bank.a_finalize(row, charge, usage_source="counted"))
        await late
        assert (finalized.outcome, finalized.charge, finalized.overrun) == (FinalizeOutcome.FINAL, charge, 0)
        return charge

    try:
        charges = await asyncio.gather(*(call(ledgers[number % 2]) for number in range(40)))
    finally:
        for ledger in ledgers:
            await ledger.stop()
    assert await bank.money(account.id) == (3_000 - sum(charges), 0, 0), f"seed {seed}"
    assert [check for check in await audit(bank.owner) if not check.ok] == []
