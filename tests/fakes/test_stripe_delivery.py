"""The fake Stripe's webhooks: each event at each endpoint, as turbulently as a test says."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import stripe

from tests.fakes.stripe import FakeStripe, Turbulence
from tests.fakes.upstream import Received, ScriptedUpstream, whole


@pytest.fixture
def fake() -> Any:
    with FakeStripe() as running:
        yield running


@contextlib.asynccontextmanager
async def receiver(status: Callable[[int], int] = lambda _: 200) -> AsyncIterator[ScriptedUpstream]:
    """An endpoint that answers its n-th webhook so."""
    async with ScriptedUpstream() as upstream:
        upstream.choose(lambda _: whole({}, status(len(upstream.requests))))
        yield upstream


def verified(fake: FakeStripe, got: list[Received]) -> list[str]:
    """The events' ids, in the order in which they came."""
    return [stripe.Webhook.construct_event(one.body, one.headers["stripe-signature"], fake.secret).id for one in got]


def customers(fake: FakeStripe, number: int) -> None:
    client = stripe.StripeClient(fake.key, base_addresses={"api": fake.url})
    for _ in range(number):
        client.v1.customers.create({})


async def test_each_event_goes_to_who_wants_it(fake: FakeStripe) -> None:
    async with receiver() as one, receiver() as other:
        fake.listen(f"{one.base_url}/hook")
        fake.listen(f"{other.base_url}/hook", ["refund.created"])
        await asyncio.to_thread(customers, fake, 3)
        results = await fake.deliver_all()
        assert [result.status for result in results] == [200] * 3
        assert verified(fake, one.requests) == [event["id"] for event in fake.events]
        assert other.requests == []
        assert one.requests[0].path == "/v1/hook"


async def test_order_copies_and_number_are_the_tests_to_choose(fake: FakeStripe) -> None:
    async with receiver() as one:
        fake.listen(f"{one.base_url}/hook")
        await asyncio.to_thread(customers, fake, 10)
        await fake.deliver_all(seed=3, copies=2, at_once=8)
        got = verified(fake, one.requests)
        assert set(Counter(got).values()) == {2}
        assert list(dict.fromkeys(got)) != [event["id"] for event in fake.events]
        assert one.open_connections > 1


async def test_what_is_refused_comes_again_by_itself(fake: FakeStripe) -> None:
    async with receiver(lambda number: 503 if number <= 2 else 200) as one:
        fake.listen(f"{one.base_url}/hook")
        fake.deliver_by_itself(Turbulence(retry_seconds=0.01))
        await asyncio.to_thread(customers, fake, 1)
        await fake.settled()
        assert [attempt.status for attempt in fake.courier.attempts] == [503, 503, 200]


async def test_undelivered_events_are_listed(fake: FakeStripe) -> None:
    client = stripe.StripeClient(fake.key, base_addresses={"api": fake.url})
    async with receiver(lambda number: 200 if number == 1 else 500) as one:
        fake.listen(f"{one.base_url}/hook")
        await asyncio.to_thread(customers, fake, 2)
        await fake.deliver_all()
        left = await asyncio.to_thread(lambda: client.v1.events.list({"delivery_success": False}).data)
        assert [event.id for event in left] == [fake.events[1]["id"]]
        assert json.loads(one.requests[0].body)["object"] == "event"


async def test_turbulence_loses_doubles_and_reorders(fake: FakeStripe) -> None:
    async with receiver() as one:
        fake.listen(f"{one.base_url}/hook")
        fake.deliver_by_itself(Turbulence(seed=5, delay_seconds_max=0.05, duplicates=0.3, lost=0.2))
        await asyncio.to_thread(customers, fake, 40)
        await fake.settled()
        got = verified(fake, one.requests)
        assert 0 < len(set(got)) < 40
        assert max(Counter(got).values()) == 2
        assert got != sorted(got, key=[event["id"] for event in fake.events].index)
        fake.deliver_by_itself(False)
        await asyncio.to_thread(customers, fake, 1)
        await fake.settled()
        assert len(one.requests) == len(got)


async def test_nobody_there_is_a_failed_attempt(fake: FakeStripe) -> None:
    fake.listen("http://127.0.0.1:1/hook")
    await asyncio.to_thread(customers, fake, 1)
    assert [result.ok for result in await fake.deliver(fake.events[0])] == [False]
