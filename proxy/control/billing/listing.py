"""What Stripe's book says, by kind of object: listed page by page, as the few values that are compared with ours.

``amount`` is what counts by now, in minor units: what came in for a payment or an invoice, what a refund has given back
(0: it failed), what a dispute's bank has taken (0: nothing, or it came back).
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import stripe

from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import Members, members
from proxy.control.billing.stripe_returns import dispute_of, refund_of
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from proxy.ledger.stripe_events import Event

__all__ = ["AtStripe", "Listing", "disputes", "events", "invoices", "listed", "payments", "refunds"]

Found = TypeVar("Found")

PAGE = 100
ACTIVE = frozenset({"pending", "requires_action", "succeeded"})
"""The statuses of a refund whose money is gone, or about to go."""


@dataclass(frozen=True, slots=True)
class AtStripe:
    """One object. ``payment``: the PaymentIntent of a refund or dispute; ``state``: their status."""

    id: str
    currency: str
    amount: int
    payment: str | None = None
    state: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """How one kind of object is listed, fetched and read, and which of those that are listed may be ours."""

    page: Callable[[stripe.StripeClient, Any], Any]
    fetch: Callable[[stripe.StripeClient, str], Any]
    read: Callable[[Members], AtStripe]
    may_be_ours: Callable[[Members], bool] = lambda found: True

    async def pages(self, api: StripeApi, since: datetime) -> AsyncIterator[list[AtStripe]]:
        """Those that were made since then, the newest first. Raises StripeAway and StripeRefused."""
        async for page in listed(api, self.page, since):
            yield [self.read(found) for found in page if self.may_be_ours(found)]

    async def one(self, api: StripeApi, id: str) -> AtStripe:
        """As it is now. Raises StripeUnknown, StripeAway, StripeRefused."""
        return await api.call(lambda client: self.read(members(self.fetch(client, id))))


async def listed(
    api: StripeApi, page: Callable[[stripe.StripeClient, Any], Any], since: datetime, **filters: Any
) -> AsyncIterator[list[Members]]:
    """The pages of a list of what was made since then. Each is a call of its own, so that none takes long."""
    after: dict[str, str] = {}
    more = True
    while more:
        params = {"created": {"gte": int(since.timestamp())}, "limit": PAGE, **filters, **after}
        found = await api.call(lambda client, params=params: members(page(client, params)))  # type: ignore[misc]
        items = found.listed("data")
        yield items
        more = found.flag_or("has_more", default=False) and bool(items)
        if more:
            after = {"starting_after": items[-1].text("id")}


def payments() -> Listing:
    """PaymentIntents that carry an order's name."""

    def read(found: Members) -> AtStripe:
        received = found.number("amount_received", 0) if found.text("status") == "succeeded" else 0
        return AtStripe(found.text("id"), found.text("currency"), received)

    return Listing(
        lambda client, params: client.v1.payment_intents.list(params),
        lambda client, id: client.v1.payment_intents.retrieve(id),
        read,
        lambda found: ORDER_KEY in found.metadata(),
    )


def invoices(plans: Callable[[], Any]) -> Listing:
    """Paid invoices that have a plan on them (``plans``: by the ids of their prices), or a subscription of ours."""

    def read(found: Members) -> AtStripe:
        return AtStripe(
            found.text("id"), found.text("currency"), found.number("amount_paid"), state=found.text_or_none("status")
        )

    return Listing(
        lambda client, params: client.v1.invoices.list(params),
        lambda client, id: client.v1.invoices.retrieve(id),
        read,
        lambda found: found.text_or_none("status") == "paid" and _is_ours(found, plans()),
    )


def refunds() -> Listing:
    """All refunds: whose payment they are of is the ledger's to say."""

    def read(found: Members) -> AtStripe:
        refund = refund_of(found)
        amount = refund.amount if refund.status in ACTIVE else 0
        return AtStripe(refund.id, refund.currency, amount, refund.payment_intent, refund.status)

    return Listing(
        lambda client, params: client.v1.refunds.list(params),
        lambda client, id: client.v1.refunds.retrieve(id),
        read,
    )


def disputes() -> Listing:
    """All disputes."""

    def read(found: Members) -> AtStripe:
        dispute = dispute_of(found)
        amount = dispute.amount if dispute.withdrawn else 0
        return AtStripe(dispute.id, dispute.currency, amount, dispute.payment_intent, dispute.status)

    return Listing(
        lambda client, params: client.v1.disputes.list(params),
        lambda client, id: client.v1.disputes.retrieve(id),
        read,
    )


async def events(api: StripeApi, since: datetime) -> AsyncIterator[list[Event]]:
    """The events that are acted on here. Stripe lists them for 30 days."""
    async for page in listed(
        api, lambda client, params: client.v1.events.list(params), since, types=sorted(EVENT_TYPES)
    ):
        yield [event for event in map(_event, page) if event is not None]


def _event(found: Members) -> Event | None:
    data = found.members("data")
    about = None if data is None else data.members("object")
    # Of a connected account's objects nothing is ours.
    if about is None or found.text_or_none("account") is not None:
        return None
    return Event(
        found.text("id"), found.text("type"), found.flag("livemode"), about.text("id"), found.moment("created")
    )


def _is_ours(invoice: Members, plans: Any) -> bool:
    parent = invoice.members("parent")
    subscription = None if parent is None else parent.members("subscription_details")
    if subscription is not None and ACCOUNT_KEY in subscription.metadata():
        return True
    lines = invoice.members("lines")
    if lines is None:
        return False
    prices = [
        details.ref("price")
        for line in lines.listed("data")
        if (pricing := line.members("pricing")) is not None
        and (details := pricing.members("price_details")) is not None
    ]
    # An invoice shows its first lines only; of a long one the desk looks at all.
    return any(price in plans for price in prices) or lines.flag_or("has_more", default=False)
