"""Forged webhooks: none brings a credit, and each is refused clearly. Over HTTP, a real ledger, a real Stripe client.

Each forgery of ``forgeries.py`` is about a session that *was* paid at Stripe and of which we haven't heard: whatever
got past the signature would be credited. At the end the true event comes, and is: the trap was set.
"""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import asyncpg
import httpx2
import pytest

from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from proxy.control.billing.webhooks import PATH
from proxy.ledger.orders import Order
from tests.control.billing.endpoint import Endpoint, payments, running_endpoint
from tests.control.billing.forgeries import FORGERIES, Forgery, header
from tests.control.billing.signing import OLD_SECRET, SECRET
from tests.control.billing.till import Desk, open_desk
from tests.fakes.stripe import FakeStripe, Object
from tests.ledger.bank import Bank


@dataclass(frozen=True, slots=True)
class Trap:
    """A till behind the endpoint, an order whose payment we haven't heard of, and the true event that says so."""

    desk: Desk
    endpoint: Endpoint
    order: Order
    body: bytes

    async def send(self, forgery: Forgery) -> httpx2.Response:
        headers = [("content-type", "application/json; charset=utf-8"), *forgery.headers]
        return await self.endpoint.http.post(PATH, content=forgery.body, headers=headers)

    async def tell(self, event: Object, **changes: Any) -> str:
        """Deliver an event, truly signed; its outcome."""
        body = json.dumps(event | changes, indent=2).encode()
        headers = {"stripe-signature": header(body, int(time.time()))}
        answer = await self.endpoint.http.post(PATH, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["outcome"])

    async def credits(self) -> int:
        """What all accounts of this database were credited from Stripe."""
        connection = await asyncpg.connect(self.desk.bank.database.superuser)
        query = (
            "SELECT coalesce(sum(amount), 0)::bigint FROM farebox.transfers WHERE kind IN ('purchase', 'promo', 'plan')"
        )
        found: int = await connection.fetchval(query)
        await connection.close()
        return found

    async def reason(self, payment: str | None) -> str | None:
        """Why a payment is in quarantine."""
        connection = await asyncpg.connect(self.desk.bank.database.superuser)
        found: str | None = await connection.fetchval(
            "SELECT reason FROM farebox.quarantine WHERE payment = $1", payment
        )
        await connection.close()
        return found


def completed(desk: Desk, session: str) -> Object:
    """What Stripe has told of the session."""
    [event] = [
        event
        for event in desk.stripe.events_of("checkout.session.completed")
        if event["data"]["object"]["id"] == session
    ]
    return event


@pytest.fixture
async def set_trap(bank: Bank) -> AsyncIterator[Callable[..., Awaitable[Trap]]]:
    async with AsyncExitStack() as stack:

        async def make(*, live: bool = False) -> Trap:
            stripe = stack.enter_context(FakeStripe(live=live))
            desk = await stack.enter_async_context(open_desk(bank, stripe))
            order = await desk.order(livemode=live, bonus=100)
            session = await desk.session(order)
            desk.stripe.checkout.pay(session, tax=190)
            body = json.dumps(completed(desk, session), indent=2).encode()
            endpoint = await stack.enter_async_context(
                running_endpoint(bank.control._pool, payments(desk.till), livemode=live)
            )
            return Trap(desk, endpoint, order, body)

        yield make


@pytest.fixture
async def trap(set_trap: Callable[..., Awaitable[Trap]]) -> Trap:
    return await set_trap()


def test_there_are_more_than_two_hundred() -> None:
    body = json.dumps({"id": "evt_1", "livemode": False, "data": {"object": {"id": "cs_1"}}}).encode()
    made = [forgery for kind in FORGERIES.values() for forgery in kind(body, 1_790_000_000)]
    assert len(made) >= 200
    assert len({(forgery.body, forgery.headers) for forgery in made}) >= 200


