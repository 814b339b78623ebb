"""What has been written stays, even for the owner; and what can't be is refused by the tables themselves."""

import asyncpg
import pytest

from proxy.ledger.errors import InvalidValue
from proxy.ledger.holds import HoldLedger
from tests.ledger.bank import BODY, VERSION, Bank

FOR_EVER = [
    "UPDATE farebox.transfers SET amount = amount + 1",
    "UPDATE farebox.transfers SET amount = amount WHERE false",
    "DELETE FROM farebox.transfers",
    "TRUNCATE farebox.transfers",
    "UPDATE farebox.price_versions SET body = ''",
    "DELETE FROM farebox.price_versions",
    "TRUNCATE farebox.price_versions CASCADE",
    "UPDATE farebox.prices SET per_request = 0",
    "DELETE FROM farebox.prices",
    "TRUNCATE farebox.prices",
    "DELETE FROM farebox.accounts",
    "TRUNCATE farebox.accounts CASCADE",
    "DELETE FROM farebox.holds",
    "TRUNCATE farebox.holds",
    "DELETE FROM farebox.api_keys",
]
NEVER = [
    "UPDATE farebox.accounts SET held = -1 WHERE id = $1",
    "UPDATE farebox.accounts SET held = balance + 1 WHERE id = $1",
    "UPDATE farebox.accounts SET debt = -1 WHERE id = $1",
    "UPDATE farebox.accounts SET debt = 1 WHERE id = $1",
    "UPDATE farebox.holds SET amount = -1 WHERE account_id = $1",
    "UPDATE farebox.holds SET state = 'lost' WHERE account_id = $1",
    "UPDATE farebox.holds SET state = 'open' WHERE account_id = $1",
    "UPDATE farebox.holds SET reversed = charge + 1 WHERE account_id = $1",
    "UPDATE farebox.holds SET usage = '{1}' WHERE account_id = $1",
]


@pytest.mark.parametrize("statement", FOR_EVER)
async def test_rows_are_never_changed_or_removed_not_even_by_the_owner(bank: Bank, statement: str) -> None:
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="never changed or removed"):
        await bank.owner.execute(statement)


@pytest.mark.parametrize("statement", NEVER)
async def test_what_must_never_be_is_refused_by_the_table(bank: Bank, statement: str) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    await bank.finalize(reserve, 10)
    with pytest.raises(asyncpg.CheckViolationError):
        await bank.owner.execute(statement, account.id)


async def test_a_hold_is_charged_once_whatever_a_function_does(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    await bank.finalize(reserve, 10)
    with pytest.raises(asyncpg.UniqueViolationError, match="transfers_once_a_hold"):
        await bank.owner.execute(
            """
            INSERT INTO farebox.transfers
            SELECT t.account_id, 99, t.kind, t.account_side, t.system_account, t.amount, 0, 0, t.hold_id,
                   NULL, NULL, NULL, now()
              FROM farebox.transfers t WHERE t.account_id = $1 AND t.kind = 'charge'
            """,
            account.id,
        )


async def test_a_price_version_is_its_hash_and_is_put_once(bank: Bank) -> None:
    assert not await bank.holds.put_price_version(VERSION, BODY)
    with pytest.raises(InvalidValue, match="not the SHA-256"):
        await bank.holds.put_price_version("0" * 64, BODY)
    with pytest.raises(InvalidValue, match="not the SHA-256"):
        await bank.holds.put_price_version(VERSION, BODY + " ")


async def test_a_failed_batch_changes_nothing(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    good = bank.a_finalize(reserve, 10)
    poison = bank.a_finalize(bank.a_reserve(key, 1), 5)
    object.__setattr__(poison, "receipt", "a\0b")
    with pytest.raises(InvalidValue):
        await HoldLedger(bank.pool).batch([good, poison], [bank.a_reserve(key, 5)])
    assert await bank.money(account.id) == (1000, 100, 0)
    assert (await bank.holds.finalize(good)).charge == 10


async def test_what_cant_be_encoded_is_an_invalid_value(bank: Bank) -> None:
    with pytest.raises(InvalidValue):
        await bank.holds.stop_worker("no uuid")  # type: ignore[arg-type]
