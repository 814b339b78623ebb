"""Refunds: what Stripe says of them, and those that we ask Stripe for. One method for each SQL function.

Money is minor units of the order's currency, credits are microcredits. Every change may be repeated: a refund's id, or
a request's, says that it is the same one.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Pool, translated
from proxy.ledger.errors import Unknown
from proxy.ledger.records import check_text
from proxy.ledger.reports import report

__all__ = ["RefundApplied", "RefundLedger", "RefundOpened", "RefundOutcome", "RefundRequest", "RequestOutcome"]

_REQUEST = report("refund_request")

# The largest amount in a signed 64-bit column.
_MONEY_MAX = 2**63 - 1


class RefundOutcome(StrEnum):
    """What became of a refund or a dispute that Stripe told of."""

    TAKEN = "taken"
    """Credits left the account by this."""
    RETURNED = "returned"
    """Credits came back by this."""
    KNOWN = "known"
    """It moved nothing: it had before, or there is nothing to move."""
    STALE = "stale"
    """Something later is known of it."""
    NOT_OURS = "not_ours"
    """No order has its payment."""
    NOT_PAID = "not_paid"
    """An order has, and isn't paid."""
    CONFLICT = "conflict"
    """It was another order's, or of another amount or currency: nothing was done."""
    UNKNOWN_STATUS = "unknown_status"
    """It has a status that this release doesn't know: nothing was done."""


@dataclass(frozen=True, slots=True)
class RefundApplied:
    """``moved``: microcredits that left the account by it; negative: that came back."""

    outcome: RefundOutcome
    order_id: UUID | None
    account_id: UUID | None
    moved: int


class RequestOutcome(StrEnum):
    """What became of a request to refund a part of a payment."""

    DONE = "done"
    """Its credits are held, by this call or an earlier one."""
    UNKNOWN = "unknown"
    """There is no such order."""
    NO_PAYMENT = "no_payment"
    """It isn't paid, or nothing was paid for it."""
    UNDER_WAY = "under_way"
    """Another request of the order waits for its refund."""
    REFUNDED = "refunded"
    """All of its payment has gone back."""
    SPENT = "spent"
    """Nothing is left of the purchase."""
    ABOVE_PAYMENT = "above_payment"
    """More than is left of the payment."""
    INSUFFICIENT = "insufficient"
    """The credits that go with it aren't available: they are spent, or calls that run hold them."""


@dataclass(frozen=True, slots=True)
class RefundOpened:
    """``request_id``: this request, or the one that is under way. ``amount``: its money; of a refusal: for how much it
    could be (INSUFFICIENT), or what is left of the payment."""

    outcome: RequestOutcome
    request_id: UUID | None
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundRequest:
    """What we ask Stripe to refund. ``credits`` and ``bonus`` are held for it until it is done or released.

    ``state``: held, done, released. ``refund``: what it is called at Stripe, once known. ``problem``: why it was
    released.
    """

    id: UUID
    order_id: UUID
    account_id: UUID
    payment_intent: str
    currency: str
    livemode: bool
    amount: int
    credits: int
    bonus: int
    state: str
    refund: str | None
    actor: str
    reason: str | None
    problem: str | None
    created_at: datetime
    changed_at: datetime


class RefundLedger:
    """Refunds and requests for them. ``pool`` acts as ``Role.CONTROL``.

    Raises Unknown as its methods say, InvalidValue for what can't be stored, and LedgerUnavailable where Postgres can't
    be asked.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def apply(
        self,
        refund_id: str,
        *,
        payment_intent: str,
        amount: int,
        currency: str,
        status: str,
        request_id: UUID | None,
        problem: str | None,
    ) -> RefundApplied:
        """A refund as it was fetched. ``request_id``: the request of ours that it names; ``problem``: why it failed."""
        for field, text in (("refund", refund_id), ("payment", payment_intent), ("status", status), ("why", problem)):
            check_text(field, text)
        with translated():
            row = await self._pool.fetchrow(
                "SELECT * FROM farebox.apply_refund($1, $2, $3, $4, $5, $6, $7)",
                *(refund_id, payment_intent, amount, currency, status, request_id, problem),
            )
        assert row is not None
        return RefundApplied(RefundOutcome(row["outcome"]), row["order_id"], row["account_id"], row["moved"])

    async def open(
        self,
        request_id: UUID,
        order_id: UUID,
        amount: int | None,
        *,
        owing: bool,
        step: int,
        actor: str,
        reason: str | None,
    ) -> RefundOpened:
        """Hold the credits that go with ``amount`` of an order's payment, before Stripe is asked to refund it.

        None: with what of the purchase isn't spent, rounded down to a multiple of ``step``; ``owing``: with all that is
        left of the payment, and what isn't available will be owed.
        """
        check_text("actor", actor)
        check_text("reason", reason)
        with translated():
            row = await self._pool.fetchrow(
                "SELECT * FROM farebox.open_refund_request($1, $2, $3, $4, $5, $6, $7)",
                *(request_id, order_id, None if amount is None else min(amount, _MONEY_MAX), owing, step),
                *(actor, reason),
            )
        assert row is not None
        return RefundOpened(RequestOutcome(row["outcome"]), row["request_id"], row["amount"] or 0)

    async def release(self, request_id: UUID, problem: str) -> str | None:
        """There will be no refund: what was held is available again. The request's state now; None: there is none."""
        check_text("problem", problem)
        with translated():
            state: str | None = await self._pool.fetchval(
                "SELECT farebox.release_refund_request($1, $2)", request_id, problem
            )
        return state

    async def request(self, request_id: UUID) -> RefundRequest:
        """By id. Raises Unknown."""
        with translated():
            row = await self._pool.fetchrow(_REQUEST, request_id)
        if row is None:
            raise Unknown(f"no refund request {request_id}")
        return _request(row)

    async def claim(self, *, age_seconds: float, pause_seconds: float, limit: int) -> list[RefundRequest]:
        """Requests made at least so long ago that nobody has taken lately: the caller sees to them now.

        None is given out again before some time has passed: the longer the older it is, up to ``pause_seconds``.
        """
        with translated():
            rows = await self._pool.fetch(
                _CLAIM, timedelta(seconds=age_seconds), timedelta(seconds=pause_seconds), limit
            )
        return [await self.request(row["id"]) for row in rows]

    async def waiting(self) -> tuple[int, datetime | None]:
        """How many requests wait for their refund, and since when the oldest does."""
        with translated():
            row = await self._pool.fetchrow(
                "SELECT count(*) AS count, min(created_at) AS oldest FROM farebox.refund_requests WHERE state = 'held'"
            )
        assert row is not None
        return row["count"], row["oldest"]

    async def held(self, *, age_seconds: float = 0.0, limit: int = 100) -> list[RefundRequest]:
        """Requests that wait for their refund, the oldest first, made at least so long ago."""
        with translated():
            rows = await self._pool.fetch(_HELD, timedelta(seconds=age_seconds), limit)
        return [_request(row) for row in rows]


_CLAIM = "SELECT * FROM farebox.claim_refund_requests($1, $2, $3)"
_HELD = report("held_refund_requests")
_COLUMNS = tuple(RefundRequest.__dataclass_fields__)


def _request(row: asyncpg.Record) -> RefundRequest:
    return RefundRequest(**{name: row[name] for name in _COLUMNS})
