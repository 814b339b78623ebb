"""What a purchase's payment, refunds and disputes come to, worked out by hand: the second opinion on the till.

Nothing of Farebox's is used. Money is in minor units, credits in whole numbers; of a part of the money the part of the
credits is rounded down. What was learned in which order doesn't matter, only what is known by now.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Books", "Known", "Sold", "books"]

STANDING = frozenset({"pending", "requires_action", "succeeded"})
"""Refunds in these have gone back to the customer, or are about to."""
HARMLESS = frozenset({"won", "prevented", "warning_needs_response", "warning_under_review", "warning_closed"})
"""Disputes in these freeze nothing."""


@dataclass(frozen=True)
class Sold:
    """The order's terms, and what of its credits was spent: before the first refund or dispute where it has a bonus,
    since the bonus is spent first and a refund takes no more of it than is left."""

    credits: int
    bonus: int
    spent: int = 0


@dataclass(frozen=True)
class Known:
    """What was fetched from Stripe by now: what came in and the order's state, refunds (amount, status) and disputes
    (amount, status, their balance transactions) by id."""

    state: str = "open"
    received: int | None = None
    refunds: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    disputes: Mapping[str, tuple[int, str, tuple[int, ...]]] = field(default_factory=dict)

    def with_payment(self, state: str, received: int | None) -> "Known":
        """Paid is for ever, and what has ended brings nothing but payment any more."""
        if self.state == "paid" or (self.state in ("failed", "expired", "canceled") and state != "paid"):
            return self
        return replace(self, state=state, received=received if state == "paid" else None)

    def with_refund(self, refund: Mapping[str, Any]) -> "Known":
        return replace(self, refunds={**self.refunds, refund["id"]: (refund["amount"], refund["status"])})

    def with_dispute(self, dispute: Mapping[str, Any]) -> "Known":
        moved = tuple(one["amount"] for one in dispute["balance_transactions"])
        fact = (dispute["amount"], dispute["status"], moved)
        return replace(self, disputes={**self.disputes, dispute["id"]: fact})


@dataclass(frozen=True)
class Books:
    """What the ledger must say. ``net``: the balance less the debt; with nothing held one of the two is 0."""

    state: str
    taken: int
    bonus_taken: int
    net: int
    frozen: bool
    purchases: int
    """Transfers that credited the purchase: one, or none."""


def books(sold: Sold, known: Known) -> Books:
    """The books of an account that bought this once."""
    if known.state != "paid":
        return Books(known.state, 0, 0, 0, frozen=False, purchases=0)
    assert known.received is not None
    gone = sum(amount for amount, status in known.refunds.values() if status in STANDING)
    gone += sum(amount for amount, status, moved in known.disputes.values() if _withdrawn(status, moved))
    gone = min(gone, known.received)
    taken = sold.credits * gone // known.received if known.received else 0
    bonus_due = sold.bonus * gone // known.received if known.received else 0
    bonus_taken = min(bonus_due, max(sold.bonus - sold.spent, 0))
    return Books(
        "paid",
        taken,
        bonus_taken,
        sold.credits + sold.bonus - sold.spent - taken - bonus_taken,
        frozen=any(status not in HARMLESS for _, status, _ in known.disputes.values()),
        purchases=1,
    )


def _withdrawn(status: str, moved: tuple[int, ...]) -> bool:
    """Whether the bank has the money: it took it and didn't bring it back, or the dispute is lost for good."""
    if status.startswith("warning_"):
        return False
    return sum(moved) < 0 or status == "lost"
