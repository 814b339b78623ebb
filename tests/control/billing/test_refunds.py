"""Refunds that Stripe tells of: each takes what it comes to, once, in whatever order they come, over a real ledger and
the real Stripe client."""

import asyncio
import itertools
from contextlib import AsyncExitStack
from typing import Any

import pytest

from proxy.control.billing.errors import StripeUnknown
from proxy.ledger.connect import connect
from tests.control.billing.counter import Counter


async def test_a_partial_refund_takes_its_share_of_what_was_bought(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100, tax=190)
    # 595 of 1190 is half, whatever of it was tax.
    refund = await counter.refund(intent, 595)
    assert await counter.money(order) == (550, 0, 0)
    assert await counter.taken(order) == (500, 50)
    assert await counter.lots(order) == [("paid", 500, 0, 0), ("promo", 50, 0, 0)]
    book = {
        t.reference: (t.kind, t.amount, t.credit) for t in await counter.desk.bank.control.transfers(order.account_id)
    }
    assert book[refund] == ("refund", 500, "refunds")
    assert book[f"{refund}:bonus"] == ("refund", 50, "refunds")


async def test_several_refunds_take_together_what_their_sum_comes_to(counter: Counter) -> None:
    order, intent = await counter.sold(credits=1000, price=700, bonus=10)
    for expected in (142, 285, 428, 571, 714, 857, 1000):
        await counter.refund(intent, 100)
        assert (await counter.taken(order))[0] == expected
    assert await counter.money(order) == (0, 0, 0)


async def test_twice_late_and_by_eight_at_once_is_once(counter: Counter) -> None:
    order, intent = await counter.sold()
    refund = counter.desk.stripe.refunds.create(intent, 300)["id"]
    outcomes = await asyncio.gather(*(counter.refunds.apply(refund) for _ in range(8)))
    assert sorted(outcomes) == ["known"] * 7 + ["taken"]
    assert await counter.money(order) == (700, 0, 0)


async def test_a_refund_that_fails_is_put_back_once(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100)
    refund = await counter.refund(intent, 400, beginning="pending")
    assert await counter.money(order) == (660, 0, 0)
    counter.desk.stripe.refunds.settle(refund, "failed")
    outcomes = await asyncio.gather(*(counter.refunds.apply(refund) for _ in range(8)))
    assert sorted(outcomes) == ["known"] * 7 + ["returned"]
    assert await counter.money(order) == (1100, 0, 0)
    assert await counter.taken(order) == (0, 0)
    assert await counter.lots(order) == [("paid", 1000, 0, 0), ("promo", 100, 0, 0)]


async def test_one_that_failed_before_anything_was_heard_of_it_takes_nothing(counter: Counter) -> None:
    order, intent = await counter.sold()
    refund = counter.desk.stripe.refunds.create(intent, 400, beginning="pending")["id"]
    counter.desk.stripe.refunds.settle(refund, "failed")
    assert await counter.refunds.apply(refund) == "known"
    assert await counter.desk.bank.book(order.account_id) == [("purchase", 1000)]


async def test_a_stale_answer_can_t_undo_a_later_one(counter: Counter) -> None:
    order, intent = await counter.sold()
    refund = await counter.refund(intent, 400, beginning="pending")
    counter.desk.stripe.refunds.settle(refund, "failed")
    await counter.refunds.apply(refund)
    again = await counter.ledger.apply(
        refund, payment_intent=intent, amount=400, currency="usd", status="succeeded", request_id=None, problem=None
    )
    assert again.outcome == "stale"
    assert await counter.money(order) == (1000, 0, 0)


async def test_a_refund_that_is_heard_of_before_its_payment_finds_it_paid(counter: Counter) -> None:
    order, intent = await counter.paid_unseen()
    refund = counter.desk.stripe.refunds.create(intent, 250)["id"]
    assert await counter.refunds.apply(refund) == "taken"
    assert await counter.money(order) == (750, 0, 0)


async def test_what_was_spent_becomes_debt_and_the_next_credits_pay_it(counter: Counter) -> None:
    order, intent = await counter.sold()
    await counter.spend(order, 900)
    await counter.refund(intent)
    assert await counter.money(order) == (0, 0, 900)
    await counter.sold(account_id=order.account_id)
    assert await counter.money(order) == (100, 0, 0)


