"""Our calls to Stripe through the real client: what its failures are called, and what a key is good for."""

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from proxy.control.billing.errors import StripeAway, StripeRefused, StripeUnknown
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import Members, session
from proxy.control.billing.threads import Busy, Threads
from tests.fakes.stripe import (
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


@pytest.fixture
async def api(fake: FakeStripe) -> AsyncIterator[StripeApi]:
    opened = StripeApi(fake.key, url=fake.url, retries=0, seconds=5)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "fault", [Unavailable(), ErrorBefore(), ErrorAfter(), LostRequest(), LostReply(), RateLimited()], ids=repr
)
async def test_what_may_go_better_next_time_is_away(api: StripeApi, fake: FakeStripe, fault: Fault) -> None:
    fake.faults.on("POST /v1/customers", fault)
    with pytest.raises(StripeAway):
        await api.create_customer({}, key=uuid4().hex)


async def test_an_answer_that_takes_too_long_is_away(fake: FakeStripe) -> None:
    api, until = StripeApi(fake.key, url=fake.url, retries=0, seconds=0.2), threading.Event()
    fake.faults.on("GET /v1/payment_intents/*", Hold(until))
    try:
        with pytest.raises(StripeAway, match="can't be asked"):
            await api.payment_intent("pi_any")
    finally:
        until.set()
        api.close()


async def test_an_address_where_nobody_listens_is_away() -> None:
    api = StripeApi("sk_test_x", url="http://127.0.0.1:1", retries=0)
    with pytest.raises(StripeAway):
        await api.payment_intent("pi_any")
    api.close()


@pytest.mark.parametrize("fault", [ErrorBefore(), ErrorAfter()], ids=repr)
async def test_a_key_that_remembers_a_failure_is_followed_by_another(
    api: StripeApi, fake: FakeStripe, fault: Fault
) -> None:
    key = uuid4().hex
    fake.faults.on("POST /v1/customers", fault)
    with pytest.raises(StripeAway):
        await api.create_customer({}, key=key)
    made = [await api.create_customer({}, key=key) for _ in range(2)]
    assert made[0] == made[1], "and that one is good for as many as ask"
    assert [asked.key for asked in fake.asked if (asked.key or "").startswith(key)][-1] == f"{key}:2"


async def test_a_key_under_which_something_else_was_asked_is_followed_by_another(api: StripeApi) -> None:
    key = uuid4().hex
    first = await api.create_customer({"description": "one"}, key=key)
    other = await api.create_customer({"description": "two"}, key=key)
    assert first != other
    assert await api.create_customer({"description": "one"}, key=key) == first


async def test_no_object_no_right_and_no_sense_have_their_names(api: StripeApi, fake: FakeStripe) -> None:
    with pytest.raises(StripeUnknown) as unknown:
        await api.payment_intent("pi_nobodys")
    assert (unknown.value.status, unknown.value.code) == (404, "resource_missing")
    with pytest.raises(StripeRefused) as refused:
        await api.create_session({"mode": "payment", "line_items": []}, key=uuid4().hex)
    assert refused.value.status == 400
    stranger = StripeApi("sk_nobodys_key", url=fake.url, retries=0)
    with pytest.raises(StripeRefused) as denied:
        await stranger.payment_intent("pi_any")
    assert denied.value.status == 401
    assert "sk_nobodys_key" not in str(denied.value)
    stranger.close()


async def test_a_declined_card_says_why_and_names_its_payment(api: StripeApi) -> None:
    params = {
        "amount": 100, "currency": "usd", "confirm": True, "payment_method": "pm_card_chargeDeclinedInsufficientFunds",
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
    }  # fmt: skip
    with pytest.raises(StripeRefused) as declined:
        await api.call(lambda client: client.v1.payment_intents.create(params).id)  # type: ignore[arg-type]
    assert declined.value.code == "card_declined"
    assert declined.value.decline_code == "insufficient_funds"
    assert declined.value.payment_intent is not None
    intent = await api.payment_intent(declined.value.payment_intent)
    assert (intent.status, intent.failed, intent.amount_received) == ("requires_payment_method", True, 0)


