"""A subscription's invoice as values of our own: the fields that say who paid how much for which prices.

As in ``stripe_objects.py`` a field that isn't what Stripe's reference says raises StripeAway. Amounts are minor units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import stripe

from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import Members, members

__all__ = ["Invoice", "InvoiceLine", "fetch_invoice", "invoice_of"]

PAGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceLine:
    """One line. ``price``: the id of what it sells (None: it has none); ``amount``: for all of ``quantity``, before
    discount; ``prorated``: for a part of a period, and negative where it gives back what was paid and not used."""

    price: str | None
    amount: int
    currency: str
    quantity: int
    prorated: bool
    period_end: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoice:
    """An invoice with all its lines. ``amount_paid``: what came in for it; ``from_balance``: how much of ``total`` was
    paid from what the customer has at Stripe. ``metadata``: its subscription's."""

    id: str
    livemode: bool
    status: str
    currency: str
    customer: str | None
    amount_paid: int
    total: int
    from_balance: int
    subtotal: int
    discount: int
    tax: int
    payment_intent: str | None
    """The payment that brought most of it; None where there was nothing to pay, or it was paid elsewhere."""
    metadata: Mapping[str, str]
    lines: tuple[InvoiceLine, ...]
    created: datetime


async def fetch_invoice(api: StripeApi, id: str) -> Invoice:
    """The invoice as Stripe has it now. Raises StripeUnknown, StripeAway, StripeRefused."""

    def look(client: stripe.StripeClient) -> Invoice:
        found = members(client.v1.invoices.retrieve(id, {"expand": ["payments"]}))
        # The invoice shows its first lines only.
        lines = client.v1.invoices.line_items.list(id, {"limit": PAGE})
        return _invoice(found, tuple(_line(members(line)) for line in lines.auto_paging_iter()))

    return await api.call(look)


async def invoice_of(api: StripeApi, payment_intent: str) -> str | None:
    """The invoice that the payment was made for; None where it was for none. Raises StripeAway, StripeRefused."""

    def look(client: stripe.StripeClient) -> str | None:
        found = client.v1.invoice_payments.list(
            {"payment": {"type": "payment_intent", "payment_intent": payment_intent}, "limit": 1}
        )
        listed = members(found).listed("data")
        return listed[0].ref("invoice") if listed else None

    return await api.call(look)


def _invoice(found: Members, lines: tuple[InvoiceLine, ...]) -> Invoice:
    parent = found.members("parent")
    subscription = None if parent is None else parent.members("subscription_details")
    # A balance below 0 is the customer's; it rises by what is used of it.
    balance = found.number("starting_balance", 0)
    used = found.number("ending_balance", balance) - balance
    return Invoice(
        id=found.text("id"),
        livemode=found.flag("livemode"),
        status=found.text_or_none("status") or "draft",
        currency=found.text("currency"),
        customer=found.ref("customer"),
        amount_paid=found.number("amount_paid"),
        total=found.number("total"),
        from_balance=max(0, min(used, found.number("total"))),
        subtotal=found.number("subtotal"),
        discount=sum(one.number("amount") for one in found.listed("total_discount_amounts")),
        tax=sum(one.number("amount") for one in found.listed("total_taxes")),
        payment_intent=_payment_intent(found.listed("payments")),
        metadata={} if subscription is None else subscription.metadata(),
        lines=lines,
        created=found.moment("created"),
    )


def _line(found: Members) -> InvoiceLine:
    pricing, parent, period = found.members("pricing"), found.members("parent"), found.members("period")
    details = None if pricing is None else pricing.members("price_details")
    # A line comes from the subscription's item, or from an item of its own that the subscription's change has made.
    items = (parent.members(f"{kind}_item_details") for kind in ("subscription", "invoice")) if parent else ()
    ends = found if period is None else period
    return InvoiceLine(
        price=None if details is None else details.ref("price"),
        amount=found.number("amount"),
        currency=found.text("currency"),
        quantity=found.number("quantity", 1),
        prorated=any(item.flag_or("proration", default=False) for item in items if item is not None),
        period_end=ends.moment("end"),
    )


def _payment_intent(payments: list[Members]) -> str | None:
    paid = [(one.number("amount_paid", 0), one.members("payment")) for one in payments if one.text("status") == "paid"]
    named = [(amount, payment.ref("payment_intent")) for amount, payment in paid if payment is not None]
    return max(((amount, name) for amount, name in named if name is not None), default=(0, None))[1]
