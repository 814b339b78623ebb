"""Orders: what was asked for, what came in for it, and the payments that nobody asked for. One method for each SQL
function; reads are plain queries under the control role's SELECT.

Credits are microcredits, money is minor units of its currency. Every change may be repeated: an order's id, or the id
of its payment, says that it is the same one.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Pool, translated
from proxy.ledger.errors import Conflict, Unknown
from proxy.ledger.records import check_amount, check_text
from proxy.ledger.reports import report

__all__ = [
    "STATES",
    "UNFINISHED_MAX",
    "CreateOutcome",
    "Created",
    "NewOrder",
    "Order",
    "OrderLedger",
    "Paid",
    "PayOutcome",
    "Payment",
    "Quarantined",
    "order",
]

STATES = ("created", "open", "pending", "paid", "failed", "expired", "canceled")
UNFINISHED_MAX = 50
"""How many orders of one account may wait for their payment at once; the next is refused."""

_ORDERS = report("orders")
_FIND_ORDER = report("find_order")
_UNFINISHED = report("unfinished_orders")
_QUARANTINE = report("quarantine")
_FIND_QUARANTINED = report("find_quarantined")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewOrder:
    """An order before it is written down. ``credits`` and ``bonus``: microcredits; ``price``: minor units before tax.

    ``credits_seconds``, ``bonus_seconds``: how long they last from the payment on; None: for ever (a bonus: as long as
    the credits). ``discount_max``: what Stripe's promotion codes may take off. ``request_key``: the Idempotency-Key.
    """

    id: UUID
    account_id: UUID
    kind: str
    """checkout, auto or plan."""
    pack: str | None
    credits: int
    currency: str
    price: int
    livemode: bool
    actor: str
    bonus: int = 0
    credits_seconds: int | None = None
    bonus_seconds: int | None = None
    discount_max: int = 0
    request_key: str | None = None
    request_digest: bytes | None = None
    save_payment_method: bool = False
    success_url: str | None = None
    cancel_url: str | None = None
    customer: str | None = None
    payment_method: str | None = None

    def __post_init__(self) -> None:
        check_amount("credits", self.credits, least=1)
        check_amount("bonus", self.bonus)
        for name in ("pack", "currency", "actor", "request_key", "success_url", "cancel_url", "customer"):
            check_text(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A row of orders. ``received = subtotal - discount + tax`` once it is paid (inclusive tax: without ``+ tax``).

    ``taken``, ``bonus_taken``: microcredits that refunds and disputes have taken back by now.
    """

    id: UUID
    account_id: UUID
    kind: str
    state: str
    """created, open, pending; then paid, or failed, expired, canceled, which a late payment still makes paid."""
    pack: str | None
    credits: int
    bonus: int
    credits_seconds: int | None
    bonus_seconds: int | None
    currency: str
    price: int
    discount_max: int
    livemode: bool
    actor: str
    request_key: str | None
    save_payment_method: bool
    success_url: str | None
    cancel_url: str | None
    customer: str | None
    payment_method: str | None
    session_id: str | None
    payment_intent: str | None
    invoice: str | None
    url: str | None
    problem: str | None
    created_at: datetime
    changed_at: datetime
    paid_at: datetime | None
    received: int | None
    subtotal: int | None
    discount: int | None
    tax: int | None
    credit_version: int | None
    bonus_version: int | None
    taken: int
    bonus_taken: int

    @property
    def payment(self) -> str | None:
        """What its purchase is called: the PaymentIntent; the session where a discount left nothing to pay."""
        return self.payment_intent or self.session_id


class CreateOutcome(StrEnum):
    """What became of a new order."""

    DONE = "done"
    """It is written down."""
    KNOWN = "known"
    """It was already: the same id, or the same request under the same key."""
    CONFLICT = "conflict"
    """The request key stands for another request."""
    BUSY = "busy"
    """An automatic order of the account is under way."""
    TOO_MANY = "too_many"
    """So many of the account's orders wait for their payment already."""


@dataclass(frozen=True, slots=True)
class Created:
    """What became of a new order, and the order, or the one that stands in its way (None: too many do)."""

    outcome: CreateOutcome
    order: Order | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """A payment that succeeded, as it was fetched from Stripe: its facts, which the ledger holds against the order."""

    order_id: UUID | None
    """As the payment's own metadata name it."""
    account_id: UUID | None
    payment: str
    """The PaymentIntent's id; the session's where a discount left nothing to pay."""
    payment_intent: str | None
    session_id: str | None
    customer: str | None
    payment_method: str | None
    livemode: bool
    currency: str
    subtotal: int
    discount: int
    tax: int
    total: int
    """What the checkout came to."""
    received: int
    """What came in."""
    problem: str | None = None
    """Why it can't be what an order asked for, where that shows without the order."""


