"""The desks, one for each kind of Stripe's objects, and who sends what to which of them.

Webhooks, the loop that resumes them, the reconciliation and the commands all go through these, made here in one way.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from proxy.control.billing import listing
from proxy.control.billing.disputes import DisputeDesk
from proxy.control.billing.event_types import Subject
from proxy.control.billing.events import Appliers, EventDesk
from proxy.control.billing.listing import AtStripe
from proxy.control.billing.plans import PlanDesk
from proxy.control.billing.reconcile import Finished, Reconciler, Side
from proxy.control.billing.refunds import RefundDesk
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_invoices import invoice_of
from proxy.control.billing.till import Applied, Till
from proxy.core.packs import Plan
from proxy.ledger.connect import Pool
from proxy.ledger.disputes import DisputeLedger
from proxy.ledger.orders import OrderLedger
from proxy.ledger.plans import PlanLedger
from proxy.ledger.reconciliation import Booked, ReconciliationLedger
from proxy.ledger.refunds import RefundLedger
from proxy.ledger.stripe_events import EventLedger
from proxy.metrics import Metrics

__all__ = ["Desks", "open_desks", "open_reconciler"]

REQUESTS_MAX = 1_000
"""Refund requests that one reconciliation goes on with."""


@dataclass(frozen=True, slots=True)
class Desks:
    """Each applies one kind of object; ``events`` sends each event to its own. ``plans``: those that are sold now."""

    api: StripeApi
    orders: OrderLedger
    till: Till
    refund_requests: RefundLedger
    refunds: RefundDesk
    disputes: DisputeDesk
    plan_desk: PlanDesk
    plans: Callable[[], Mapping[str, Plan]]
    event_ledger: EventLedger
    events: EventDesk


def open_desks(api: StripeApi, pool: Pool, plans: Callable[[], Mapping[str, Plan]], *, metrics: Metrics) -> Desks:
    """The desks over one ledger, whose ``pool`` acts as ``Role.CONTROL``."""
    orders = OrderLedger(pool)
    till = Till(api, orders, metrics=metrics)
    plan_desk = PlanDesk(api, PlanLedger(pool), orders, plans, metrics=metrics)
    payments = _PaidWhatever(api, till, plan_desk, plans)
    refund_requests = RefundLedger(pool)
    refunds = RefundDesk(api, refund_requests, payments, metrics=metrics)
    disputes = DisputeDesk(api, DisputeLedger(pool), payments, metrics=metrics)
    event_ledger = EventLedger(pool)

    async def session(id: str) -> str:
        return (await till.apply_payment(session_id=id)).outcome

    async def payment(id: str) -> str:
        return (await till.apply_payment(payment_intent=id)).outcome

    async def invoice(id: str) -> str:
        return (await plan_desk.apply(id)).outcome

    appliers: Appliers = {
        Subject.SESSION: session,
        Subject.PAYMENT: payment,
        Subject.REFUND: refunds.apply,
        Subject.DISPUTE: disputes.apply,
        Subject.INVOICE: invoice,
    }
    event_desk = EventDesk(event_ledger, appliers, metrics=metrics)
    return Desks(api, orders, till, refund_requests, refunds, disputes, plan_desk, plans, event_ledger, event_desk)


class _PaidWhatever:
    """Applies a payment of either kind, for a refund or dispute that is heard of before it: an order's, or an
    invoice's, which its PaymentIntent doesn't show."""

    def __init__(
        self, api: StripeApi, till: Till, plan_desk: PlanDesk, plans: Callable[[], Mapping[str, Plan]]
    ) -> None:
        self._api = api
        self._till = till
        self._plan_desk = plan_desk
        self._plans = plans

    async def apply_payment(self, *, payment_intent: str) -> Applied:
        """What became of it. Raises StripeAway, StripeRefused, LedgerUnavailable."""
        applied = await self._till.apply_payment(payment_intent=payment_intent)
        if applied.outcome != "not_ours" or not self._plans():
            return applied
        invoice = await invoice_of(self._api, payment_intent)
        return applied if invoice is None else await self._plan_desk.apply(invoice)


def open_reconciler(
    desks: Desks, ledger: ReconciliationLedger, *, finish: Mapping[str, Callable[[], Awaitable[Finished]]] | None = None
) -> Reconciler:
    """What holds Stripe's book against ours. ``finish``: what else was begun here and may have to be ended."""

    async def order(id: UUID) -> str:
        return (await desks.till.apply_payment(id)).outcome

    async def refund_requests() -> Finished:
        resumed = await desks.refunds.resume(limit=REQUESTS_MAX)
        return Finished(len(resumed.ended), [f"{request.id}: {why}" for request, why in resumed.waiting])

    return Reconciler(
        desks.api,
        ledger,
        _sides(desks, ledger),
        event_ledger=desks.event_ledger,
        event_desk=desks.events,
        orders=desks.orders,
        apply_order=order,
        finish={"refund requests": refund_requests} | dict(finish or {}),
    )


def _sides(desks: Desks, ledger: ReconciliationLedger) -> Sequence[Side]:
    """What came in before what went back."""

    async def payments(found: Sequence[AtStripe]) -> Mapping[str, Booked]:
        return await ledger.payments([at.id for at in found])

    async def invoices(found: Sequence[AtStripe]) -> Mapping[str, Booked]:
        return await ledger.invoices([at.id for at in found])

    async def refunds(found: Sequence[AtStripe]) -> Mapping[str, Booked]:
        return await ledger.refunds([at.id for at in found], [at.payment for at in found])

    async def disputes(found: Sequence[AtStripe]) -> Mapping[str, Booked]:
        return await ledger.disputes([at.id for at in found], [at.payment for at in found])

    async def payment(id: str) -> str:
        return (await desks.till.apply_payment(payment_intent=id)).outcome

    async def invoice(id: str) -> str:
        return (await desks.plan_desk.apply(id)).outcome

    return (
        Side("payment", listing.payments(), payments, payment),
        Side("invoice", listing.invoices(desks.plans), invoices, invoice),
        Side("refund", listing.refunds(), refunds, desks.refunds.apply),
        Side("dispute", listing.disputes(), disputes, desks.disputes.apply),
    )
