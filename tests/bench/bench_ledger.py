"""How many calls a second the ledger reserves and settles, batched and not, in one process on an embedded PostgreSQL.

``python -m tests.bench.bench_ledger`` or ``make bench``. A pair is one reserve and one finalize. The clients run in the
measured process, so their share is in the CPU figure: it is an upper bound. Run it on a quiet machine, and compare
within a run only.
"""

import asyncio
import itertools
import resource
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import uvloop

from proxy.core.usage import Usage
from proxy.ledger.batch import BatchedLedger, BatchLimits
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.holds import HoldLedger
from proxy.ledger.journaled import JournaledLedger
from proxy.ledger.lines import lines_to
from proxy.ledger.records import ApiKey, Finalize, Finalized, Reserve, Reserved, ReserveOutcome
from tests.ledger.bank import VERSION, Bank, open_bank, uuid7
from tests.ledger.journals import opened
from tests.postgres import Database, fresh_database, remove_cluster, running_cluster

pytestmark = pytest.mark.bench

PAIRS_A_SECOND_MIN = 10_000
SECONDS = 4.0
CLIENTS = 256
ACCOUNTS = 10_000
POOL = 20
BALANCE = 10**15


@dataclass(frozen=True, slots=True)
class Figures:
    """What a round came to; milliseconds for a pair, rows a call on average."""

    name: str
    pairs_a_second: float
    cpu_us_a_pair: float
    p50_ms: float
    p99_ms: float
    rows_a_call: float

    def __str__(self) -> str:
        return (
            f"{self.name:<34} {self.pairs_a_second:>8,.0f} pairs/s {self.cpu_us_a_pair:>7.1f} us CPU a pair"
            f"   p50 {self.p50_ms:>6.1f} ms   p99 {self.p99_ms:>6.1f} ms   {self.rows_a_call:>6.1f} rows a call"
        )


Reserving = Callable[[Reserve], Awaitable[Reserved]]
Finalizing = Callable[[Finalize], Awaitable[Finalized]]


