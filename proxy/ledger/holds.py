"""The data plane's ledger: one method for each SQL function that the gateway's role may call."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import chain
from typing import Any
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Database, translated
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.records import (
    ApiKey,
    Expired,
    Extend,
    Extended,
    ExtendOutcome,
    Finalize,
    Finalized,
    FinalizeOutcome,
    Mark,
    Release,
    Released,
    Renewed,
    Reserve,
    Reserved,
    ReserveOutcome,
    check_text,
)
from proxy.ledger.rows import api_key

__all__ = ["HoldLedger"]

SINGLE_WAIT_MS = 2000

_BATCH = (
    "SELECT * FROM farebox.batch"
    "($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)"
)
_KEY = "SELECT k.*, farebox.account_frozen(k.account_id) AS account_frozen FROM farebox.find_key($1) AS k"
_EXTEND = "SELECT * FROM farebox.extend_holds($1, $2, $3, $4, $5, $6)"


class HoldLedger:
    """Holds: reserve, extend, finalize, release, expire; the worker's lease; keys and price versions.

    ``database`` is a connection or a pool that acts as ``Role.GATEWAY``. Every method raises LedgerUnavailable where
    Postgres can't be asked; what carries an id may then be sent again.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def batch(
        self,
        finalizes: Sequence[Finalize],
        reserves: Sequence[Reserve],
        releases: Sequence[Release] = (),
        *,
        wait_ms: int = 0,
    ) -> tuple[list[Finalized], list[Reserved], list[Released]]:
        """Finalizes and releases before reserves, in one transaction and row by row in effect; results as ordered.

        ``wait_ms`` 0: rows of an account that somebody else has locked come back as BUSY, and the others are done: send
        the busy ones again apart. Otherwise the call waits so long for each lock, and where one isn't to be had, every
        row is BUSY; so wait with rows of one account only.
        """
        if not (finalizes or reserves or releases):
            return [], [], []
        arguments = _batch_arguments(finalizes, reserves, releases)
        try:
            with translated():
                results = await self._database.fetch(_BATCH, *arguments, wait_ms)
        except LedgerUnavailable as error:
            if not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                raise
            return (
                [_BUSY_FINALIZED] * len(finalizes),
                [_BUSY_RESERVED] * len(reserves),
                [_BUSY_RELEASED] * len(releases),
            )
        results.sort(key=_row_number)
        first, second = len(reserves), len(reserves) + len(finalizes)
        return (
            [_finalized(result) for result in results[first:second]],
            [_reserved(result) for result in results[:first]],
            [_released(result) for result in results[second:]],
        )

    async def reserve(self, reserve: Reserve, *, wait_ms: int = SINGLE_WAIT_MS) -> Reserved:
        """Hold credits."""
        _, [reserved], _ = await self.batch((), (reserve,), wait_ms=wait_ms)
        return reserved

    async def finalize(self, finalize: Finalize, *, wait_ms: int = SINGLE_WAIT_MS) -> Finalized:
        """End a hold with its final charge."""
        [finalized], _, _ = await self.batch((finalize,), (), wait_ms=wait_ms)
        return finalized

    async def release(
        self, hold_id: UUID, account_id: UUID, worker_id: UUID, *, wait_ms: int = SINGLE_WAIT_MS
    ) -> Released:
        """End a hold with no charge."""
        _, _, [released] = await self.batch((), (), (Release(hold_id, account_id, worker_id),), wait_ms=wait_ms)
        return released

    async def extend_batch(self, rows: Sequence[Extend], *, wait_ms: int = 0) -> list[Extended]:
        """Let open holds grow, row by row in effect; results as ordered. ``wait_ms`` is ``batch``'s."""
        if not rows:
            return []
        arguments = (
            [row.hold_id for row in rows],
            [row.account_id for row in rows],
            [row.worker_id for row in rows],
            [row.total for row in rows],
            [row.at_least for row in rows],
        )
        try:
            with translated():
                results = await self._database.fetch(_EXTEND, *arguments, wait_ms)
        except LedgerUnavailable as error:
            if not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                raise
            return [Extended(ExtendOutcome.BUSY)] * len(rows)
        results.sort(key=_row_number)
        return [_extended(result) for result in results]

    async def extend(self, row: Extend, *, wait_ms: int = SINGLE_WAIT_MS) -> Extended:
        """Let one open hold grow."""
        [extended] = await self.extend_batch((row,), wait_ms=wait_ms)
        return extended

    async def start_worker(self, worker_id: UUID, hostname: str, release: str) -> bool:
        """Register this process and begin its lease. False: the id has been used and stopped; take another."""
        check_text("hostname", hostname)
        check_text("release", release)
        query = "SELECT farebox.start_worker($1, $2, $3)"
        with translated():
            return bool(await self._database.fetchval(query, worker_id, hostname, release))

    async def stop_worker(self, worker_id: UUID) -> bool:
        """End the lease at once. False: it had ended."""
        with translated():
            return bool(await self._database.fetchval("SELECT farebox.stop_worker($1)", worker_id))

    async def heartbeat(self, worker_id: UUID, marks: Sequence[Mark], *, beat: int | None = None) -> Renewed:
        """Renew the lease and store progress. False: unknown or stopped, and nothing was stored.

        ``beat``: a number that rises from call to call, so that a call that comes late changes nothing.
        """
        usages = list(chain.from_iterable(mark.usage.as_tuple() for mark in marks))
        query = "SELECT farebox.renew($1, $2, $3, $4)"
        with translated():
            marked = await self._database.fetchval(query, worker_id, beat, [mark.hold_id for mark in marks], usages)
        return Renewed(False) if marked is None else Renewed(True, frozenset(marked))

    async def now(self) -> datetime:
        """The time by the database's clock, which all leases run by."""
        with translated():
            now: datetime = await self._database.fetchval("SELECT clock_timestamp()")
        return now

    async def expire_holds(
        self, limit: int, *, not_after: datetime | None = None, restart_grace_seconds: float | None = None
    ) -> list[Expired]:
        """Settle at most ``limit`` open holds of workers that are gone.

        None while Postgres has run for less than ``restart_grace_seconds`` (two leases, where that is None): all leases
        are stale then. None after ``not_after`` by the database's clock.
        """
        query = "SELECT * FROM farebox.sweep($1, $2, $3)"
        grace = None if restart_grace_seconds is None else timedelta(seconds=restart_grace_seconds)
        with translated():
            rows = await self._database.fetch(query, limit, grace, not_after)
        return [Expired(row["hold_id"], row["account_id"], row["charge"]) for row in rows]

    async def find_key(self, key_id: str) -> ApiKey | None:
        """The key, whatever its state, and whether its account is frozen; None if there is none."""
        check_text("key_id", key_id)
        with translated():
            row = await self._database.fetchrow(_KEY, key_id)
        return None if row is None else api_key(row, account_frozen=row["account_frozen"])

    async def ledger_id(self) -> UUID:
        """Which ledger this is: the same in its backups and standbys, another in every other database."""
        with translated():
            found: UUID = await self._database.fetchval("SELECT farebox.ledger_id()")
        return found

    async def put_price_version(self, version: str, body: str) -> bool:
        """Keep a catalog's body for ever under its SHA-256 (hex). False: it was known."""
        check_text("body", body)
        with translated():
            return bool(await self._database.fetchval("SELECT farebox.put_price_version($1, $2)", version, body))


