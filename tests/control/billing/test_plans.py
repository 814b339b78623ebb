"""Subscriptions' paid invoices, from the fake Stripe into a real ledger: credited once each, or held in quarantine."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from proxy.control.billing.errors import StripeUnknown
from proxy.control.billing.plans import PlanDesk, credits_of
from proxy.control.billing.stripe_invoices import InvoiceLine
from proxy.control.billing.till import ACCOUNT_KEY, Applied
from proxy.core.packs import Plan
from proxy.ledger.connect import Connection, Pool, Role, connect
from proxy.ledger.errors import Conflict
from proxy.ledger.orders import Order, OrderLedger
from proxy.ledger.plans import PlanLedger
from tests.control.billing.till import Desk

GRACE_SECONDS = 3 * 86_400
MONTH = timedelta(days=30)
NOBODY = "01900000-0000-7000-8000-00000000dead"


def a_plan(price_id: str, **changes: Any) -> Plan:
    """5,000 microcredits for 20 dollars."""
    given: dict[str, Any] = {"credits": 5_000, "price": 2_000, "currency": "usd", "grace_seconds": GRACE_SECONDS}
    return Plan(price_id=price_id, name="A plan", **given | changes)


@dataclass
class Subscriptions:
    """A plan desk, and what customers subscribe to."""

    desk: Desk
    plans: dict[str, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ledger = PlanLedger(self.desk.bank.control._pool)
        self.plan_desk = PlanDesk(self.desk.api, ledger, self.desk.orders, lambda: self.plans)

    def plan(self, price: int = 2_000, currency: str = "usd", **changes: Any) -> str:
        """A plan that is sold; its price's id."""
        id = self.desk.stripe.invoices.price(price, currency)
        self.plans[id] = a_plan(id, price=price, currency=currency, **changes)
        return id

    async def customer(self, account_id: UUID) -> str:
        """The account's customer at Stripe."""
        id = await self.desk.api.create_customer({}, key=f"customer:{account_id}")
        return await self.desk.orders.put_customer(account_id, id, livemode=False)

    async def subscribed(self, price: str | None = None, **terms: Any) -> tuple[UUID, str]:
        """A new account, and its subscription."""
        account, _ = await self.desk.bank.open_account()
        customer = await self.customer(account.id)
        return account.id, self.desk.stripe.invoices.subscribe(customer, price or self.plan(), **terms)

    async def apply(self, invoice: str) -> str:
        return (await self.plan_desk.apply(invoice)).outcome

    async def order(self, invoice: str) -> Order:
        found = await self.desk.orders.search(invoice)
        assert found is not None
        return found

    async def reason(self, invoice: str) -> str:
        return (await self.desk.orders.quarantined(invoice)).reason

    def bill(self, subscription: str, **terms: Any) -> str:
        return self.desk.stripe.invoices.bill(subscription, **terms)


@pytest.fixture
def subs(desk: Desk) -> Subscriptions:
    return Subscriptions(desk)


async def test_each_paid_month_is_credited_once_until_some_days_after_its_end(subs: Subscriptions) -> None:
    account, subscription = await subs.subscribed()
    for month in (1, 2):
        invoice = subs.bill(subscription, tax=400)
        outcomes = await asyncio.gather(*(subs.apply(invoice) for _ in range(8)))
        assert sorted(outcomes) == ["known"] * 7 + ["paid"]
        assert await subs.desk.bank.book(account) == [("plan", 5_000)] * month
        order = await subs.order(invoice)
        assert (order.kind, order.state, order.account_id, order.invoice) == ("plan", "paid", account, invoice)
        assert (order.price, order.subtotal, order.discount, order.tax, order.received) == (2_000, 2_000, 0, 400, 2_400)
        paid_by = subs.desk.stripe.object(invoice)
        assert paid_by["amount_paid"] == 2_400
        assert order.payment_intent is not None
        assert subs.desk.stripe.object(order.payment_intent)["amount_received"] == 2_400
        [lot] = await subs.desk.bank.owner.fetch("SELECT * FROM farebox.lots WHERE order_id = $1", order.id)
        assert (lot["kind"], lot["amount"]) == ("paid", 5_000)
        ends = datetime.fromtimestamp(paid_by["lines"]["data"][0]["period"]["end"], UTC)
        assert lot["expires_at"] == ends + timedelta(seconds=GRACE_SECONDS)