async def test_a_customers_sessions_are_found_from_a_time_on(api: StripeApi, fake: FakeStripe) -> None:
    customer = await api.create_customer({}, key=uuid4().hex)
    price = {"currency": "usd", "unit_amount": 100, "product_data": {"name": "x"}}
    params = {
        "mode": "payment", "customer": customer, "line_items": [{"price_data": price, "quantity": 1}],
        "success_url": "https://example.com",
    }  # fmt: skip
    made = [(await api.create_session(params, key=uuid4().hex)).id for _ in range(2)]
    now = datetime.fromtimestamp(fake.clock.now(), UTC)
    assert [found.id for found in await api.sessions_of(customer, since=now - timedelta(hours=1))] == made[::-1]
    assert await api.sessions_of(customer, since=now + timedelta(hours=1)) == []


@pytest.mark.parametrize(
    ("key", "live"), [("sk_test_x", False), ("rk_test_x", False), ("sk_live_x", True), ("rk_live_x", True)]
)
async def test_the_mode_follows_from_the_key(key: str, live: bool) -> None:
    api = StripeApi(key, url="http://127.0.0.1:1")
    assert api.livemode is live
    api.close()


async def test_nothing_of_the_environments_is_used(
    api: StripeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A proxy would be told the key, and a .netrc would take its place."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password from-netrc\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    assert (await api.create_customer({}, key=uuid4().hex)).startswith("cus_")


@pytest.mark.parametrize(
    ("members", "reader", "name"),
    [
        ({"id": 7}, "text", "id"),
        ({}, "text", "id"),
        ({"amount": "7"}, "number", "amount"),
        ({"amount": True}, "number", "amount"),
        ({"amount": 7.0}, "number", "amount"),
        ({"livemode": 1}, "flag", "livemode"),
        ({"customer": 7}, "ref", "customer"),
        ({"data": [7]}, "listed", "data"),
    ],
    ids=str,
)
def test_an_answer_that_cant_be_read_is_none(members: dict[str, object], reader: str, name: str) -> None:
    with pytest.raises(StripeAway, match=f"no {name} that can be read"):
        getattr(Members(members, "object"), reader)(name)


def test_a_session_that_sells_nothing_can_be_read() -> None:
    """Another business of the same Stripe account may keep cards by pages that have no price."""
    found = session(
        Members(
            {
                "id": "cs_1", "object": "checkout.session", "mode": "setup", "status": "complete", "currency": None,
                "payment_status": "no_payment_required", "livemode": False, "created": 1, "amount_total": None,
                "amount_subtotal": None, "total_details": None, "payment_intent": None, "metadata": None,
                "client_reference_id": None, "customer": "cus_1", "url": None,
            },
            "session",
        )
    )  # fmt: skip
    assert (found.currency, found.total, found.payment_intent, dict(found.metadata)) == ("", 0, None, {})


async def test_threads_are_few_and_so_are_those_who_wait() -> None:
    threads, until, seen = Threads("test", count=2, waiting_max=1), threading.Event(), set()
    both = threading.Barrier(3)

    def work() -> int:
        if not until.is_set():
            both.wait(10)
        seen.add(threading.current_thread().name)
        until.wait(10)
        return 7

    running = [asyncio.create_task(threads.run(work)) for _ in range(3)]
    await asyncio.to_thread(both.wait, 10)
    with pytest.raises(Busy):
        await threads.run(work)
    until.set()
    assert await asyncio.gather(*running) == [7, 7, 7]
    assert len(seen) == 2
    assert await threads.run(work) == 7
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    threads.close()


async def test_a_caller_that_gives_up_leaves_the_call_running() -> None:
    threads, until, done = Threads("test", count=1, waiting_max=1), threading.Event(), threading.Event()

    def work() -> None:
        until.wait(10)
        done.set()

    task = asyncio.create_task(threads.run(work))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    until.set()
    await asyncio.to_thread(done.wait, 10)
    assert done.is_set()
    threads.close()