def _batch_arguments(
    finalizes: Sequence[Finalize], reserves: Sequence[Reserve], releases: Sequence[Release]
) -> tuple[Any, ...]:
    """The arguments of farebox.batch, which says what they are, but for the wait."""
    both: list[Reserve | Finalize] = [*reserves, *finalizes]
    rows: list[Reserve | Finalize | Release] = [*both, *releases]
    none = [None] * len(releases)
    # What many rows share is sent once, and a number for each row: encoding arrays is most of a batch's cost here.
    terms: dict[tuple[Any, ...], int] = {}
    numbers = [terms.setdefault(_terms(row), len(terms) + 1) for row in rows]
    return (
        len(reserves),
        len(finalizes),
        [row.hold_id for row in rows],
        [row.account_id for row in rows],
        [row.key_id for row in both] + none,
        [r.want for r in reserves] + [f.charge for f in finalizes] + none,
        [r.quote for r in reserves] + [f.receipt for f in finalizes] + none,
        [row.fingerprint for row in both] + none,
        numbers,
        [r.key_version for r in reserves],
        [r.at_least for r in reserves],
        list(chain.from_iterable(f.usage.as_tuple() for f in finalizes)),
        *map(list, zip(*terms, strict=True)),
    )


def _terms(row: Reserve | Finalize | Release) -> tuple[Any, ...]:
    if isinstance(row, Reserve):
        return row.worker_id, row.price_version, row.model, row.variant, None, None, None
    if isinstance(row, Finalize):
        return row.worker_id, row.price_version, row.model, row.variant, row.usage_source, row.capped, row.ending
    return row.worker_id, None, None, None, None, None, None


_RESERVE_OUTCOMES = {outcome.value: outcome for outcome in ReserveOutcome}
_FINALIZE_OUTCOMES = {outcome.value: outcome for outcome in FinalizeOutcome}
_BUSY_RESERVED = Reserved(ReserveOutcome.BUSY)
_BUSY_FINALIZED = Finalized(FinalizeOutcome.BUSY)
_BUSY_RELEASED = Released(0, "busy")


def _row_number(result: asyncpg.Record) -> int:
    number: int = result["row_number"]
    return number


def _reserved(result: asyncpg.Record) -> Reserved:
    _, outcome, amount, _, balance, held, debt, spend_left = result
    return Reserved(_RESERVE_OUTCOMES[outcome], amount, balance, held, debt, spend_left)


def _extended(result: asyncpg.Record) -> Extended:
    _, outcome, amount, balance, held, debt, spend_left = result
    return Extended(ExtendOutcome(outcome), amount, balance, held, debt, spend_left)


def _finalized(result: asyncpg.Record) -> Finalized:
    _, outcome, amount, overrun, balance, held, debt, _ = result
    return Finalized(_FINALIZE_OUTCOMES[outcome], amount, overrun, balance, held, debt)


def _released(result: asyncpg.Record) -> Released:
    return Released(result["amount"], result["outcome"])