async def test_a_quantity_and_carried_over_credits(subs: Subscriptions) -> None:
    account, subscription = await subs.subscribed(subs.plan(rollover=True), quantity=3)
    invoice = subs.bill(subscription)
    assert await subs.apply(invoice) == "paid"
    assert await subs.desk.bank.book(account) == [("plan", 15_000)]
    order = await subs.order(invoice)
    assert await subs.desk.bank.owner.fetchval(
        "SELECT expires_at IS NULL FROM farebox.lots WHERE order_id = $1", order.id
    )


async def test_credits_that_come_late_still_last_the_grace(subs: Subscriptions) -> None:
    _, subscription = await subs.subscribed()
    invoice = subs.bill(subscription)
    now = datetime.now(UTC) + timedelta(days=90)
    ledger = PlanLedger(subs.desk.bank.control._pool)
    late = PlanDesk(subs.desk.api, ledger, subs.desk.orders, lambda: subs.plans, clock=lambda: now)
    assert (await late.apply(invoice)).outcome == "paid"
    order = await subs.order(invoice)
    expires_at = await subs.desk.bank.owner.fetchval(
        "SELECT expires_at FROM farebox.lots WHERE order_id = $1", order.id
    )
    assert expires_at == now + timedelta(seconds=GRACE_SECONDS)


async def test_an_invoice_that_is_not_paid_waits(subs: Subscriptions) -> None:
    account, subscription = await subs.subscribed()
    invoice = subs.bill(subscription, pay=False)
    assert await subs.apply(invoice) == "open"
    subs.desk.stripe.invoices.fail(invoice)
    assert await subs.apply(invoice) == "open"
    assert await subs.desk.bank.book(account) == []
    subs.desk.stripe.invoices.pay(invoice)
    assert await subs.apply(invoice) == "paid"
    assert await subs.desk.bank.book(account) == [("plan", 5_000)]


async def test_a_discount_is_the_operators_and_recorded(subs: Subscriptions) -> None:
    account, subscription = await subs.subscribed()
    invoice = subs.bill(subscription, discount=500, tax=300)
    assert await subs.apply(invoice) == "paid"
    order = await subs.order(invoice)
    assert (order.subtotal, order.discount, order.tax, order.received) == (2_000, 500, 300, 1_800)
    free = subs.bill(subscription, discount=2_000)
    assert await subs.apply(free) == "paid"
    order = await subs.order(free)
    assert (order.received, order.payment_intent) == (0, None)
    assert await subs.desk.bank.book(account) == [("plan", 5_000)] * 2


async def test_the_metadata_of_the_subscription_say_whose_it_is(subs: Subscriptions) -> None:
    account, _ = await subs.desk.bank.open_account()
    customer = await subs.desk.api.create_customer({}, key=f"elsewhere:{account.id}")
    named = subs.desk.stripe.invoices.subscribe(customer, subs.plan(), metadata={ACCOUNT_KEY: str(account.id)})
    assert await subs.apply(subs.bill(named)) == "paid"
    assert await subs.desk.bank.book(account.id) == [("plan", 5_000)]


async def test_what_is_another_business_s_is_left_alone(subs: Subscriptions) -> None:
    account, subscription = await subs.subscribed(subs.desk.stripe.invoices.price(2_000))
    invoice = subs.bill(subscription)
    assert await subs.apply(invoice) == "not_ours"
    with pytest.raises(StripeUnknown):
        await subs.apply("in_unknown")
    assert await subs.desk.bank.book(account) == []
    assert invoice not in {held.payment for held in await subs.desk.orders.quarantine(limit=1_000)}


async def _unknown_account(subs: Subscriptions) -> str:
    customer = await subs.desk.api.create_customer({}, key="nobody")
    metadata = {ACCOUNT_KEY: NOBODY}
    return subs.bill(subs.desk.stripe.invoices.subscribe(customer, subs.plan(), metadata=metadata))


async def _no_id(subs: Subscriptions) -> str:
    customer = await subs.desk.api.create_customer({}, key="no id")
    return subs.bill(subs.desk.stripe.invoices.subscribe(customer, subs.plan(), metadata={ACCOUNT_KEY: "ann"}))


