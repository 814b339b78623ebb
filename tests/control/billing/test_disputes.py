"""Disputes: inquiries, money taken and given back, won, lost and appealed, over a real ledger and the real client."""

import asyncio

import pytest

from proxy.control.billing.stripe_returns import fetch_dispute
from proxy.ledger.records import ReserveOutcome
from tests.control.billing.counter import Counter
from tests.fakes.stripe.disputes import Status


async def frozen(counter: Counter, account_id: object) -> bool:
    return (await counter.desk.bank.control.find_account(str(account_id))).frozen_at is not None


async def moved(counter: Counter, dispute: str, status: Status) -> str:
    """The dispute goes on to that status, and is applied."""
    counter.desk.stripe.disputes.move(dispute, status)
    return await counter.disputes.apply(dispute)


async def test_an_inquiry_takes_nothing_and_freezes_nobody(counter: Counter) -> None:
    order, intent = await counter.sold()
    dispute = counter.desk.stripe.disputes.open(intent, inquiry=True)
    assert await counter.disputes.apply(dispute) == "known"
    for status in ("warning_under_review", "warning_closed"):
        assert await moved(counter, dispute, status) == "known"
    assert not await frozen(counter, order.account_id)
    assert await counter.money(order) == (1000, 0, 0)


async def test_an_inquiry_that_becomes_a_dispute_takes(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100)
    dispute = counter.desk.stripe.disputes.open(intent, inquiry=True)
    await counter.disputes.apply(dispute)
    assert await moved(counter, dispute, "needs_response") == "taken"
    assert await frozen(counter, order.account_id)
    assert await counter.money(order) == (0, 0, 0)
    assert await counter.taken(order) == (1000, 100)


async def test_it_freezes_at_once_and_takes_when_the_bank_does(counter: Counter) -> None:
    order, intent = await counter.sold()
    key = await counter.desk.bank.open_key(order.account_id)
    dispute = counter.desk.stripe.disputes.open(intent, withdraw=False)
    assert await counter.disputes.apply(dispute) == "known"
    assert await frozen(counter, order.account_id)
    assert await counter.money(order) == (1000, 0, 0)
    assert (await counter.desk.bank.reserve(key, 1))[1].outcome is ReserveOutcome.KEY_CHANGED
    counter.desk.stripe.disputes.withdraw(dispute)
    assert await counter.disputes.apply(dispute) == "taken"
    assert await counter.money(order) == (0, 0, 0)
    [why] = await counter.desk.bank.control.freezes(order.account_id)
    assert (why.reference, why.actor, why.lifted_at) == (dispute, "stripe", None)


async def test_won_gives_back_once_and_lifts_the_freeze(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100)
    await counter.spend(order, 300)
    dispute = counter.desk.stripe.disputes.open(intent)
    await counter.disputes.apply(dispute)
    assert await counter.money(order) == (0, 0, 200)
    assert await counter.taken(order) == (1000, 0)
    counter.desk.stripe.disputes.move(dispute, "won")
    outcomes = await asyncio.gather(*(counter.disputes.apply(dispute) for _ in range(8)))
    # Those that asked before another one had its answer applied are late.
    assert outcomes.count("returned") == 1
    assert set(outcomes) <= {"returned", "known", "stale"}
    assert not await frozen(counter, order.account_id)
    assert await counter.money(order) == (800, 0, 0)
    assert await counter.lots(order) == [("paid", 800, 0, 0), ("promo", 0, 0, 0)]
    book = await counter.desk.bank.book(order.account_id)
    assert [row for row in book if row[0].startswith("dispute")] == [("dispute", -1000), ("dispute_return", 1000)]


async def test_lost_leaves_the_freeze_to_the_operator_for_good(counter: Counter) -> None:
    order, intent = await counter.sold()
    dispute = counter.desk.stripe.disputes.open(intent, withdraw=False)
    await counter.disputes.apply(dispute)
    assert await moved(counter, dispute, "lost") == "taken"
    assert await frozen(counter, order.account_id)
    assert await counter.money(order) == (0, 0, 0)
    await counter.desk.bank.control.unfreeze(order.account_id, reference=None, actor="ann")
    assert await counter.disputes.apply(dispute) == "known"
    assert not await frozen(counter, order.account_id)


async def test_an_appeal_that_is_won_gives_back_what_was_lost(counter: Counter) -> None:
    order, intent = await counter.sold()
    dispute = counter.desk.stripe.disputes.open(intent)
    await counter.disputes.apply(dispute)
    for status in ("under_review", "lost", "appeal_needs_response", "appeal_under_review"):
        assert await moved(counter, dispute, status) == "known"
        assert await counter.money(order) == (0, 0, 0)
    assert await moved(counter, dispute, "won") == "returned"
    assert not await frozen(counter, order.account_id)
    assert await counter.money(order) == (1000, 0, 0)


