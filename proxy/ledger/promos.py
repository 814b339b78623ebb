"""Promo codes in the ledger: one method for each SQL function. The pool acts as ``Role.CONTROL``.

A code gives each account its credits once; refusals are outcomes, and too many of them within an hour are one, too.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Pool, translated
from proxy.ledger.errors import Conflict, InvalidValue, Unknown
from proxy.ledger.records import Transfer, check_amount, check_text
from proxy.ledger.reports import report
from proxy.ledger.rows import transfer

__all__ = ["CREDITS_SECONDS_MAX", "PromoCode", "PromoLedger", "PromoOutcome", "PromoTerms", "Redemption"]

CREDITS_SECONDS_MAX = 100 * 366 * 86_400
"""The longest that credits may last: beyond, dates part ways with calendars."""

_CODES = report("promo_codes")
_REDEMPTION = report("promo_redemption")


class PromoOutcome(StrEnum):
    """What came of naming a code. DONE: credited now; AGAIN: credited before, by the transfer that is named.

    UNKNOWN, NOT_STARTED, ENDED and USED_UP count as refusals of the account; after ten within an hour it is WAIT.
    """

    DONE = "done"
    AGAIN = "again"
    UNKNOWN = "unknown"
    NOT_STARTED = "not_started"
    ENDED = "ended"
    USED_UP = "used_up"
    WAIT = "wait"
    ABOVE_LIMIT = "above_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoTerms:
    """What a code gives (microcredits), how long that lasts (None: for ever), and when and how often it is redeemed."""

    credits: int
    credits_seconds: int | None = None
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    redemptions_max: int | None = None


@dataclass(frozen=True, slots=True)
class PromoCode:
    """A code as it stands. ``ended_at``: when its operator ended it, before ``terms.ends_at`` maybe."""

    code: str
    terms: PromoTerms
    redeemed: int
    actor: str
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Redemption:
    """What came of naming a code. ``transfer`` is there for DONE and AGAIN, ``retry_at`` for WAIT."""

    outcome: PromoOutcome
    transfer: Transfer | None = None
    expires_at: datetime | None = None
    retry_at: datetime | None = None


class PromoLedger:
    """Makes, ends, lists and redeems codes. Codes are given in capitals.

    Raises Unknown and Conflict as each method says, InvalidValue for what can't be stored, and LedgerUnavailable.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(self, code: str, terms: PromoTerms, *, actor: str) -> PromoCode:
        """A new code; the same again is the same. Raises Conflict where it has other terms, or was ended."""
        check_text("code", code)
        check_text("actor", actor)
        check_amount("credits", terms.credits, least=1)
        if terms.credits_seconds is not None and not 1 <= terms.credits_seconds <= CREDITS_SECONDS_MAX:
            raise InvalidValue(f"credits_seconds is {terms.credits_seconds}; expected 1 to {CREDITS_SECONDS_MAX}")
        if terms.redemptions_max is not None:
            check_amount("redemptions_max", terms.redemptions_max, least=1)
        [row] = await self._rows(
            "SELECT farebox.create_promo($1, $2, $3, $4, $5, $6, $7)",
            *(code, terms.credits, terms.credits_seconds, terms.starts_at, terms.ends_at, terms.redemptions_max),
            actor,
        )
        if row[0] != "done":
            raise Conflict(f"the code {code!r} is there already, with other terms, or was ended")
        return await self.find(code)

    async def end(self, code: str) -> PromoCode:
        """From now on nobody redeems it. Raises Unknown."""
        check_text("code", code)
        [row] = await self._rows("SELECT farebox.end_promo($1)", code)
        if row[0] != "done":
            raise Unknown(f"no promo code {code[:80]!r}")
        return await self.find(code)

    async def find(self, code: str) -> PromoCode:
        """By its text. Raises Unknown."""
        check_text("code", code)
        for row in await self._rows(_CODES, code, None, 1):
            return _promo_code(row)
        raise Unknown(f"no promo code {code[:80]!r}")

    async def codes(self, *, after: str | None = None, limit: int = 100) -> list[PromoCode]:
        """At most ``limit`` codes, newest first, those behind the code ``after``."""
        check_text("after", after)
        return [_promo_code(row) for row in await self._rows(_CODES, None, after, limit)]

    async def redeem(self, account_id: UUID, code: str, *, actor: str) -> Redemption:
        """Give the account the code's credits, once. Raises Unknown (account)."""
        check_text("code", code)
        check_text("actor", actor)
        [row] = await self._rows("SELECT * FROM farebox.redeem_promo($1, $2, $3)", account_id, code, actor)
        if row["outcome"] == "no_account":
            raise Unknown(f"no account {account_id}")
        if row["outcome"] == "conflict":
            raise Conflict(f"another transfer has the reference of {code!r} and this account")
        outcome = PromoOutcome(row["outcome"])
        if outcome not in (PromoOutcome.DONE, PromoOutcome.AGAIN):
            return Redemption(outcome, retry_at=row["retry_at"])
        [credit] = await self._rows(_REDEMPTION, row["transfer_account"], row["transfer_version"])
        return Redemption(outcome, transfer(credit), credit["expires_at"])

    async def _rows(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        with translated():
            return await self._pool.fetch(query, *arguments)


def _promo_code(row: asyncpg.Record) -> PromoCode:
    return PromoCode(
        code=row["code"],
        terms=PromoTerms(
            credits=row["credits"],
            credits_seconds=row["credits_seconds"],
            starts_at=row["starts_at"],
            ends_at=row["ends_at"],
            redemptions_max=row["redemptions_max"],
        ),
        redeemed=row["redeemed"],
        actor=row["actor"],
        created_at=row["created_at"],
        ended_at=row["ended_at"],
    )