async def _no_account(subs: Subscriptions) -> str:
    customer = await subs.desk.api.create_customer({}, key="stranger")
    return subs.bill(subs.desk.stripe.invoices.subscribe(customer, subs.plan()))


async def _other_account(subs: Subscriptions) -> str:
    other, _ = await subs.desk.bank.open_account()
    _, subscription = await subs.subscribed(metadata={ACCOUNT_KEY: str(other.id)})
    return subs.bill(subscription)


async def _other_price(subs: Subscriptions) -> str:
    price = subs.plan()
    subs.plans[price] = a_plan(price, price=1_999, currency="usd")
    return subs.bill((await subs.subscribed(price))[1])


async def _other_currency(subs: Subscriptions) -> str:
    price = subs.plan()
    subs.plans[price] = a_plan(price, price=2_000, currency="eur")
    return subs.bill((await subs.subscribed(price))[1])


async def _unknown_price(subs: Subscriptions) -> str:
    account, _ = await subs.desk.bank.open_account()
    _, subscription = await subs.subscribed(
        subs.desk.stripe.invoices.price(2_000), metadata={ACCOUNT_KEY: str(account.id)}
    )
    return subs.bill(subscription)


QUARANTINED = {
    "unknown_account": [_unknown_account, _no_id],
    "no_account": [_no_account],
    "other_account": [_other_account],
    "other_amount": [_other_price],
    "other_currency": [_other_currency],
    "unknown_price": [_unknown_price],
}


@pytest.mark.parametrize(
    ("reason", "make"), [(reason, make) for reason, makers in QUARANTINED.items() for make in makers]
)
async def test_what_does_not_match_is_in_quarantine(subs: Subscriptions, reason: str, make: Any) -> None:
    invoice = await make(subs)
    for _ in range(2):
        assert await subs.apply(invoice) == "quarantined"
    assert await subs.reason(invoice) == reason
    assert await subs.desk.orders.search(invoice) is None


async def test_what_was_mended_is_credited_by_the_next_look(subs: Subscriptions) -> None:
    price = subs.plan()
    account, subscription = await subs.subscribed(price, metadata={})
    plan = subs.plans[price]
    subs.plans[price] = a_plan(price, price=1, currency="usd")
    invoice = subs.bill(subscription)
    assert await subs.apply(invoice) == "quarantined"
    subs.plans[price] = plan
    assert await subs.apply(invoice) == "paid"
    assert await subs.apply(invoice) == "known"
    assert (await subs.desk.orders.quarantined(invoice)).resolution == "credited"
    assert await subs.desk.bank.book(account) == [("plan", 5_000)]


async def test_what_was_dismissed_stays_so(subs: Subscriptions) -> None:
    price = subs.plan()
    account, subscription = await subs.subscribed(price)
    plan = subs.plans[price]
    subs.plans[price] = a_plan(price, price=1, currency="usd")
    invoice = subs.bill(subscription)
    assert await subs.apply(invoice) == "quarantined"
    await subs.desk.orders.resolve(invoice, "dismissed", actor="test", new_id=UUID(NOBODY))
    subs.plans[price] = plan
    assert await subs.apply(invoice) == "dismissed"
    assert await subs.desk.bank.book(account) == []


