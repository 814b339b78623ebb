"""Holds: what each outcome is, what it leaves on the account, and that every call may be said twice."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from proxy.core.money import AMOUNT_MAX
from proxy.core.usage import Usage
from proxy.ledger.audit import audit
from proxy.ledger.errors import InvalidValue
from proxy.ledger.records import FinalizeOutcome, Release, Released, ReserveOutcome
from tests.ledger.bank import Bank

GRANTED, FINAL = ReserveOutcome.GRANTED, FinalizeOutcome.FINAL


async def test_a_call_is_reserved_charged_and_the_rest_given_back(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, reserved = await bank.reserve(key, 400)
    assert (reserved.outcome, reserved.granted, reserved.balance, reserved.held) == (GRANTED, 400, 1000, 400)
    finalized = await bank.finalize(reserve, 150)
    assert (finalized.outcome, finalized.charge, finalized.overrun, finalized.balance) == (FINAL, 150, 0, 850)
    assert await bank.money(account.id) == (850, 0, 0)
    assert await bank.book(account.id) == [("grant", 1000), ("charge", -150)]


# Reserve


async def test_grants_as_much_as_there_is_between_at_least_and_want(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    _, first = await bank.reserve(key, 700)
    _, second = await bank.reserve(key, 700, at_least=100)
    _, third = await bank.reserve(key, 700, at_least=0)
    assert [r.granted for r in (first, second, third)] == [700, 300, 0]
    assert [r.outcome for r in (first, second, third)] == [GRANTED] * 3
    assert await bank.money(account.id) == (1000, 1000, 0)


async def test_says_whether_the_balance_is_too_low_or_only_held(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    await bank.reserve(key, 600)
    _, held = await bank.reserve(key, 500)
    _, short = await bank.reserve(key, 1001)
    assert (held.outcome, held.granted, held.held) == (ReserveOutcome.CREDITS_HELD, 0, 600)
    assert (short.outcome, short.granted) == (ReserveOutcome.INSUFFICIENT, 0)


async def test_the_same_reserve_again_is_the_same_hold(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    again = await bank.holds.reserve(reserve)
    other = await bank.holds.reserve(replace(reserve, fingerprint=b"x" * 32))
    assert (again.outcome, again.granted, again.held) == (GRANTED, 400, 400)
    assert (other.outcome, other.granted) == (ReserveOutcome.CONFLICT, 0)
    assert await bank.money(account.id) == (1000, 400, 0)


async def test_a_reserve_again_after_its_end_holds_nothing(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    released, _ = await bank.reserve(key, 100)
    await bank.release(released)
    settled, _ = await bank.reserve(key, 100)
    await bank.finalize(settled, 60)
    assert (await bank.holds.reserve(released)).outcome is ReserveOutcome.ENDED
    assert (await bank.holds.reserve(settled)).outcome is ReserveOutcome.ENDED
    assert (await bank.holds.reserve(replace(settled, fingerprint=b"x"))).outcome is ReserveOutcome.CONFLICT
    assert await bank.money(account.id) == (940, 0, 0)


async def test_another_account_can_neither_use_nor_end_a_hold(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    thief, its_key = await bank.open_account(1000)
    stolen = replace(reserve, account_id=thief.id, key_id=its_key.id)
    assert (await bank.holds.reserve(stolen)).outcome is ReserveOutcome.CONFLICT
    assert (await bank.finalize(stolen, 10)).outcome is FinalizeOutcome.CONFLICT
    assert await bank.release(stolen) == Released(0, "conflict")
    assert await bank.money(account.id) == (1000, 400, 0)
    assert await bank.money(thief.id) == (1000, 0, 0)


async def test_what_isnt_known_is_refused(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    for change in (
        {"account_id": uuid4()},
        {"key_id": "nobody"},
        {"price_version": "0" * 64},
        {"model": "other"},
        {"variant": "other"},
    ):
        _, refused = await bank.reserve(key, 1, **change)
        assert refused.outcome is ReserveOutcome.UNKNOWN, change
    _, other_account = await bank.open_account(5)
    assert (await bank.reserve(other_account, 1, account_id=account.id))[1].outcome is ReserveOutcome.UNKNOWN
    assert await bank.money(account.id) == (1000, 0, 0)


async def test_a_worker_without_a_lease_admits_nothing(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    assert (await bank.reserve(key, 1, worker_id=uuid4()))[1].outcome is ReserveOutcome.WORKER_LAPSED
    await bank.lapse()
    assert (await bank.reserve(key, 1))[1].outcome is ReserveOutcome.WORKER_LAPSED
    assert await bank.holds.heartbeat(bank.worker_id, [])
    assert (await bank.reserve(key, 1))[1].outcome is GRANTED
    assert await bank.holds.stop_worker(bank.worker_id)
    assert (await bank.reserve(key, 1))[1].outcome is ReserveOutcome.WORKER_LAPSED
    assert not await bank.holds.heartbeat(bank.worker_id, [])
    assert not await bank.holds.start_worker(bank.worker_id, "host", "0.1")
    assert (await bank.money(account.id))[1] == 1


async def test_an_expired_key_is_refused(bank: Bank) -> None:
    _, key = await bank.open_account(1000, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert (await bank.reserve(key, 1))[1].outcome is ReserveOutcome.KEY_EXPIRED


# Finalize and release


async def test_the_same_finalize_again_is_its_stored_result_and_another_a_conflict_for_ever(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    first = await bank.finalize(reserve, 150)
    assert await bank.finalize(reserve, 150) == first
    conflict = await bank.finalize(reserve, 151)
    assert (conflict.outcome, conflict.charge) == (FinalizeOutcome.CONFLICT, 0)
    await bank.control.reverse(reserve.hold_id, 50, reference=None, actor="test", reason=None)
    again = await bank.finalize(reserve, 150)
    assert (again.outcome, again.charge, again.balance) == (FINAL, 150, 900)
    assert await bank.book(account.id) == [("grant", 1000), ("charge", -150), ("reversal", 50)]


async def test_a_zero_charge_moves_nothing(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    finalized = await bank.finalize(reserve, 0)
    assert (finalized.outcome, finalized.charge, finalized.held) == (FINAL, 0, 0)
    assert await bank.book(account.id) == [("grant", 1000)]
    assert (await bank.finalize(reserve, 5)).outcome is FinalizeOutcome.CONFLICT


async def test_after_a_release_nothing_is_charged(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    assert await bank.release(reserve) == Released(400, "released")
    assert await bank.release(reserve) == Released(0, "released")
    assert (await bank.finalize(reserve, 100)).outcome is FinalizeOutcome.RELEASED
    assert await bank.money(account.id) == (1000, 0, 0)


async def test_a_release_after_the_charge_gives_nothing_back(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await bank.finalize(reserve, 150)
    assert await bank.release(reserve) == Released(0, "final")
    assert await bank.money(account.id) == (850, 0, 0)


async def test_a_finalize_without_its_reserve_charges_and_leaves_a_tombstone(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    late = bank.a_reserve(key, 400)
    finalized = await bank.finalize(late, 150)
    assert (finalized.outcome, finalized.charge) == (FINAL, 150)
    assert (await bank.holds.reserve(late)).outcome is ReserveOutcome.ENDED
    assert (await bank.finalize(late, 150)) == finalized
    assert (await bank.finalize(late, 151)).outcome is FinalizeOutcome.CONFLICT
    assert await bank.money(account.id) == (850, 0, 0)
    # A counted one, too: there is no hold to be within.
    counted = await bank.finalize(bank.a_reserve(key, 1), 40, usage_source="counted")
    assert counted.charge == 40


async def test_a_release_without_its_reserve_leaves_a_tombstone(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    late = bank.a_reserve(key, 400)
    assert await bank.release(late) == Released(0, "released")
    assert (await bank.holds.reserve(late)).outcome is ReserveOutcome.ENDED
    assert (await bank.finalize(late, 10)).outcome is FinalizeOutcome.RELEASED
    assert await bank.money(account.id) == (1000, 0, 0)


async def test_an_unknown_account_is_told(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    stranger = bank.a_reserve(key, 1, account_id=uuid4())
    assert (await bank.finalize(stranger, 1)).outcome is FinalizeOutcome.UNKNOWN
    assert await bank.release(stranger) == Released(0, "unknown")


async def test_a_counted_charge_never_exceeds_its_hold_and_says_so(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    finalized = await bank.finalize(reserve, 130, usage_source="counted")
    assert (finalized.charge, finalized.overrun) == (100, 0)
    ended = await bank.control.ended(reserve.hold_id)
    assert ended is not None
    assert (ended.charge, ended.capped, ended.usage) == (100, "counted_above_hold", Usage(output=130))
    assert await bank.money(account.id) == (900, 0, 0)


async def test_a_receipt_keeps_what_both_ends_said(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    await bank.finalize(reserve, 30, capped="implausible", usage=Usage(input=7, reasoning=500))
    ended = await bank.control.ended(reserve.hold_id)
    assert ended is not None
    assert (ended.state, ended.key_id, ended.amount, ended.charge, ended.capped) == (
        "final",
        key.id,
        100,
        30,
        "implausible",
    )
    assert (ended.quote, ended.receipt, ended.ending) == ('{"quote": 1}', '{"usage": {}}', "stop")
    assert ended.usage == Usage(input=7, reasoning=500)
    assert ended.rates == (1_000_000,) * 5 + (2_000_000, 1_000_000)
    assert ended.ended_at is not None
    assert ended.ended_at >= ended.opened_at
    assert await bank.control.ended(uuid4()) is None


# Debt


async def test_an_overrun_takes_what_is_available_never_another_hold_and_leaves_debt(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    mine, _ = await bank.reserve(key, 200)
    await bank.reserve(key, 500)
    finalized = await bank.finalize(mine, 700)
    assert (finalized.charge, finalized.overrun) == (700, 200)
    assert await bank.money(account.id) == (500, 500, 200)
    assert await bank.book(account.id) == [("grant", 1000), ("overrun", 200), ("charge", -700)]


async def test_debt_is_paid_first_from_whatever_becomes_available_and_blocks_until_then(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    mine, _ = await bank.reserve(key, 200)
    second, _ = await bank.reserve(key, 500)
    third, _ = await bank.reserve(key, 300)
    await bank.finalize(mine, 1500)
    assert await bank.money(account.id) == (800, 800, 1300)
    assert (await bank.reserve(key, 0))[1].outcome is ReserveOutcome.INSUFFICIENT
    # A release,
    await bank.release(third)
    assert await bank.money(account.id) == (500, 500, 1000)
    # the rest of a charge,
    finalized = await bank.finalize(second, 100)
    assert (finalized.overrun, finalized.debt) == (0, 600)
    assert await bank.money(account.id) == (0, 0, 600)
    # a reversal,
    await bank.control.reverse(second.hold_id, 100, reference="r", actor="test", reason="why")
    assert await bank.money(account.id) == (0, 0, 500)
    # and a grant; what is left of it is credit again.
    await bank.control.grant(account.id, 800, reference="g", actor="test")
    assert await bank.money(account.id) == (300, 0, 0)
    assert (await bank.reserve(key, 300))[1].outcome is GRANTED
    assert (await bank.book(account.id))[1:] == [
        ("overrun", 1300),
        ("charge", -1500),
        ("debt_payment", -300),
        ("charge", -100),
        ("debt_payment", -400),
        ("reversal", 100),
        ("debt_payment", -100),
        ("grant", 800),
        ("debt_payment", -500),
    ]
    assert [check.name for check in await audit(bank.owner) if not check.ok] == []


# Batches


async def test_finalizes_come_before_reserves_and_each_row_sees_the_one_before(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    first, _ = await bank.reserve(key, 1000)
    rows = [bank.a_reserve(key, 400) for _ in range(3)]
    finalized, reserved, _ = await bank.holds.batch([bank.a_finalize(first, 100)], rows)
    assert finalized[0].charge == 100
    assert [r.outcome for r in reserved] == [GRANTED, GRANTED, ReserveOutcome.CREDITS_HELD]
    assert [r.held for r in reserved] == [400, 800, 800]
    assert await bank.money(account.id) == (900, 800, 0)


async def test_duplicates_in_a_batch_get_the_same_result(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row, late, gone = (bank.a_reserve(key, 300) for _ in range(3))
    open_, _ = await bank.reserve(key, 100)
    finalize = bank.a_finalize(open_, 60)
    other = replace(finalize, charge=61, fingerprint=b"other")
    finalized, reserved, released = await bank.holds.batch(
        [finalize, finalize, bank.a_finalize(late, 5), other, bank.a_finalize(late, 5)],
        [row, late, row, gone, replace(row, fingerprint=b"other")],
        [Release(gone.hold_id, account.id, bank.worker_id)] * 2,
    )
    assert [f.outcome for f in finalized] == [FINAL, FINAL, FINAL, FinalizeOutcome.CONFLICT, FINAL]
    assert [f.charge for f in finalized] == [60, 60, 5, 0, 5]
    assert released == [Released(0, "released")] * 2
    conflict, ended = ReserveOutcome.CONFLICT, ReserveOutcome.ENDED
    assert [r.outcome for r in reserved] == [GRANTED, ended, GRANTED, ended, conflict]
    assert [r.granted for r in reserved] == [300, 0, 300, 0, 0]
    assert await bank.money(account.id) == (935, 300, 0)
    assert [check.name for check in await audit(bank.owner) if not check.ok] == []


async def test_results_come_in_the_order_given_over_many_accounts(bank: Bank) -> None:
    opened = [await bank.open_account(100 * n) for n in range(1, 9)]
    rows = [bank.a_reserve(opened[n % 8][1], 50 + n, 0) for n in range(50)]
    _, reserved, _ = await bank.holds.batch([], rows)
    left = {account.id: account.balance for account, _ in opened}
    for row, result in zip(rows, reserved, strict=True):
        assert result.granted == min(row.want, left[row.account_id])
        left[row.account_id] -= result.granted
    assert {account.id: account.balance - (await bank.money(account.id))[1] for account, _ in opened} == left


async def test_one_hold_id_under_two_accounts_in_a_batch_fails_it_as_a_whole_and_singly_is_a_conflict(
    bank: Bank,
) -> None:
    _, one = await bank.open_account(100)
    account, two = await bank.open_account(100)
    row = bank.a_reserve(one, 10)
    stolen = replace(row, account_id=account.id, key_id=two.id)
    with pytest.raises(Exception, match="holds_pkey"):
        await bank.holds.batch([], [row, stolen])
    assert await bank.money(account.id) == (100, 0, 0)
    outcomes = {(await bank.holds.reserve(r)).outcome for r in (row, stolen)}
    assert outcomes == {GRANTED, ReserveOutcome.CONFLICT}


async def test_an_empty_batch_is_nothing(bank: Bank) -> None:
    assert await bank.holds.batch([], []) == ([], [], [])


# What never gets in


async def test_amounts_and_texts_that_cant_be_stored_are_refused_when_made(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    good = bank.a_reserve(key, 10)
    starts: tuple[dict[str, Any], ...] = (
        {"quote": "a\0b"},
        {"model": "\ud800"},
        {"want": AMOUNT_MAX + 1},
        {"want": -1},
        {"at_least": 11},
    )
    for change in starts:
        with pytest.raises(InvalidValue):
            replace(good, **change)
    ends: tuple[dict[str, Any], ...] = (
        {"receipt": "\0"},
        {"ending": "\udfff"},
        {"charge": AMOUNT_MAX + 1},
        {"usage": Usage(input=2**63)},
    )
    for change in ends:
        with pytest.raises(InvalidValue):
            replace(bank.a_finalize(good, 10), **change)


async def test_the_largest_amounts_are_reserved_and_charged(bank: Bank) -> None:
    account, key = await bank.open_account(AMOUNT_MAX)
    reserve, reserved = await bank.reserve(key, AMOUNT_MAX)
    assert reserved.granted == AMOUNT_MAX
    finalized = await bank.finalize(reserve, AMOUNT_MAX)
    again = await bank.finalize(bank.a_reserve(key, 1), AMOUNT_MAX)
    assert (finalized.overrun, again.overrun) == (0, AMOUNT_MAX)
    assert await bank.money(account.id) == (0, 0, AMOUNT_MAX)
