"""Webhooks in the ledger: taken, finished once, left to the next attempt, and claimed by one at a time."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from typing import Any

import asyncpg
import pytest

from proxy.ledger.connect import Role, create_pool
from proxy.ledger.stripe_events import Event, EventLedger, EventState, Taken
from tests.postgres import Database

NUMBERS = count(1)


@pytest.fixture
async def events(database: Database) -> AsyncIterator[EventLedger]:
    pool = await create_pool(database.app, Role.CONTROL, size=10)
    yield EventLedger(pool)
    await pool.close()


async def wind_back(database: Database, **seconds: float) -> None:
    """Let it all have happened so many seconds earlier."""
    connection = await asyncpg.connect(database.superuser)
    for column, by in seconds.items():
        assert column in ("tried_at", "received_at")
        query = "UPDATE farebox.stripe_events SET {} = {} - $1::double precision * interval '1 second'"
        await connection.execute(query.format(column, column), by)
    await connection.close()


def an_event(**changes: Any) -> Event:
    number = next(NUMBERS)
    made = Event(f"evt_{number}", "refund.created", False, f"re_{number}", datetime(2026, 11, 22, tzinfo=UTC))
    return replace(made, **changes)


async def state_of(events: EventLedger, event: Event) -> EventState:
    [state] = [state for state in await events.newest(limit=100) if state.event.id == event.id]
    return state


async def claim_all(events: EventLedger, **how: Any) -> list[EventState]:
    """One after the other, as long as one is due."""
    claimed: list[EventState] = []
    while (state := await events.claim(livemode=False, **how)) is not None and state.event.id not in {
        c.event.id for c in claimed
    }:
        claimed.append(state)
    return claimed


async def test_an_event_is_taken_until_it_is_finished(events: EventLedger) -> None:
    event = an_event()
    assert await events.take(event) is Taken.TAKEN
    assert await events.take(event) is Taken.TAKEN
    assert (await state_of(events, event)).attempts == 2
    assert await events.finish(event.id, "paid")
    assert await events.take(event) is Taken.PROCESSED
    state = await state_of(events, event)
    assert (state.event, state.attempts, state.outcome, state.error) == (event, 2, "paid", None)
    assert state.processed_at is not None


async def test_it_is_finished_once_and_no_later_failure_undoes_it(events: EventLedger) -> None:
    event = an_event()
    await events.take(event)
    assert await events.fail(event.id, "StripeAway: nobody\0 answered \ud800" + "!" * 600)
    state = await state_of(events, event)
    assert state.error is not None
    assert state.error.startswith("StripeAway: nobody? answered ?!")
    assert (len(state.error), state.outcome) == (500, None)
    assert await events.finish(event.id, "paid")
    assert not await events.finish(event.id, "something else")
    assert not await events.fail(event.id, "late")
    state = await state_of(events, event)
    assert (state.outcome, state.error) == ("paid", None)
    assert not await events.finish("evt_nobody_knows", "paid")


async def test_what_needs_no_work_is_finished_at_once(events: EventLedger) -> None:
    event = an_event(type="balance.available", object_id="")
    assert await events.take(event, outcome="ignored") is Taken.PROCESSED
    assert await events.take(event, outcome="ignored") is Taken.PROCESSED
    assert (await state_of(events, event)).outcome == "ignored"
    left = an_event()
    await events.take(left)
    assert await events.take(left, outcome="not_ours") is Taken.PROCESSED
    assert (await state_of(events, left)).outcome == "not_ours"
    assert (await events.unprocessed(livemode=False)).count == 0


@pytest.mark.parametrize("changes", [{"type": "refund.failed"}, {"object_id": "re_other"}, {"livemode": True}])
async def test_an_id_is_one_event_s(events: EventLedger, changes: dict[str, Any]) -> None:
    """Else who knows a secret could have an event skipped, by sending its id first."""
    event = an_event()
    await events.take(event, outcome="ignored")
    assert await events.take(replace(event, **changes)) is Taken.CONFLICT
    assert (await state_of(events, event)).event == event


async def test_eight_at_once_are_one_row(events: EventLedger) -> None:
    event = an_event()
    taken = await asyncio.gather(*(events.take(event) for _ in range(8)))
    assert set(taken) == {Taken.TAKEN}
    finished = await asyncio.gather(*(events.finish(event.id, "paid") for _ in range(8)))
    assert sorted(finished) == [False] * 7 + [True]
    assert (await state_of(events, event)).attempts == 8


async def test_what_is_left_is_claimed_by_one_at_a_time_after_a_pause(database: Database, events: EventLedger) -> None:
    made = [an_event() for _ in range(6)]
    for event in made:
        await events.take(event)
    await events.finish(made[0].id, "paid")
    assert await events.claim(livemode=False) is None
    assert (await events.unprocessed(livemode=False)).count == 5
    await wind_back(database, tried_at=31)
    claimed = [
        state.event.id for state in await asyncio.gather(*(events.claim(livemode=False) for _ in range(8))) if state
    ]
    claimed += [state.event.id for state in await claim_all(events)]
    assert sorted(claimed) == sorted(event.id for event in made[1:])
    # The second pause is longer, unless somebody is in a hurry.
    await wind_back(database, tried_at=31)
    assert await events.claim(livemode=False) is None
    hurried = await claim_all(events, pause_seconds=30)
    assert sorted(state.event.id for state in hurried) == sorted(claimed)
    assert {state.attempts for state in hurried} == {3}
    assert (await claim_all(events, pause_seconds=0, without=claimed[1:]))[0].event.id == claimed[0]
    await wind_back(database, tried_at=3601)
    assert await events.claim(livemode=True) is None
    assert (await events.unprocessed(livemode=True)).count == 0
    assert len(await claim_all(events)) == 5


async def test_the_pause_is_an_hour_at_most(database: Database, events: EventLedger) -> None:
    connection = await asyncpg.connect(database.owner)
    pauses = [
        await connection.fetchval("SELECT farebox.event_pause($1)", attempts) for attempts in (1, 2, 7, 8, 2**31 - 1)
    ]
    await connection.close()
    assert [pause.total_seconds() for pause in pauses] == [30, 60, 1920, 3600, 3600]


async def test_old_events_are_forgotten_unless_they_wait(database: Database, events: EventLedger) -> None:
    old, waiting, new = an_event(), an_event(), an_event()
    for event in (old, waiting):
        await events.take(event)
    await events.finish(old.id, "paid")
    await wind_back(database, received_at=86_400 * 91)
    await events.take(new, outcome="ignored")
    assert await events.forget(100, keep_seconds=86_400 * 90) == 1
    assert [state.event.id for state in await events.newest(limit=10)] == [new.id, waiting.id]
    left = await events.unprocessed(livemode=False)
    assert left.count == 1
    assert left.oldest is not None
    assert await events.forget(100, keep_seconds=86_400 * 90) == 0


async def test_events_are_listed_by_pages_the_newest_first(events: EventLedger) -> None:
    made = [an_event() for _ in range(5)]
    for event in made:
        await events.take(event)
    await events.finish(made[2].id, "paid")
    first = await events.newest(limit=3)
    assert [state.event.id for state in first] == [made[4].id, made[3].id, made[2].id]
    rest = await events.newest(limit=3, after=first[-1].event.id)
    assert [state.event.id for state in rest] == [made[1].id, made[0].id]
    assert len(await events.newest(limit=9, unprocessed=True)) == 4
