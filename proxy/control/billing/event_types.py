"""Stripe's events that mean something to Farebox, and what kind of object each is about.

One list for three: `farebox stripe setup` subscribes to exactly these, the webhook endpoint acts on exactly these, and
docs/stripe.md names them. An event is a hint: whatever its type, the object it names is fetched and applied, so that a
type more costs one fetch and a type less costs the hour until the reconciliation.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

__all__ = ["EVENT_TYPES", "Subject"]


class Subject(StrEnum):
    """What an event is about; the word that Stripe's objects carry as ``object``."""

    SESSION = "checkout.session"
    PAYMENT = "payment_intent"
    REFUND = "refund"
    DISPUTE = "dispute"
    INVOICE = "invoice"


EVENT_TYPES: Mapping[str, Subject] = MappingProxyType(
    {
        # Completed says that the customer is done, not that it is paid: of a bank's transfer the second or third tells.
        "checkout.session.completed": Subject.SESSION,
        "checkout.session.async_payment_succeeded": Subject.SESSION,
        "checkout.session.async_payment_failed": Subject.SESSION,
        "checkout.session.expired": Subject.SESSION,
        # Payments without a session: an account that tops itself up. Of one with a session they say the same again.
        "payment_intent.succeeded": Subject.PAYMENT,
        "payment_intent.payment_failed": Subject.PAYMENT,
        "payment_intent.canceled": Subject.PAYMENT,
        # By the refund, never by its charge: charge.refunded lists none since 2022-11-15 and its amount is a sum.
        "refund.created": Subject.REFUND,
        "refund.updated": Subject.REFUND,
        "refund.failed": Subject.REFUND,
        "charge.dispute.created": Subject.DISPUTE,
        "charge.dispute.updated": Subject.DISPUTE,
        "charge.dispute.funds_withdrawn": Subject.DISPUTE,
        "charge.dispute.funds_reinstated": Subject.DISPUTE,
        "charge.dispute.closed": Subject.DISPUTE,
        # A subscription's month.
        "invoice.paid": Subject.INVOICE,
    }
)
"""Event type -> what ``data.object`` is."""
