"""Many connections at once: nothing oversold, nothing lost, no revoked key, no account that stops the others."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.ledger.audit import audit
from proxy.ledger.connect import Connection, Role, connect, create_pool
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import Finalize, FinalizeOutcome, Release, Released, Reserve, ReserveOutcome
from tests.ledger.bank import Bank

GRANTED = ReserveOutcome.GRANTED


@asynccontextmanager
async def locked(bank: Bank, account_id: UUID) -> AsyncIterator[None]:
    """The account's row, locked by somebody else for as long as the block lasts."""
    connection = await connect(bank.database.owner)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR NO KEY UPDATE", account_id)
            yield
    finally:
        await connection.close()


async def waiting(bank: Bank, at_least: int) -> None:
    """Until so many calls wait for a lock in this database."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    superuser = await asyncpg.connect(bank.database.superuser)
    deadline = time.monotonic() + 10
    while await superuser.fetchval(query) < at_least:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await superuser.close()


async def test_credits_for_k_calls_admit_exactly_k_of_many(bank: Bank) -> None:
    account, key = await bank.open_account(50 * 10)
    low: list[int] = []

    async def watch() -> None:
        while True:
            balance, held, _ = await bank.money(account.id)
            low.append(balance - held)
            await asyncio.sleep(0.005)

    watcher = asyncio.create_task(watch())
    results = await asyncio.gather(*(bank.reserve(key, 10) for _ in range(500)))
    granted = [row for row, reserved in results if reserved.outcome is GRANTED]
    refused = {reserved.outcome for _, reserved in results} - {GRANTED}
    assert (len(granted), refused) == (50, {ReserveOutcome.CREDITS_HELD})
    await asyncio.gather(*(bank.finalize(row, 7) for row in granted))
    watcher.cancel()
    assert min(low) >= 0
    assert await bank.money(account.id) == (150, 0, 0)


async def test_one_hold_from_many_connections_is_one_hold_and_one_charge(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row = bank.a_reserve(key, 100)
    end = bank.a_finalize(row, 60)
    reserved = await asyncio.gather(*(bank.holds.reserve(row) for _ in range(10)))
    assert {(r.outcome, r.granted) for r in reserved} == {(GRANTED, 100)}
    finalized = await asyncio.gather(*(bank.holds.finalize(end) for _ in range(10)))
    assert {(f.outcome, f.charge) for f in finalized} == {(FinalizeOutcome.FINAL, 60)}
    assert await bank.book(account.id) == [("grant", 1000), ("charge", -60)]


@pytest.mark.parametrize("change", ["revoke", "rotate"])
async def test_a_key_revoked_while_reserves_queue_on_a_locked_account_gets_none(bank: Bank, change: str) -> None:
    account, key = await bank.open_account(1000)
    pool = await create_pool(bank.database.app, Role.GATEWAY, size=8, lock_ms=10_000)
    holds = HoldLedger(pool)
    control = await connect(bank.database.app, Role.CONTROL)
    async with control.transaction():
        # Changed, but not committed: whoever comes now queues behind it, with a snapshot from before.
        if change == "revoke":
            await control.fetch("SELECT farebox.revoke_key($1)", key.id)
        else:
            await control.fetch("SELECT farebox.rotate_key($1, $2, 'x', 1, '0')", key.id, uuid4().hex[:12])
        queued = [asyncio.create_task(holds.reserve(bank.a_reserve(key, 10), wait_ms=10_000)) for _ in range(8)]
        await waiting(bank, 8)
    await control.close()
    reserved = await asyncio.gather(*queued)
    assert {r.outcome for r in reserved} == {ReserveOutcome.KEY_CHANGED}
    assert await bank.money(account.id) == (1000, 0, 0)
    await pool.close()


async def test_after_a_revocation_has_returned_no_reserve_commits(bank: Bank) -> None:
    """Reserves come in all the time; those that were granted had all been granted before."""
    account, key = await bank.open_account(1_000_000)
    stop = False
    granted_after: list[ReserveOutcome] = []
    revoked = asyncio.Event()

    async def spend() -> None:
        while not stop:
            began_after = revoked.is_set()
            _, reserved = await bank.reserve(key, 1)
            if began_after:
                granted_after.append(reserved.outcome)

    spenders = [asyncio.create_task(spend()) for _ in range(8)]
    await asyncio.sleep(0.3)
    await bank.control.revoke_key(key.id)
    revoked.set()
    held = (await bank.money(account.id))[1]
    await asyncio.sleep(0.3)
    stop = True
    await asyncio.gather(*spenders)
    assert held > 0
    assert (await bank.money(account.id))[1] == held
    assert set(granted_after) == {ReserveOutcome.KEY_CHANGED}


async def test_a_locked_account_comes_back_busy_and_stops_no_other(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    other, its_key = await bank.open_account(1000)
    one, _ = await bank.reserve(key, 100)
    two, _ = await bank.reserve(its_key, 100)
    finalizes = [bank.a_finalize(one, 60), bank.a_finalize(two, 60)]
    reserves = [bank.a_reserve(key, 10), bank.a_reserve(its_key, 10)]
    releases = [Release(uuid4(), a.id, bank.worker_id) for a in (account, other)]
    async with locked(bank, account.id):
        began = time.monotonic()
        finalized, reserved, released = await bank.holds.batch(finalizes, reserves, releases)
        assert time.monotonic() - began < 1
        assert [f.outcome for f in finalized] == [FinalizeOutcome.BUSY, FinalizeOutcome.FINAL]
        assert [r.outcome for r in reserved] == [ReserveOutcome.BUSY, GRANTED]
        assert released == [Released(0, "busy"), Released(0, "released")]
        # Waiting for it in vain makes the whole call busy, after as long as was said.
        began = time.monotonic()
        assert (await bank.holds.reserve(reserves[0], wait_ms=100)).outcome is ReserveOutcome.BUSY
        assert 0.09 < time.monotonic() - began < 2
    assert await bank.money(account.id) == (1000, 100, 0)
    again = await bank.holds.batch(finalizes, reserves, releases)
    assert {f.outcome for f in again[0]} == {FinalizeOutcome.FINAL}
    assert {r.outcome for r in again[1]} == {GRANTED}
    for a in (account, other):
        assert await bank.money(a.id) == (940, 10, 0)


async def test_a_wait_that_is_granted_goes_on(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    async with locked(bank, account.id):
        task = asyncio.create_task(bank.holds.reserve(bank.a_reserve(key, 10), wait_ms=5_000))
        await waiting(bank, 1)
    assert (await task).outcome is GRANTED


async def test_the_functions_refuse_a_snapshot_older_than_their_lock(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    connection = await connect(bank.database.app, Role.GATEWAY)
    with pytest.raises(asyncpg.PostgresError, match="READ COMMITTED"):
        async with connection.transaction(isolation="repeatable_read"):
            await HoldLedger(connection).reserve(bank.a_reserve(key, 10))
    await connection.close()


async def test_a_database_that_is_stricter_by_default_serves_all_the_same(own_bank: Bank) -> None:
    """Else every call would fail with what looks like a standby's error, and be tried again for ever."""
    superuser = await asyncpg.connect(own_bank.database.superuser)
    await superuser.execute(
        f"ALTER DATABASE {own_bank.database.name} SET default_transaction_isolation = 'serializable'"
    )
    await superuser.close()
    _, key = await own_bank.open_account(1000)
    gateway = await connect(own_bank.database.app, Role.GATEWAY)
    try:
        assert (await HoldLedger(gateway).reserve(own_bank.a_reserve(key, 10))).outcome is ReserveOutcome.GRANTED
    finally:
        await gateway.close()


