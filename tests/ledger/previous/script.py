"""What the code of release 0.1 says to the database, word for word, in one long conversation.

It is frozen, like migration 0001: servers of that release go on working while the next one's schema is rolled out. The
eight .sql files beside this are its reports. Ids are fixed, so that two databases answer alike; times are left out.
When a release is made, a script of its own words takes this one's place.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg

__all__ = ["Conversation", "converse"]

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

BATCH = (
    "SELECT * FROM farebox.batch"
    "($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)"
)
BODY = json.dumps({"routes": {"m": {"variants": {"standard": {"rates": [1_000_000] * 7, "per_request": 0}}}}})
VERSION = hashlib.sha256(BODY.encode()).hexdigest()
WORKER, OTHER_WORKER, NO_WORKER = UUID(int=1), UUID(int=2), UUID(int=3)
ANN, BOB, NOBODY = UUID(int=11), UUID(int=12), UUID(int=13)
SEVEN = [0, 0, 0, 30, 0, 0, 0]
HMAC = b"h" * 32


def a_hold(number: int) -> UUID:
    """A UUIDv7 of its own."""
    return UUID(int=1 << 80 | 7 << 76 | 2 << 62 | number)


class Conversation:
    """Three connections, one for each role, and everything that was answered."""

    def __init__(self, gateway: Connection, control: Connection, reader: Connection) -> None:
        self.gateway = gateway
        self.control = control
        self.reader = reader
        self.answers: list[tuple[str, Any]] = []

    async def say(self, label: str, connection: Connection, query: str, *arguments: Any) -> None:
        """Ask, and keep the answer: the rows in their order, or the error's code."""
        try:
            rows = await connection.fetch(query, *arguments)
        except asyncpg.PostgresError as error:
            self.answers.append((label, error.sqlstate))
        else:
            self.answers.append((label, [plain(row) for row in rows]))

    async def report(self, name: str, connection: Connection, *arguments: Any) -> None:
        """Ask with one of the reports."""
        await self.say(f"report {name}", connection, (Path(__file__).parent / f"{name}.sql").read_text(), *arguments)

    async def read_as(self, account: UUID, name: str, *arguments: Any) -> None:
        """A report for self-service: the account is set first, for the transaction."""
        async with self.reader.transaction(readonly=True):
            await self.reader.execute("SELECT set_config('farebox.account', $1, true)", str(account))
            await self.report(name, self.reader, *arguments)

    async def batch(
        self,
        label: str,
        *,
        reserves: Sequence[dict[str, Any]] = (),
        finalizes: Sequence[dict[str, Any]] = (),
        releases: Sequence[dict[str, Any]] = (),
        wait_ms: int = 2000,
    ) -> None:
        """The one call for all three, as ``_batch_arguments`` of that release made it; one term for each row."""
        rows = [*({"op": "reserve"} | row for row in reserves), *finalizes, *releases]
        both = [*reserves, *finalizes]
        nothing = [None] * len(releases)
        await self.say(
            label,
            self.gateway,
            BATCH,
            len(reserves),
            len(finalizes),
            [row["hold"] for row in rows],
            [row.get("account", ANN) for row in rows],
            [row.get("key", "annskey00001") for row in both] + nothing,
            [row["want"] for row in reserves] + [row["charge"] for row in finalizes] + nothing,
            ["{}"] * len(both) + nothing,
            [row.get("fingerprint", b"f" * 32) for row in both] + nothing,
            list(range(1, len(rows) + 1)),
            [row.get("key_version", 1) for row in reserves],
            [row.get("at_least", row["want"]) for row in reserves],
            [number for row in finalizes for number in [0, 0, 0, row["charge"], 0, 0, 0]],
            [row.get("worker", WORKER) for row in rows],
            [row.get("version", VERSION) for row in both] + nothing,
            ["m"] * len(both) + nothing,
            ["standard"] * len(both) + nothing,
            [None] * len(reserves) + [row.get("source", "reported") for row in finalizes] + nothing,
            [None] * len(rows),
            [None] * len(reserves) + ["complete"] * len(finalizes) + nothing,
            wait_ms,
        )


def plain(row: asyncpg.Record) -> dict[str, Any]:
    """The row without its times, which no two databases share."""
    return {name: value for name, value in row.items() if not isinstance(value, datetime)}


