"""Refunds: those that Stripe tells of take back what they come to, and those that we ask for hold it beforehand.

A refund is applied in one way, whoever hears of it (webhook, command, reconciliation): it is fetched, and the ledger is
told its facts. One that we ask for (``refunding.py``) is a request first, with its credits held; the request's id is
the idempotency key at Stripe and stands in the refund's metadata. Whoever dies in between, or gets no answer, leaves a
held request, which ``carry_out`` goes on with: it looks for the refund before it asks again, since Stripe forgets keys
after a day.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from proxy.control.billing.errors import StripeAway, StripeError, StripeRefused
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_returns import Refund, create_refund, fetch_refund, refunds_of
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY, Applied
from proxy.control.fields import parse_uuid
from proxy.ledger.errors import LedgerError
from proxy.ledger.refunds import RefundApplied, RefundLedger, RefundOutcome, RefundRequest

__all__ = ["REFUND_KEY", "WITH_ITS_PAYMENT", "PaymentDesk", "RefundDesk", "RefundMetrics", "Resumed"]

REFUND_KEY = "farebox_refund"
"""Under which name a refund's metadata hold the id of our request."""

log = structlog.get_logger("farebox.billing")


class PaymentDesk(Protocol):
    """The till's part in this: a refund may be heard of before its payment."""

    async def apply_payment(self, *, payment_intent: str) -> Applied: ...


class RefundMetrics(Protocol):
    """What this tells ``metrics.Metrics``."""

    def refund_applied(self, outcome: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Resumed:
    """What became of held requests: ended by now; still held, with why."""

    ended: list[RefundRequest]
    waiting: list[tuple[RefundRequest, str]]


class RefundDesk:
    """Applies refunds, and goes on with those that we asked for.

    Raises StripeAway, StripeRefused and LedgerError: call again later.
    """

    def __init__(
        self, api: StripeApi, ledger: RefundLedger, till: PaymentDesk, *, metrics: RefundMetrics | None = None
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._till = till
        self._metrics = metrics

    async def apply(self, refund_id: str) -> str:
        """Fetch the refund and do what it says; the outcome in a word. Raises StripeUnknown."""
        return await self.apply_fetched(await fetch_refund(self._api, refund_id))

    async def apply_fetched(self, refund: Refund) -> str:
        """A refund as it was fetched with our own key."""
        payment = refund.payment_intent
        if payment is None:
            return RefundOutcome.NOT_OURS.value
        applied = await self._ledger_apply(refund, payment)
        if applied.outcome in WITH_ITS_PAYMENT:
            paid = await self._till.apply_payment(payment_intent=payment)
            applied = await self._ledger_apply(refund, payment)
            if applied.outcome in WITH_ITS_PAYMENT:
                return f"payment_{paid.outcome}" if paid.outcome != "not_ours" else paid.outcome
        self._tell(refund, applied)
        return applied.outcome.value

    async def _ledger_apply(self, refund: Refund, payment: str) -> RefundApplied:
        return await self._ledger.apply(
            refund.id,
            payment_intent=payment,
            amount=refund.amount,
            currency=refund.currency,
            status=refund.status,
            request_id=parse_uuid(refund.metadata.get(REFUND_KEY)),
            problem=refund.failure_reason,
        )

    def _tell(self, refund: Refund, applied: RefundApplied) -> None:
        facts = {"refund": refund.id, "status": refund.status, "order_id": str(applied.order_id)}
        if applied.outcome in (RefundOutcome.CONFLICT, RefundOutcome.UNKNOWN_STATUS):
            log.error("a refund was not applied", outcome=applied.outcome.value, **facts)
        elif applied.moved:
            log.info("a refund was applied", account=str(applied.account_id), credits=applied.moved, **facts)
        if self._metrics is not None:
            self._metrics.refund_applied(applied.outcome.value)

    async def resume(self, *, age_seconds: float = 0.0, limit: int = 100) -> Resumed:
        """Carry on with requests that were made at least so long ago and have no refund yet. Raises LedgerError."""
        return await self.carry_on(await self._ledger.held(age_seconds=age_seconds, limit=limit))

    async def carry_on(self, requests: Sequence[RefundRequest]) -> Resumed:
        """Carry on with these, one after the other. Raises LedgerError."""
        ended: list[RefundRequest] = []
        waiting: list[tuple[RefundRequest, str]] = []
        for request in requests:
            if request.livemode != self._api.livemode:
                waiting.append((request, "it is of the other mode than FAREBOX_STRIPE_KEY"))
                continue
            try:
                ended.append(await self.carry_out(request))
            except LedgerError:
                raise
            except Exception as error:
                # Whatever is wrong with this one, the others are not to wait for it.
                known = isinstance(error, StripeError)
                log.warning(
                    "a refund request waits",
                    request_id=str(request.id),
                    reason=str(error),
                    exc_info=None if known else error,
                )
                waiting.append((request, str(error)))
        return Resumed(ended, waiting)

    async def carry_out(self, request: RefundRequest) -> RefundRequest:
        """A held request, to its end: done; or, where Stripe refuses, released. Raises StripeError: it waits."""
        refund = await self._existing(request) or await self._ask(request)
        if refund is not None:
            await self.apply_fetched(refund)
        return await self._ledger.request(request.id)

    async def _existing(self, request: RefundRequest) -> Refund | None:
        """The request's refund, where there is one whose answer was lost."""
        for refund in await refunds_of(self._api, request.payment_intent):
            if parse_uuid(refund.metadata.get(REFUND_KEY)) == request.id:
                return refund
        return None

    async def _ask(self, request: RefundRequest) -> Refund | None:
        """The refund; None where Stripe refuses it, and the request is released."""
        try:
            return await create_refund(self._api, _params(request), key=str(request.id))
        except StripeRefused as refused:
            # Of an earlier attempt nobody knows what it did: that key may stand for a refund.
            if refused.code == "idempotency_error":
                raise StripeAway(str(refused)) from refused
            refund = await self._existing(request)
            if refund is None:
                await self._ledger.release(request.id, str(refused))
                log.warning("a refund was refused", request_id=str(request.id), reason=str(refused))
            return refund


WITH_ITS_PAYMENT = frozenset({RefundOutcome.NOT_OURS, RefundOutcome.NOT_PAID})
"""Outcomes that may only mean that the payment hasn't been heard of: apply it, and then this again."""


def _params(request: RefundRequest) -> Mapping[str, Any]:
    """The same for every attempt: Stripe compares them under the idempotency key."""
    return {
        "payment_intent": request.payment_intent,
        "amount": request.amount,
        "metadata": {
            REFUND_KEY: str(request.id),
            ORDER_KEY: str(request.order_id),
            ACCOUNT_KEY: str(request.account_id),
        },
    }
