"""Automatic top-ups: what accounts have said about them, and the attempts that this leads to.

An attempt is an order of the kind ``auto``, written before Stripe hears of it. One method for each SQL function; reads
are plain queries under the control role's SELECT. Credits are microcredits, money is minor units of its currency.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Database, translated
from proxy.ledger.errors import Unknown
from proxy.ledger.orders import Order, order
from proxy.ledger.records import check_amount, check_text
from proxy.ledger.reports import report

__all__ = ["AutoTopup", "AutoTopupLedger", "Offer", "Opened", "Wanted"]

_AUTO_TOPUP = report("auto_topup")
_DUE = report("auto_topups_due")
_TO_LINK = report("auto_topups_to_link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an account's owner asks for: ``pack`` whenever the balance is below ``threshold`` (microcredits), for at
    most ``monthly_max`` (minor units) a calendar month in UTC.

    ``credits``, ``currency``, ``price``: the pack as its owner saw it; one that is worse by then isn't bought.
    """

    threshold: int
    pack: str
    credits: int
    currency: str
    price: int
    monthly_max: int
    livemode: bool
    enabled: bool = True

    def __post_init__(self) -> None:
        check_amount("threshold", self.threshold, least=1)
        check_amount("credits", self.credits, least=1)
        check_amount("monthly_max", self.monthly_max)
        check_text("pack", self.pack)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoTopup:
    """What is stored of that, and how it stands."""

    account_id: UUID
    wanted: Wanted
    spent: int
    """Minor units that this month's attempts have taken, or may still take."""
    attempt: UUID | None
    """The order that is under way."""
    failures: int
    """In a row."""
    problem: str | None
    blocked_until: datetime | None
    """No attempt before then; ``datetime.max`` (infinity): until its owner has done something."""
    checkout_url: str | None
    """Where the owner can pay in place of an attempt for which the bank wants its customer."""
    has_payment_method: bool
    changed_at: datetime

    @property
    def blocked_for_good(self) -> bool:
        """Whether nothing will be attempted before somebody has done something."""
        return self.blocked_until is not None and self.blocked_until.year >= 9000


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A pack, as it is sold now; see ``core.packs.Pack``."""

    credits: int
    bonus: int
    credits_seconds: int | None
    bonus_seconds: int | None
    currency: str
    price: int


class Opened(StrEnum):
    """What became of opening an attempt."""

    DONE = "done"
    NOT_DUE = "not_due"
    BUSY = "busy"
    """Another attempt is under way."""
    NO_PAYMENT_METHOD = "no_payment_method"
    MONTHLY_MAX = "monthly_max"
    TOO_OFTEN = "too_often"
    PACK_GONE = "pack_gone"
    PACK_CHANGED = "pack_changed"


class AutoTopupLedger:
    """``database`` acts as ``Role.CONTROL``. Raises LedgerUnavailable, and Unknown as each method says."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, account_id: UUID) -> AutoTopup | None:
        """What the account has said; None where it never said anything."""
        for row in await self._rows(_AUTO_TOPUP, account_id):
            return _auto_topup(row)
        return None

    async def set(self, account_id: UUID, wanted: Wanted, *, actor: str) -> None:
        """This is wanted from now on; what stood in the way is forgotten. Raises Unknown."""
        check_text("actor", actor)
        outcome = await self._value(
            "SELECT farebox.set_auto_topup($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            *(account_id, wanted.enabled, wanted.threshold, wanted.pack, wanted.credits, wanted.currency),
            *(wanted.price, wanted.monthly_max, wanted.livemode, actor),
        )
        if outcome == "unknown":
            raise Unknown(f"no account {account_id}")

    async def stop(self, account_id: UUID, *, actor: str) -> bool:
        """No more attempts; one that is under way comes to its end. False: the account never wanted any."""
        check_text("actor", actor)
        outcome: str = await self._value("SELECT farebox.stop_auto_topup($1, $2)", account_id, actor)
        return outcome == "done"

    async def due(self, *, livemode: bool, limit: int) -> Sequence[tuple[UUID, str]]:
        """Accounts that want to buy now, and which pack: as far as a look without locks can tell."""
        return [(row["account_id"], row["pack"]) for row in await self._rows(_DUE, livemode, limit)]

    async def open(self, id: UUID, account_id: UUID, offer: Offer | None, *, livemode: bool, day_max: int) -> Opened:
        """Write the attempt down as the order ``id``, if the account is due and nothing stands in the way.

        ``offer`` None: its pack isn't sold any more. ``day_max``: attempts in 24 hours.
        """
        values: tuple[Any, ...] = (None,) * 6
        if offer is not None:
            values = (offer.credits, offer.bonus, offer.credits_seconds, offer.bonus_seconds)
            values += (offer.currency, offer.price)
        outcome = await self._value(
            "SELECT farebox.open_auto_topup($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            *(id, account_id, livemode, offer is not None, *values, day_max),
        )
        return Opened(outcome)

    async def claim(self, *, livemode: bool, after_seconds: float, limit: int) -> Sequence[Order]:
        """Attempts of which nothing was heard for so long, each for one caller; old ones more seldom."""
        after = timedelta(seconds=after_seconds)
        rows = await self._rows("SELECT * FROM farebox.claim_auto_orders($1, $2, $3)", livemode, after, limit)
        return [order(row) for row in rows]

    async def to_link(self, *, livemode: bool, limit: int) -> Sequence[Order]:
        """Failed attempts for which the bank wants its customer, who has not been told yet."""
        return [order(row) for row in await self._rows(_TO_LINK, livemode, limit)]

    async def linked(self, failed: Order, link: UUID | None) -> bool:
        """Its owner is told now, once, with the checkout of the order ``link``; None: there can't be one.

        False: it was told before, or it has become another matter.
        """
        outcome: str = await self._value(
            "SELECT farebox.link_auto_topup($1, $2, $3)", failed.account_id, failed.id, link
        )
        return outcome == "done"

    async def age_seconds(self, order_id: UUID) -> float:
        """How long ago an order was written down, by the ledger's clock alone."""
        age = await self._value(
            "SELECT extract(epoch FROM clock_timestamp() - o.created_at)::float8 FROM farebox.orders o WHERE o.id = $1",
            order_id,
        )
        return float(age)

    async def _rows(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        with translated():
            return await self._database.fetch(query, *arguments)

    async def _value(self, query: str, *arguments: Any) -> Any:
        [row] = await self._rows(query, *arguments)
        return row[0]


def _auto_topup(row: asyncpg.Record) -> AutoTopup:
    return AutoTopup(
        account_id=row["account_id"],
        wanted=Wanted(
            threshold=row["threshold"],
            pack=row["pack"],
            credits=row["credits"],
            currency=row["currency"],
            price=row["price"],
            monthly_max=row["monthly_max"],
            livemode=row["livemode"],
            enabled=row["enabled"],
        ),
        spent=row["spent"],
        attempt=row["attempt"],
        failures=row["failures"],
        problem=row["problem"],
        blocked_until=row["blocked_until"],
        checkout_url=row["checkout_url"],
        has_payment_method=row["has_payment_method"],
        changed_at=row["changed_at"],
    )