async def measure(
    name: str,
    bank: Bank,
    keys: list[ApiKey],
    reserve: Reserving,
    finalize: Finalizing,
    *,
    clients: int = CLIENTS,
    seconds: float = SECONDS,
    calls: list[int] | None = None,
) -> Figures:
    """Clients that each reserve and finalize over and over, each pair on the next key."""
    assert await bank.holds.heartbeat(bank.worker_id, ())
    next_key = itertools.cycle(keys)
    times: list[float] = []
    ends = time.perf_counter() + seconds

    async def client() -> None:
        while (began := time.perf_counter()) < ends:
            row = _a_reserve(next(next_key), bank.worker_id)
            assert (await reserve(row)).outcome is ReserveOutcome.GRANTED
            await finalize(_a_finalize(row))
            times.append(time.perf_counter() - began)

    began, cpu = time.perf_counter(), _cpu_seconds()
    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    times.sort()
    pairs = len(times)
    return Figures(
        name,
        pairs / elapsed,
        cpu / pairs * 1e6,
        times[pairs // 2] * 1e3,
        times[pairs * 99 // 100] * 1e3,
        sum(calls) / len(calls) if calls else 1.0,
    )


async def batched(name: str, bank: Bank, keys: list[ApiKey], **terms: Any) -> Figures:
    """A round through BatchedLedger, on its one connection."""
    calls: list[int] = []
    limits = BatchLimits(reserve_seconds=60.0)
    ledger = BatchedLedger(lines_to(bank.database.app), limits=limits, observe=lambda rows, seconds: calls.append(rows))
    await ledger.start()
    try:
        return await measure(name, bank, keys, ledger.reserve, ledger.finalize, calls=calls, **terms)
    finally:
        assert not await ledger.stop()


async def journaled(name: str, bank: Bank, keys: list[ApiKey], **terms: Any) -> Figures:
    """The same with a journal before it, on the disk of the temporary directory."""
    calls: list[int] = []
    limits = BatchLimits(reserve_seconds=60.0)
    ledger = BatchedLedger(lines_to(bank.database.app), limits=limits, observe=lambda rows, seconds: calls.append(rows))
    with tempfile.TemporaryDirectory() as directory:
        async with opened(Path(directory), ledger_id=await bank.holds.ledger_id()) as desk:
            await ledger.start()
            before = JournaledLedger(ledger, desk.journal)
            try:
                return await measure(name, bank, keys, before.reserve, before.finalize, calls=calls, **terms)
            finally:
                assert not await ledger.stop()


async def unbatched(name: str, bank: Bank, keys: list[ApiKey], **terms: Any) -> Figures:
    """A round of single calls over a pool."""
    pool = await create_pool(bank.database.app, Role.GATEWAY, size=POOL, lock_ms=60_000, statement_seconds=60)
    ledger = HoldLedger(pool)

    async def reserve(row: Reserve) -> Reserved:
        return await ledger.reserve(row, wait_ms=60_000)

    async def finalize(row: Finalize) -> Finalized:
        return await ledger.finalize(row, wait_ms=60_000)

    try:
        return await measure(name, bank, keys, reserve, finalize, **terms)
    finally:
        await pool.close()


async def run(database: Database) -> dict[str, Figures]:
    """Every round, printed as it is done."""
    found: dict[str, Figures] = {}

    def show(figures: Figures) -> None:
        found[figures.name] = figures
        print(figures, flush=True)

    async with open_bank(database, size=2) as bank:
        # The first round warms plans and pages up.
        _, key = await bank.open_account(BALANCE)
        await batched("warm-up", bank, [key], seconds=1.0)
        for number in range(3):
            show(await batched(f"one account, batched, round {number + 1}", bank, [key]))
            show(await journaled(f"the same with a journal, {number + 1}", bank, [key]))
        show(await unbatched("one account, single calls", bank, [key]))
        show(await batched("one account, 1,024 clients, batched", bank, [key], clients=4 * CLIENTS))
        show(await batched("one account, one client, batched", bank, [key], clients=1, seconds=2.0))
        show(await unbatched("one account, one client, single", bank, [key], clients=1, seconds=2.0))
        keys = await _open_many(bank, key)
        show(await batched(f"{ACCOUNTS:,} accounts, batched", bank, keys))
        show(await unbatched(f"{ACCOUNTS:,} accounts, single calls", bank, keys))
    best = max(figures.pairs_a_second for name, figures in found.items() if "round" in name)
    ratio = best / found["one account, single calls"].pairs_a_second
    written = max(figures.pairs_a_second for name, figures in found.items() if "journal" in name)
    print(f"with a journal to without: {written / best:.2f}")
    verdict = "met" if best >= PAIRS_A_SECOND_MIN else "not met"
    print(f"batched to single on one account: {ratio:.1f}; bar of {PAIRS_A_SECOND_MIN:,} pairs/s: {verdict}")
    return found


async def _open_many(bank: Bank, like: ApiKey) -> list[ApiKey]:
    """Accounts with a key and credits each, made by the ledger's own functions, but in three statements."""
    await bank.owner.execute("SET statement_timeout = 0")
    rows = await bank.owner.fetch(
        "SELECT (farebox.create_account(gen_random_uuid(), 'bench ' || n, NULL, NULL)).account_id AS id"
        "  FROM generate_series(1, $1::int) AS n",
        ACCOUNTS,
    )
    ids = [row["id"] for row in rows]
    await bank.owner.execute(
        "SELECT farebox.grant_credits(id, 'grant', $2, id::text, 'bench', NULL) FROM unnest($1::uuid[]) AS id",
        ids,
        BALANCE,
    )
    await bank.owner.execute(
        "SELECT farebox.create_key("
        "           left(id::text, 13), id, 'key', sha256('x'), 1, '{inference}', NULL, NULL, true, NULL, NULL)"
        "  FROM unnest($1::uuid[]) AS id",
        ids,
    )
    await bank.owner.execute("ANALYZE farebox.accounts, farebox.api_keys")
    found = [await bank.holds.find_key(str(account_id)[:13]) for account_id in ids]
    keys = [key for key in found if key is not None]
    assert len(keys) == ACCOUNTS
    return keys


def _a_reserve(key: ApiKey, worker_id: UUID) -> Reserve:
    return Reserve(
        hold_id=uuid7(),
        account_id=key.account_id,
        key_id=key.id,
        key_version=key.version,
        worker_id=worker_id,
        want=1_000,
        at_least=1_000,
        price_version=VERSION,
        model="m",
        variant="standard",
        quote='{"input_tokens":312,"output_tokens":688,"cap":null,"amount":1000}',
        fingerprint=b"r" * 32,
    )


def _a_finalize(row: Reserve) -> Finalize:
    return Finalize(
        hold_id=row.hold_id,
        account_id=row.account_id,
        key_id=row.key_id,
        worker_id=row.worker_id,
        charge=700,
        usage=Usage(input=300, output=400),
        usage_source="reported",
        price_version=row.price_version,
        model=row.model,
        variant=row.variant,
        ending="complete",
        receipt='{"usage":{"prompt_tokens":300,"completion_tokens":400,"total_tokens":700},"finish":["stop"]}',
        fingerprint=b"f" * 32,
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.mark.timeout(300)
def test_pairs_a_second(database: Database) -> None:
    print()
    found = uvloop.run(run(database))
    assert found["one account, batched, round 1"].pairs_a_second > found["one account, single calls"].pairs_a_second


def main() -> None:
    """A cluster of its own, the measurement, and nothing left."""
    run_id = secrets.token_hex(6)
    try:
        with running_cluster(run_id) as address, fresh_database(address) as database:
            uvloop.run(run(database))
    finally:
        remove_cluster(run_id)


if __name__ == "__main__":
    main()
