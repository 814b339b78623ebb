"""A counter for tests: where money goes back, over the tests' till."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from proxy.control.billing.disputes import DisputeDesk
from proxy.control.billing.refunds import RefundDesk
from proxy.ledger.audit import audit
from proxy.ledger.disputes import DisputeLedger
from proxy.ledger.orders import Order
from proxy.ledger.refunds import RefundLedger
from tests.control.billing.till import Desk

__all__ = ["Counter", "open_counter"]


@dataclass(frozen=True, slots=True)
class Counter:
    """Refunds and disputes beside the till."""

    desk: Desk
    ledger: RefundLedger
    refunds: RefundDesk
    disputes: DisputeDesk

    async def sold(self, *, account_id: UUID | None = None, tax: int = 0, **changes: Any) -> tuple[Order, str]:
        """An order that was paid, and its PaymentIntent."""
        order, intent = await self.paid_unseen(account_id=account_id, tax=tax, **changes)
        assert (await self.desk.till.apply_payment(payment_intent=intent)).outcome == "paid"
        return await self.desk.orders.find(order.id), intent

    async def paid_unseen(self, *, account_id: UUID | None = None, tax: int = 0, **changes: Any) -> tuple[Order, str]:
        """An order that was paid at Stripe, of which nothing has been heard here."""
        order = await self.desk.order(account_id, **changes)
        intent = self.desk.stripe.checkout.pay(await self.desk.session(order), tax=tax)
        assert intent is not None
        return order, intent

    async def refund(self, intent: str, amount: int | None = None, **given: Any) -> str:
        """As somebody does in Stripe's dashboard; applied."""
        refund = self.desk.stripe.refunds.create(intent, amount, **given)["id"]
        await self.refunds.apply(refund)
        return str(refund)

    async def spend(self, order: Order, amount: int) -> None:
        key = await self.desk.bank.open_key(order.account_id)
        row, _ = await self.desk.bank.reserve(key, amount)
        await self.desk.bank.finalize(row, amount)

    async def money(self, order: Order) -> tuple[int, int, int]:
        return await self.desk.bank.money(order.account_id)

    async def taken(self, order: Order) -> tuple[int, int]:
        found = await self.desk.orders.find(order.id)
        return found.taken, found.bonus_taken

    async def lots(self, order: Order) -> list[tuple[str, int, int, int]]:
        """Kind, remaining, reserved and owed of the account's lots."""
        await self.desk.bank.control._pool.fetch("SELECT farebox.draw_lots($1, NULL, NULL)", order.account_id)
        rows = await self.desk.bank.control._pool.fetch(
            "SELECT kind, remaining, reserved, owed FROM farebox.lots WHERE account_id = $1 ORDER BY version",
            order.account_id,
        )
        return [tuple(row) for row in rows]

    async def audit(self) -> None:
        checks = await audit(self.desk.bank.owner)
        assert [check for check in checks if not check.ok] == []


@asynccontextmanager
async def open_counter(desk: Desk) -> AsyncIterator[Counter]:
    """A counter on the desk's ledger. At its end the audit must find everything right."""
    pool = desk.bank.control._pool
    refunds = RefundLedger(pool)
    opened = Counter(
        desk, refunds, RefundDesk(desk.api, refunds, desk.till), DisputeDesk(desk.api, DisputeLedger(pool), desk.till)
    )
    yield opened
    await opened.audit()
