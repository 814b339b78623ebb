"""Accounts that top themselves up, for tests: a card at the fake Stripe, a pack, and what watches over both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from proxy.control.billing.autotopup import AutoTopups
from proxy.control.billing.errors import StripeRefused
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY, Till
from proxy.ledger.autotopups import AutoTopup, AutoTopupLedger, Offer, Wanted
from proxy.ledger.orders import NewOrder, Order
from proxy.metrics import Metrics
from tests.control.billing.till import Desk
from tests.fakes.stripe import Behaviour

__all__ = ["PACK", "Shop", "an_offer"]

PACK = "starter"


def an_offer(**changes: Any) -> Offer:
    """1,000 microcredits and 100 as a bonus, for 10 dollars."""
    given: dict[str, Any] = {
        "credits": 1_000, "bonus": 100, "credits_seconds": None, "bonus_seconds": None, "currency": "usd",
        "price": 1_000,
    }  # fmt: skip
    return Offer(**given | changes)


@dataclass
class Shop:
    """A desk whose accounts buy by themselves. ``offers`` is what is sold, by the pack's id."""

    desk: Desk
    metrics: Metrics = field(default_factory=Metrics)
    offers: dict[str, Offer] = field(default_factory=lambda: {PACK: an_offer()})

    def __post_init__(self) -> None:
        self.ledger = AutoTopupLedger(self.desk.bank.control._pool)
        self.topups = self.worker(self.desk.api)

    def worker(self, api: StripeApi, *, silent_seconds: float = 0.0) -> AutoTopups:
        """What one process has."""
        till, orders = Till(api, self.desk.orders), self.desk.orders
        return AutoTopups(
            api, self.ledger, orders, till, self, self.offers.get, metrics=self.metrics, look_seconds=0.05,
            silent_seconds=silent_seconds,
        )  # fmt: skip

    async def account(
        self, behaviour: Behaviour | None = "succeed", *, balance: int = 5, threshold: int = 10, **changes: Any
    ) -> UUID:
        """An account that is due. ``behaviour``: of its saved card; None: it has none."""
        account, _ = await self.desk.bank.open_account(balance)
        customer = await self.desk.api.create_customer({}, key=str(uuid4()))
        await self.desk.orders.put_customer(account.id, customer, livemode=False)
        if behaviour is not None:
            await self.save(account.id, self.desk.stripe.customers.save(customer, behaviour))
        await self.want(account.id, threshold=threshold, **changes)
        return account.id

    async def save(self, account_id: UUID, method: str) -> None:
        """This is the account's saved payment method."""
        await self.desk.bank.owner.execute(
            "UPDATE farebox.stripe_customers SET payment_method = $2 WHERE account_id = $1", account_id, method
        )

    async def want(self, account_id: UUID, **changes: Any) -> None:
        """What its owner says: the pack as it is now, unless told otherwise."""
        given: dict[str, Any] = {
            "threshold": 10, "pack": PACK, "credits": 1_000, "currency": "usd", "price": 1_000, "monthly_max": 100_000,
            "livemode": False,
        }  # fmt: skip
        await self.ledger.set(account_id, Wanted(**given | changes), actor="test")

    async def checkout_instead(self, failed: Order) -> Order:
        """A checkout of the same goods, once for each attempt."""
        values: dict[str, Any] = {"customer": failed.customer, "save_payment_method": True}
        values |= {
            name: getattr(failed, name) for name in ("pack", "credits", "bonus", "currency", "price", "livemode")
        }
        new = NewOrder(
            id=uuid4(), account_id=failed.account_id, kind="checkout", actor="auto_topup",
            request_key=f"auto:{failed.id}", **values
        )  # fmt: skip
        order = (await self.desk.orders.create(new)).order
        if order is None:
            raise StripeRefused("as many orders of the account wait for their payment as may")
        if order.session_id is not None:
            return order
        metadata = {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(order.account_id)}
        price = {"currency": order.currency, "unit_amount": order.price, "product_data": {"name": "credits"}}
        params: dict[str, Any] = {
            "mode": "payment", "line_items": [{"price_data": price, "quantity": 1}], "metadata": metadata,
            "client_reference_id": str(order.id), "payment_intent_data": {"metadata": metadata},
            "customer": order.customer, "success_url": "https://example.com/done",
        }  # fmt: skip
        session = await self.desk.api.create_session(params, key=str(order.id))
        return await self.desk.orders.opened(order.id, session.id, session.url)

    async def state(self, account_id: UUID) -> AutoTopup:
        found = await self.ledger.find(account_id)
        assert found is not None
        return found

    async def attempts(self, account_id: UUID) -> Sequence[Order]:
        """The account's automatic orders, newest first."""
        return [one for one in await self.desk.orders.list_orders(account_id) if one.kind == "auto"]

    async def customer(self, account_id: UUID) -> str:
        found = await self.desk.orders.customer(account_id, livemode=False)
        assert found is not None
        return found[0]

    async def charged(self, account_id: UUID) -> list[int]:
        """What was really taken from the customer."""
        return [charge["amount"] for charge in self.desk.stripe.payments.charges(await self.customer(account_id))]

    async def balance(self, account_id: UUID) -> int:
        return (await self.desk.bank.money(account_id))[0]

    async def spend(self, account_id: UUID, amount: int) -> None:
        """As calls would."""
        key = await self.desk.bank.open_key(account_id)
        reserve, _ = await self.desk.bank.reserve(key, amount)
        await self.desk.bank.finalize(reserve, amount)

    async def later(self, account_id: UUID) -> None:
        """What blocks the account is over."""
        await self.desk.bank.owner.execute(
            "UPDATE farebox.auto_topups SET blocked_until = clock_timestamp() WHERE account_id = $1", account_id
        )

    async def pauses(self, account_id: UUID) -> float | None:
        """For how many hours it is blocked; None: until its owner does something."""
        hours: float | None = await self.desk.bank.owner.fetchval(
            "SELECT round(extract(epoch FROM nullif(blocked_until, 'infinity') - clock_timestamp()) / 3600, 1)"
            "  FROM farebox.auto_topups WHERE account_id = $1",
            account_id,
        )
        return None if hours is None else float(hours)

    async def told(self, account_id: UUID) -> list[tuple[str, str | None]]:
        """Messages, oldest first: type, and the reason of a failure."""
        rows = await self.desk.bank.owner.fetch(
            "SELECT type, payload FROM farebox.outbox WHERE account_id = $1 ORDER BY created_at, id", account_id
        )
        return [
            (row["type"].removeprefix("account."), json.loads(row["payload"])["data"].get("reason")) for row in rows
        ]
