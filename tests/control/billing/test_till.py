"""The till: what Stripe says of a payment, held against our order, over a real ledger and the real Stripe client."""

import asyncio

from tests.control.billing.till import Desk


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
    assert (await desk.till.apply_payment(payment_intent="pi_nobodys")).outcome == "not_ours"
    assert (await desk.till.apply_payment(session_id="cs_nobodys")).outcome == "not_ours"
    assert await desk.balance(order) == 0
