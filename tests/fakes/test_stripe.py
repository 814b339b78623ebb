"""The fake Stripe, through the real stripe-python client: each call that Farebox makes, and Stripe's own rules."""

from collections.abc import Iterator
from typing import Any

import pytest
import stripe

from tests.fakes.stripe import FakeStripe


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as running:
        yield running


@pytest.fixture
def client(fake: FakeStripe) -> stripe.StripeClient:
    return client_of(fake)


def client_of(fake: FakeStripe, key: str | None = None, retries: int = 0) -> stripe.StripeClient:
    return stripe.StripeClient(key or fake.key, base_addresses={"api": fake.url}, max_network_retries=retries)


def session(client: stripe.StripeClient, *, amount: int = 1000, **more: Any) -> stripe.checkout.Session:
    price: Any = {"currency": "usd", "unit_amount": amount, "product_data": {"name": "10 credits"}}
    params: Any = {
        "mode": "payment",
        "line_items": [{"price_data": price, "quantity": 1}],
        "client_reference_id": "order-1",
        "payment_intent_data": {"metadata": {"farebox_order": "order-1"}},
        "success_url": "https://example.com/done",
        "cancel_url": "https://example.com/back",
    }
    return client.v1.checkout.sessions.create({**params, **more})


def paid(fake: FakeStripe, client: stripe.StripeClient, amount: int = 1000) -> str:
    """A PaymentIntent that was paid."""
    found = fake.checkout.pay(session(client, amount=amount).id)
    assert found is not None
    return found


def types(fake: FakeStripe) -> list[str]:
    return [event["type"] for event in fake.events]


def test_a_session_is_made_and_paid(fake: FakeStripe, client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({"metadata": {"farebox_account": "a"}})
    made = session(client, customer=customer.id)
    assert (made.status, made.payment_status, made.payment_intent) == ("open", "unpaid", None)
    assert made.url is not None
    assert made.url.startswith("https://checkout.stripe.com/")
    intent = fake.checkout.pay(made.id, tax=190, discount=100)
    got = client.v1.checkout.sessions.retrieve(made.id, {"expand": ["payment_intent.latest_charge"]})
    assert (got.status, got.payment_status, got.client_reference_id) == ("complete", "paid", "order-1")
    assert (got.amount_subtotal, got.amount_total, got.currency) == (1000, 1090, "usd")
    assert got.total_details is not None
    assert (got.total_details.amount_discount, got.total_details.amount_tax) == (100, 190)
    found = got.payment_intent
    assert isinstance(found, stripe.PaymentIntent)
    assert (found.id, found.status, found.amount_received) == (intent, "succeeded", 1090)
    assert found.metadata["farebox_order"] == "order-1"
    assert found.customer == customer.id
    assert isinstance(found.latest_charge, stripe.Charge)
    assert found.latest_charge.paid
    assert types(fake)[-3:] == ["charge.succeeded", "payment_intent.succeeded", "checkout.session.completed"]


def test_a_refund_fails_later(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = paid(fake, client)
    refund = client.v1.refunds.create({"payment_intent": intent, "amount": 300, "metadata": {"farebox_refund": "r"}})
    assert (refund.status, refund.amount) == ("succeeded", 300)
    assert refund.metadata is not None
    assert refund.metadata["farebox_refund"] == "r"
    fake.refunds.settle(refund.id, "failed")
    assert client.v1.refunds.retrieve(refund.id).status == "failed"
    assert types(fake)[-5:] == [
        "refund.created", "charge.refunded", "refund.failed", "refund.updated", "charge.refund.updated",
    ]  # fmt: skip


def test_a_key_gives_the_first_result_again(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = paid(fake, client)
    one, two = (
        client.v1.refunds.create({"payment_intent": intent, "amount": 1}, {"idempotency_key": "k"}) for _ in range(2)
    )
    assert one.id == two.id
    assert [asked.replayed for asked in fake.asked[-2:]] == [False, True]
    with pytest.raises(stripe.IdempotencyError):
        client.v1.refunds.create({"payment_intent": intent, "amount": 2}, {"idempotency_key": "k"})


def test_events_are_signed_by_stripes_own_helper(fake: FakeStripe, client: stripe.StripeClient) -> None:
    paid(fake, client)
    event = fake.events_of("checkout.session.completed")[0]
    post = fake.signed(event)
    read = stripe.Webhook.construct_event(post.body, post.headers["stripe-signature"], fake.secret)
    assert (read.id, read.type) == (event["id"], "checkout.session.completed")
