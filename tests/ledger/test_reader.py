"""Self-service reads: an account's own rows and no other's, whatever the query says."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.core.usage import Usage
from proxy.ledger.connect import Pool, Role, connect, create_pool
from proxy.ledger.reader import AccountReader, DayUsage
from proxy.ledger.records import Account, Mark
from tests.ledger.bank import Bank

TABLES = {"accounts": "id", "holds": "account_id", "transfers": "account_id"}


@pytest.fixture
async def pool(bank: Bank) -> Any:
    made = await create_pool(bank.database.app, Role.READER, size=2)
    yield made
    await made.close()


async def busy_account(bank: Bank, charge: int) -> tuple[Account, UUID]:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    await bank.finalize(reserve, charge)
    await bank.reserve(key, 10)
    return await bank.control.find_account(account.id), reserve.hold_id


async def test_an_account_reads_itself(bank: Bank, pool: Pool) -> None:
    account, hold_id = await busy_account(bank, 60)
    reader = AccountReader(pool)
    assert await reader.account(account.id) == account
    assert await reader.transfers(account.id) == await bank.control.transfers(account.id)
    assert [t.kind for t in await reader.transfers(account.id, before=2)] == ["grant"]
    receipt = await reader.receipt(account.id, hold_id)
    assert receipt == await bank.control.ended(hold_id)
    assert receipt is not None
    assert receipt.charge == 60


async def test_two_accounts_see_nothing_of_each_other(bank: Bank, pool: Pool) -> None:
    one, its_hold = await busy_account(bank, 60)
    two, other_hold = await busy_account(bank, 70)
    reader = AccountReader(pool)
    assert await reader.receipt(one.id, other_hold) is None
    assert await reader.receipt(two.id, its_hold) is None
    assert {t.account_id for t in await reader.transfers(one.id)} == {one.id}
    assert await reader.account(uuid4()) is None
    # And where a query forgets to ask for one account only: each sees its own, all of it, and nothing else.
    owner = bank.owner
    async with pool.acquire() as connection:
        for account in (one, two):
            async with connection.transaction():
                await connection.execute("SELECT set_config('farebox.account', $1, true)", str(account.id))
                for table, column in TABLES.items():
                    seen = await connection.fetch(f"SELECT * FROM farebox.{table}")
                    all_of_it = await owner.fetch(f"SELECT * FROM farebox.{table} WHERE {column} = $1", account.id)
                    assert seen
                    assert sorted(map(repr, seen)) == sorted(map(repr, all_of_it))


async def test_without_saying_whose_no_row_is_seen(bank: Bank, pool: Pool) -> None:
    account, _ = await busy_account(bank, 60)
    reader = AccountReader(pool)
    await reader.account(account.id)
    async with pool.acquire() as connection:
        # Also after a transaction that said it, on the same connection: it was said for that transaction alone.
        for _ in range(2):
            for table in TABLES:
                assert await connection.fetch(f"SELECT * FROM farebox.{table}") == []
            async with connection.transaction():
                await connection.execute("SELECT set_config('farebox.account', '', true)")
                assert await connection.fetch("SELECT * FROM farebox.accounts") == []


async def test_the_owner_and_the_operator_see_all(bank: Bank) -> None:
    accounts = {(await busy_account(bank, 60))[0].id for _ in range(2)}
    control = await connect(bank.database.app, Role.CONTROL)
    for connection in (control, bank.owner):
        seen = {row["id"] for row in await connection.fetch("SELECT id FROM farebox.accounts")}
        assert accounts <= seen
    await control.close()


async def test_usage_is_summed_by_day_and_model(bank: Bank, pool: Pool) -> None:
    account, key = await bank.open_account(10_000)
    today = datetime.now(UTC)
    for charge, usage in ((10, Usage(input=4, output=6)), (20, Usage(output=20)), (0, Usage(cached_input=0))):
        reserve, _ = await bank.reserve(key, 100)
        await bank.finalize(reserve, charge, usage=usage)
    old, _ = await bank.reserve(key, 100)
    await bank.finalize(old, 50)
    await bank.owner.execute(
        "UPDATE farebox.holds SET opened_at = opened_at - interval '1 day' WHERE id = $1", old.hold_id
    )
    refunded, _ = await bank.reserve(key, 100)
    await bank.finalize(refunded, 30)
    await bank.control.reverse(refunded.hold_id, 25, reference=None, actor="test", reason=None)
    # Neither open ones nor released ones are usage; nor is another account's.
    await bank.reserve(key, 100)
    released, _ = await bank.reserve(key, 100)
    await bank.release(released)
    await busy_account(bank, 99)
    reader = AccountReader(pool)
    since, until = today - timedelta(days=3), today + timedelta(minutes=5)
    found = await reader.usage(account.id, since, until)
    days = sorted({row.day for row in found}, reverse=True)
    assert found == [
        DayUsage(days[0], "m", 4, Usage(input=4, output=56), 35),
        DayUsage(days[1], "m", 1, Usage(output=50), 50),
    ]
    assert days[0] - days[1] == timedelta(days=1)
    assert await reader.usage(account.id, until, until + timedelta(days=1)) == []
    assert await reader.usage(account.id, datetime(1960, 1, 1, tzinfo=UTC), since) == []


async def test_a_provisional_charge_is_usage_too(bank: Bank, pool: Pool) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    await bank.holds.heartbeat(bank.worker_id, [Mark(reserve.hold_id, Usage(output=7))])
    await bank.lapse()
    await bank.expire()
    now = datetime.now(UTC)
    [row] = await AccountReader(pool).usage(account.id, now - timedelta(hours=1), now + timedelta(hours=1))
    assert (row.requests, row.usage, row.charge) == (1, Usage(output=7), 7)


async def test_a_reader_writes_nothing(pool: Pool) -> None:
    async with pool.acquire() as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE farebox.accounts SET balance = 5")
