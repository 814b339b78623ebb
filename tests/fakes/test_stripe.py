"""The fake Stripe, through the real stripe-python client: each call that Farebox makes, and Stripe's own rules."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import stripe

from tests.fakes.stripe import FakeStripe, Object
from tests.fakes.stripe.shapes import fields_of

DAY_SECONDS = 24 * 3600


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
    params |= more
    return client.v1.checkout.sessions.create(params)


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
    got = client.v1.checkout.sessions.retrieve(made.id, {"expand": ["payment_intent.latest_charge", "line_items"]})
    assert (got.status, got.payment_status, got.client_reference_id) == ("complete", "paid", "order-1")
    assert (got.amount_subtotal, got.amount_total, got.currency) == (1000, 1090, "usd")
    assert got.total_details is not None
    assert (got.total_details.amount_discount, got.total_details.amount_tax) == (100, 190)
    assert got.line_items is not None
    assert [item.description for item in got.line_items.data] == ["10 credits"]
    found = got.payment_intent
    assert isinstance(found, stripe.PaymentIntent)
    assert (found.id, found.status, found.amount_received) == (intent, "succeeded", 1090)
    assert found.metadata["farebox_order"] == "order-1"
    assert found.customer == customer.id
    assert isinstance(found.latest_charge, stripe.Charge)
    assert found.latest_charge.paid
    assert types(fake)[-3:] == ["charge.succeeded", "payment_intent.succeeded", "checkout.session.completed"]
    assert [one.id for one in client.v1.checkout.sessions.list({"payment_intent": found.id}).data] == [made.id]


def test_a_session_is_paid_later_or_never(fake: FakeStripe, client: stripe.StripeClient) -> None:
    one, two = session(client), session(client)
    for made in (one, two):
        fake.checkout.pay_later(made.id)
        got = client.v1.checkout.sessions.retrieve(made.id, {"expand": ["payment_intent"]})
        assert (got.status, got.payment_status) == ("complete", "unpaid")
        assert isinstance(got.payment_intent, stripe.PaymentIntent)
        assert (got.payment_intent.status, got.payment_intent.amount_received) == ("processing", 0)
    fake.checkout.settle(one.id)
    fake.checkout.settle(two.id, succeed=False)
    assert [client.v1.checkout.sessions.retrieve(made.id).payment_status for made in (one, two)] == ["paid", "unpaid"]
    assert types(fake)[-6:] == [
        "charge.succeeded", "payment_intent.succeeded", "checkout.session.async_payment_succeeded",
        "charge.failed", "payment_intent.payment_failed", "checkout.session.async_payment_failed",
    ]  # fmt: skip
    assert len(fake.payments.charges()) == 1


def test_a_discount_of_all_leaves_no_payment(fake: FakeStripe, client: stripe.StripeClient) -> None:
    made = session(client)
    assert fake.checkout.pay(made.id, discount=1000) is None
    got = client.v1.checkout.sessions.retrieve(made.id)
    assert (got.payment_status, got.payment_intent, got.amount_total) == ("no_payment_required", None, 0)
    assert fake.payments.charges() == []


def test_another_currency_is_shown_beside_ours(fake: FakeStripe, client: stripe.StripeClient) -> None:
    made = session(client, adaptive_pricing={"enabled": True})
    fake.checkout.pay(made.id, presentment=(950, "eur"))
    got = client.v1.checkout.sessions.retrieve(made.id, {"expand": ["payment_intent"]})
    assert (got.currency, got.amount_total) == ("usd", 1000)
    assert got.presentment_details is not None
    assert got.presentment_details.presentment_currency == "eur"
    assert isinstance(got.payment_intent, stripe.PaymentIntent)
    assert (got.payment_intent.currency, got.payment_intent.amount) == ("usd", 1000)


def test_a_declined_customer_tries_again(fake: FakeStripe, client: stripe.StripeClient) -> None:
    made = session(client)
    declined = fake.checkout.decline(made.id)
    assert client.v1.payment_intents.retrieve(declined).status == "requires_payment_method"
    assert client.v1.checkout.sessions.retrieve(made.id).status == "open"
    assert fake.checkout.pay(made.id) == declined


def test_sessions_expire_when_asked_to_and_in_time(fake: FakeStripe, client: stripe.StripeClient) -> None:
    asked, left = session(client), session(client)
    client.v1.checkout.sessions.expire(asked.id)
    with pytest.raises(stripe.InvalidRequestError):
        client.v1.checkout.sessions.expire(asked.id)
    fake.clock.advance(DAY_SECONDS + 1)
    fake.checkout.tick()
    assert {client.v1.checkout.sessions.retrieve(one.id).status for one in (asked, left)} == {"expired"}
    assert types(fake).count("checkout.session.expired") == 2


def test_an_invoice_of_a_checkout_names_no_subscription(fake: FakeStripe, client: stripe.StripeClient) -> None:
    made = session(client, invoice_creation={"enabled": True})
    intent = fake.checkout.pay(made.id, tax=100)
    event = fake.events_of("invoice.paid")[0]
    invoice = client.v1.invoices.retrieve(event["data"]["object"]["id"], {"expand": ["payments"]})
    assert (invoice.parent, invoice.amount_paid, invoice.status) == (None, 1100, "paid")
    assert invoice.payments is not None
    assert [one.payment.payment_intent for one in invoice.payments.data] == [intent]


def test_a_payment_without_its_customer(fake: FakeStripe, client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({}).id
    other = client.v1.customers.create({}).id
    method = fake.customers.save(customer)

    def pay(**more: Any) -> stripe.PaymentIntent:
        params: Any = {
            "amount": 500,
            "currency": "usd",
            "customer": customer,
            "payment_method": method,
            "off_session": True,
            "confirm": True,
            "metadata": {"farebox_order": "o"},
        }
        params |= more
        return client.v1.payment_intents.create(params)

    assert (pay().status, pay().amount_received) == ("succeeded", 500)
    with pytest.raises(stripe.InvalidRequestError, match="does not belong"):
        pay(customer=other)
    fake.customers.behave(method, "insufficient_funds")
    with pytest.raises(stripe.CardError) as caught:
        pay()
    error = caught.value
    assert (error.code, error.http_status, error.error and error.error.decline_code) == (
        "card_declined",
        402,
        "insufficient_funds",
    )
    assert error.error is not None
    assert error.error.payment_intent is not None
    declined = client.v1.payment_intents.retrieve(error.error.payment_intent.id)
    assert (declined.status, declined.payment_method) == ("requires_payment_method", None)
    assert declined.last_payment_error is not None
    assert declined.last_payment_error.decline_code == "insufficient_funds"
    fake.customers.behave(method, "authentication_required")
    with pytest.raises(stripe.CardError) as caught:
        pay()
    assert caught.value.code == "authentication_required"
    assert pay(off_session=False).status == "requires_action"
    fake.customers.behave(method, "processing")
    later = pay()
    assert (later.status, later.amount_received) == ("processing", 0)
    with pytest.raises(stripe.InvalidRequestError) as refused:
        client.v1.payment_intents.cancel(later.id)
    assert refused.value.code == "payment_intent_unexpected_state"
    fake.payments.settle(later.id)
    assert client.v1.payment_intents.retrieve(later.id).status == "succeeded"
    assert client.v1.payment_intents.cancel(declined.id).status == "canceled"
    assert sum(charge["amount"] for charge in fake.payments.charges(customer)) == 1500


def test_a_checkout_saves_the_way_it_was_paid(fake: FakeStripe, client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({}).id
    made = session(client, customer=customer, payment_intent_data={"setup_future_usage": "off_session"})
    intent = client.v1.payment_intents.retrieve(fake.checkout.pay(made.id, saves="decline") or "")
    assert isinstance(intent.payment_method, str)
    saved = client.v1.payment_methods.list({"customer": customer})
    assert [one.id for one in saved.data] == [intent.payment_method]
    with pytest.raises(stripe.CardError):
        client.v1.payment_intents.create(
            {
                "amount": 500,
                "currency": "usd",
                "customer": customer,
                "payment_method": intent.payment_method,
                "off_session": True,
                "confirm": True,
            }
        )


def test_lists_are_paged_and_bounded_by_time(fake: FakeStripe, client: stripe.StripeClient) -> None:
    made = [paid(fake, client, 100 + number) for number in range(7)]
    fake.clock.advance(1000)
    late = paid(fake, client)
    pages = client.v1.payment_intents.list({"limit": 3})
    assert [one.id for one in pages.auto_paging_iter()] == [late, *reversed(made)]
    since = client.v1.payment_intents.list({"created": {"gte": fake.clock.now() - 500}})
    assert [one.id for one in since.data] == [late]
    forward = client.v1.payment_intents.list({"limit": 2, "ending_before": made[0]})
    assert [one.id for one in forward.auto_paging_iter()] == [*made[1:], late]


def test_a_search_is_behind_what_it_searches(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = paid(fake, client)
    query: Any = {"query": "metadata['farebox_order']:'order-1' AND status:'succeeded'"}
    assert client.v1.payment_intents.search(query).data == []
    fake.clock.advance(61)
    assert [one.id for one in client.v1.payment_intents.search(query).data] == [intent]
    assert client.v1.payment_intents.search({"query": "metadata['farebox_order']:'order-2'"}).data == []


def test_refunds_of_parts_and_too_much(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = paid(fake, client)
    refund = client.v1.refunds.create({"payment_intent": intent, "amount": 300, "metadata": {"farebox_refund": "r"}})
    assert (refund.status, refund.amount, refund.payment_intent) == ("succeeded", 300, intent)
    assert refund.metadata is not None
    assert refund.metadata["farebox_refund"] == "r"
    with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded"):
        client.v1.refunds.create({"payment_intent": intent, "amount": 701})
    rest = client.v1.refunds.create({"payment_intent": intent})
    assert rest.amount == 700
    with pytest.raises(stripe.InvalidRequestError) as refused:
        client.v1.refunds.create({"payment_intent": intent})
    assert refused.value.code == "charge_already_refunded"
    assert {one.id for one in client.v1.refunds.list({"payment_intent": intent}).data} == {refund.id, rest.id}
    charge = client.v1.payment_intents.retrieve(intent, {"expand": ["latest_charge.refunds"]}).latest_charge
    assert isinstance(charge, stripe.Charge)
    assert (charge.amount_refunded, charge.refunded) == (1000, True)
    assert charge.refunds is not None
    assert len(charge.refunds.data) == 2


def test_a_refund_fails_later(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = paid(fake, client)
    refund = client.v1.refunds.create({"payment_intent": intent, "amount": 300})
    fake.refunds.beginning = "pending"
    slow = client.v1.refunds.create({"payment_intent": intent, "amount": 700})
    assert slow.status == "pending"
    fake.refunds.settle(slow.id, "succeeded")
    fake.refunds.settle(refund.id, "failed")
    got = client.v1.refunds.retrieve(refund.id)
    assert (got.status, got.failure_reason) == ("failed", "expired_or_canceled_card")
    assert types(fake)[-3:] == ["refund.failed", "refund.updated", "charge.refund.updated"]
    assert client.v1.refunds.create({"payment_intent": intent}).amount == 300


def test_disputes_take_money_and_give_it_back(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = paid(fake, client)
    name = fake.disputes.open(intent, 400)
    got = client.v1.disputes.retrieve(name)
    assert (got.status, got.amount, got.payment_intent) == ("needs_response", 400, intent)
    assert [(one.amount, one.reporting_category) for one in got.balance_transactions] == [(-400, "dispute")]
    with pytest.raises(stripe.InvalidRequestError) as refused:
        client.v1.refunds.create({"payment_intent": intent})
    assert refused.value.code == "charge_disputed"
    fake.disputes.move(name, "under_review")
    fake.disputes.move(name, "won")
    got = client.v1.disputes.retrieve(name)
    assert (got.status, [one.amount for one in got.balance_transactions]) == ("won", [-400, 400])
    assert types(fake)[-5:] == [
        "charge.dispute.created", "charge.dispute.funds_withdrawn", "charge.dispute.updated",
        "charge.dispute.funds_reinstated", "charge.dispute.closed",
    ]  # fmt: skip


def test_an_inquiry_takes_nothing_until_it_is_a_dispute(fake: FakeStripe, client: stripe.StripeClient) -> None:
    ended, grown = (fake.disputes.open(paid(fake, client), inquiry=True) for _ in range(2))
    fake.disputes.move(ended, "warning_closed")
    got = client.v1.disputes.retrieve(ended)
    assert (got.status, got.balance_transactions, got.is_charge_refundable) == ("warning_closed", [], True)
    fake.disputes.move(grown, "needs_response")
    got = client.v1.disputes.retrieve(grown)
    assert (len(got.balance_transactions), got.is_charge_refundable) == (1, False)
    fake.disputes.move(grown, "lost")
    assert len(client.v1.disputes.retrieve(grown).balance_transactions) == 1
    assert [one.id for one in client.v1.disputes.list({}).data] == [grown, ended]


def test_a_subscription_is_billed(fake: FakeStripe, client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({"metadata": {"farebox_account": "a"}}).id
    price = fake.invoices.price(2000, "eur")
    subscription = fake.invoices.subscribe(customer, price, metadata={"plan": "pro"})
    name = fake.invoices.bill(subscription, tax=380, pay=False)
    assert client.v1.invoices.retrieve(name).status == "open"
    fake.invoices.fail(name)
    intent = fake.invoices.pay(name)
    got = client.v1.invoices.retrieve(name, {"expand": ["payments"]})
    assert (got.status, got.customer, got.currency, got.livemode) == ("paid", customer, "eur", False)
    assert (got.subtotal, got.total, got.amount_paid) == (2000, 2380, 2380)
    line = got.lines.data[0]
    assert line.pricing is not None
    assert line.pricing.price_details is not None
    assert (line.pricing.price_details.price, line.amount, line.quantity) == (price, 2000, 1)
    assert got.parent is not None
    assert got.parent.subscription_details is not None
    assert got.parent.subscription_details.subscription == subscription
    assert got.payments is not None
    assert [one.payment.payment_intent for one in got.payments.data] == [intent]
    by_intent: Any = {"payment": {"type": "payment_intent", "payment_intent": intent}}
    assert [one.invoice for one in client.v1.invoice_payments.list(by_intent).data] == [name]
    assert client.v1.subscriptions.retrieve(subscription).status == "active"
    assert client.v1.prices.retrieve(price).unit_amount == 2000
    assert len(list(client.v1.invoices.line_items.list(name).auto_paging_iter())) == 1
    assert types(fake)[-2:] == ["invoice.paid", "invoice.payment_succeeded"]


def test_a_webhook_endpoint_shows_its_secret_once(fake: FakeStripe, client: stripe.StripeClient) -> None:
    events: Any = ["refund.created", "refund.failed"]
    made = client.v1.webhook_endpoints.create({"url": "https://example.com/hook", "enabled_events": events})
    assert made.secret is not None
    assert made.secret.startswith("whsec_")
    assert client.v1.webhook_endpoints.list({}).data[0].secret is None
    client.v1.webhook_endpoints.update(made.id, {"enabled_events": ["*"]})
    assert client.v1.webhook_endpoints.retrieve(made.id).enabled_events == ["*"]
    client.v1.webhook_endpoints.delete(made.id)
    assert client.v1.webhook_endpoints.list({}).data == []


def test_events_are_signed_by_stripes_own_helper(fake: FakeStripe, client: stripe.StripeClient) -> None:
    paid(fake, client)
    event = fake.events_of("checkout.session.completed")[0]
    post = fake.signed(event)
    read = stripe.Webhook.construct_event(post.body, post.headers["stripe-signature"], fake.secret)
    assert (read.id, read.type) == (event["id"], "checkout.session.completed")
    both = fake.signed(event, "whsec_old", "whsec_new")
    for secret in ("whsec_old", "whsec_new"):
        stripe.Webhook.construct_event(both.body, both.headers["stripe-signature"], secret)
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.Webhook.construct_event(post.body, post.headers["stripe-signature"], "whsec_other")
    old = fake.signed(event, at=int(time.time()) - 400)
    with pytest.raises(stripe.SignatureVerificationError, match="tolerance"):
        stripe.Webhook.construct_event(old.body, old.headers["stripe-signature"], fake.secret)


def test_events_are_listed_for_a_month(fake: FakeStripe, client: stripe.StripeClient) -> None:
    paid(fake, client)
    kinds: Any = {"types": ["payment_intent.succeeded", "checkout.session.completed"]}
    found = client.v1.events.list(kinds).data
    assert [one.type for one in found] == ["checkout.session.completed", "payment_intent.succeeded"]
    assert client.v1.events.retrieve(found[0].id).api_version == stripe.api_version
    fake.clock.advance(31 * DAY_SECONDS)
    assert client.v1.events.list(kinds).data == []


def test_the_modes_see_nothing_of_each_other(fake: FakeStripe, client: stripe.StripeClient) -> None:
    live = client_of(fake, "rk_live_other")
    intent = paid(fake, client)
    with pytest.raises(stripe.InvalidRequestError, match="a similar object exists in test mode") as refused:
        live.v1.payment_intents.retrieve(intent)
    assert (refused.value.code, refused.value.http_status) == ("resource_missing", 404)
    assert live.v1.payment_intents.list({}).data == []
    assert live.v1.customers.create({}).livemode
    assert not client.v1.customers.create({}).livemode
    with pytest.raises(stripe.AuthenticationError):
        client_of(fake, "pk_test_public").v1.customers.list({})


def test_what_stripe_does_not_know_is_refused(fake: FakeStripe, client: stripe.StripeClient) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"amount_in_cents": 5}, "unknown parameter"),
        ({"payment_intent_data": {"meta": {"a": "b"}}}, "unknown parameter: payment_intent_data.meta"),
        ({"line_items": [{"price_data": {"unit_amount": 5}}]}, "Missing required param"),
        ({"expires_at": "soon"}, "Invalid integer"),
        ({"automatic_tax": {"enabled": "perhaps"}}, "Invalid boolean"),
        ({"customer": "cus_none"}, "No such customer"),
        ({"expires_at": 5}, "at least 30 minutes"),
        ({"expand": ["nothing"]}, "cannot be expanded"),
    ]
    for more, message in wrong:
        with pytest.raises(stripe.InvalidRequestError, match=message):
            session(client, **more)
    with pytest.raises(stripe.InvalidRequestError, match="Unrecognized request URL"):
        client.raw_request("post", "/v1/nothing")


def test_the_clients_own_thread_may_be_one_of_many(fake: FakeStripe, client: stripe.StripeClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: client.v1.customers.create({}).id, range(40)))
    assert len(set(ids)) == 40


def test_no_request_is_answered_without_a_key(fake: FakeStripe) -> None:
    answer = httpx2.get(f"{fake.url}/v1/customers", trust_env=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "invalid_request_error")


RESOURCES: dict[str, type[stripe.StripeObject]] = {
    "checkout.session": stripe.checkout.Session, "payment_intent": stripe.PaymentIntent, "charge": stripe.Charge,
    "refund": stripe.Refund, "dispute": stripe.Dispute, "customer": stripe.Customer, "invoice": stripe.Invoice,
    "payment_method": stripe.PaymentMethod, "balance_transaction": stripe.BalanceTransaction, "event": stripe.Event,
    "subscription": stripe.Subscription, "price": stripe.Price, "product": stripe.Product,
    "invoice_payment": stripe.InvoicePayment,
}  # fmt: skip


def test_objects_have_the_fields_that_the_library_declares(fake: FakeStripe, client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({}).id
    later = session(client, customer=customer, payment_intent_data={"setup_future_usage": "off_session"})
    fake.checkout.pay_later(later.id)
    fake.checkout.settle(later.id, succeed=False)
    made = session(client, invoice_creation={"enabled": True})
    intent = fake.checkout.pay(made.id, tax=5, discount=7, presentment=(900, "eur"))
    assert intent is not None
    fake.refunds.settle(fake.refunds.create(intent, 100)["id"], "failed")
    fake.disputes.move(fake.disputes.open(intent), "won")
    fake.invoices.bill(fake.invoices.subscribe(customer, fake.invoices.price(100)), tax=5, discount=3, proration=9)
    seen = set()
    for kind, resource in RESOURCES.items():
        for thing in fake.state.all(kind):
            seen.add(kind)
            assert_declared(thing, resource, kind)
    assert seen == RESOURCES.keys()


def assert_declared(thing: Object, resource: type[stripe.StripeObject], path: str) -> None:
    fields = fields_of(resource)
    assert thing.keys() <= fields.keys(), f"{path} has no {thing.keys() - fields.keys()}"
    absent = {name for name, optional in fields.items() if not optional and name not in thing}
    assert not absent, f"{path} lacks {absent}"
    null = {name for name, value in thing.items() if value is None and not fields[name]}
    assert not null, f"{path}: {null} can't be null"
    inner = getattr(resource, "_inner_class_types", {})
    for name, value in thing.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and name in inner:
                assert_declared(one, inner[name], f"{path}.{name}")
