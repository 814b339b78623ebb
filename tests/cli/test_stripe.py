"""`farebox stripe events` and `dismiss`: what came, what is left, and giving one up."""

import asyncio
from datetime import UTC, datetime
from itertools import count

from proxy.ledger.connect import Role, connect
from proxy.ledger.stripe_events import Event, EventLedger
from tests.cli.conftest import Farebox
from tests.postgres import Database

NUMBERS = count(1)


def came(database: Database, *, outcome: str | None = None, error: str | None = None) -> str:
    """A webhook that was received; its id."""
    event = Event(f"evt_{next(NUMBERS)}", "refund.failed", False, "re_17", datetime(2026, 11, 22, 12, 30, tzinfo=UTC))

    async def work() -> None:
        connection = await connect(database.app, Role.CONTROL)
        ledger = EventLedger(connection)
        await ledger.take(event)
        if error is not None:
            await ledger.fail(event.id, error)
        if outcome is not None:
            await ledger.finish(event.id, outcome)
        await connection.close()

    asyncio.run(work())
    return event.id


def test_what_came_is_listed_and_what_is_left(farebox: Farebox, module_database: Database) -> None:
    assert "No webhooks are left" in farebox("stripe", "events", "--unprocessed").out
    done = came(module_database, outcome="refunded")
    left = came(module_database, error="StripeAway: nobody answered")
    listed = farebox("stripe", "events", "--json").json["data"]
    assert [row["id"] for row in listed[:2]] == [left, done]
    assert (listed[1]["outcome"], listed[1]["about"], listed[1]["created_at"]) == (
        "refunded",
        "re_17",
        "2026-11-22T12:30:00.000000Z",
    )
    page = farebox("stripe", "events", "--limit", "1", "--json").json
    assert (page["has_more"], page["last_id"]) == (True, left)
    assert farebox("stripe", "events", "--limit", "1", "--after", left, "--json").json["data"][0]["id"] == done
    text = farebox("stripe", "events", "--unprocessed").out
    assert left in text
    assert "nobody answered" in text
    assert done not in text


def test_one_that_cant_be_applied_is_dismissed_once(farebox: Farebox, module_database: Database) -> None:
    left = came(module_database)
    assert farebox("stripe", "dismiss", left).code == 0
    [row] = [row for row in farebox("stripe", "events", "--json").json["data"] if row["id"] == left]
    assert row["outcome"].startswith("dismissed by cli:")
    again = farebox("stripe", "dismiss", left, "--json")
    assert (again.code, again.json["error"]["code"]) == (1, "not_found")