class PayOutcome(StrEnum):
    """What became of a payment."""

    PAID = "paid"
    """Its order is paid now, and its credits are there."""
    KNOWN = "known"
    """They had been before."""
    QUARANTINED = "quarantined"
    """It doesn't match its order: no credits until an operator says so."""
    CREDITED = "credited"
    """An operator said so."""
    DISMISSED = "dismissed"
    """An operator said that there will be none."""


@dataclass(frozen=True, slots=True)
class Paid:
    """What became of a payment; ``reason``: why it is in quarantine; ``fresh``: whether that is this call's news."""

    outcome: PayOutcome
    reason: str | None
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A payment that carries an order's name and doesn't match it."""

    payment: str
    order_id: UUID | None
    account_id: UUID | None
    reason: str
    payment_intent: str | None
    session_id: str | None
    customer: str | None
    payment_method: str | None
    currency: str | None
    subtotal: int | None
    discount: int | None
    tax: int | None
    received: int | None
    livemode: bool
    seen_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None
    resolution: str | None


class OrderLedger:
    """Orders and what is in quarantine. ``pool`` acts as ``Role.CONTROL``.

    Raises Unknown and Conflict as each method says, InvalidValue for what can't be stored, and LedgerUnavailable where
    Postgres can't be asked.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(self, new: NewOrder, *, unfinished_max: int = UNFINISHED_MAX) -> Created:
        """Write it down; the same id, or request key and digest, again is the same order. Raises Unknown (account)."""
        row = await self._row(
            "SELECT * FROM farebox.create_order"
            "($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)",
            *(new.id, new.account_id, new.kind, new.pack, new.credits, new.bonus, new.credits_seconds),
            *(new.bonus_seconds, new.currency, new.price, new.discount_max, new.livemode, new.actor),
            *(new.request_key, new.request_digest, new.save_payment_method, new.success_url, new.cancel_url),
            *(new.customer, new.payment_method, unfinished_max),
        )
        if row["outcome"] == "unknown":
            raise Unknown(f"no account {new.account_id}")
        found = None if row["order_id"] is None else await self.find(row["order_id"])
        return Created(CreateOutcome(row["outcome"]), found)

    async def opened(self, order_id: UUID, session_id: str, url: str | None, *, customer: str | None = None) -> Order:
        """It has this Checkout Session. Raises Unknown, Conflict (another session, or another order's)."""
        outcome = await self._value("SELECT farebox.open_order($1, $2, $3, $4)", order_id, session_id, url, customer)
        if outcome == "unknown":
            raise Unknown(f"no order {order_id}")
        if outcome == "conflict":
            raise Conflict(f"order {order_id} has another Checkout Session than {session_id}")
        return await self.find(order_id)

    async def advance(
        self, order_id: UUID, state: str, *, payment_intent: str | None = None, problem: str | None = None
    ) -> str | None:
        """It is pending, failed, expired or canceled, unless it got as far already: its state now; None if unknown."""
        state_now: str | None = await self._value(
            "SELECT farebox.advance_order($1, $2, $3, $4)", order_id, state, payment_intent, problem
        )
        return state_now

    async def pay(self, payment: Payment) -> Paid:
        """Credit the order that the payment names, once, where everything matches; else it is in quarantine."""
        row = await self._row(
            "SELECT * FROM farebox.pay_order($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
            *(payment.order_id, payment.account_id, payment.payment, payment.payment_intent, payment.session_id),
            *(payment.customer, payment.payment_method, payment.livemode, payment.currency, payment.subtotal),
            *(payment.discount, payment.tax, payment.total, payment.received, payment.problem),
        )
        return Paid(PayOutcome(row["outcome"]), row["reason"], row["fresh"])

    async def find(self, order_id: UUID) -> Order:
        """By id. Raises Unknown."""
        found = await self.search(str(order_id))
        if found is None:
            raise Unknown(f"no order {order_id}")
        return found

    async def search(self, ref: str) -> Order | None:
        """By id, PaymentIntent, Checkout Session or invoice; None if there is none."""
        check_text("order", ref)
        for row in await self._rows(_FIND_ORDER, _uuid_or_none(ref), ref):
            return order(row)
        return None

    async def list_orders(
        self, account_id: UUID | None = None, *, state: str | None = None, after: UUID | None = None, limit: int = 100
    ) -> list[Order]:
        """At most ``limit`` orders, newest first, those behind ``after``; of one account, in one state, or all."""
        return [order(row) for row in await self._rows(_ORDERS, account_id, state, after, limit)]

    async def unfinished(self, *, before: datetime, after: UUID | None = None, limit: int = 100) -> list[Order]:
        """Orders created, open or pending that were made before that time, oldest first."""
        return [order(row) for row in await self._rows(_UNFINISHED, before, after, limit)]

    async def customer(self, account_id: UUID, *, livemode: bool) -> tuple[str, str | None] | None:
        """The account's Stripe customer and the payment method saved for it; None where it has none yet."""
        for row in await self._rows(
            "SELECT customer, payment_method FROM farebox.stripe_customers WHERE account_id = $1 AND livemode = $2",
            *(account_id, livemode),
        ):
            return row["customer"], row["payment_method"]
        return None

    async def account_of(self, customer: str, *, livemode: bool) -> UUID | None:
        """Whose Stripe customer that is."""
        for row in await self._rows(
            "SELECT account_id FROM farebox.stripe_customers WHERE customer = $1 AND livemode = $2", customer, livemode
        ):
            account_id: UUID = row["account_id"]
            return account_id
        return None

    async def put_customer(
        self, account_id: UUID, customer: str, *, livemode: bool, instead_of: str | None = None
    ) -> str:
        """Who the account is to Stripe from now on: the first that was put, unless that is ``instead_of``: gone."""
        known: str = await self._value(
            "SELECT farebox.put_customer($1, $2, $3, $4)", account_id, livemode, customer, instead_of
        )
        return known

    async def quarantine(self, *, resolved: bool = False, limit: int = 100) -> list[Quarantined]:
        """Payments in quarantine, oldest first; with ``resolved`` also those that somebody has decided about."""
        rows = await self._rows(_QUARANTINE, resolved, limit)
        return [Quarantined(**dict(row)) for row in rows]

    async def quarantined(self, payment: str) -> Quarantined:
        """One payment in quarantine. Raises Unknown."""
        check_text("payment", payment)
        for row in await self._rows(_FIND_QUARANTINED, payment):
            return Quarantined(**dict(row))
        raise Unknown(f"no payment {payment[:80]!r} is in quarantine")

    async def resolve(self, payment: str, resolution: str, *, actor: str, new_id: UUID) -> UUID | None:
        """Decide about a payment in quarantine, once: ``credited`` or ``dismissed``. The order that it pays, if any.

        Raises Unknown; Conflict where it was decided otherwise, or there is nothing that it could pay.
        """
        check_text("payment", payment)
        check_text("actor", actor)
        row = await self._row(
            "SELECT * FROM farebox.resolve_quarantine($1, $2, $3, $4)", payment, resolution, actor, new_id
        )
        if row["outcome"] == "unknown":
            raise Unknown(f"no payment {payment[:80]!r} is in quarantine")
        if row["outcome"] != "done":
            raise Conflict(_UNRESOLVED[row["outcome"]])
        order_id: UUID | None = row["order_id"]
        return order_id

    async def _rows(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        with translated():
            return await self._pool.fetch(query, *arguments)

    async def _row(self, query: str, *arguments: Any) -> asyncpg.Record:
        [row] = await self._rows(query, *arguments)
        return row

    async def _value(self, query: str, *arguments: Any) -> Any:
        return (await self._row(query, *arguments))[0]


_UNRESOLVED = {
    "conflict": "the payment was decided about already, otherwise",
    "no_order": "the order that the payment names is not in this ledger: grant the credits with `farebox credits grant`"
    " and dismiss the payment",
    "other_mode": "a payment of Stripe's test mode is no money for an order of live mode, nor the reverse",
    "elsewhere": "the payment has been credited already",
    "above_limit": "the account's balance would be above what one account can have",
}

_COLUMNS = tuple(Order.__dataclass_fields__)


def order(row: asyncpg.Record) -> Order:
    """An Order, from a row that has its columns and maybe more."""
    return Order(**{name: row[name] for name in _COLUMNS})


def _uuid_or_none(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
