"""The bank: twenty writers over ten accounts, readers of snapshots and the audit beside them, and a line that breaks.

After Jepsen's bank test. The writers speak through natural batches over a faulty link to Postgres, whose backends are
killed now and then as well. No reader ever sees a total that is wrong or an account below zero; the audit gives no
false alarm; and when the link is good again, every account has paid what its writers were told, to the microcredit.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import httpx2

from proxy.ledger.audit import audit
from proxy.ledger.batch import BatchedLedger, BatchLimits
from proxy.ledger.connect import connect
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.lines import lines_to
from proxy.ledger.records import ApiKey, FinalizeOutcome, ReserveOutcome
from tests.fakes.link import Cut, Delay, Direction, Fault, Link, Slice, Stall
from tests.ledger.bank import Bank
from tests.postgres import Database

SEED = 20
ACCOUNTS, WRITERS, CALLS = 10, 20, 150
GRANTED = 60_000
READS_MIN = 500
FAULTS: tuple[Fault, ...] = (Cut(2_000), Cut(50_000, reset=True), Stall(), Delay(0.02), Slice(200))

_TOTALS = """
    SELECT a.id, a.balance, a.held, a.debt,
           (SELECT coalesce(sum(CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END), 0)
              FROM farebox.transfers t WHERE t.account_id = a.id) AS moved,
           (SELECT coalesce(sum(h.amount), 0)
              FROM farebox.holds h WHERE h.account_id = a.id AND h.state = 'open') AS open,
           (SELECT coalesce(sum(h.charge - h.reversed), 0)
              FROM farebox.holds h WHERE h.account_id = a.id AND h.state <> 'open') AS charged
      FROM farebox.accounts a
"""


@dataclass
class Told:
    """What the writers were told, and what the readers saw."""

    charges: Counter[UUID] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    audits: int = 0
    wrong: list[str] = field(default_factory=list)


async def test_no_total_is_ever_wrong(own_bank: Bank) -> None:
    bank, told, chance = own_bank, Told(), random.Random(SEED)
    keys = [(await bank.open_account(GRANTED))[1] for _ in range(ACCOUNTS)]
    async with _link(bank.database) as (link, dsn), contextlib.AsyncExitStack() as stack:
        ledgers = []
        for _ in range(2):
            ledger = BatchedLedger(lines_to(dsn), limits=BatchLimits(reserve_seconds=2.0, call_seconds=2.0))
            await ledger.start()
            stack.push_async_callback(ledger.stop)
            ledgers.append(ledger)
        beside = [
            asyncio.create_task(_spoil(link, bank.database, chance)),
            asyncio.create_task(_keep_lease(bank)),
            asyncio.create_task(_read(bank, told)),
            asyncio.create_task(_read(bank, told)),
            asyncio.create_task(_audit(bank, told)),
        ]
        writers = [
            _write(bank, ledgers[i % 2], keys[i % ACCOUNTS], random.Random(SEED + i), told) for i in range(WRITERS)
        ]
        async with asyncio.timeout(120):
            await asyncio.gather(*writers)
        for task in beside:
            task.cancel()
        ends = await asyncio.gather(*beside, return_exceptions=True)
        assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == []
        link.heal()
        assert link.hit > 0
    assert told.wrong == []
    assert told.reads >= READS_MIN
    assert told.audits > 2
    for happened in ("charged", "released", "insufficient"):
        assert told.outcomes[happened] > 0, told.outcomes
    for key in keys:
        assert await bank.money(key.account_id) == (GRANTED - told.charges[key.account_id], 0, 0)
    assert [check for check in await audit(bank.owner) if not check.ok] == []


async def _write(bank: Bank, ledger: BatchedLedger, key: ApiKey, chance: random.Random, told: Told) -> None:
    """Hold, and then pay or give back; remember what the ledger said."""
    for _ in range(CALLS):
        want = chance.randrange(1, 30_000)
        row = bank.a_reserve(key, want, chance.randrange(1, want + 1))
        try:
            reserved = await ledger.reserve(row)
        except LedgerUnavailable:
            told.outcomes["unavailable"] += 1
            continue
        if reserved.outcome is not ReserveOutcome.GRANTED:
            told.outcomes["insufficient"] += 1
            continue
        await asyncio.sleep(chance.choice((0, 0.001, 0.01)))
        if chance.random() < 0.3:
            await ledger.release(row.hold_id, row.account_id, row.worker_id)
            told.outcomes["released"] += 1
            continue
        charge = chance.randrange(reserved.granted // 20 + 1)
        finalized = await ledger.finalize(bank.a_finalize(row, charge))
        assert finalized.outcome is FinalizeOutcome.FINAL
        told.charges[row.account_id] += charge
        told.outcomes["charged"] += 1


async def _read(bank: Bank, told: Told) -> None:
    """Totals in one snapshot, over and over."""
    connection = await connect(bank.database.superuser)
    try:
        while True:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                rows = await connection.fetch(_TOTALS)
            told.reads += 1
            for row in rows:
                right = (
                    row["balance"] == row["moved"] == GRANTED - row["charged"]
                    and row["held"] == row["open"]
                    and row["balance"] >= row["held"] >= 0
                    and row["debt"] == 0
                )
                if not right:
                    told.wrong.append(str(dict(row)))
    finally:
        connection.terminate()


async def _audit(bank: Bank, told: Told) -> None:
    connection = await connect(bank.database.owner)
    try:
        while True:
            told.wrong += [str(check) for check in await audit(connection) if not check.ok]
            told.audits += 1
            await asyncio.sleep(0.2)
    finally:
        connection.terminate()


async def _keep_lease(bank: Bank) -> None:
    while True:
        await bank.holds.heartbeat(bank.worker_id, ())
        await asyncio.sleep(2)


async def _spoil(link: Link, database: Database, chance: random.Random) -> None:
    """Now and then a fault of the link, or the end of a backend behind it."""
    connection = await asyncpg.connect(database.superuser)
    directions: tuple[Direction, Direction] = ("to", "back")
    try:
        while True:
            await asyncio.sleep(chance.uniform(0.05, 0.4))
            link.spoil(chance.choice(directions), chance.choice(FAULTS))
            await asyncio.sleep(chance.uniform(0.05, 0.3))
            link.heal()
            if chance.random() < 0.3:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name = $1 AND random() < 0.5",
                    "through the link",
                )
    finally:
        connection.terminate()


@contextlib.asynccontextmanager
async def _link(database: Database) -> AsyncIterator[tuple[Link, str]]:
    """A link to the database's server, and the gateway's DSN through it."""
    url = httpx2.URL(database.app)
    async with Link(f"{url.params['host']}/.s.PGSQL.{url.params.get('port', '5432')}") as link:
        name = "application_name=through%20the%20link"
        yield link, f"postgresql://{url.userinfo.decode()}@127.0.0.1:{link.port}{url.path}?{name}"
