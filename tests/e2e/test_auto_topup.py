"""An account that tops itself up, from its first checkout on, in a Farebox that serves; and whoever is told of it."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from proxy.app import Timing
from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.webhooks import PATH
from tests.e2e.proxy import Customer, Proxy, pricing_yaml, running_proxy
from tests.fakes.stripe import Behaviour, FakeStripe
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.postgres import Database

HURRY = Timing(events_seconds=0.1, auto_topup_seconds=0.1, alerts_seconds=0.1, messages_seconds=0.1)
SECRET = "whsec_" + base64.b64encode(b"m" * 32).decode()
PACKS = """
packs:
  starter:
    credits: 100
    price: 10.00
    currency: USD
"""
WISH = {"pack": "starter", "threshold": "100", "monthly_max": "1000"}


@dataclass
class Shop:
    proxy: Proxy
    stripe: FakeStripe
    told: ScriptedUpstream

    async def customer(self, saves: Behaviour = "succeed") -> Customer:
        """One who has bought a pack, and let the card be kept."""
        customer = await self.proxy.account(credits=0, scopes=frozenset({"inference", "billing", "read"}))
        order = await self.ask(customer, "POST", "checkout", {"pack": "starter", "save_payment_method": True})
        [session] = [one for one in self.stripe.state.all("checkout.session") if one["url"] == order["url"]]
        self.stripe.checkout.pay(session["id"], saves=saves)
        await self.balance(customer, 100)
        return customer

    async def ask(self, customer: Customer, method: str, path: str, body: Any = None) -> Any:
        answer = await self.proxy.http.request(method, f"/billing/{path}", json=body, headers=customer.headers)
        assert answer.status_code < 300, answer.text
        return answer.json()

    async def balance(self, customer: Customer, credits: int) -> None:
        """Once it is at least that."""

        async def look() -> bool:
            return (await customer.money()).balance >= credits * 1_000_000

        await eventually(look)

    async def heard(self, type: str) -> dict[str, Any]:
        """The first message of that type, once it has come, with its signature verified."""

        async def look() -> bool:
            return any(message["type"] == type for message in self.messages())

        await eventually(look)
        data: dict[str, Any] = next(message for message in self.messages() if message["type"] == type)["data"]
        return data

    def messages(self) -> list[dict[str, Any]]:
        return [Webhook(SECRET).verify(received.body, received.headers) for received in self.told.requests]


async def eventually(look: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(600):
        if await look():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came")


@pytest.fixture
async def shop(database: Database, tmp_path: Path) -> AsyncIterator[Shop]:
    async with ScriptedUpstream() as upstream, ScriptedUpstream() as told:
        upstream.will(*whole(chat_answer()))
        told.will(*whole(b"", 204))
        with FakeStripe() as stripe:
            settings: dict[str, Any] = {
                "stripe_key": stripe.key, "stripe_url": stripe.url, "stripe_webhook_secrets": stripe.secret,
                "billing_url": "https://shop.example.com", "webhook_url": told.base_url, "webhook_secret": SECRET,
                "low_balance": 100_000_000,
            }  # fmt: skip
            async with running_proxy(
                database, tmp_path, upstream.base_url, pricing=pricing_yaml() + PACKS, timing=HURRY, **settings
            ) as proxy:
                stripe.listen(proxy.base_url.removesuffix("/v1") + PATH, list(EVENT_TYPES))
                stripe.deliver_by_itself()
                yield Shop(proxy, stripe, told)


async def test_what_is_spent_is_bought_again_by_the_card_that_was_saved(shop: Shop) -> None:
    customer = await shop.customer()
    assert (await shop.ask(customer, "PUT", "auto_topup", WISH))["state"] == "ready"
    assert (await customer.post()).status_code == 200
    await shop.balance(customer, 199)
    view = await shop.ask(customer, "GET", "auto_topup")
    assert (view["state"], view["spent_this_month"]) == ("ready", "10.00")
    orders = (await shop.ask(customer, "GET", "orders"))["data"]
    assert [(order["kind"], order["state"], order["received"]) for order in orders] == [
        ("auto", "paid", "10.00"),
        ("checkout", "paid", "10.00"),
    ]
    assert [charge["amount"] for charge in shop.stripe.payments.charges()] == [1_000, 1_000]
    assert (await shop.heard("account.topped_up"))["account"] == str(customer.id)
    await shop.proxy.audit()


async def test_where_the_bank_wants_its_customer_a_link_is_told_and_paying_it_heals(shop: Shop) -> None:
    customer = await shop.customer(saves="authentication_required")
    await shop.ask(customer, "PUT", "auto_topup", WISH)
    assert (await customer.post()).status_code == 200
    failed = await shop.heard("account.auto_topup_failed")
    assert failed["reason"] == "authentication_required"
    view = await shop.ask(customer, "GET", "auto_topup")
    assert (view["state"], view["checkout_url"]) == ("blocked", failed["checkout_url"])
    assert (await shop.heard("account.low_balance"))["balance"] == "99.975"
    [session] = [one for one in shop.stripe.state.all("checkout.session") if one["url"] == failed["checkout_url"]]
    shop.stripe.checkout.pay(session["id"])
    await shop.balance(customer, 199)
    assert (await shop.ask(customer, "GET", "auto_topup"))["state"] == "ready"
    assert [charge["amount"] for charge in shop.stripe.payments.charges()] == [1_000, 1_000]
    # The card that was saved there pays the next one.
    await shop.ask(customer, "PUT", "auto_topup", WISH | {"threshold": "200"})
    await shop.balance(customer, 299)
    assert len(shop.stripe.payments.charges()) == 3
    await shop.proxy.audit()