async def converse(talk: Conversation) -> None:
    """The whole conversation."""
    await _workers_and_prices(talk)
    await _accounts_and_keys(talk)
    await _reserves(talk)
    await _endings(talk)
    await _sweeps(talk)
    await _credits(talk)
    await _reports(talk)


async def _workers_and_prices(talk: Conversation) -> None:
    start = "SELECT farebox.start_worker($1, $2, $3)"
    for worker in (WORKER, OTHER_WORKER, WORKER):
        await talk.say("start_worker", talk.gateway, start, worker, "host", "0.1")
    for _ in range(2):
        await talk.say("put_price_version", talk.gateway, "SELECT farebox.put_price_version($1, $2)", VERSION, BODY)
    await talk.say("put_price_version", talk.control, "SELECT farebox.put_price_version($1, $2)", VERSION, BODY)
    await talk.say("schema_version", talk.gateway, "SELECT number >= serves_from AS ok FROM farebox.schema_version()")


async def _accounts_and_keys(talk: Conversation) -> None:
    create_account = "SELECT * FROM farebox.create_account($1, $2, $3, $4)"
    await talk.say("create_account", talk.control, create_account, ANN, "Ann", "cus_ann", "ann@example.org")
    await talk.say("create_account again", talk.control, create_account, NOBODY, "Ann", "cus_ann", "ann@example.org")
    await talk.say("create_account conflict", talk.control, create_account, NOBODY, "Another", "cus_ann", None)
    await talk.say("create_account", talk.control, create_account, BOB, "Bob", None, None)
    create_key = "SELECT farebox.create_key($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
    for key, account, limit in (("annskey00001", ANN, None), ("annslimit001", ANN, 50), ("bobskey00001", BOB, None)):
        terms: tuple[Any, ...] = ("name", HMAC, 1, ["inference"], None, None, True, limit, None)
        await talk.say("create_key", talk.control, create_key, key, account, *terms)
        await talk.say("create_key again", talk.control, create_key, key, account, *terms)
    terms = ("name", b"x" * 32, 1, ["inference"], ["m"], "chat", False, None, None)
    await talk.say("create_key conflict", talk.control, create_key, "annskey00001", ANN, *terms)
    await talk.say("create_key unknown", talk.control, create_key, "nobodyskey01", NOBODY, *terms)
    for key in ("annskey00001", "annslimit001", "nosuchkey001"):
        await talk.say("find_key", talk.gateway, "SELECT * FROM farebox.find_key($1)", key)
    grant = "SELECT * FROM farebox.grant_credits($1, $2, $3, $4, $5, $6)"
    for account, amount in ((ANN, 1000), (ANN, 1000), (ANN, 999), (BOB, 1000), (NOBODY, 1)):
        await talk.say("grant", talk.control, grant, account, "grant", amount, f"ref {account}", "test", "a reason")
    await talk.say("grant", talk.control, grant, BOB, "grant", 1, None, "test", None)


