"""Money in, from end to end: a customer buys a pack at the checkout, Stripe tells of it, the credits are there and are
spent through the OpenAI SDK, a part of the payment is given back, and the books agree at each step.

One Farebox on a real socket, a real PostgreSQL, the real stripe client, and a Stripe and a provider of our own.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.webhooks import PATH
from tests.e2e.proxy import MESSAGES, Customer, Proxy, pricing_yaml, running_proxy
from tests.fakes.stripe import FakeStripe
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.postgres import Database

ROOT = Path(__file__).parents[2]
PACKS = """\
packs:
  starter:
    name: 50 credits
    credits: 50
    price: 10.00
    currency: USD
    bonus: 5
    bonus_expires_days: 90
"""
BACK = "https://shop.example/account"


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as running:
        yield running


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        running.will(*whole(chat_answer("Hello.", prompt=10, completion=5)))
        yield running


@pytest.fixture
async def shop(
    database: Database, tmp_path: Path, fake: FakeStripe, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    settings: dict[str, Any] = {
        "stripe_key": fake.key,
        "stripe_url": fake.url,
        "stripe_webhook_secrets": f"whsec_theOneBefore,{fake.secret}",
        "billing_return_urls": BACK,
    }
    pricing = pricing_yaml() + PACKS
    async with running_proxy(database, tmp_path, upstream.base_url, pricing=pricing, **settings) as proxy:
        fake.listen(proxy.base_url.removesuffix("/v1") + PATH, list(EVENT_TYPES))
        yield proxy


async def credits_of(customer: Customer) -> Decimal:
    """The balance, as the customer sees it."""
    answer = await customer.proxy.http.get("/credits", headers=customer.headers)
    assert answer.status_code == 200, answer.text
    return Decimal(answer.json()["balance"])


async def ask(customer: Customer) -> str | None:
    """One call through the SDK; its answer."""
    async with openai.AsyncOpenAI(base_url=customer.proxy.base_url, api_key=customer.key, max_retries=0) as sdk:
        answer = await sdk.chat.completions.create(model="m", messages=MESSAGES)
        return answer.choices[0].message.content


async def buy(customer: Customer) -> httpx2.Response:
    body = {"pack": "starter", "success_url": f"{BACK}/thanks", "cancel_url": BACK}
    headers = customer.headers | {"idempotency-key": "cart-17"}
    return await customer.proxy.http.post("/billing/checkout", json=body, headers=headers)


async def tell(fake: FakeStripe, seed: int) -> None:
    """Stripe tells of all that has happened: twice, in any order, eight at once."""
    delivered = await fake.deliver_all(seed=seed, copies=2, at_once=8)
    assert delivered
    assert {attempt.status for attempt in delivered} == {200}


async def command(shop: Proxy, fake: FakeStripe, *words: str) -> Any:
    """What the command answers, run as an operator does beside the server: a process of its own."""
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": shop.database.app,
        "FAREBOX_STRIPE_KEY": fake.key,
        "FAREBOX_STRIPE_URL": fake.url,
    }
    arguments = (sys.executable, "-m", "proxy.cli", *words, "--json")
    process = await asyncio.create_subprocess_exec(*arguments, env=variables, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return json.loads(said)


async def test_bought_told_spent_and_partly_refunded(shop: Proxy, fake: FakeStripe) -> None:
    customer = await shop.account(credits=0, scopes=frozenset({"inference", "read", "billing"}))
    with pytest.raises(openai.APIStatusError) as refused:
        await ask(customer)
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_quota")

    # A checkout; asked for again under the same key, it is the same one.
    order = (await buy(customer)).json()
    assert (await buy(customer)).json() == order
    [made] = [asked for asked in fake.asked if asked.name == "POST /v1/checkout/sessions"]
    assert made is not None
    assert order["url"].startswith("https://checkout.stripe.com/")
    [session] = [found["id"] for found in fake.state.all("checkout.session") if found["url"] == order["url"]]

    # Paid, with tax on top. Until Stripe tells of it, nothing is there: to come back from the page proves nothing.
    intent = fake.checkout.pay(session, tax=190)
    assert intent is not None
    assert await credits_of(customer) == 0
    await tell(fake, 1)
    assert await credits_of(customer) == 55
    paid = (await shop.http.get(f"/billing/orders/{order['id']}", headers=customer.headers)).json()
    assert (paid["state"], paid["credits"], paid["bonus"]) == ("paid", "50", "5")
    await shop.audit()

    # Spent: 10 tokens in at 1 and 5 out at 3 credits for 1,000.
    assert await ask(customer) == "Hello."
    [hold] = await customer.ended()
    assert hold["charge"] == 25_000
    assert await credits_of(customer) == Decimal("54.975")

    # A fifth of the payment goes back by Stripe's dashboard, and with it a fifth of what it brought.
    fake.refunds.create(intent, 238)
    await tell(fake, 2)
    assert await credits_of(customer) == Decimal("43.975")
    assert await ask(customer) == "Hello."
    await customer.ended(2)
    assert await credits_of(customer) == Decimal("43.95")

    # And another fifth by the command, which knows what it did before Stripe tells of it.
    refund = await command(shop, fake, "refund", intent, "--amount", "2.38", "--ref", "case-7")
    assert (refund["state"], refund["amount"], refund["currency"]) == ("done", "2.38", "USD")
    assert await credits_of(customer) == Decimal("32.95")
    assert await command(shop, fake, "refund", intent, "--amount", "2.38", "--ref", "case-7") == refund
    await tell(fake, 3)
    assert await credits_of(customer) == Decimal("32.95")
    assert fake.object(fake.object(intent)["latest_charge"])["amount_refunded"] == 476

    book = (await shop.http.get("/transactions", headers=customer.headers)).json()["data"]
    moved = [(line["kind"], Decimal(line["amount"])) for line in reversed(book)]
    assert sorted(moved[:2]) == [("promo", Decimal(5)), ("purchase", Decimal(50))]
    assert [kind for kind, _ in moved[2:]] == ["charge", "refund", "refund", "charge", "refund", "refund"]
    assert sum(amount for _, amount in moved) == Decimal("32.95")
    assert (await command(shop, fake, "stripe", "events", "--unprocessed"))["data"] == []
    await shop.audit()