async def test_a_bank_that_comes_back_upon_a_won_dispute_takes_and_freezes_again(counter: Counter) -> None:
    order, intent = await counter.sold()
    dispute = counter.desk.stripe.disputes.open(intent)
    await counter.disputes.apply(dispute)
    await moved(counter, dispute, "won")
    for status in ("lost", "won", "lost"):
        assert await moved(counter, dispute, status) == ("returned" if status == "won" else "taken")
        assert await frozen(counter, order.account_id) is (status == "lost")
    assert await counter.money(order) == (0, 0, 0)
    transfers = await counter.desk.bank.control.transfers(order.account_id)
    assert [(t.kind, t.reference) for t in reversed(transfers)][1:] == [
        ("dispute", dispute),
        ("dispute_return", dispute),
        ("dispute", f"{dispute}:2"),
        ("dispute_return", f"{dispute}:2"),
        ("dispute", f"{dispute}:3"),
    ]
    references = {freeze.reference for freeze in await counter.desk.bank.control.freezes(order.account_id)}
    assert references == {dispute, f"{dispute}:2", f"{dispute}:3"}


async def test_first_heard_of_when_it_is_over(counter: Counter) -> None:
    cases: list[tuple[Status, str, int]] = [("won", "known", 1000), ("lost", "taken", 0)]
    for status, outcome, left in cases:
        order, intent = await counter.sold()
        dispute = counter.desk.stripe.disputes.open(intent)
        assert await moved(counter, dispute, status) == outcome
        assert await counter.money(order) == (left, 0, 0)
        assert await frozen(counter, order.account_id) is (status == "lost")


async def test_a_dispute_that_is_heard_of_before_its_payment_finds_it_paid(counter: Counter) -> None:
    order, intent = await counter.paid_unseen()
    dispute = counter.desk.stripe.disputes.open(intent)
    assert await counter.disputes.apply(dispute) == "taken"
    assert await counter.money(order) == (0, 0, 0)
    assert await frozen(counter, order.account_id)


async def test_an_answer_that_was_asked_for_earlier_is_stale(counter: Counter) -> None:
    order, intent = await counter.sold()
    dispute = counter.desk.stripe.disputes.open(intent)
    ledger = counter.disputes._ledger
    asked = await ledger.ask()
    before = await fetch_dispute(counter.desk.api, dispute)
    await counter.disputes.apply(dispute)
    assert await moved(counter, dispute, "won") == "returned"
    late = await ledger.apply(
        dispute,
        payment_intent=intent,
        amount=before.amount,
        currency=before.currency,
        status=before.status,
        withdrawn=before.withdrawn,
        asked=asked,
    )
    assert (late.outcome, late.moved, late.froze) == ("stale", 0, False)
    assert await counter.money(order) == (1000, 0, 0)
    assert not await frozen(counter, order.account_id)


async def test_a_part_that_is_disputed_takes_that_part(counter: Counter) -> None:
    order, intent = await counter.sold()
    dispute = counter.desk.stripe.disputes.open(intent, 250)
    assert await counter.disputes.apply(dispute) == "taken"
    assert await counter.money(order) == (750, 0, 0)


async def test_two_disputes_of_one_account_freeze_it_until_both_are_won(counter: Counter) -> None:
    order, intent = await counter.sold()
    _, other = await counter.sold(account_id=order.account_id)
    disputes = [counter.desk.stripe.disputes.open(payment) for payment in (intent, other)]
    for dispute in disputes:
        await counter.disputes.apply(dispute)
    for dispute, still in zip(disputes, (True, False), strict=True):
        await moved(counter, dispute, "won")
        assert await frozen(counter, order.account_id) is still
    assert await counter.money(order) == (2000, 0, 0)


@pytest.mark.parametrize(("status", "withdrawn"), [("prevented", False), ("a_status_of_2031", True)])
async def test_statuses_beyond_the_usual(counter: Counter, status: str, withdrawn: bool) -> None:
    order, intent = await counter.sold()
    ledger = counter.disputes._ledger
    await ledger.apply(
        f"dp_{order.id}",
        payment_intent=intent,
        amount=1000,
        currency="usd",
        status=status,
        withdrawn=withdrawn,
        asked=await ledger.ask(),
    )
    # What we don't know may be any trouble; what was prevented is none.
    assert await frozen(counter, order.account_id) is withdrawn
    assert await counter.money(order) == (0 if withdrawn else 1000, 0, 0)


async def test_a_dispute_in_another_currency_counts_as_one_of_the_whole_payment(counter: Counter) -> None:
    order, intent = await counter.sold()
    ledger = counter.disputes._ledger
    await ledger.apply(
        f"dp_{order.id}",
        payment_intent=intent,
        amount=7,
        currency="eur",
        status="needs_response",
        withdrawn=True,
        asked=await ledger.ask(),
    )
    assert await counter.money(order) == (0, 0, 0)
