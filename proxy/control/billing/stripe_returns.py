"""What Stripe says of money that goes back, as values of our own: refunds and disputes, and the calls for them.

Amounts are minor units. All calls raise StripeAway and StripeRefused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import stripe

from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import Members, members

__all__ = [
    "Dispute",
    "Refund",
    "create_refund",
    "dispute_of",
    "fetch_dispute",
    "fetch_refund",
    "refund_of",
    "refunds_of",
]

PAGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """Money given back. ``status``: pending, requires_action, succeeded, failed, canceled."""

    id: str
    status: str
    amount: int
    currency: str
    payment_intent: str | None
    metadata: Mapping[str, str]
    failure_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispute:
    """A payment that the customer's bank disputes, or (status warning_...) only asks about.

    ``withdrawn``: the bank has the money: it was taken more often than it came back, or the dispute is lost. By the
    number of the movements, not by their sum: what comes back was converted at another day's rate.
    """

    id: str
    status: str
    amount: int
    currency: str
    payment_intent: str | None
    withdrawn: bool


async def fetch_refund(api: StripeApi, refund_id: str) -> Refund:
    """A refund as it is now. Raises StripeUnknown."""
    return await api.call(lambda client: refund_of(members(client.v1.refunds.retrieve(refund_id))))


async def create_refund(api: StripeApi, params: Mapping[str, Any], *, key: str) -> Refund:
    """Give money back, once for each idempotency key.

    Never under another key than the first: whether a call whose answer was lost took effect shows by its key alone.
    """
    return await api.call(
        lambda client: refund_of(members(client.v1.refunds.create(params, {"idempotency_key": key})))  # type: ignore[arg-type]
    )


async def refunds_of(api: StripeApi, payment_intent: str) -> list[Refund]:
    """All refunds of a payment."""

    def look(client: stripe.StripeClient) -> list[Refund]:
        found = client.v1.refunds.list({"payment_intent": payment_intent, "limit": PAGE})
        return [refund_of(members(item)) for item in found.auto_paging_iter()]

    return await api.call(look)


async def fetch_dispute(api: StripeApi, dispute_id: str) -> Dispute:
    """A dispute as it is now. Raises StripeUnknown."""
    return await api.call(lambda client: dispute_of(members(client.v1.disputes.retrieve(dispute_id))))


def refund_of(found: Members) -> Refund:
    """A refund that was fetched or listed."""
    return Refund(
        id=found.text("id"),
        status=found.text("status"),
        amount=found.number("amount"),
        currency=found.text("currency"),
        payment_intent=found.ref("payment_intent"),
        metadata=found.metadata(),
        failure_reason=found.text_or_none("failure_reason"),
    )


def dispute_of(found: Members) -> Dispute:
    """A dispute that was fetched or listed."""
    status = found.text("status")
    amounts = [movement.number("amount") for movement in found.listed("balance_transactions")]
    taken, returned = sum(amount < 0 for amount in amounts), sum(amount > 0 for amount in amounts)
    inquiry = status.startswith("warning_")
    return Dispute(
        id=found.text("id"),
        status=status,
        amount=found.number("amount"),
        currency=found.text("currency"),
        payment_intent=found.ref("payment_intent"),
        withdrawn=not inquiry and (taken > returned or status == "lost"),
    )