async def test_other_credits_are_taken_before_a_debt_is_made(counter: Counter) -> None:
    order, intent = await counter.sold()
    await counter.desk.bank.control.grant(order.account_id, 500, reference=f"g {order.id}", actor="test")
    await counter.spend(order, 800)
    await counter.refund(intent)
    assert await counter.money(order) == (0, 0, 300)


async def test_a_bonus_that_was_spent_is_no_debt(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=200)
    await counter.spend(order, 150)  # of the bonus, which goes first
    refund = await counter.refund(intent)
    assert await counter.money(order) == (0, 0, 0)
    assert await counter.taken(order) == (1000, 50)
    counter.desk.stripe.refunds.settle(refund, "failed")
    await counter.refunds.apply(refund)
    assert await counter.money(order) == (1050, 0, 0)
    assert await counter.taken(order) == (0, 0)


async def test_a_running_call_keeps_what_it_holds(counter: Counter) -> None:
    order, intent = await counter.sold()
    key = await counter.desk.bank.open_key(order.account_id)
    row, _ = await counter.desk.bank.reserve(key, 400)
    await counter.refund(intent)
    assert await counter.money(order) == (400, 400, 400)
    await counter.desk.bank.finalize(row, 100)
    assert await counter.money(order) == (0, 0, 100)


async def test_to_apply_again_takes_no_more_though_more_is_there(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=200)
    key = await counter.desk.bank.open_key(order.account_id)
    row, _ = await counter.desk.bank.reserve(key, 200)
    await counter.desk.bank.finalize(row, 200)
    refund = await counter.refund(intent, beginning="pending")
    await counter.desk.bank.control.reverse(row.hold_id, 200, reference=f"r {order.id}", actor="test", reason="why")
    counter.desk.stripe.refunds.settle(refund, "succeeded")
    assert await counter.refunds.apply(refund) == "known"
    assert await counter.money(order) == (200, 0, 0)


async def test_a_refund_that_fails_takes_no_bonus_though_some_came_back_meanwhile(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=200)
    key = await counter.desk.bank.open_key(order.account_id)
    row, _ = await counter.desk.bank.reserve(key, 200)
    await counter.desk.bank.finalize(row, 200)
    await counter.refund(intent, 500)
    refund = await counter.refund(intent, 400, beginning="pending")
    assert await counter.taken(order) == (900, 0)
    await counter.desk.bank.control.reverse(row.hold_id, 200, reference=f"r {order.id}", actor="test", reason="why")
    counter.desk.stripe.refunds.settle(refund, "failed")
    assert await counter.refunds.apply(refund) == "returned"
    assert await counter.taken(order) == (500, 0)
    assert await counter.money(order) == (700, 0, 0)


@pytest.mark.parametrize("order_of", list(itertools.permutations(range(3))), ids=str)
async def test_refunds_and_disputes_overlap_in_any_order(counter: Counter, order_of: tuple[int, ...]) -> None:
    order, intent = await counter.sold()
    first = counter.desk.stripe.refunds.create(intent, 300)["id"]
    second = counter.desk.stripe.refunds.create(intent, 200, beginning="pending")["id"]
    dispute = counter.desk.stripe.disputes.open(intent)
    steps = [
        lambda: counter.refunds.apply(first),
        lambda: counter.refunds.apply(second),
        lambda: counter.disputes.apply(dispute),
    ]
    for step in order_of:
        await steps[step]()
    # Never more than there was.
    assert await counter.taken(order) == (1000, 0)
    assert await counter.money(order) == (0, 0, 0)
    counter.desk.stripe.refunds.settle(second, "failed")
    counter.desk.stripe.disputes.move(dispute, "won")
    for step in order_of:
        await steps[step]()
    assert await counter.taken(order) == (300, 0)
    assert await counter.money(order) == (700, 0, 0)
    assert await counter.lots(order) == [("paid", 700, 0, 0)]


