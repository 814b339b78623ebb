"""Automatic top-ups by many processes at once, while Stripe fails in every way it can: paid is credited, and no attempt
is charged twice."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

import pytest

from proxy.control.billing.autotopup import AutoTopups
from proxy.control.billing.stripe_api import StripeApi
from proxy.ledger.audit import audit
from proxy.ledger.connect import Role, connect
from tests.control.billing.shop import Shop
from tests.control.billing.till import open_desk
from tests.fakes.stripe import (
    Behaviour,
    ErrorAfter,
    ErrorBefore,
    FakeStripe,
    LostReply,
    LostRequest,
    RateLimited,
    Unavailable,
)
from tests.ledger.bank import open_bank
from tests.postgres import Database

ROUNDS = int(os.environ.get("FAREBOX_AUTO_TOPUP_ROUNDS", "30"))
FAULTS = (LostReply(), LostRequest(), Unavailable(), RateLimited(), ErrorAfter(), ErrorBefore())
CARDS: tuple[Behaviour, ...] = ("succeed", "succeed", "decline", "authentication_required", "processing")


@pytest.fixture
async def shop(database: Database) -> AsyncIterator[Shop]:
    """On a ledger and a Stripe of the test's own: a round looks at every account."""
    with FakeStripe() as fake:
        async with open_bank(database, size=4) as bank, open_desk(bank, fake) as desk:
            yield Shop(desk)


async def test_fifty_processes_that_look_at_once_buy_once_for_each_account(shop: Shop) -> None:
    accounts = [await shop.account() for _ in range(3)]
    workers = [shop.worker(shop.desk.api, silent_seconds=60) for _ in range(50)]
    await asyncio.gather(*(worker.round() for worker in workers))
    for account in accounts:
        assert await shop.charged(account) == [1_000]
        assert await shop.balance(account) == 1_105
    paid = shop.metrics.registry.get_sample_value("farebox_auto_topups_total", {"outcome": "paid"})
    assert paid == 3


async def test_the_loop_does_it_all_by_itself(shop: Shop) -> None:
    plain, asked = await shop.account(), await shop.account("authentication_required")
    shop.topups.start()
    for _ in range(1_000):
        if await shop.balance(plain) > 1_000 and (await shop.state(asked)).checkout_url is not None:
            break
        await asyncio.sleep(0.02)
    await shop.topups.stop()
    assert await shop.charged(plain) == [1_000]
    assert (await shop.state(asked)).checkout_url is not None


async def test_one_account_s_trouble_is_not_another_s(shop: Shop) -> None:
    accounts = [await shop.account() for _ in range(4)]
    shop.desk.stripe.faults.on("POST /v1/payment_intents", LostRequest(), times=2)
    await shop.worker(shop.desk.api, silent_seconds=60).round()
    charged = [await shop.charged(account) for account in accounts]
    assert sorted(charged) == [[], [], [1_000], [1_000]]
    await shop.topups.round()
    assert [await shop.charged(account) for account in accounts] == [[1_000]] * 4


async def test_rounds_of_faults_and_crashes_never_charge_an_attempt_twice(shop: Shop) -> None:
    """Each round: three processes look at the same accounts, Stripe fails half the time, and processes are cut off at
    any await. In the end every charge is credited, once, and belongs to an attempt of its own."""
    chance = random.Random(36)
    apis = [
        StripeApi(shop.desk.stripe.key, url=shop.desk.stripe.url, retries=retries, seconds=5) for retries in (0, 0, 1)
    ]
    workers = [shop.worker(api) for api in apis]
    accounts = [await shop.account(CARDS[number % len(CARDS)], monthly_max=10**9) for number in range(5)]
    for number in range(ROUNDS):
        shop.desk.stripe.faults.seeded(chance.randrange(10**6), 0.5, FAULTS)
        await _cut_off_somewhere(shop, workers, chance)
        if chance.random() < 0.3:
            await _time_passes(shop, accounts)
        if number % 7 == 0:
            await _banks_decide(shop, chance)
        if number % 5 == 0:
            await _a_day_passes(shop, apis)
    shop.desk.stripe.faults.clear()
    await _a_day_passes(shop, apis)
    await shop.topups.round()
    unknown = "SELECT * FROM farebox.orders WHERE kind = 'auto' AND state = 'created'"
    assert await shop.desk.bank.owner.fetch(unknown) == []
    for api in apis:
        api.close()
    bought = 0
    for account in accounts:
        bought += await _paid_is_credited(shop, account)
    assert bought >= ROUNDS // 6
    control = await connect(shop.desk.bank.database.app, Role.CONTROL)
    assert [check for check in await audit(control) if not check.ok] == []
    await control.close()


async def _cut_off_somewhere(shop: Shop, workers: Sequence[AutoTopups], chance: random.Random) -> None:
    tasks = [asyncio.create_task(worker.round()) for worker in workers]
    doomed = chance.choice([*tasks, None])
    if doomed is not None:
        await asyncio.sleep(chance.random() * 0.05)
        doomed.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # A cancelled caller leaves its call running, as a request that is on the wire: it may arrive after all.
    await asyncio.sleep(chance.random() * 0.02)


async def _time_passes(shop: Shop, accounts: list[UUID]) -> None:
    """Pauses are over, and what was bought is spent."""
    for account in accounts:
        await shop.later(account)
        if (balance := await shop.balance(account)) > 10:
            await shop.spend(account, balance - 5)
    await shop.desk.bank.owner.execute(
        "UPDATE farebox.orders SET created_at = created_at - interval '3 hours' WHERE state <> 'created'"
    )


async def _a_day_passes(shop: Shop, apis: Sequence[StripeApi]) -> None:
    """For attempts of which nothing is known yet; and Stripe forgets their keys, as it may by then."""
    # No request is on its way for a day, nor does the client try it again after one: its attempts end in seconds.
    while any(api._threads._open for api in (*apis, shop.desk.api)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await shop.desk.bank.owner.execute(
        "UPDATE farebox.orders SET changed_at = changed_at - interval '1 day', created_at = created_at -"
        " CASE WHEN created_at > clock_timestamp() - interval '1 day' THEN interval '1 day' ELSE '0' END"
        " WHERE kind = 'auto' AND state = 'created'"
    )
    shop.desk.stripe.keys.forget()


async def _banks_decide(shop: Shop, chance: random.Random) -> None:
    """On what was processing; and the till hears of it."""
    for intent in shop.desk.stripe.state.all("payment_intent"):
        if intent["status"] == "processing":
            shop.desk.stripe.payments.settle(intent["id"], succeed=chance.random() < 0.7)
            shop.desk.stripe.faults.clear()
            await shop.desk.till.apply_payment(payment_intent=intent["id"])


async def _paid_is_credited(shop: Shop, account: UUID) -> int:
    """How often the account was charged."""
    customer = await shop.customer(account)
    charges = shop.desk.stripe.payments.charges(customer)
    by_order = Counter(charge["metadata"]["farebox_order"] for charge in charges)
    assert set(by_order.values()) <= {1}, "an attempt was charged twice"
    paid = await shop.desk.bank.owner.fetch(
        "SELECT id FROM farebox.orders WHERE account_id = $1 AND kind = 'auto' AND state = 'paid'", account
    )
    assert set(by_order) == {str(row["id"]) for row in paid}
    purchases = [amount for kind, amount in await shop.desk.bank.book(account) if kind == "purchase"]
    assert purchases == [1_000] * len(charges)
    return len(charges)
