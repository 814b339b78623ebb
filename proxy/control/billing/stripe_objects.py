"""What Stripe says, as values of our own: the few fields that are read, checked where they come in.

Stripe's objects stay in ``stripe_api.py``; past it there are frozen dataclasses. Amounts are minor units. A field that
isn't what Stripe's reference says raises StripeAway: an answer that can't be read is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NoReturn

from proxy.control.billing.errors import StripeAway

__all__ = ["Members", "PaymentIntent", "Session", "members", "payment_intent", "session"]


class Members:
    """The members of one of Stripe's objects. All readers raise StripeAway where one is not what was expected."""

    def __init__(self, members: Mapping[str, Any], what: str) -> None:
        self._members = members
        self._what = what

    def text(self, name: str) -> str:
        """Text that has to be there."""
        found = self.text_or_none(name)
        return found if found is not None else self._odd(name)

    def text_or_none(self, name: str) -> str | None:
        """Text; None where it is absent or null."""
        value = self._members.get(name)
        return value if value is None or isinstance(value, str) else self._odd(name)

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number; ``default`` where it is absent or null."""
        value = self._members.get(name)
        if value is None and default is not None:
            return default
        return value if isinstance(value, int) and not isinstance(value, bool) else self._odd(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._members.get(name)
        return value if isinstance(value, bool) else self._odd(name)

    def flag_or(self, name: str, *, default: bool) -> bool:
        """As ``flag``; ``default`` where it is absent or null."""
        return default if self._members.get(name) is None else self.flag(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is absent or null."""
        value = self._members.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return self._odd(name)
        return value

    def moment(self, name: str) -> datetime:
        """A time, in UTC."""
        return datetime.fromtimestamp(self.number(name), UTC)

    def ref(self, name: str) -> str | None:
        """The id of what Stripe gives either by its id or as a whole (expanded); None where there is none."""
        value = self._members.get(name)
        found = value.get("id") if isinstance(value, Mapping) else value
        return found if found is None or isinstance(found, str) else self._odd(name)

    def members(self, name: str) -> "Members | None":
        """A nested object; None where it is absent or null, or there is only its id."""
        value = self._members.get(name)
        return Members(value, f"{self._what}.{name}") if isinstance(value, Mapping) else None

    def listed(self, name: str) -> "list[Members]":
        """A list's objects: a plain one's, or one of Stripe's list objects; empty where it is absent."""
        value = self._members.get(name)
        if isinstance(value, Mapping):
            value = value.get("data")
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            self._odd(name)
        return [Members(item, f"{self._what}.{name}[]") for item in value]

    def metadata(self) -> Mapping[str, str]:
        """The object's metadata."""
        value = self._members.get("metadata") or {}
        return MappingProxyType({str(key): str(text) for key, text in value.items()})

    def _odd(self, name: str) -> NoReturn:
        raise StripeAway(f"Stripe's {self._what} has no {name} that can be read")


def members(found: Any) -> Members:
    """The members of what Stripe's client returned."""
    value = found.to_dict()
    return Members(value, str(value.get("object", "answer")))


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentIntent:
    """One attempt to be paid. ``amount_received``: what came in by now."""

    id: str
    status: str
    livemode: bool
    currency: str
    amount: int
    amount_received: int
    customer: str | None
    payment_method: str | None
    latest_charge: str | None
    metadata: Mapping[str, str]
    created: datetime
    error_code: str | None
    """Why the last attempt failed."""
    decline_code: str | None

    @property
    def failed(self) -> bool:
        """Whether the last attempt failed and nothing is under way."""
        return self.status == "canceled" or (self.status == "requires_payment_method" and self.error_code is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A Checkout Session. ``status``: open, complete, expired; ``payment_status``: paid, unpaid, no_payment_required.

    ``total = subtotal - discount + tax``, and ``subtotal - discount`` where the prices hold the tax already.
    """

    id: str
    status: str
    payment_status: str
    livemode: bool
    currency: str
    subtotal: int
    discount: int
    tax: int
    shipping: int
    total: int
    url: str | None
    customer: str | None
    client_reference_id: str | None
    metadata: Mapping[str, str]
    created: datetime
    payment_intent_id: str | None
    payment_intent: PaymentIntent | None
    """Where it was asked to be expanded."""


def payment_intent(found: Members) -> PaymentIntent:
    """A PaymentIntent."""
    error = found.members("last_payment_error")
    return PaymentIntent(
        id=found.text("id"),
        status=found.text("status"),
        livemode=found.flag("livemode"),
        currency=found.text("currency"),
        amount=found.number("amount"),
        amount_received=found.number("amount_received", 0),
        customer=found.ref("customer"),
        payment_method=found.ref("payment_method"),
        latest_charge=found.ref("latest_charge"),
        metadata=found.metadata(),
        created=found.moment("created"),
        error_code=error.text_or_none("code") if error else None,
        decline_code=error.text_or_none("decline_code") if error else None,
    )


def session(found: Members) -> Session:
    """A Checkout Session, in the currency that its prices were made in."""
    totals = found.members("total_details")
    intent = found.members("payment_intent")
    return Session(
        id=found.text("id"),
        # Another business's may be of a kind that has none of these: one that only keeps a card has no currency.
        status=found.text_or_none("status") or "",
        payment_status=found.text("payment_status"),
        livemode=found.flag("livemode"),
        currency=found.text_or_none("currency") or "",
        subtotal=found.number("amount_subtotal", 0),
        discount=totals.number("amount_discount", 0) if totals else 0,
        tax=totals.number("amount_tax", 0) if totals else 0,
        shipping=totals.number("amount_shipping", 0) if totals else 0,
        total=found.number("amount_total", 0),
        url=found.text_or_none("url"),
        customer=found.ref("customer"),
        client_reference_id=found.text_or_none("client_reference_id"),
        metadata=found.metadata(),
        created=found.moment("created"),
        payment_intent_id=found.ref("payment_intent"),
        payment_intent=None if intent is None else payment_intent(intent),
    )
