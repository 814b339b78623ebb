"""Disputes: what Stripe says of them. One method for each SQL function.

Money is minor units of its currency. To apply a dispute twice, late or out of order gives the same ledger.
"""

from dataclasses import dataclass
from uuid import UUID

from proxy.ledger.connect import Pool, translated
from proxy.ledger.records import check_text
from proxy.ledger.refunds import RefundOutcome

__all__ = ["DisputeApplied", "DisputeLedger"]


@dataclass(frozen=True, slots=True)
class DisputeApplied:
    """``moved``: microcredits that left the account by it; negative: that came back. ``froze``: the account is frozen
    by it now, and wasn't before."""

    outcome: RefundOutcome
    order_id: UUID | None
    account_id: UUID | None
    moved: int
    froze: bool


class DisputeLedger:
    """Disputes. ``pool`` acts as ``Role.CONTROL``. Raises InvalidValue and LedgerUnavailable."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def ask(self) -> int:
        """A number to take before a dispute is fetched: of two answers the one with the higher number stands."""
        with translated():
            number: int = await self._pool.fetchval("SELECT farebox.ask_dispute()")
        return number

    async def apply(
        self,
        dispute_id: str,
        *,
        payment_intent: str,
        amount: int,
        currency: str,
        status: str,
        withdrawn: bool,
        asked: int,
    ) -> DisputeApplied:
        """A dispute as it was fetched after ``ask`` had said ``asked``. ``withdrawn``: the bank has the money."""
        for field, text in (("dispute", dispute_id), ("payment", payment_intent), ("status", status)):
            check_text(field, text)
        with translated():
            row = await self._pool.fetchrow(
                "SELECT * FROM farebox.apply_dispute($1, $2, $3, $4, $5, $6, $7)",
                *(dispute_id, payment_intent, amount, currency, status, withdrawn, asked),
            )
        assert row is not None
        return DisputeApplied(
            RefundOutcome(row["outcome"]), row["order_id"], row["account_id"], row["moved"], row["froze"]
        )