async def _reserves(talk: Conversation) -> None:
    await talk.batch("granted", reserves=[{"hold": a_hold(1), "want": 100}, {"hold": a_hold(2), "want": 200}])
    await talk.batch("granted again", reserves=[{"hold": a_hold(1), "want": 100}])
    await talk.batch("conflict", reserves=[{"hold": a_hold(1), "want": 100, "fingerprint": b"x" * 32}])
    await talk.batch("partly", reserves=[{"hold": a_hold(3), "want": 5000, "at_least": 10}])
    await talk.batch("credits_held", reserves=[{"hold": a_hold(4), "want": 500}])
    await talk.batch("insufficient", reserves=[{"hold": a_hold(5), "want": 50_000}])
    await talk.batch("released", releases=[{"hold": a_hold(3)}, {"hold": a_hold(6)}, {"hold": a_hold(3)}])
    await talk.batch("ended", reserves=[{"hold": a_hold(3), "want": 5000, "at_least": 10}])
    await talk.batch("tombstone", reserves=[{"hold": a_hold(6), "want": 1}])
    await talk.batch("spend_limit", reserves=[{"hold": a_hold(7), "want": 60, "key": "annslimit001"}])
    await talk.batch("limited", reserves=[{"hold": a_hold(8), "want": 60, "at_least": 1, "key": "annslimit001"}])
    await talk.batch("key_changed", reserves=[{"hold": a_hold(9), "want": 1, "key_version": 7}])
    await talk.batch("unknown key", reserves=[{"hold": a_hold(9), "want": 1, "key": "nosuchkey001"}])
    await talk.batch("another's key", reserves=[{"hold": a_hold(9), "want": 1, "key": "bobskey00001"}])
    await talk.batch("unknown price", reserves=[{"hold": a_hold(9), "want": 1, "version": "0" * 64}])
    await talk.batch("unknown account", reserves=[{"hold": a_hold(9), "want": 1, "account": NOBODY}], wait_ms=0)
    await talk.batch("unknown worker", reserves=[{"hold": a_hold(9), "want": 1, "worker": NO_WORKER}])
    extend = "SELECT * FROM farebox.extend($1, $2, $3, $4, $5)"
    for label, hold, worker, by, at_least in (
        ("extend", a_hold(1), WORKER, 50, 50),
        ("extend once more", a_hold(1), WORKER, 50, 50),
        ("extend partly", a_hold(1), WORKER, 100_000, 1),
        ("extend beyond", a_hold(1), WORKER, 100_000, 100_000),
        ("extend another worker's", a_hold(1), OTHER_WORKER, 1, 1),
        ("extend what has ended", a_hold(3), WORKER, 1, 1),
        ("extend the unknown", a_hold(99), WORKER, 1, 1),
    ):
        await talk.say(label, talk.gateway, extend, hold, ANN, worker, by, at_least)


async def _endings(talk: Conversation) -> None:
    await talk.batch("final", finalizes=[{"hold": a_hold(1), "charge": 120}])
    await talk.batch("final again", finalizes=[{"hold": a_hold(1), "charge": 120}])
    await talk.batch("conflict", finalizes=[{"hold": a_hold(1), "charge": 121, "fingerprint": b"x" * 32}])
    await talk.batch("release of a final one", releases=[{"hold": a_hold(1)}])
    await talk.batch("finalize of a released one", finalizes=[{"hold": a_hold(3), "charge": 1}])
    await talk.batch("finalize without a reserve", finalizes=[{"hold": a_hold(10), "charge": 5}])
    await talk.batch("counted above hold", finalizes=[{"hold": a_hold(8), "charge": 500, "source": "counted"}])
    await talk.batch(
        "all at once",
        reserves=[
            {"hold": a_hold(20), "want": 300},
            {"hold": a_hold(21), "want": 300, "account": BOB, "key": "bobskey00001"},
        ],
        finalizes=[{"hold": a_hold(2), "charge": 10}],
        releases=[{"hold": a_hold(22)}],
    )
    await talk.batch("overrun", finalizes=[{"hold": a_hold(20), "charge": 5000}])
    await talk.batch("in debt", reserves=[{"hold": a_hold(23), "want": 1}])


async def _sweeps(talk: Conversation) -> None:
    beat = "SELECT farebox.heartbeat($1, $2, $3)"
    for number in (30, 31, 32):
        row = {"hold": a_hold(number), "want": 50, "account": BOB, "key": "bobskey00001", "worker": OTHER_WORKER}
        await talk.batch("reserve to sweep", reserves=[row])
    await talk.say("heartbeat", talk.gateway, beat, OTHER_WORKER, [a_hold(30), a_hold(31)], SEVEN + SEVEN)
    await talk.say("heartbeat back", talk.gateway, beat, OTHER_WORKER, [a_hold(30)], [0] * 7)
    await talk.say("heartbeat unknown", talk.gateway, beat, NO_WORKER, [], [])
    sweep = "SELECT * FROM (SELECT * FROM farebox.expire_holds($1, $2)) AS s ORDER BY s.hold_id"
    await talk.say("nothing to sweep", talk.gateway, sweep, 500, timedelta(0))
    await talk.say("stop_worker", talk.gateway, "SELECT farebox.stop_worker($1)", OTHER_WORKER)
    await talk.say("stop_worker again", talk.gateway, "SELECT farebox.stop_worker($1)", OTHER_WORKER)
    await talk.say("start it again", talk.gateway, "SELECT farebox.start_worker($1, $2, $3)", OTHER_WORKER, "h", "r")
    await talk.say("heartbeat stopped", talk.gateway, beat, OTHER_WORKER, [a_hold(30)], SEVEN)
    row = {"hold": a_hold(33), "want": 1, "account": BOB, "key": "bobskey00001", "worker": OTHER_WORKER}
    await talk.batch("worker_lapsed", reserves=[row])
    await talk.say("too early", talk.gateway, sweep, 500, timedelta(days=365))
    await talk.say("sweep", talk.gateway, sweep, 500, timedelta(0))
    await talk.say("sweep again", talk.gateway, sweep, 500, timedelta(0))
    swept = {"account": BOB, "key": "bobskey00001", "worker": OTHER_WORKER}
    await talk.batch("true-up up", finalizes=[{"hold": a_hold(30), "charge": 40} | swept])
    await talk.batch("true-up down", finalizes=[{"hold": a_hold(31), "charge": 3} | swept])
    await talk.batch("release of a swept one", releases=[{"hold": a_hold(32), "account": BOB}])


