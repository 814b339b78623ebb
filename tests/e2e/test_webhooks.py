"""Webhooks at a Farebox that serves: what Stripe tells it becomes credits, though the database is away meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from proxy.app import Timing
from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.webhooks import PATH
from proxy.ledger.orders import Order
from proxy.local.state import LocalError
from tests.control.billing.till import Desk, open_desk
from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.fakes.stripe import FakeStripe, Unavailable
from tests.ledger.bank import open_bank
from tests.postgres import Database

HURRY = Timing(events_seconds=0.05)
UPSTREAM = "http://127.0.0.1:1/v1"


def stripe_settings(fake: FakeStripe, **changes: Any) -> dict[str, Any]:
    return {"stripe_key": fake.key, "stripe_url": fake.url, "stripe_webhook_secrets": fake.secret} | changes


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as running:
        yield running


@pytest.fixture
async def shop(database: Database, tmp_path: Path, fake: FakeStripe) -> AsyncIterator[Proxy]:
    """A Farebox that sells, and to which the fake's events go."""
    async with running_proxy(database, tmp_path, UPSTREAM, timing=HURRY, **stripe_settings(fake)) as proxy:
        fake.listen(proxy.base_url.removesuffix("/v1") + PATH, list(EVENT_TYPES))
        yield proxy


@pytest.fixture
async def desk(database: Database, fake: FakeStripe) -> AsyncIterator[Desk]:
    async with open_bank(database, size=1) as bank, open_desk(bank, fake) as opened:
        yield opened


async def paid_order(desk: Desk, customer: Customer) -> tuple[Order, str]:
    """An order of the customer's, which Stripe was paid for, and its PaymentIntent. We haven't heard of it."""
    order = await desk.order(customer.id, credits=5_000_000, bonus=100, price=500)
    intent = desk.stripe.checkout.pay(await desk.session(order), tax=95)
    assert intent is not None
    return order, intent


async def credited(customer: Customer) -> None:
    """Once the account has something."""
    async with asyncio.timeout(20):
        while True:
            if (await customer.money()).balance:
                return
            await asyncio.sleep(0.05)


def statuses(delivered: Any) -> set[int]:
    return {attempt.status for attempt in delivered}


async def test_a_payment_a_refund_and_a_dispute_are_applied_whatever_the_order(
    shop: Proxy, fake: FakeStripe, desk: Desk
) -> None:
    customer = await shop.account(credits=0)
    order, intent = await paid_order(desk, customer)
    refund = fake.refunds.create(intent, 119)
    assert statuses(await fake.deliver_all(seed=3, copies=2, at_once=8)) == {200}
    # 119 of 595 are a fifth.
    assert (await customer.money()).balance == 4_000_000 + 80
    fake.refunds.settle(refund["id"], "failed")
    assert statuses(await fake.deliver_all(fake.events_of("refund.failed"))) == {200}
    assert (await customer.money()).balance == 5_000_000 + 100
    assert (await desk.orders.find(order.id)).tax == 95
    await shop.audit()


async def test_without_the_database_it_is_5xx_and_credited_at_the_next_delivery(
    shop: Proxy, fake: FakeStripe, desk: Desk, database: Database
) -> None:
    customer = await shop.account(credits=0)
    await paid_order(desk, customer)
    await shop.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
    await shop.query_elsewhere(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database.name}'"
    )
    assert statuses(await fake.deliver_all(at_once=4)) == {503}
    await shop.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
    assert (await customer.money()).balance == 0
    assert statuses(await fake.deliver_all(at_once=4)) == {200}
    assert (await customer.money()).balance == 5_000_100
    await shop.audit()


async def test_without_stripe_it_is_5xx_and_farebox_comes_back_for_it(
    shop: Proxy, fake: FakeStripe, desk: Desk
) -> None:
    """The event was taken, and what it is about could not be fetched. Stripe never tells of it again."""
    customer = await shop.account(credits=0)
    await paid_order(desk, customer)
    fake.faults.on("GET *", Unavailable(), times=3)
    assert statuses(await fake.deliver_all(fake.events_of("payment_intent.succeeded"))) == {503}
    assert (await customer.money()).balance == 0
    await shop.query("UPDATE farebox.stripe_events SET tried_at = tried_at - interval '31 seconds'")
    await credited(customer)
    [event] = await shop.query("SELECT attempts, outcome, error FROM farebox.stripe_events")
    assert (event["attempts"], event["outcome"], event["error"]) == (2, "paid", None)
    assert (await customer.money()).balance == 5_000_100
    await shop.audit()


async def test_it_doesnt_start_without_a_secret(database: Database, tmp_path: Path, fake: FakeStripe) -> None:
    settings = stripe_settings(fake) | {"stripe_webhook_secrets": ()}
    with structlog.testing.capture_logs() as logs, pytest.raises(LocalError):
        async with running_proxy(database, tmp_path, UPSTREAM, **settings):
            pytest.fail("it serves, and would believe anybody")
    assert any("FAREBOX_STRIPE_WEBHOOK_SECRETS" in line.get("reason", "") for line in logs)
