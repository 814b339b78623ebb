"""The till: what Stripe says of a payment, held against our order, over a real ledger and the real Stripe client."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from proxy.control.billing.errors import StripeAway, StripeUnknown
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from proxy.ledger.orders import Order
from tests.control.billing.till import Desk
from tests.fakes.stripe import Unavailable


async def test_a_paid_session_credits_once_however_it_is_named(desk: Desk) -> None:
    order = await desk.order(bonus=100)
    session = await desk.session(order)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "open"
    intent = desk.stripe.checkout.pay(session, tax=190)
    assert intent is not None
    assert (await desk.till.apply_payment(payment_intent=intent)).outcome == "paid"
    assert (await desk.till.apply_payment(session_id=session)).outcome == "known"
    assert (await desk.till.apply_payment(order.id)).outcome == "known"
    paid = await desk.orders.find(order.id)
    assert (paid.state, paid.received, paid.subtotal, paid.discount, paid.tax) == ("paid", 1190, 1000, 0, 190)
    assert (paid.payment_intent, paid.session_id) == (intent, session)
    assert await desk.balance(order) == 1100
    assert sorted(await desk.bank.book(order.account_id)) == [("promo", 100), ("purchase", 1000)]


async def test_eight_at_once_credit_once(desk: Desk) -> None:
    order = await desk.order(bonus=100)
    session = await desk.session(order)
    intent = desk.stripe.checkout.pay(session)
    by_intent = [desk.till.apply_payment(payment_intent=intent) for _ in range(4)]
    by_session = [desk.till.apply_payment(session_id=session) for _ in range(4)]
    applied = await asyncio.gather(*by_intent, *by_session)
    assert sorted(found.outcome for found in applied) == ["known"] * 7 + ["paid"]
    assert await desk.balance(order) == 1100


async def test_unpaid_waits_for_the_bank(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    desk.stripe.checkout.pay_later(session)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "pending"
    assert (await desk.orders.find(order.id)).state == "pending"
    assert await desk.balance(order) == 0
    desk.stripe.checkout.settle(session)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "paid"
    assert await desk.balance(order) == 1000


async def test_a_bank_that_refuses_leaves_nothing(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    desk.stripe.checkout.pay_later(session)
    desk.stripe.checkout.settle(session, succeed=False)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "failed"
    assert (await desk.orders.find(order.id)).state == "failed"
    assert await desk.balance(order) == 0


async def test_an_expired_session_expires_its_order(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    await desk.api.call(lambda client: client.v1.checkout.sessions.expire(session))
    assert (await desk.till.apply_payment(session_id=session)).outcome == "expired"
    assert (await desk.orders.find(order.id)).state == "expired"


async def test_what_isnt_ours_is_left_alone(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order, metadata={}, client_reference_id="cart-7", payment_intent_data={})
    intent = desk.stripe.checkout.pay(session)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "not_ours"
    assert (await desk.till.apply_payment(payment_intent=intent)).outcome == "not_ours"
    assert await desk.balance(order) == 0


async def test_what_stripe_doesnt_know_is_not_taken_for_anothers(desk: Desk) -> None:
    with pytest.raises(StripeUnknown):
        await desk.till.apply_payment(payment_intent="pi_nobodys")
    with pytest.raises(StripeUnknown):
        await desk.till.apply_payment(session_id="cs_nobodys")


async def test_a_payment_that_names_anothers_account_waits(desk: Desk) -> None:
    order, other = await desk.order(), await desk.order()
    metadata = {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(other.account_id)}
    session = await desk.session(order, metadata=metadata, payment_intent_data={"metadata": metadata})
    desk.stripe.checkout.pay(session)
    applied = await desk.till.apply_payment(session_id=session)
    assert (applied.outcome, applied.reason) == ("quarantined", "other_account")
    assert [await desk.balance(each) for each in (order, other)] == [0, 0]


async def test_a_payment_link_that_points_at_an_order_waits(desk: Desk) -> None:
    """Whoever opens a payment link of the operator's chooses its client_reference_id: it must prove nothing."""
    order = await desk.order()
    session = await desk.session(order, metadata={}, payment_intent_data={})
    desk.stripe.checkout.pay(session)
    applied = await desk.till.apply_payment(session_id=session)
    assert (applied.outcome, applied.reason) == ("quarantined", "not_named")
    assert await desk.balance(order) == 0


async def test_a_session_whose_payment_names_another_order_waits(desk: Desk) -> None:
    order, other = await desk.order(), await desk.order()
    metadata = {ORDER_KEY: str(other.id), ACCOUNT_KEY: str(other.account_id)}
    session = await desk.session(order, payment_intent_data={"metadata": metadata})
    intent = desk.stripe.checkout.pay(session)
    applied = await desk.till.apply_payment(payment_intent=intent)
    assert (applied.outcome, applied.reason) == ("quarantined", "not_named")
    assert [await desk.balance(each) for each in (order, other)] == [0, 0]