async def _credits(talk: Conversation) -> None:
    reverse = "SELECT * FROM farebox.reverse($1, $2, $3, $4, $5)"
    for hold, amount, reference in (
        (a_hold(2), 4, "half"),
        (a_hold(2), 4, "half"),
        (a_hold(2), 5, "half"),
        (a_hold(2), 400, "too much"),
        (a_hold(2), None, "the rest"),
        (a_hold(21), None, "not yet final"),
        (a_hold(98), None, "unknown"),
    ):
        await talk.say("reverse", talk.control, reverse, hold, amount, reference, "test", "a reason")
    await talk.say(
        "a grant that pays debt",
        talk.control,
        "SELECT * FROM farebox.grant_credits($1, $2, $3, $4, $5, $6)",
        *(ANN, "grant", 10_000, "paying", "test", None),
    )
    update = "SELECT farebox.update_key($1, $2, $3, $4, $5, $6, $7, $8, $9)"
    for version in (1, 1):
        await talk.say(
            "update_key",
            talk.control,
            update,
            *("annslimit001", version, "new name", ["inference", "read"], ["m"], "chat", False, 500, None),
        )
    rotate = "SELECT farebox.rotate_key($1, $2, $3, $4, $5)"
    for old, new in (("annslimit001", "annslimit002"), ("annslimit001", "annslimit002"), ("nosuchkey001", "x")):
        await talk.say("rotate_key", talk.control, rotate, old, new, HMAC, 1, timedelta(0))
    for key in ("annslimit002", "annslimit002", "nosuchkey001"):
        await talk.say("revoke_key", talk.control, "SELECT farebox.revoke_key($1)", key)
    await talk.batch("revoked", reserves=[{"hold": a_hold(40), "want": 1, "key": "annslimit002"}])
    await talk.batch(
        "and last", reserves=[{"hold": a_hold(41), "want": 1}], finalizes=[{"hold": a_hold(41), "charge": 1}]
    )
    async with talk.control.transaction(isolation="repeatable_read", readonly=True):
        await talk.say("audit", talk.control, "SELECT sum(violations) AS violations FROM farebox.audit()")
    await talk.say("what it may not", talk.gateway, "SELECT * FROM farebox.accounts")
    await talk.say("what it may not", talk.reader, "SELECT farebox.revoke_key('annskey00001')")


async def _reports(talk: Conversation) -> None:
    await talk.report("accounts", talk.control, None, 10)
    for ref in (ANN, None):
        await talk.report("find_account", talk.control, ref, "Bob")
    await talk.report("keys", talk.control, ANN, None)
    for number in (1, 2, 8, 10, 20, 21, 30, 31, 32, 41):
        await talk.report("receipt", talk.control, a_hold(number))
    for account in (ANN, BOB):
        await talk.report("transfers", talk.control, account, None, 100)
        await talk.report("transfer", talk.control, account, 1)
        await talk.read_as(account, "account", account)
        await talk.read_as(account, "transfers", account, None, 100)
        await talk.read_as(BOB, "account", account)
        first, last = UUID(int=0), UUID(int=2**128 - 1)
        times = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
        await talk.read_as(account, "usage", account, *times, first, last)
