"""The audit of lots: right after everything that happens to them, and no altered row of theirs escapes it."""

from uuid import UUID

import pytest

from proxy.core.usage import Usage
from proxy.ledger.audit import audit, audit_since_last
from proxy.ledger.connect import Connection, Role, connect
from tests.ledger.bank import Bank
from tests.ledger.lots import UNSOLD, broken, give_back, purchase, take

MARK, SPOKEN = (
    "lots_hold_the_balance_at_their_mark",
    "lots_owe_no_more_than_the_debt_and_reserve_no_more_than_is_held",
)
CAME, LEFT, DRAWN = (
    "lots_came_with_their_transfers",
    "lots_have_left_what_their_draws_left",
    "transfers_are_drawn_from_lots",
)
LENT = "what_no_hold_was_lent_was_taken_back"
PAID = "(account_id, version) IN (SELECT account_id, version FROM farebox.lots WHERE kind = 'paid')"
ONE_DRAW = "(account_id, version, nth) = (SELECT account_id, version, nth FROM farebox.draws WHERE amount = 70)"
TAMPERED = [
    (f"UPDATE farebox.lots SET remaining = remaining - 1 WHERE {PAID}", {MARK, LEFT}),
    (f"UPDATE farebox.lots SET amount = amount + 1 WHERE {PAID}", {CAME, LEFT}),
    (f"UPDATE farebox.lots SET amount = amount + 1, remaining = remaining + 1 WHERE {PAID}", {MARK, CAME}),
    ("UPDATE farebox.lots SET kind = 'promo' WHERE kind = 'granted'", {CAME}),
    (f"UPDATE farebox.lots SET owed = owed + 1 WHERE {PAID}", {SPOKEN}),
    (f"UPDATE farebox.lots SET reserved = reserved + 1 WHERE {PAID}", {SPOKEN}),
    (f"DELETE FROM farebox.lots WHERE {PAID}", {MARK, LEFT}),
    ("UPDATE farebox.draws SET amount = amount + 1 WHERE amount = 70", {LEFT, DRAWN}),
    ("UPDATE farebox.draws SET version = version + 1, nth = 9 WHERE amount = 70", {DRAWN}),
    ("UPDATE farebox.draws SET lot_version = lot_version + 1 WHERE amount = 70", {LEFT}),
    (f"DELETE FROM farebox.draws WHERE {ONE_DRAW}", {LEFT, DRAWN}),
    # Of no transfer that there is: the sums of the others stay as they are.
    (
        "INSERT INTO farebox.draws SELECT account_id, version + 100, nth, lot_version, amount, owed"
        " FROM farebox.draws WHERE amount = 70",
        {LEFT, DRAWN},
    ),
    ("UPDATE farebox.lot_marks SET version = version + 1 WHERE version > 3", {MARK, SPOKEN}),
    ("DELETE FROM farebox.lot_marks", {MARK, SPOKEN, DRAWN}),
]


@pytest.fixture(scope="module")
def accounts() -> dict[str, UUID]:
    """Of the module's database, made by the first test that needs it."""
    return {}


@pytest.fixture
async def drawn_bank(bank: Bank, accounts: dict[str, UUID]) -> Bank:
    """A bank in which lots were drawn, owed, unwound and are drawn to somewhere."""
    if not accounts:
        account, key = await bank.open_account(50)
        accounts["one"] = account.id
        lot = await purchase(bank, account.id, 400)
        row, _ = await bank.reserve(key, 300)
        await bank.finalize(row, 120)
        await bank.control.reverse(row.hold_id, 10, reference=None, actor="test", reason="why")
        await bank.reserve(key, 260)
        await take(bank, account.id, lot, 200)
        assert (await bank.money(account.id))[2] > 0
        await bank.owner.fetchval("SELECT farebox.draw_lots($1, NULL, NULL)", account.id)
        other, _ = await bank.open_account(7)
        await bank.owner.fetchval("SELECT farebox.draw_lots($1, NULL, NULL)", other.id)
    return bank


async def test_what_the_functions_write_is_right(drawn_bank: Bank) -> None:
    found = {check.name: check for check in await audit(drawn_bank.owner)}
    assert {name for name, check in found.items() if not check.ok} == UNSOLD
    assert all(found[name].rows for name in (MARK, SPOKEN, CAME, LEFT, DRAWN, LENT))


@pytest.mark.parametrize(("statement", "expected"), TAMPERED)
async def test_an_altered_row_is_found(drawn_bank: Bank, statement: str, expected: set[str]) -> None:
    owner = drawn_bank.owner
    transaction = owner.transaction()
    await transaction.start()
    for table in ("lots", "draws"):
        await owner.execute(f"ALTER TABLE farebox.{table} DISABLE TRIGGER USER")
    changed = await owner.execute(statement)
    assert not changed.endswith(" 0"), changed
    for table in ("lots", "draws"):
        await owner.execute(f"ALTER TABLE farebox.{table} ENABLE TRIGGER USER")
    found = {row["name"]: row for row in await owner.fetch("SELECT * FROM farebox.audit()")}
    assert {name for name, row in found.items() if row["violations"]} - UNSOLD == expected
    assert all(found[name]["example"] for name in expected)
    await transaction.rollback()
    assert await broken(drawn_bank.owner) == set()


async def test_lending_that_nothing_follows_is_found(own_bank: Bank) -> None:
    """Credits from nowhere, made to look like a refund's."""
    account, key = await own_bank.open_account(50)
    lot = await purchase(own_bank, account.id, 100)
    await own_bank.reserve(key, 150)
    await take(own_bank, account.id, lot, 30)
    assert await broken(own_bank.owner) == set()
    await own_bank.owner.execute("ALTER TABLE farebox.transfers DISABLE TRIGGER USER")
    await own_bank.owner.execute("DELETE FROM farebox.transfers WHERE kind = 'refund'")
    assert LENT in await broken(own_bank.owner)


async def test_what_is_new_is_audited_too(own_bank: Bank) -> None:
    control = await connect(own_bank.database.app, Role.CONTROL)
    account, key = await own_bank.open_account(50)
    assert await _broken_since(control) == set()
    row, _ = await own_bank.reserve(key, 20)
    await own_bank.finalize(row, 20, usage=Usage(output=20))
    await own_bank.owner.fetchval("SELECT farebox.draw_lots($1, NULL, NULL)", account.id)
    await own_bank.owner.execute("UPDATE farebox.lots SET remaining = remaining + 1")
    assert await _broken_since(control) == {MARK}
    await own_bank.owner.execute("UPDATE farebox.lots SET remaining = remaining - 1")
    assert await _broken_since(control) == set()
    await control.close()


async def test_a_return_leaves_lots_as_they_should_be(own_bank: Bank) -> None:
    account, key = await own_bank.open_account(0)
    lot = await purchase(own_bank, account.id, 100)
    row, _ = await own_bank.reserve(key, 60)
    taking = await take(own_bank, account.id, lot, 100)
    assert await broken(own_bank.owner) == set()
    await own_bank.finalize(row, 10)
    await give_back(own_bank, account.id, lot, taking.taken, [taking.reference])
    assert await broken(own_bank.owner) == set()


async def _broken_since(connection: Connection) -> set[str]:
    return {check.name for check in await audit_since_last(connection) if not check.ok}
