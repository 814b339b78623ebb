"""What goes wrong at the fake Stripe and on the way to it: keys that remember, answers that get lost."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import stripe

from tests.fakes.stripe import (
    Delay,
    ErrorAfter,
    ErrorBefore,
    FakeStripe,
    Fault,
    Hold,
    LostReply,
    LostRequest,
    RateLimited,
    Unavailable,
)

CREATE = "POST /v1/payment_intents"
KEEP_SECONDS = 24 * 3600


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as running:
        yield running


@pytest.fixture
def client(fake: FakeStripe) -> stripe.StripeClient:
    return stripe.StripeClient(fake.key, base_addresses={"api": fake.url}, max_network_retries=0)


def pay(client: stripe.StripeClient, key: str | None = None, amount: int = 500) -> stripe.PaymentIntent:
    params: Any = {"amount": amount, "currency": "usd", "payment_method": "pm_card_visa", "confirm": True}
    options: Any = {} if key is None else {"idempotency_key": key}
    return client.v1.payment_intents.create(params, options)


def test_a_key_gives_the_first_result_again(fake: FakeStripe, client: stripe.StripeClient) -> None:
    assert pay(client, "k").id == pay(client, "k").id
    assert [asked.replayed for asked in fake.asked] == [False, True]
    assert len(fake.payments.charges()) == 1


def test_other_parameters_under_a_key_are_refused(fake: FakeStripe, client: stripe.StripeClient) -> None:
    pay(client, "k")
    with pytest.raises(stripe.IdempotencyError, match="same parameters"):
        pay(client, "k", amount=501)
    with pytest.raises(stripe.IdempotencyError, match="same endpoint"):
        client.v1.customers.create({}, {"idempotency_key": "k"})
    assert len(fake.payments.charges()) == 1


def test_a_key_is_forgotten_after_a_day(fake: FakeStripe, client: stripe.StripeClient) -> None:
    first = pay(client, "k")
    fake.clock.advance(KEEP_SECONDS - 60)
    assert pay(client, "k").id == first.id
    fake.clock.advance(120)
    assert pay(client, "k").id != first.id


def test_a_key_of_one_mode_is_nothing_in_the_other(fake: FakeStripe, client: stripe.StripeClient) -> None:
    live = stripe.StripeClient("sk_live_x", base_addresses={"api": fake.url})
    one = client.v1.customers.create({}, {"idempotency_key": "k"})
    assert live.v1.customers.create({}, {"idempotency_key": "k"}).id != one.id


def test_a_key_in_use_is_a_conflict(fake: FakeStripe, client: stripe.StripeClient) -> None:
    hold = Hold(threading.Event(), after=True)
    fake.faults.on(CREATE, hold)
    with ThreadPoolExecutor(1) as pool:
        first: Future[stripe.PaymentIntent] = pool.submit(pay, client, "k")
        assert hold.reached.wait(20)
        with pytest.raises(stripe.APIError) as caught:
            pay(client, "k")
        assert caught.value.http_status == 409
        assert caught.value.error is not None
        assert caught.value.error.code == "idempotency_key_in_use"
        assert len(fake.payments.charges()) == 1
        hold.until.set()
        paid = first.result().id
    assert pay(client, "k").id == paid


def test_eight_at_once_with_one_key_pay_once(fake: FakeStripe) -> None:
    retrying = stripe.StripeClient(fake.key, base_addresses={"api": fake.url}, max_network_retries=3)
    fake.faults.on(CREATE, Delay(0.1))
    with ThreadPoolExecutor(8) as pool:
        found = {intent.id for intent in pool.map(lambda _: pay(retrying, "k"), range(8))}
    assert len(found) == len(fake.payments.charges()) == 1


def test_a_declined_payment_is_remembered_too(fake: FakeStripe, client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({}).id
    method = fake.customers.save(customer, "decline")
    params: Any = {"amount": 5, "currency": "usd", "customer": customer, "payment_method": method, "confirm": True}
    for _ in range(2):
        with pytest.raises(stripe.CardError):
            client.v1.payment_intents.create(params, {"idempotency_key": "k"})
        fake.customers.behave(method, "succeed")
    assert fake.payments.charges() == []


def test_wrong_parameters_are_not_remembered(fake: FakeStripe, client: stripe.StripeClient) -> None:
    params: Any = {"amount": "many", "currency": "usd"}
    with pytest.raises(stripe.InvalidRequestError):
        client.v1.payment_intents.create(params, {"idempotency_key": "k"})
    params["amount"] = 5
    assert client.v1.payment_intents.create(params, {"idempotency_key": "k"}).amount == 5


@pytest.mark.parametrize(
    ("fault", "error", "paid_first", "paid_again"),
    [
        # fault, what the client sees, what was paid then, and after the same request with the same key.
        (Unavailable(), stripe.APIError, 0, 1),
        (RateLimited(), stripe.RateLimitError, 0, 1),
        (LostRequest(), stripe.APIConnectionError, 0, 1),
        (LostReply(), stripe.APIConnectionError, 1, 1),
        (ErrorBefore(), stripe.APIError, 0, 0),
        (ErrorAfter(), stripe.APIError, 1, 1),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, type | int) else "",
)
def test_what_is_paid_after_a_fault(
    fake: FakeStripe,
    client: stripe.StripeClient,
    fault: Fault,
    error: type[stripe.StripeError],
    paid_first: int,
    paid_again: int,
) -> None:
    fake.faults.on(CREATE, fault)
    with pytest.raises(error):
        pay(client, "k")
    assert len(fake.payments.charges()) == paid_first
    if isinstance(fault, ErrorBefore | ErrorAfter):
        # The key gives the 500 for as long as it lives; only a list says what became of it.
        with pytest.raises(error):
            pay(client, "k")
        assert len(client.v1.payment_intents.list({}).data) == paid_again
    else:
        pay(client, "k")
    assert len(fake.payments.charges()) == paid_again
    assert fake.faults.hit == [(CREATE, fault)]


def test_the_clients_own_retries_find_the_first_result(fake: FakeStripe) -> None:
    retrying = stripe.StripeClient(fake.key, base_addresses={"api": fake.url}, max_network_retries=2)
    fake.faults.on(CREATE, LostReply())
    fake.faults.on(CREATE, Unavailable())
    assert pay(retrying).status == "succeeded"
    assert len(fake.payments.charges()) == 1


def test_faults_are_drawn_from_a_seed(fake: FakeStripe, client: stripe.StripeClient) -> None:
    def met(seed: int) -> list[bool]:
        fake.faults.seeded(seed, 0.3, (Unavailable(), RateLimited()))
        results = []
        for _ in range(30):
            try:
                client.v1.customers.list({})
                results.append(False)
            except stripe.StripeError:
                results.append(True)
        return results

    assert met(1) == met(1) != met(2)
    fake.faults.clear()
    assert client.v1.customers.list({}).data == []
