"""Plan credits: a subscription's paid invoice brings its account the credits of the plans on it, once.

As with every payment, the invoice is fetched and held against what is sold: here the plans of pricing.yaml, by the ids
of their prices at Stripe. Whose it is stands in the subscription's metadata (``farebox_account``), or follows from the
customer, where Farebox made that. What doesn't match is held in quarantine; once its cause is mended, the next look at
the invoice (the hourly reconciliation) credits it.

A change of plans in the middle of a period comes as prorated lines, some of them negative. They count in proportion to
their money, so that a customer gets credits for what was paid, and not the new plan's on top of the old one's. What
they leave to the customer's favour becomes a balance at Stripe; the credits of the plan that was given back stay, so
that what this balance pays for brings none: or whoever goes down and up again would have them twice.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from uuid import UUID, uuid4

import structlog

from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_invoices import Invoice, InvoiceLine, fetch_invoice
from proxy.control.billing.till import ACCOUNT_KEY, Applied, TillMetrics
from proxy.control.fields import parse_uuid
from proxy.core.packs import Plan
from proxy.ledger.orders import OrderLedger
from proxy.ledger.plans import PlanLedger, PlanPayment

__all__ = ["PlanDesk", "credits_of"]

log = structlog.get_logger("farebox.plans")

Plans = Mapping[str, Plan]
"""The plans that are sold, by the ids of their prices at Stripe."""


class PlanDesk:
    """Applies invoices. ``plans``: those of the catalog that serves. ``clock`` is for tests.

    Raises StripeAway, StripeRefused and LedgerUnavailable: call again later.
    """

    def __init__(
        self,
        api: StripeApi,
        ledger: PlanLedger,
        orders: OrderLedger,
        plans: Callable[[], Plans],
        *,
        metrics: TillMetrics | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._orders = orders
        self._plans = plans
        self._metrics = metrics
        self._clock = clock

    async def apply(self, invoice_id: str) -> Applied:
        """Fetch the invoice and do what it says. One that sells no plan of ours is ``not_ours``.

        Raises StripeUnknown besides, for one that our key doesn't know.
        """
        plans = self._plans()
        invoice = await fetch_invoice(self._api, invoice_id)
        sold = [line for line in invoice.lines if line.price in plans]
        named = ACCOUNT_KEY in invoice.metadata
        if not sold and not named:
            return Applied("not_ours")
        if invoice.status != "paid":
            return Applied("open")
        problem = _problem(invoice, plans) if sold else "unknown_price"
        credits = 0 if problem else _paid_for(credits_of(sold, plans), invoice)
        if problem is None and credits == 0:
            return Applied("nothing_sold")
        account_id, unnamed = await self._account(invoice)
        return await self._pay(_payment(invoice, sold, account_id, credits, problem or unnamed, self._expiry(sold)))

    async def _account(self, invoice: Invoice) -> tuple[UUID | None, str | None]:
        """Whose invoice it is, and what is wrong with that."""
        by_customer = None
        if invoice.customer is not None:
            by_customer = await self._orders.account_of(invoice.customer, livemode=invoice.livemode)
        if ACCOUNT_KEY not in invoice.metadata:
            return by_customer, None if by_customer is not None else "no_account"
        named = parse_uuid(invoice.metadata[ACCOUNT_KEY])
        if named is None:
            return None, "unknown_account"
        return named, "other_account" if by_customer not in (None, named) else None

    def _expiry(self, sold: list[InvoiceLine]) -> datetime | None:
        """When the credits end: some days after the period that was paid, or after today where we come too late."""
        plans = self._plans()
        terms = [(line, plans[line.price]) for line in sold if line.price is not None and line.amount > 0]
        if not terms or any(plan.rollover for _, plan in terms):
            return None
        grace = timedelta(seconds=max(plan.grace_seconds for _, plan in terms))
        return max(self._clock(), *(line.period_end for line, _ in terms)) + grace

    async def _pay(self, payment: PlanPayment) -> Applied:
        paid = await self._ledger.pay(payment, order_id=uuid4())
        if paid.fresh and paid.outcome == "quarantined":
            log.error(
                "payment_quarantined",
                payment=payment.invoice,
                reason=paid.reason,
                currency=payment.currency,
                received=payment.received,
            )
        elif paid.fresh:
            log.info("payment_credited", payment=payment.invoice, order_id=str(paid.order_id))
        if paid.fresh and self._metrics is not None:
            self._metrics.payment_applied(paid.outcome)
        return Applied(paid.outcome, paid.order_id, paid.reason)


def credits_of(sold: list[InvoiceLine], plans: Plans) -> int:
    """Microcredits that lines of plans come to, in proportion to their money, rounded down; never below 0."""
    total = sum(
        (Fraction(plans[line.price].credits * line.amount, plans[line.price].price) for line in sold if line.price),
        Fraction(0),
    )
    return max(0, total.numerator // total.denominator)


def _paid_for(credits: int, invoice: Invoice) -> int:
    """What of them the customer pays for anew: not what their balance at Stripe pays."""
    if invoice.from_balance == 0:
        return credits
    return credits * (invoice.total - invoice.from_balance) // invoice.total


def _problem(invoice: Invoice, plans: Plans) -> str | None:
    """What is wrong with a paid invoice whoever's it is."""
    for line in invoice.lines:
        plan = plans.get(line.price or "")
        if plan is None:
            # What is given back for a plan that we don't know can't be counted against what is sold.
            if line.prorated:
                return "unknown_price"
            continue
        if line.currency != plan.currency or invoice.currency != plan.currency:
            return "other_currency"
        # A trial's line is 0, and sells nothing.
        if not line.prorated and line.amount not in (0, plan.price * line.quantity):
            return "other_amount"
    return None


def _payment(
    invoice: Invoice,
    sold: list[InvoiceLine],
    account_id: UUID | None,
    credits: int,
    problem: str | None,
    expires_at: datetime | None,
) -> PlanPayment:
    return PlanPayment(
        invoice=invoice.id,
        account_id=account_id,
        payment_intent=invoice.payment_intent,
        customer=invoice.customer,
        pack=" ".join(dict.fromkeys(line.price for line in sold if line.price)),
        credits=credits,
        expires_at=expires_at,
        currency=invoice.currency,
        price=sum(line.amount for line in sold),
        livemode=invoice.livemode,
        subtotal=invoice.subtotal,
        discount=invoice.discount,
        tax=invoice.tax,
        received=invoice.amount_paid,
        problem=problem,
    )
