"""Natural batching on the real ledger: what a batch does equals what single calls do, and nobody waits for another."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

import asyncpg
import pytest

from proxy.ledger.audit import audit
from proxy.ledger.batch import BatchedLedger, BatchLimits, Remains, RowRejected
from proxy.ledger.errors import LedgerError
from proxy.ledger.lines import lines_to
from proxy.ledger.records import ApiKey, Finalize, Finalized, Reserve, Reserved, ReserveOutcome
from tests.ledger.bank import Bank
from tests.ledger.test_audit import UNDRAWN, UNSOLD

GRANTED = ReserveOutcome.GRANTED
PATIENT = BatchLimits(reserve_seconds=60.0)


@dataclass(slots=True)
class Calls:
    """How many rows each call of a ledger had."""

    rows: list[int] = field(default_factory=list)

    def observe(self, rows: int, seconds: float) -> None:
        self.rows.append(rows)


@asynccontextmanager
async def batched(
    bank: Bank, limits: BatchLimits | None = None, calls: Calls | None = None
) -> AsyncIterator[BatchedLedger]:
    """A ledger that stops cleanly, without a task left."""
    before = asyncio.all_tasks()
    ledger = BatchedLedger(lines_to(bank.database.app), limits=limits, observe=(calls or Calls()).observe)
    await ledger.start()
    try:
        yield ledger
        assert await ledger.stop() == Remains()
    finally:
        await ledger.stop(0.0)
    assert asyncio.all_tasks() == before


async def idle(ledger: BatchedLedger) -> None:
    """Wait until nothing waits."""
    async with asyncio.timeout(10):
        while ledger.waiting != (0, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("moments", range(0, 30, 3))
async def test_a_cancel_while_a_reserve_waits_in_the_batch_leaves_nothing_held(bank: Bank, moments: int) -> None:
    account, key = await bank.open_account(1_000_000)
    async with batched(bank) as ledger:
        rows = [bank.a_reserve(key, 100) for _ in range(300)]
        waiting = [asyncio.create_task(ledger.reserve(row)) for row in rows]
        # From "not even queued" over "in flight" to "just answered".
        for _ in range(moments):
            await asyncio.sleep(0.001)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for row, task in zip(rows, waiting, strict=True):
            if not task.cancelled():
                await ledger.release(row.hold_id, row.account_id, row.worker_id)
        await idle(ledger)
        assert await bank.money(account.id) == (1_000_000, 0, 0)


async def test_a_batch_equals_single_calls(bank: Bank) -> None:
    """Duplicates, one account fifty times, refusals and a poison row among them, on twins of one account."""
    together, one_by_one = [await _twin(bank) for _ in range(2)]
    calls = Calls()
    async with batched(bank, calls=calls) as ledger:
        finalized = [ledger.finalize(row) for row in together.finalizes]
        reserved = [asyncio.create_task(ledger.reserve(row)) for row in together.reserves]
        results = await asyncio.gather(*finalized, *reserved, return_exceptions=True)
    expected: list[Finalized | Reserved | LedgerError] = []
    for finalize in one_by_one.finalizes:
        expected.append(await bank.holds.finalize(finalize))
    for reserve in one_by_one.reserves:
        try:
            expected.append(await bank.holds.reserve(reserve))
        except LedgerError as error:
            expected.append(error)
    assert [_comparable(result) for result in results] == [_comparable(result) for result in expected]
    assert [type(result) for result in results].count(RowRejected) == 1
    outcomes = [result.outcome for result in results if isinstance(result, Reserved)]
    assert outcomes.count(ReserveOutcome.CREDITS_HELD) == 1
    assert outcomes.count(ReserveOutcome.CONFLICT) == 1
    assert outcomes.count(GRANTED) == 50 + 10
    assert len(calls.rows) < 12, "they went together, and then by halves around the poison"
    assert await bank.money(together.key.account_id) == await bank.money(one_by_one.key.account_id)
    assert await bank.book(together.key.account_id) == await bank.book(one_by_one.key.account_id)


@dataclass(frozen=True, slots=True)
class _Twin:
    key: ApiKey
    finalizes: Sequence[Finalize]
    reserves: Sequence[Reserve]


async def _twin(bank: Bank) -> _Twin:
    _, key = await bank.open_account(10_000)
    earlier = [(await bank.reserve(key, 300))[0] for _ in range(5)]
    finalizes = [bank.a_finalize(row, 10 * number) for number, row in enumerate(earlier)]
    finalizes += [finalizes[2], replace(finalizes[3], charge=9, fingerprint=b"other")]
    reserves = [bank.a_reserve(key, 100 + number) for number in range(50)]
    reserves[20:20] = reserves[5:15]
    # Its text got past our own checks; Postgres refuses it, and with it the whole call.
    poison = bank.a_reserve(key, 1)
    object.__setattr__(poison, "quote", "\0")
    reserves.insert(33, poison)
    reserves.insert(12, bank.a_reserve(key, 9_900))
    reserves.append(replace(reserves[0], fingerprint=b"other"))
    return _Twin(key, finalizes, reserves)


def _comparable(result: object) -> object:
    """Without the balances: what is said twice in a batch is answered with those after the first time."""
    if isinstance(result, LedgerError):
        return LedgerError
    assert isinstance(result, Finalized | Reserved)
    return replace(result, balance=0, held=0, debt=0)


async def test_a_value_that_cannot_be_sent_fails_alone(bank: Bank) -> None:
    account, key = await bank.open_account(1_000)
    rows = [bank.a_reserve(key, 10) for _ in range(9)]
    rows[4] = replace(rows[4], key_version=2**40)
    async with batched(bank) as ledger:
        results = await asyncio.gather(*map(ledger.reserve, rows), return_exceptions=True)
    assert isinstance(results[4], RowRejected)
    assert await bank.money(account.id) == (1_000, 80, 0)


async def test_an_account_locked_for_5_seconds_does_not_stop_other_accounts(bank: Bank) -> None:
    locked_account, locked_key = await bank.open_account(1_000)
    _, free_key = await bank.open_account(1_000_000)
    blocker = await asyncpg.connect(bank.database.owner)
    async with batched(bank, replace(PATIENT, lock_ms=100)) as ledger:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", locked_account.id)
        stuck = [asyncio.create_task(ledger.reserve(bank.a_reserve(locked_key, 10))) for _ in range(20)]
        ends = time.monotonic() + 5.0
        seconds = []
        while time.monotonic() < ends:
            began = time.monotonic()
            results = await asyncio.gather(*(ledger.reserve(bank.a_reserve(free_key, 1)) for _ in range(5)))
            seconds.append(time.monotonic() - began)
            assert {result.outcome for result in results} == {GRANTED}
        assert not any(task.done() for task in stuck)
        await transaction.rollback()
        assert {(await task).outcome for task in stuck} == {GRANTED}
    await blocker.close()
    seconds.sort()
    assert seconds[len(seconds) * 99 // 100] < 0.5
    assert (await bank.money(locked_account.id))[1] == 200


async def test_credits_for_k_calls_admit_k_of_ten_thousand(bank: Bank) -> None:
    """Through two ledgers on connections of their own, as two processes would."""
    affordable, price = 700, 13
    account, key = await bank.open_account(affordable * price + price - 1)
    sampled = []

    async def sample() -> None:
        while True:
            sampled.append(await bank.money(account.id))
            await asyncio.sleep(0.02)

    async with batched(bank, PATIENT) as first, batched(bank, PATIENT) as second:
        sampler = asyncio.create_task(sample())
        rows = [bank.a_reserve(key, price) for _ in range(10_000)]
        asked = [(first, second)[number % 2].reserve(row) for number, row in enumerate(rows)]
        results = await asyncio.gather(*asked)
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)
        outcomes = [result.outcome for result in results]
        assert outcomes.count(GRANTED) == affordable
        assert set(outcomes) == {GRANTED, ReserveOutcome.CREDITS_HELD}
        admitted = [row for row, outcome in zip(rows, outcomes, strict=True) if outcome is GRANTED]
        final = [
            (second, first)[number % 2].finalize(bank.a_finalize(row, price)) for number, row in enumerate(admitted)
        ]
        assert {result.charge for result in await asyncio.gather(*final)} == {price}
    assert await bank.money(account.id) == (price - 1, 0, 0)
    assert len(sampled) > 3
    assert all(0 <= held <= balance for balance, held, _ in sampled)


async def test_a_connection_that_the_server_ends_costs_nothing(bank: Bank) -> None:
    """Killed over and over while reserves and finalizes go through: each is carried out once."""
    account, key = await bank.open_account(1_000_000)
    killer = await asyncpg.connect(bank.database.superuser)
    stop = asyncio.Event()

    async def kill() -> None:
        while not stop.is_set():
            await killer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE '%farebox.batch%' AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.03)

    async def call(ledger: BatchedLedger) -> None:
        row = bank.a_reserve(key, 10)
        assert (await ledger.reserve(row)).outcome is GRANTED
        assert (await ledger.finalize(bank.a_finalize(row, 3))).charge == 3

    async with batched(bank, PATIENT) as ledger:
        killing = asyncio.create_task(kill())
        for _ in range(10):
            await asyncio.gather(*(call(ledger) for _ in range(20)))
        stop.set()
        await killing
    await killer.close()
    assert await bank.money(account.id) == (1_000_000 - 600, 0, 0)
    assert len(await bank.book(account.id)) == 201


async def test_a_caller_gone_before_the_connection_was_lost_leaves_nothing_held(bank: Bank) -> None:
    account, key = await bank.open_account(1_000)
    blocker = await asyncpg.connect(bank.database.superuser)
    onlooker = await asyncpg.connect(bank.database.superuser)
    async with batched(bank, replace(PATIENT, lock_ms=5_000)) as ledger:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", account.id)
        waiting = asyncio.create_task(ledger.reserve(bank.a_reserve(key, 10)))
        pid = await _backend_that_waits(onlooker)
        waiting.cancel()
        await onlooker.execute("SELECT pg_terminate_backend($1)", pid)
        await transaction.rollback()
        await idle(ledger)
    await blocker.close()
    await onlooker.close()
    assert await bank.money(account.id) == (1_000, 0, 0)


async def _backend_that_waits(connection: "asyncpg.Connection[asyncpg.Record]") -> int:
    """The backend whose batch waits for a lock."""
    async with asyncio.timeout(5):
        while True:
            pid = await connection.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if pid is not None:
                return int(pid)
            await asyncio.sleep(0.01)


async def test_everything_at_once_leaves_the_books_right(bank: Bank) -> None:
    """Two ledgers, callers that leave, a sweeper, an operator: then every credit is where it should be."""
    chance = random.Random(20)
    accounts = [await bank.open_account(3_000) for _ in range(4)]
    keys = [key for _, key in accounts]
    keys += [await bank.open_key(keys[0].account_id, spend_limit=1_500)]
    mortal = uuid4()
    await bank.holds.start_worker(mortal, "host", "0.1")
    granted = [3_000] * 4
    stop = asyncio.Event()

    async def call(ledger: BatchedLedger) -> None:
        key = chance.choice(keys)
        worker_id = chance.choice([bank.worker_id, bank.worker_id, mortal])
        row = bank.a_reserve(key, chance.randrange(1, 200), 1, worker_id=worker_id)
        try:
            async with asyncio.timeout(chance.choice([0.001, 0.003, 5.0, 5.0, 5.0])):
                reserved = await ledger.reserve(row)
        except TimeoutError:
            return
        if reserved.outcome is not GRANTED:
            return
        await asyncio.sleep(chance.random() * 0.02)
        if chance.random() < 0.3:
            await ledger.release(row.hold_id, row.account_id, row.worker_id)
        else:
            charge = chance.randrange(0, 2 * reserved.granted)
            finalized = await ledger.finalize(bank.a_finalize(row, charge))
            assert finalized.charge == charge
            if charge and chance.random() < 0.1:
                await bank.control.reverse(row.hold_id, None, reference=None, actor="test", reason="test")

    async def sweep() -> None:
        while not stop.is_set():
            await bank.lapse(mortal)
            await bank.expire()
            await bank.holds.heartbeat(mortal, ())
            await asyncio.sleep(0.02)

    async def operate() -> None:
        while not stop.is_set():
            number = chance.randrange(4)
            await bank.control.grant(accounts[number][0].id, 300, reference=uuid4().hex, actor="test")
            granted[number] += 300
            await asyncio.sleep(0.03)

    async with batched(bank, PATIENT) as first, batched(bank, PATIENT) as second:
        others = [asyncio.create_task(work()) for work in (sweep, operate)]
        for _ in range(6):
            await asyncio.gather(*(call(chance.choice([first, second])) for _ in range(150)))
        stop.set()
        await asyncio.gather(*others)
        await idle(first)
        await idle(second)
    for number, (account, _) in enumerate(accounts):
        balance, held, debt = await bank.money(account.id)
        assert held == 0
        spent = await bank.owner.fetchval(
            "SELECT sum(charge - reversed)::bigint FROM farebox.holds WHERE account_id = $1", account.id
        )
        assert balance - debt == granted[number] - spent
    checks = await audit(bank.owner)
    assert [check for check in checks if not check.ok] == []
    # Nothing has been sealed, drawn or sold here, and perhaps nothing is held any more.
    may_be_empty = ("sealed_", "seals_", "open_holds_", *UNDRAWN, *UNSOLD)
    empty = [check.name for check in checks if not check.rows]
    assert [name for name in empty if not name.startswith(may_be_empty)] == []
