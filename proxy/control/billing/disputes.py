"""Disputes: a customer's bank asks about a payment, takes the money, and may give it back.

An inquiry does nothing here. A dispute freezes the account; its credits leave when the bank has taken the money, and
come back when the money does; winning it lifts the freeze, losing it leaves that to the operator. However often, late
or out of order Stripe tells of one, what counts is the dispute as it was fetched last.
"""

from typing import Protocol

import structlog

from proxy.control.billing.refunds import WITH_ITS_PAYMENT, PaymentDesk
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_returns import Dispute, fetch_dispute
from proxy.ledger.disputes import DisputeApplied, DisputeLedger
from proxy.ledger.refunds import RefundOutcome

__all__ = ["DisputeDesk", "DisputeMetrics"]

log = structlog.get_logger("farebox.billing")


class DisputeMetrics(Protocol):
    """What this tells ``metrics.Metrics``."""

    def dispute_applied(self, outcome: str) -> None: ...


class DisputeDesk:
    """Applies disputes. Raises StripeAway, StripeRefused and LedgerError: call again later."""

    def __init__(
        self, api: StripeApi, ledger: DisputeLedger, till: PaymentDesk, *, metrics: DisputeMetrics | None = None
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._till = till
        self._metrics = metrics

    async def apply(self, dispute_id: str) -> str:
        """Fetch the dispute and do what it says; the outcome in a word. Raises StripeUnknown."""
        asked = await self._ledger.ask()
        dispute = await fetch_dispute(self._api, dispute_id)
        payment = dispute.payment_intent
        if payment is None:
            return RefundOutcome.NOT_OURS.value
        applied = await self._ledger_apply(dispute, payment, asked)
        if applied.outcome in WITH_ITS_PAYMENT:
            paid = await self._till.apply_payment(payment_intent=payment)
            applied = await self._ledger_apply(dispute, payment, asked)
            if applied.outcome in WITH_ITS_PAYMENT:
                return f"payment_{paid.outcome}" if paid.outcome != "not_ours" else paid.outcome
        self._tell(dispute, applied)
        return applied.outcome.value

    async def _ledger_apply(self, dispute: Dispute, payment: str, asked: int) -> DisputeApplied:
        return await self._ledger.apply(
            dispute.id,
            payment_intent=payment,
            amount=dispute.amount,
            currency=dispute.currency,
            status=dispute.status,
            withdrawn=dispute.withdrawn,
            asked=asked,
        )

    def _tell(self, dispute: Dispute, applied: DisputeApplied) -> None:
        facts = {"dispute": dispute.id, "status": dispute.status, "account": str(applied.account_id)}
        if applied.outcome is RefundOutcome.CONFLICT:
            log.error("a dispute was not applied", **facts)
        if applied.froze:
            log.warning("an account is frozen: its payment is disputed", order_id=str(applied.order_id), **facts)
        if applied.moved:
            log.info("a dispute was applied", credits=applied.moved, **facts)
        if self._metrics is not None:
            self._metrics.dispute_applied(applied.outcome.value)