async def test_what_isnt_ours_is_left_alone(counter: Counter) -> None:
    order = await counter.desk.order()
    session = await counter.desk.session(order, metadata={}, client_reference_id="cart-7", payment_intent_data={})
    intent = counter.desk.stripe.checkout.pay(session)
    assert intent is not None
    assert await counter.refunds.apply(counter.desk.stripe.refunds.create(intent)["id"]) == "not_ours"
    for desk, unknown in ((counter.refunds, "re_nobodys"), (counter.disputes, "dp_nobodys")):
        with pytest.raises(StripeUnknown):
            await desk.apply(unknown)


@pytest.mark.parametrize("kind", ["refund", "dispute"])
async def test_what_is_paid_while_it_is_looked_for_is_not_touched_without_its_account_s_lock(
    counter: Counter, kind: str
) -> None:
    """The purchase is credited between the look for the account and the look for the order."""
    bank = counter.desk.bank
    order, intent = await counter.paid_unseen()
    call = {
        "refund": "SELECT outcome FROM farebox.apply_refund($1, $2, 400, 'usd', 'succeeded', NULL, NULL)",
        "dispute": "SELECT outcome FROM farebox.apply_dispute($1, $2, 400, 'usd', 'needs_response', true, 1)",
    }[kind]
    lock_accounts = await bank.owner.fetchval("SELECT pg_get_functiondef('farebox.lock_accounts'::regproc)")
    patient = {"statement_seconds": 0, "lock_ms": 0}
    async with AsyncExitStack() as stack:
        apart, caller = [await connect(bank.database.owner, None, **patient) for _ in range(2)]
        stack.push_async_callback(apart.close)
        stack.push_async_callback(caller.close)
        await bank.owner.execute(lock_accounts.replace("BEGIN\n", _WAITS_WHERE_NOBODY_IS_LOCKED, 1))
        stack.push_async_callback(bank.owner.execute, lock_accounts)
        await bank.owner.execute("SELECT pg_advisory_lock(4711)")
        taking = asyncio.create_task(apart.fetchval(call, f"{kind}_{order.id}", intent))
        while not await caller.fetchval(_WAITING):  # noqa: ASYNC110 - Postgres tells nobody
            await asyncio.sleep(0.01)
        assert (await counter.desk.till.apply_payment(payment_intent=intent)).outcome == "paid"
        async with caller.transaction():
            # As a call's: it has the account, and holds some of its credits.
            await caller.execute("SELECT farebox.lock_accounts(ARRAY[$1::uuid], NULL)", order.account_id)
            await bank.owner.execute("SELECT pg_advisory_unlock(4711)")
            # Whoever has no lock on the account has nothing to wait for.
            assert await asyncio.wait_for(taking, 30) == "not_ours"
    assert await counter.money(order) == (1000, 0, 0)


_WAITING = """
    SELECT count(*)
      FROM pg_locks l JOIN pg_database d ON d.oid = l.database
     WHERE d.datname = current_database() AND l.objid = 4711 AND NOT l.granted
"""
_WAITS_WHERE_NOBODY_IS_LOCKED = """BEGIN
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = ANY (_account_ids)) THEN
        PERFORM pg_advisory_xact_lock(4711);
    END IF;
"""


async def test_a_refund_of_a_payment_in_quarantine_takes_nothing(counter: Counter) -> None:
    order = await counter.desk.order()
    session = await counter.desk.session(order, client_reference_id="another")
    intent = counter.desk.stripe.checkout.pay(session)
    assert intent is not None
    assert await counter.refunds.apply(counter.desk.stripe.refunds.create(intent)["id"]) == "payment_quarantined"
    assert await counter.money(order) == (0, 0, 0)


async def test_another_amount_under_a_known_id_is_a_conflict(counter: Counter) -> None:
    order, intent = await counter.sold()
    refund = await counter.refund(intent, 100)
    for changes in ({"amount": 101}, {"currency": "eur"}):
        given: dict[str, Any] = {"amount": 100, "currency": "usd", "status": "succeeded"}
        applied = await counter.ledger.apply(
            refund, payment_intent=intent, request_id=None, problem=None, **(given | changes)
        )
        assert applied.outcome == "conflict"
    applied = await counter.ledger.apply(
        refund, payment_intent=intent, request_id=None, problem=None, amount=100, currency="usd", status="odd"
    )
    assert applied.outcome == "unknown_status"
    assert await counter.money(order) == (900, 0, 0)
