"""A till for tests: our orders on a real ledger, and Stripe's side at the fake."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY, Till
from proxy.ledger.orders import NewOrder, Order, OrderLedger
from tests.fakes.stripe import FakeStripe
from tests.ledger.bank import Bank

__all__ = ["Desk", "a_new_order", "open_desk"]


def a_new_order(account_id: UUID, **changes: Any) -> NewOrder:
    """10 dollars for 1,000 credits (in microcredits a small number, so that sums can be read)."""
    given: dict[str, Any] = {
        "id": uuid4(),
        "account_id": account_id,
        "kind": "checkout",
        "pack": "starter",
        "credits": 1_000,
        "currency": "usd",
        "price": 1_000,
        "livemode": False,
        "actor": "test",
    }
    return NewOrder(**given | changes)


@dataclass(frozen=True, slots=True)
class Desk:
    """Orders, Stripe, and the till between them."""

    bank: Bank
    orders: OrderLedger
    stripe: FakeStripe
    api: StripeApi
    till: Till

    async def order(self, account_id: UUID | None = None, **changes: Any) -> Order:
        """An order of a new account, unless it is another's."""
        if account_id is None:
            account_id = (await self.bank.open_account())[0].id
        created = await self.orders.create(a_new_order(account_id, **changes))
        assert created.order is not None
        return created.order

    async def session(self, order: Order, **changes: Any) -> str:
        """A Checkout Session for the order, as our checkout makes it: its id."""
        price = {"currency": order.currency, "unit_amount": order.price, "product_data": {"name": "credits"}}
        metadata = {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(order.account_id)}
        params: dict[str, Any] = {
            "mode": "payment",
            "line_items": [{"price_data": price, "quantity": 1}],
            "client_reference_id": str(order.id),
            "metadata": metadata,
            "payment_intent_data": {"metadata": metadata},
            "success_url": "https://example.com/done",
        }
        made = await self.api.create_session(params | changes, key=f"test:{uuid4()}")
        return made.id

    async def balance(self, order: Order) -> int:
        """What the order's account owns."""
        return (await self.bank.money(order.account_id))[0]


@asynccontextmanager
async def open_desk(bank: Bank, stripe: FakeStripe) -> AsyncIterator[Desk]:
    """A desk on the bank's database; the fake's mode is its own."""
    orders = OrderLedger(bank.control._pool)
    api = StripeApi(stripe.key, url=stripe.url, retries=0)
    try:
        yield Desk(bank, orders, stripe, api, Till(api, orders))
    finally:
        api.close()
