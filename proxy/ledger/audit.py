"""The audit: proves from the rows that the ledger is right, in one snapshot. What is checked is written in SQL.

In full, or since the last time that nothing was wrong. And the seals: their heads, for keeping elsewhere, and whether
heads that were kept elsewhere still stand in the chains.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from proxy.ledger.connect import Connection, translated
from proxy.ledger.errors import InvalidValue
from proxy.ledger.reports import report

__all__ = ["SINCE_LAST_ROWS", "BookState", "Check", "SealHead", "audit", "audit_since_last", "book_state", "seal_heads"]

SINCE_LAST_ROWS = 20_000
"""Transfers, and ended holds, in one call of the audit of what is new: some hundred milliseconds."""

_HEAD = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: on how many ``rows`` it was checked, and how many break it. ``example``: the id of one of them."""

    name: str
    rows: int
    violations: int
    example: str | None

    @property
    def ok(self) -> bool:
        return self.violations == 0


@dataclass(frozen=True, slots=True)
class SealHead:
    """The last seal of an account: ``head`` (64 hexadecimal digits) stands for all it had up to ``version``."""

    account_id: UUID
    number: int
    version: int
    head: str

    @classmethod
    def of(cls, view: Mapping[str, Any]) -> "SealHead":
        """As ``farebox audit --seals --json`` wrote it. Raises InvalidValue."""
        try:
            found = cls(UUID(view["account"]), int(view["number"]), int(view["version"]), str(view["head"]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InvalidValue(f"not a seal: {str(view)[:80]}") from error
        if not _HEAD.match(found.head):
            raise InvalidValue(f"not a seal's head: {found.head[:80]!r}")
        return found


@dataclass(frozen=True, slots=True)
class BookState:
    """How many transfers there are, and how far seals and the audit of what is new are behind them.

    ``clean_at``: when that audit last found nothing wrong; None: it has not yet come through.
    """

    transfers: int
    unsealed: int
    unaudited: int
    clean_at: datetime | None


async def audit(connection: Connection, *, kept: Sequence[SealHead] = ()) -> list[Check]:
    """Every check, in one snapshot, on a connection that acts as ``Role.CONTROL`` or as the owner.

    ``kept``: heads from elsewhere, which must stand in the chains still. Takes seconds a million transfers, and locks
    nothing that others need. Raises LedgerUnavailable.
    """
    with translated():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL statement_timeout = 0")
            rows = await connection.fetch("SELECT * FROM farebox.audit()")
            found = [_check(row) for row in rows]
            if kept:
                found.append(await _kept_elsewhere(connection, kept))
    return found


async def audit_since_last(connection: Connection, *, rows: int = SINCE_LAST_ROWS) -> list[Check]:
    """What is new since the last time that nothing was wrong, ``rows`` transfers at most; ``book_state`` says whether
    any are left. Empty: another process is at it. On a connection that acts as ``Role.CONTROL``.

    Raises LedgerUnavailable, also where another process has just done it.
    """
    with translated():
        async with connection.transaction(isolation="repeatable_read"):
            await connection.execute("SET LOCAL statement_timeout = 0")
            found = await connection.fetch("SELECT * FROM farebox.audit_since_last($1)", rows)
    return [_check(row) for row in found]


async def book_state(connection: Connection) -> BookState:
    """How far seals and audit have come. Raises LedgerUnavailable."""
    with translated():
        row = await connection.fetchrow("SELECT * FROM farebox.book_state()")
    assert row is not None
    return BookState(row["transfers"], row["unsealed"], row["unaudited"], row["clean_at"])


async def seal_heads(connection: Connection) -> list[SealHead]:
    """The last seal of each account. Raises LedgerUnavailable."""
    with translated():
        rows = await connection.fetch(report("seal_heads"))
    return [SealHead(row["account_id"], row["number"], row["last_version"], row["head"].hex()) for row in rows]


async def _kept_elsewhere(connection: Connection, kept: Sequence[SealHead]) -> Check:
    rows = await connection.fetch(
        report("seals_changed"),
        [head.account_id for head in kept],
        [head.number for head in kept],
        [head.version for head in kept],
        [bytes.fromhex(head.head) for head in kept],
    )
    example = f"{rows[0]['account_id']} seal {rows[0]['number']}" if rows else None
    return Check("seals_are_those_kept_elsewhere", len(kept), len(rows), example)


def _check(row: Any) -> Check:
    return Check(row["name"], row["checked"], row["violations"], row["example"])
