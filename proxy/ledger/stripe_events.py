"""Webhooks in the ledger: what came, what is still to be done about it, and what became of it.

An event is a hint that an object at Stripe has changed. It is written down before anything is done about it, and is
unprocessed until that object was fetched and applied; whoever dies in between leaves it to the next attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import asyncpg

from proxy.ledger.connect import Database, translated
from proxy.ledger.records import check_text
from proxy.ledger.reports import report

__all__ = ["ERROR_CHARS_MAX", "Event", "EventLedger", "EventState", "Taken", "Unprocessed"]

ERROR_CHARS_MAX = 500

_EVENTS = report("stripe_events")
_UNPROCESSED = report("stripe_events_unprocessed")


class Taken(StrEnum):
    """What became of taking an event."""

    TAKEN = "taken"
    """It is to be processed now."""
    PROCESSED = "processed"
    """It was processed before: nothing is left to do."""
    CONFLICT = "conflict"
    """Its id stands for an event of another type or about another object."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a webhook says: something of this type happened to the object of this id ("": it has none)."""

    id: str
    type: str
    livemode: bool
    object_id: str
    created: datetime

    def __post_init__(self) -> None:
        check_text("event", self.id)
        check_text("type", self.type)
        check_text("object", self.object_id)


@dataclass(frozen=True, slots=True)
class EventState:
    """An event and how far it has come. ``outcome`` None: not processed yet; ``error``: why the last attempt failed."""

    event: Event
    received_at: datetime
    attempts: int
    tried_at: datetime
    error: str | None
    processed_at: datetime | None
    outcome: str | None


@dataclass(frozen=True, slots=True)
class Unprocessed:
    """How many events are not processed, and since when the oldest of them has waited (None: there is none)."""

    count: int
    oldest: datetime | None


class EventLedger:
    """One method a SQL function. ``database`` acts as ``Role.CONTROL``. All raise LedgerUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, event: Event, *, outcome: str | None = None) -> Taken:
        """Write the event down, to be processed; with an ``outcome``, as one that nothing has to be done about."""
        query = "SELECT farebox.take_event($1, $2, $3, $4, $5, $6)"
        with translated():
            return Taken(
                await self._database.fetchval(
                    query, event.id, event.type, event.livemode, event.object_id, event.created, outcome
                )
            )

    async def finish(self, event_id: str, outcome: str) -> bool:
        """Its object was fetched and applied. False: it had been before."""
        check_text("outcome", outcome)
        with translated():
            return bool(await self._database.fetchval("SELECT farebox.finish_event($1, $2)", event_id, outcome))

    async def fail(self, event_id: str, error: str) -> bool:
        """It wasn't, for this reason; another attempt comes. False: another attempt has succeeded meanwhile."""
        text = error.replace("\0", "?").encode(errors="replace").decode()[:ERROR_CHARS_MAX]
        with translated():
            return bool(await self._database.fetchval("SELECT farebox.fail_event($1, $2)", event_id, text))

    async def claim(
        self, *, livemode: bool, pause_seconds: float = 3_600.0, without: Sequence[str] = ()
    ) -> EventState | None:
        """The unprocessed event of this mode that has waited longest for its next attempt, but for those of the ids
        ``without``; None: none is due. Nobody else is given it until its pause is over.

        The pause grows with the attempts, from 30 s to an hour, and is ``pause_seconds`` at most.
        """
        query = "SELECT * FROM farebox.claim_event($1, $2, $3)"
        with translated():
            row = await self._database.fetchrow(query, livemode, timedelta(seconds=pause_seconds), list(without))
        return None if row is None else _state(row)

    async def forget(self, limit: int, *, keep_seconds: float) -> int:
        """Remove processed events that came longer ago than this, at most ``limit``; how many."""
        query = "SELECT farebox.forget_events($1, $2)"
        with translated():
            return int(await self._database.fetchval(query, limit, timedelta(seconds=keep_seconds)))

    async def newest(self, *, after: str | None = None, limit: int, unprocessed: bool = False) -> list[EventState]:
        """At most ``limit`` events, the newest first, those that came before the event ``after``."""
        check_text("after", after)
        with translated():
            return [_state(row) for row in await self._database.fetch(_EVENTS, after, limit, unprocessed)]

    async def unprocessed(self, *, livemode: bool) -> Unprocessed:
        """What is left to do in this mode."""
        with translated():
            row = await self._database.fetchrow(_UNPROCESSED, livemode)
        assert row is not None
        return Unprocessed(row["count"], row["oldest"])


def _state(row: asyncpg.Record) -> EventState:
    return EventState(
        event=Event(row["id"], row["type"], row["livemode"], row["object_id"], row["created"]),
        received_at=row["received_at"],
        attempts=row["attempts"],
        tried_at=row["tried_at"],
        error=row["error"],
        processed_at=row["processed_at"],
        outcome=row["outcome"],
    )
