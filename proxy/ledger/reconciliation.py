"""The ledger's side of the comparison with Stripe's book: what is known here of what Stripe lists. Reads, but for one
row that says when the books were last compared. The pool acts as ``Role.CONTROL``; all methods raise LedgerUnavailable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Connection, Pool, translated
from proxy.ledger.reports import report

__all__ = ["WINDOWS", "Booked", "LastReconciliation", "ReconciliationLedger", "try_lock"]

WINDOWS = ("recent", "month")
"""The times over which the server compares the books."""

_BOOKED = {kind: report(f"booked_{kind}") for kind in ("payments", "invoices", "refunds", "disputes")}
_PAID_SINCE = report("paid_since")
_UNSETTLED = report("unsettled_returns")
_KNOWN_EVENTS = report("known_events")
PAGE = 1_000

# Any numbers, as long as they are always the same, and no other lock's: one process compares over each time.
_LOCKS = {"recent": 0x6661_7265_626F_7802, "month": 0x6661_7265_626F_7803}


@dataclass(frozen=True, slots=True)
class Booked:
    """What is known here of one of Stripe's objects. ``amount``: minor units that count by it; None: nothing is known.

    ``state``: Stripe's status of a refund or dispute, as it was last fetched. ``reason`` and ``resolution``: why a
    payment is in quarantine, and what an operator decided about it. ``whole``: of a dispute, all of the payment, which
    one in another currency than the order's (``currency``) counts as.
    """

    id: str
    order_id: UUID | None
    currency: str | None
    amount: int | None
    state: str | None
    reason: str | None
    resolution: str | None
    whole: int | None


@dataclass(frozen=True, slots=True)
class LastReconciliation:
    """When the books were last compared over that time. ``clean_at``: when last nothing was left between them."""

    name: str
    finished_at: datetime
    compared: int
    mended: int
    differing: int
    clean_at: datetime | None


class ReconciliationLedger:
    """What the comparison asks."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def payments(self, ids: Sequence[str]) -> dict[str, Booked]:
        """By PaymentIntent: all of them."""
        return _booked(await self._rows(_BOOKED["payments"], list(ids)))

    async def invoices(self, ids: Sequence[str]) -> dict[str, Booked]:
        """By invoice: all of them."""
        return _booked(await self._rows(_BOOKED["invoices"], list(ids)))

    async def refunds(self, ids: Sequence[str], payments: Sequence[str | None]) -> dict[str, Booked]:
        """By refund: those whose payment has paid an order of ours."""
        return _booked(await self._rows(_BOOKED["refunds"], list(ids), list(payments)))

    async def disputes(self, ids: Sequence[str], payments: Sequence[str | None]) -> dict[str, Booked]:
        """By dispute: those whose payment has paid an order of ours."""
        return _booked(await self._rows(_BOOKED["disputes"], list(ids), list(payments)))

    async def paid_since(self, since: datetime, *, livemode: bool) -> list[str]:
        """The PaymentIntents by which orders were paid since then, without subscriptions'."""
        found: list[str] = []
        while True:
            after = found[-1] if found else ""
            rows = await self._rows(_PAID_SINCE, since, livemode, after, PAGE)
            found += [row["payment_intent"] for row in rows]
            if len(rows) < PAGE:
                return found

    async def unsettled(self, *, livemode: bool) -> list[tuple[str, str]]:
        """Refunds and disputes that Stripe may still decide about: ``refund`` or ``dispute``, and the id."""
        return [(row["kind"], row["id"]) for row in await self._rows(_UNSETTLED, livemode)]

    async def known_events(self, ids: Sequence[str]) -> set[str]:
        """Which of these events have come."""
        return {row["id"] for row in await self._rows(_KNOWN_EVENTS, list(ids))}

    async def note(self, name: str, started_at: datetime, *, compared: int, mended: int, differing: int) -> None:
        """The books were compared over one of WINDOWS."""
        query = "SELECT farebox.note_reconciliation($1, $2, $3, $4, $5)"
        await self._rows(query, name, started_at, compared, mended, differing)

    async def last(self) -> dict[str, LastReconciliation]:
        """The last comparison over each of WINDOWS, as far as there was one."""
        rows = await self._rows("SELECT * FROM farebox.reconciliations")
        columns = tuple(LastReconciliation.__dataclass_fields__)
        return {row["name"]: LastReconciliation(**{name: row[name] for name in columns}) for row in rows}

    async def _rows(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        with translated():
            return await self._pool.fetch(query, *arguments)


async def try_lock(connection: Connection, name: str) -> bool:
    """Whether nobody else reconciles over that one of WINDOWS: the lock is this connection's until it ends. Raises
    LedgerUnavailable."""
    with translated():
        return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCKS[name]))


def _booked(rows: list[asyncpg.Record]) -> dict[str, Booked]:
    return {row["id"]: Booked(**dict(row)) for row in rows}
