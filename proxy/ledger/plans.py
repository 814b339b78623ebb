"""Subscriptions' paid invoices in the ledger: one method for the SQL function. The pool acts as ``Role.CONTROL``."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from proxy.ledger.connect import Pool, translated
from proxy.ledger.records import check_amount, check_text

__all__ = ["PlanLedger", "PlanPaid", "PlanPayment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPayment:
    """A paid invoice, as it was fetched from Stripe, and what its lines sell.

    ``credits``: microcredits, until ``expires_at`` (None: for ever). ``price``: what those lines come to, before
    discount and tax; ``subtotal``, ``discount``, ``tax`` and ``received`` are the whole invoice's. All in minor units.
    """

    invoice: str
    account_id: UUID | None
    """As the subscription's metadata or the customer say; None: nobody knows."""
    payment_intent: str | None
    customer: str | None
    pack: str
    """Which prices it was for."""
    credits: int
    expires_at: datetime | None
    currency: str
    price: int
    livemode: bool
    subtotal: int
    discount: int
    tax: int
    received: int
    problem: str | None = None
    """Why it can't be credited, where that shows without the ledger."""


@dataclass(frozen=True, slots=True)
class PlanPaid:
    """What became of it: ``paid`` (now), ``known`` (before), ``quarantined`` for the reason, or as an operator decided
    ``dismissed`` or ``credited``. ``fresh``: whether that is this call's news."""

    outcome: str
    reason: str | None
    order_id: UUID | None
    fresh: bool


class PlanLedger:
    """Credits invoices. Raises InvalidValue for what can't be stored, and LedgerUnavailable."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def pay(self, payment: PlanPayment, *, order_id: UUID) -> PlanPaid:
        """Credit the account once for the invoice, where nothing is wrong with it; else it is in quarantine.

        ``order_id``: a fresh one, for the order that says what was bought.
        """
        check_amount("credits", payment.credits)
        for name in ("invoice", "payment_intent", "customer", "pack", "problem"):
            check_text(name, getattr(payment, name))
        with translated():
            row = await self._pool.fetchrow(
                "SELECT * FROM farebox.pay_plan($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
                *(order_id, payment.account_id, payment.invoice, payment.payment_intent, payment.customer),
                *(payment.pack, payment.credits, payment.expires_at, payment.currency, payment.price),
                *(payment.livemode, payment.subtotal, payment.discount, payment.tax, payment.received),
                payment.problem,
            )
        assert row is not None, "the function returns one row"
        return PlanPaid(row["outcome"], row["reason"], row["order_id"], row["fresh"])