@pytest.mark.parametrize(("kind", "live"), [*((kind, False) for kind in FORGERIES), ("the_other_mode", True)])
async def test_a_forgery_brings_nothing_and_is_refused_clearly(
    set_trap: Callable[..., Awaitable[Trap]], kind: str, live: bool
) -> None:
    trap = await set_trap(live=live)
    before = await trap.credits()
    events = len(await trap.endpoint.events.newest(limit=1000))
    wrong = []
    for forgery in FORGERIES[kind](trap.body, int(time.time())):
        answer = await trap.send(forgery)
        said = answer.json().get("error", {})
        if (answer.status_code, said.get("code")) != (forgery.status, forgery.code) or len(said["message"]) < 20:
            wrong.append((forgery.name, answer.status_code, said))
    assert wrong == []
    assert await trap.credits() == before
    assert len(await trap.endpoint.events.newest(limit=1000)) == events
    # The trap was set.
    assert await trap.tell(json.loads(trap.body)) == "paid"
    assert await trap.credits() == before + 1100
    assert await trap.desk.balance(trap.order) == 1100


async def test_only_a_post_to_the_endpoint_is_served(trap: Trap) -> None:
    headers = {"stripe-signature": header(trap.body, int(time.time()))}
    for method, path in (("PUT", PATH), ("PATCH", PATH), ("DELETE", PATH), ("GET", PATH)):
        answer = await trap.endpoint.http.request(method, path, content=trap.body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    for path in (
        "/webhooks",
        "/webhooks/Stripe",
        "/v1/webhooks/stripe",
        "/webhooks/stripe/x",
        "/admin/webhooks/stripe",
    ):
        answer = await trap.endpoint.http.post(path, content=trap.body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert await trap.desk.balance(trap.order) == 0


async def test_a_replay_credits_nothing_more(trap: Trap) -> None:
    now = int(time.time())
    event = json.loads(trap.body)
    assert await trap.tell(event) == "paid"
    v1 = header(trap.body, now).partition(",")[2]
    for value in (header(trap.body, now), f"{v1},t={now}", f"t={now},v0=0,{v1}", header(trap.body, now + 250)):
        answer = await trap.send(Forgery("replay", "", trap.body, (("stripe-signature", value),)))
        assert (answer.status_code, answer.json()["outcome"]) == (200, "known")
    # Even who knows the secret, and makes the same news up under other names, is told the truth again.
    for number in range(4):
        assert await trap.tell(event, id=f"evt_again{number}", created=now + number) == "known"
    about = event["data"]["object"] | {"id": event["data"]["object"]["payment_intent"], "object": "payment_intent"}
    again = {"id": "evt_byanother", "type": "payment_intent.succeeded", "data": {"object": about}}
    assert await trap.tell(event, **again) == "known"
    assert await trap.desk.balance(trap.order) == 1100


async def test_what_an_event_says_of_its_object_is_not_believed(trap: Trap) -> None:
    """Truly signed, and untrue: only what Stripe says when it is asked counts."""
    desk, before = trap.desk, await trap.credits()
    order = await desk.order()
    true = json.loads(trap.body)

    async def claim(session: str, intent: str | None, number: int) -> str:
        about = true["data"]["object"] | {"id": session, "payment_intent": intent, "client_reference_id": str(order.id)}
        assert about["payment_status"] == "paid"
        return await trap.tell(true, id=f"evt_{session[3:]}{number}", data={"object": about})

    session = await desk.session(order)
    assert await claim(session, "pi_1", 1) == "open"
    declined = desk.stripe.checkout.decline(session)
    assert await claim(session, declined, 2) == "open"
    intent = {"id": declined, "object": "payment_intent", "status": "succeeded", "amount_received": 1000}
    told = {"id": "evt_declined", "type": "payment_intent.succeeded", "data": {"object": intent}}
    assert await trap.tell(true, **told) == "open"
    await desk.api.call(lambda client: client.v1.checkout.sessions.expire(session))
    assert await claim(session, "pi_1", 5) == "expired"
    later = await desk.session(order := await desk.order())
    waiting = desk.stripe.checkout.pay_later(later)
    assert await claim(later, waiting, 6) == "pending"
    assert await trap.credits() == before
    assert (await desk.orders.find(order.id)).state == "pending"


async def test_a_connected_account_s_news_and_other_types_do_nothing(trap: Trap) -> None:
    event, before = json.loads(trap.body), await trap.credits()
    for number in range(3):
        assert await trap.tell(event, id=f"evt_connected{number}", account=f"acct_{number}") == "not_ours"
    types = ("charge.succeeded", "charge.captured", "payment_intent.created", "invoice.payment_succeeded", "x")
    for number, event_type in enumerate(types):
        assert await trap.tell(event, id=f"evt_type{number}", type=event_type) == "ignored"
    assert await trap.credits() == before


async def test_an_id_that_came_before_is_not_taken_for_another(trap: Trap) -> None:
    """Who could have it taken for done would keep a customer from their credits."""
    event = json.loads(trap.body)
    assert await trap.tell(event, type="charge.succeeded") == "ignored"
    body = json.dumps(event).encode()
    headers = {"stripe-signature": header(body, int(time.time()))}
    answer = await trap.endpoint.http.post(PATH, content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "event_conflict")


# Paid, truly told, and not what was ordered: what makes the session another than the order's, and what that is called.
Change = Callable[[Order, Order], dict[str, Any]]


def _metadata(order: object, account: object) -> dict[str, Any]:
    metadata = {ORDER_KEY: str(order), ACCOUNT_KEY: str(account)}
    return {"metadata": metadata, "payment_intent_data": {"metadata": metadata}, "client_reference_id": str(order)}


def _priced(amount: int, currency: str = "usd", quantity: int = 1) -> dict[str, Any]:
    price = {"currency": currency, "unit_amount": amount, "product_data": {"name": "credits"}}
    return {"line_items": [{"price_data": price, "quantity": quantity}]}


MISMATCHES: list[tuple[str, str, Change]] = [
    ("another account's order", "other_account", lambda own, theirs: _metadata(theirs.id, own.account_id)),
    ("another account", "other_account", lambda own, theirs: _metadata(own.id, theirs.account_id)),
    ("no account", "other_account", lambda own, theirs: _metadata(own.id, "")),
    ("an unknown order", "unknown_order", lambda own, theirs: _metadata(uuid4(), own.account_id)),
    ("an order that is no id", "not_named", lambda own, theirs: _metadata("1 OR 1=1", own.account_id)),
    ("the reference alone", "not_named", lambda own, theirs: {"metadata": {}, "payment_intent_data": {}}),
    ("another reference", "not_named", lambda own, theirs: {"client_reference_id": str(theirs.id)}),
    ("no reference", "not_named", lambda own, theirs: {"client_reference_id": "cart-7"}),
    (
        "a payment that names another order than its session",
        "not_named",
        lambda own, theirs: {"payment_intent_data": _metadata(theirs.id, theirs.account_id)["payment_intent_data"]},
    ),
    *(
        (f"{amount} instead of 1000", "other_amount", lambda own, theirs, a=amount: _priced(a))
        for amount in (1, 10, 500, 999, 1001, 2000, 100_000, 99_999_999)
    ),
    ("ten times a tenth too little", "other_amount", lambda own, theirs: _priced(99, quantity=10)),
    *(
        (f"in {currency}", "other_currency", lambda own, theirs, c=currency: _priced(1000, c))
        for currency in ("eur", "jpy", "krw", "vnd", "idr", "isk", "huf", "kwd", "bhd", "ugx", "gbp", "inr")
    ),
]


@pytest.mark.parametrize(("name", "reason", "change"), MISMATCHES, ids=[name for name, _, _ in MISMATCHES])
async def test_what_doesnt_match_its_order_is_held_in_quarantine(
    trap: Trap, name: str, reason: str, change: Change
) -> None:
    desk, before = trap.desk, await trap.credits()
    own, theirs = await desk.order(), await desk.order()
    session = await desk.session(own, **change(own, theirs))
    intent = desk.stripe.checkout.pay(session)
    told = [event for event in desk.stripe.events if event["data"]["object"]["id"] in (session, intent)]
    outcomes = {
        await trap.tell(event)
        for event in told
        if event["type"] in ("checkout.session.completed", "payment_intent.succeeded")
    }
    # A payment that carries no name of ours is nobody's here, until its session is looked at.
    assert outcomes - {"not_ours"} == {"quarantined"}
    assert await trap.reason(intent) == reason
    assert await trap.credits() == before
    assert {(await desk.orders.find(order.id)).state for order in (own, theirs)} == {"created"}


@pytest.mark.parametrize(
    ("event_type", "subject", "object_id"),
    [
        ("checkout.session.completed", "checkout.session", "cs_test_nobodys"),
        ("payment_intent.succeeded", "payment_intent", "pi_3Nobodys"),
    ],
)
async def test_what_our_key_doesnt_know_waits_with_the_reason(
    trap: Trap, event_type: str, subject: str, object_id: str
) -> None:
    """Truly signed: the endpoint's secret is of another Stripe account than the key."""
    about = {"id": object_id, "object": subject}
    event = json.loads(trap.body) | {"id": f"evt_{object_id}", "type": event_type, "data": {"object": about}}
    body = json.dumps(event).encode()
    headers = {"stripe-signature": header(body, int(time.time()))}
    for _ in range(2):
        answer = await trap.endpoint.http.post(PATH, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "event_unprocessed")
    [left] = [state for state in await trap.endpoint.events.newest(limit=99) if state.event.id == event["id"]]
    assert (left.outcome, left.processed_at) == (None, None)
    assert left.error is not None
    for part in (object_id, "FAREBOX_STRIPE_KEY", "FAREBOX_STRIPE_WEBHOOK_SECRETS", "test mode", "dismiss"):
        assert part in left.error, left.error
    assert await trap.endpoint.events.finish(event["id"], "dismissed by test")
    answer = await trap.endpoint.http.post(PATH, content=body, headers=headers)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "known")


@pytest.mark.parametrize("discount", [1, 500, 1000])
async def test_a_discount_that_wasnt_allowed_brings_nothing(trap: Trap, discount: int) -> None:
    desk, before = trap.desk, await trap.credits()
    session = await desk.session(await desk.order())
    payment = desk.stripe.checkout.pay(session, discount=discount) or session
    assert await trap.tell(completed(desk, session)) == "quarantined"
    assert await trap.reason(payment) == "discount"
    assert await trap.credits() == before


async def test_a_second_payment_of_an_order_brings_nothing(trap: Trap) -> None:
    desk = trap.desk
    assert await trap.tell(json.loads(trap.body)) == "paid"
    before = await trap.credits()
    second = await desk.session(trap.order)
    intent = desk.stripe.checkout.pay(second)
    assert await trap.tell(completed(desk, second)) == "quarantined"
    assert await trap.reason(intent) == "second_payment"
    assert await trap.credits() == before


async def test_an_order_of_the_other_mode_is_not_paid(trap: Trap) -> None:
    """A payment of test mode, true in all else, for an order that is to be paid with money."""
    desk, before = trap.desk, await trap.credits()
    order = await desk.order(livemode=True)
    session = await desk.session(order)
    intent = desk.stripe.checkout.pay(session)
    assert await trap.tell(completed(desk, session)) == "quarantined"
    assert await trap.reason(intent) == "other_mode"
    assert await trap.credits() == before


async def test_another_business_on_the_same_account_is_left_alone(trap: Trap) -> None:
    desk, before = trap.desk, await trap.credits()
    order = await desk.order()
    session = await desk.session(order, metadata={}, payment_intent_data={}, client_reference_id="cart-7")
    desk.stripe.checkout.pay(session)
    assert await trap.tell(completed(desk, session)) == "not_ours"
    assert await trap.credits() == before


async def test_the_secret_before_is_good_while_it_is_configured(bank: Bank, fake: FakeStripe) -> None:
    async with open_desk(bank, fake) as desk:
        session = await desk.session(await desk.order())
        desk.stripe.checkout.pay(session)
        body = json.dumps(completed(desk, session)).encode()
        signed = {"stripe-signature": header(body, int(time.time()), secret=OLD_SECRET)}
        async with running_endpoint(bank.control._pool, payments(desk.till), secrets=[SECRET]) as endpoint:
            answer = await endpoint.http.post(PATH, content=body, headers=signed)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "signature_invalid")
        async with running_endpoint(bank.control._pool, payments(desk.till), secrets=[SECRET, OLD_SECRET]) as endpoint:
            answer = await endpoint.http.post(PATH, content=body, headers=signed)
            assert (answer.status_code, answer.json()["outcome"]) == (200, "paid")