async def test_a_payment_by_hand_under_an_orders_name_waits(desk: Desk) -> None:
    order = await desk.order()
    intent = await a_bare_payment(desk, order)
    applied = await desk.till.apply_payment(payment_intent=intent)
    assert (applied.outcome, applied.reason) == ("quarantined", "no_session")
    assert await desk.balance(order) == 0


async def test_an_automatic_orders_payment_needs_no_session(desk: Desk) -> None:
    order = await desk.order(kind="auto")
    intent = await a_bare_payment(desk, order)
    assert (await desk.till.apply_payment(payment_intent=intent)).outcome == "paid"
    assert await desk.balance(order) == 1000


async def test_an_amount_that_isnt_the_orders_waits(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(replace(order, price=1))
    desk.stripe.checkout.pay(session)
    applied = await desk.till.apply_payment(session_id=session)
    assert (applied.outcome, applied.reason) == ("quarantined", "other_amount")


async def test_a_discount_that_nobody_allowed_waits(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    desk.stripe.checkout.pay(session, discount=1)
    applied = await desk.till.apply_payment(session_id=session)
    assert (applied.outcome, applied.reason) == ("quarantined", "discount")


async def test_a_second_session_of_one_order_waits_once_the_first_is_paid(desk: Desk) -> None:
    order = await desk.order()
    first, second = await desk.session(order), await desk.session(order)
    for session in (first, second):
        desk.stripe.checkout.pay(session)
    assert (await desk.till.apply_payment(session_id=second)).outcome == "paid"
    applied = await desk.till.apply_payment(session_id=first)
    assert (applied.outcome, applied.reason) == ("quarantined", "second_payment")
    assert await desk.balance(order) == 1000


async def test_a_declined_card_leaves_the_page_open(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    intent = desk.stripe.checkout.decline(session)
    assert (await desk.till.apply_payment(payment_intent=intent)).outcome == "open"
    assert (await desk.orders.find(order.id)).state == "created"
    desk.stripe.checkout.pay(session)
    assert (await desk.till.apply_payment(payment_intent=intent)).outcome == "paid"


async def test_what_comes_late_still_counts(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    desk.stripe.checkout.pay_later(session)
    await desk.orders.advance(order.id, "expired")
    desk.stripe.checkout.settle(session)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "paid"
    assert await desk.balance(order) == 1000


async def test_a_stale_look_undoes_nothing(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    desk.stripe.checkout.pay_later(session)
    stale = await desk.api.session(session)
    desk.stripe.checkout.settle(session)
    assert (await desk.till.apply_payment(session_id=session)).outcome == "paid"
    assert (await desk.till.apply_session(stale)).outcome == "known"
    assert (await desk.orders.find(order.id)).state == "paid"


async def test_an_order_that_nobody_was_sent_to_pay_expires(desk: Desk) -> None:
    order = await desk.order()
    assert (await desk.till.apply_payment(order.id)).outcome == "open"
    await desk.bank.owner.execute(
        "UPDATE farebox.orders SET created_at = created_at - interval '25 hours' WHERE id = $1", order.id
    )
    assert (await desk.till.apply_payment(order.id)).outcome == "expired"
    assert (await desk.orders.find(order.id)).state == "expired"


async def test_an_order_of_the_other_mode_is_left_alone(desk: Desk) -> None:
    order = await desk.order(livemode=True)
    assert (await desk.till.apply_payment(order.id)).outcome == "not_ours"


async def test_an_order_whose_session_this_stripe_account_doesnt_know_is_left_alone(desk: Desk) -> None:
    order = await desk.order()
    await desk.orders.opened(order.id, f"cs_elsewhere{order.id.hex}", "https://example.com/pay")
    assert (await desk.till.apply_payment(order.id)).outcome == "not_ours"
    assert (await desk.orders.find(order.id)).state == "open"


async def test_what_was_shown_in_another_currency_is_credited_as_ours(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order, adaptive_pricing={"enabled": True})
    desk.stripe.checkout.pay(session, presentment=(950, "eur"))
    assert (await desk.till.apply_payment(session_id=session)).outcome == "paid"
    assert (await desk.orders.find(order.id)).currency == "usd"


async def test_stripe_away_leaves_everything_for_another_time(desk: Desk) -> None:
    order = await desk.order()
    session = await desk.session(order)
    desk.stripe.checkout.pay(session)
    desk.stripe.faults.on("GET /v1/checkout/sessions/*", Unavailable())
    with pytest.raises(StripeAway):
        await desk.till.apply_payment(session_id=session)
    assert await desk.balance(order) == 0
    assert (await desk.till.apply_payment(session_id=session)).outcome == "paid"


async def a_bare_payment(desk: Desk, order: Order) -> str:
    """A PaymentIntent that no session made, paid: its id."""
    params: Any = {
        "amount": order.price,
        "currency": order.currency,
        "confirm": True,
        "payment_method": "pm_card_visa",
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "metadata": {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(order.account_id)},
    }
    return await desk.api.call(lambda client: client.v1.payment_intents.create(params).id)
