"""Two books for tests: the fake Stripe's, and a ledger's of one's own, with everything that reconciles them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from proxy.control.billing.desks import Desks, open_desks, open_reconciler
from proxy.control.billing.reconcile import Reconciler, Reconciliation
from proxy.core.packs import Plan
from proxy.ledger.orders import Order
from proxy.ledger.reconciliation import ReconciliationLedger
from proxy.ledger.refunds import RefundLedger
from proxy.ledger.stripe_events import Event
from proxy.metrics import Metrics
from tests.control.billing.till import Desk, open_desk
from tests.fakes.stripe import FakeStripe, Object
from tests.ledger.bank import Bank

__all__ = ["Books", "open_books"]


@dataclass(frozen=True, slots=True)
class Books:
    """Nobody delivers webhooks here: what is known is what was reconciled."""

    desk: Desk
    desks: Desks
    ledger: ReconciliationLedger
    reconciler: Reconciler
    refund_ledger: RefundLedger
    plans: dict[str, Plan]

    @property
    def stripe(self) -> FakeStripe:
        return self.desk.stripe

    @property
    def bank(self) -> Bank:
        return self.desk.bank

    async def run(self, back: timedelta = timedelta(hours=72)) -> Reconciliation:
        """Reconcile, by Stripe's clock."""
        return await self.reconciler.run(datetime.fromtimestamp(self.stripe.clock.now(), UTC) - back)

    async def bought(self, *, tax: int = 0, discount: int = 0, **changes: Any) -> tuple[Order, str]:
        """An order, paid at Stripe, and its PaymentIntent ("": a discount left nothing to pay)."""
        order = await self.desk.order(**changes)
        session = await self.desk.session(order)
        order = await self.desk.orders.opened(order.id, session, None)
        return order, self.stripe.checkout.pay(session, tax=tax, discount=discount) or ""

    async def subscribed(self, **plan: Any) -> tuple[UUID, str]:
        """An account, and its subscription to a plan of 5,000 microcredits for 20 dollars."""
        price = self.stripe.invoices.price(2_000)
        terms: dict[str, Any] = {"credits": 5_000, "price": 2_000, "currency": "usd", "grace_seconds": 0}
        self.plans[price] = Plan(price_id=price, name="A plan", **terms | plan)
        account, _ = await self.bank.open_account()
        customer = await self.desk.api.create_customer({}, key=f"customer:{account.id}")
        await self.desk.orders.put_customer(account.id, customer, livemode=False)
        return account.id, self.stripe.invoices.subscribe(customer, price)

    async def book(self, account_id: UUID) -> list[tuple[str, int]]:
        return await self.bank.book(account_id)

    @staticmethod
    def event(found: Object) -> Event:
        """One of the fake's events as a webhook brings it."""
        about = found["data"]["object"]["id"]
        return Event(
            found["id"], found["type"], found["livemode"], about, datetime.fromtimestamp(found["created"], UTC)
        )


@asynccontextmanager
async def open_books(bank: Bank, stripe: FakeStripe) -> AsyncIterator[Books]:
    """Both books; the ledger's on the bank's database."""
    async with open_desk(bank, stripe) as desk:
        pool = bank.control._pool
        plans: dict[str, Plan] = {}
        desks = open_desks(desk.api, pool, lambda: plans, metrics=Metrics())
        ledger = ReconciliationLedger(pool)
        yield Books(desk, desks, ledger, open_reconciler(desks, ledger), RefundLedger(pool), plans)