@pytest.mark.parametrize("first", ["credited", "dismissed"])
async def test_an_invoice_is_credited_or_dismissed_and_never_both(subs: Subscriptions, first: str) -> None:
    """Its plan is mended, and while one connection credits it an operator dismisses it on another; or the reverse."""
    price = subs.plan()
    account, subscription = await subs.subscribed(price)
    plan = subs.plans[price]
    subs.plans[price] = a_plan(price, price=1, currency="usd")
    invoice = subs.bill(subscription)
    assert await subs.apply(invoice) == "quarantined"
    subs.plans[price] = plan

    async def credit(connection: Connection) -> str:
        ledger = PlanLedger(cast(Pool, connection))
        desk = PlanDesk(subs.desk.api, ledger, subs.desk.orders, lambda: subs.plans)
        return (await desk.apply(invoice)).outcome

    async def dismiss(connection: Connection) -> str:
        try:
            await OrderLedger(cast(Pool, connection)).resolve(invoice, "dismissed", actor="test", new_id=uuid4())
        except Conflict:
            return "conflict"
        return "dismissed"

    steps = (credit, dismiss) if first == "credited" else (dismiss, credit)
    async with AsyncExitStack() as stack:
        dsn = subs.desk.bank.database.app
        one, other = [await connect(dsn, Role.CONTROL, lock_ms=0, statement_seconds=0) for _ in steps]
        stack.push_async_callback(one.close)
        stack.push_async_callback(other.close)
        pid = await other.fetchval("SELECT pg_backend_pid()")
        async with one.transaction():
            assert await steps[0](one) == ("paid" if first == "credited" else "dismissed")
            late = asyncio.create_task(steps[1](other))
            blocked = "SELECT cardinality(pg_blocking_pids($1)) > 0"
            while not late.done() and not await subs.desk.bank.owner.fetchval(blocked, pid):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        assert await late == ("conflict" if first == "credited" else "dismissed")
    assert (await subs.desk.orders.quarantined(invoice)).resolution == first
    assert await subs.desk.bank.book(account) == ([("plan", 5_000)] if first == "credited" else [])


async def test_a_change_within_the_period_counts_by_its_money(subs: Subscriptions) -> None:
    account, subscription = await subs.subscribed()
    # A whole month, and a half of one that is given back.
    assert await subs.apply(subs.bill(subscription, proration=-1_000)) == "paid"
    assert await subs.desk.bank.book(account) == [("plan", 2_500)]


async def test_what_is_paid_with_money_that_was_given_back_brings_no_credits_again(subs: Subscriptions) -> None:
    """Down to a smaller plan and up again, as often as one likes: what is left over goes to the customer's balance at
    Stripe, the credits stay, and the balance pays for the larger plan."""
    account, subscription = await subs.subscribed()
    assert await subs.apply(subs.bill(subscription)) == "paid"
    for _ in range(3):
        assert await subs.apply(subs.bill(subscription, balance=2_000)) == "nothing_sold"
    assert await subs.desk.bank.book(account) == [("plan", 5_000)]
    # A part of it, tax and all.
    assert await subs.apply(subs.bill(subscription, tax=400, balance=600)) == "paid"
    assert await subs.desk.bank.book(account) == [("plan", 5_000), ("plan", 3_750)]


SMALL = a_plan("price_small", credits=1_000_000)
LARGE = a_plan("price_large", credits=3_000_000, price=4_000)


@pytest.mark.parametrize(
    ("amounts", "credits"),
    [
        ([("small", 2_000)], 1_000_000),
        ([("small", 4_000)], 2_000_000),
        ([("small", 0)], 0),
        # Half a month of the small one back, half a month of the large one.
        ([("small", -1_000), ("large", 2_000)], 1_000_000),
        # Back from the large one: nothing is taken.
        ([("small", 1_000), ("large", -2_000)], 0),
        # Rounded once, down.
        ([("small", 1), ("small", 1), ("large", 1)], 1_750),
        ([("large", 333)], 249_750),
    ],
)
def test_credits_are_what_the_lines_money_buys(amounts: list[tuple[str, int]], credits: int) -> None:
    end = datetime(2027, 1, 31, tzinfo=UTC)
    lines = [
        InvoiceLine(price=price, amount=amount, currency="usd", quantity=1, prorated=True, period_end=end)
        for price, amount in amounts
    ]
    assert credits_of(lines, {"small": SMALL, "large": LARGE}) == credits


async def test_a_trial_brings_nothing_and_is_no_alarm(subs: Subscriptions) -> None:
    price = subs.desk.stripe.invoices.price(0)
    subs.plans[price] = SMALL
    account, subscription = await subs.subscribed(price)
    assert await subs.apply(subs.bill(subscription)) == "nothing_sold"
    assert await subs.desk.bank.book(account) == []


async def test_what_was_applied_says_which_order_it_is(subs: Subscriptions) -> None:
    _, subscription = await subs.subscribed()
    invoice = subs.bill(subscription)
    applied = await subs.plan_desk.apply(invoice)
    assert applied == Applied("paid", (await subs.order(invoice)).id)