async def test_a_database_that_cant_be_reached_is_unavailable() -> None:
    with pytest.raises(LedgerUnavailable):
        await connect("postgresql://nobody@127.0.0.1:1/none", connect_seconds=2)


async def test_batches_over_shared_accounts_from_many_connections_never_deadlock_nor_lose_a_credit(bank: Bank) -> None:
    """Each batch takes accounts in its own order; the ledger locks them in one."""
    opened = [await bank.open_account(1_000_000) for _ in range(12)]
    dice = random.Random(7)
    charged: dict[UUID, int] = {account.id: 0 for account, _ in opened}

    async def work(connection: Connection) -> None:
        holds = HoldLedger(connection)
        open_: list[Reserve] = []
        for _ in range(30):
            reserves = [bank.a_reserve(dice.choice(opened)[1], dice.randrange(1, 200)) for _ in range(8)]
            ends = [bank.a_finalize(row, dice.randrange(0, 250)) for row in open_[: len(open_) // 2]]
            drops = [Release(row.hold_id, row.account_id, row.worker_id) for row in open_[len(open_) // 2 :]]
            finalized, reserved, _ = await holds.batch(ends, reserves, drops, wait_ms=20_000)
            for end, result in zip(ends, finalized, strict=True):
                assert result.outcome is FinalizeOutcome.FINAL
                charged[end.account_id] += result.charge
            open_ = [row for row, result in zip(reserves, reserved, strict=True) if result.outcome is GRANTED]
        last: list[Finalize] = [bank.a_finalize(row, 0) for row in open_]
        await holds.batch(last, [], wait_ms=20_000)

    connections = [await connect(bank.database.app, Role.GATEWAY, statement_seconds=30) for _ in range(8)]
    await asyncio.gather(*map(work, connections))
    for connection in connections:
        await connection.close()
    for account, _ in opened:
        balance, held, debt = await bank.money(account.id)
        assert (balance - debt, held) == (1_000_000 - charged[account.id], 0)
    assert [check.name for check in await audit(bank.owner) if not check.ok] == []
