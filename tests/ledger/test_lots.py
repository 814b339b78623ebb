"""Lots, by example: what is drawn, in which order, what comes back, what a refund takes. The machine does the rest."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.ledger import lots as lots_pass
from proxy.ledger.audit import audit
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.errors import Conflict, InvalidValue
from proxy.ledger.lots import LotKeeper, LotState, draw_behind, expire
from tests.ledger.bank import Bank
from tests.ledger.lots import Lot, draw, give_back, locked, lots, purchase, take

SOON = timedelta(days=1)


async def grant(bank: Bank, account_id: UUID, amount: int, **terms: Any) -> int:
    """Credits from an operator; their lot's version."""
    return (await bank.control.grant(account_id, amount, reference=uuid4().hex, actor="test", **terms)).version


async def pass_end(bank: Bank, account_id: UUID) -> None:
    """Every end that lies ahead has come."""
    await bank.owner.execute(
        "UPDATE farebox.lots SET expires_at = clock_timestamp() WHERE account_id = $1 AND expires_at IS NOT NULL",
        account_id,
    )


async def left(bank: Bank, account_id: UUID) -> dict[int, int]:
    return {lot.version: lot.remaining for lot in await lots(bank, account_id)}


async def test_promotions_go_first_then_what_was_given_then_what_was_paid(bank: Bank) -> None:
    account, key = await bank.open_account(0)
    paid = await purchase(bank, account.id, 100)
    given = await grant(bank, account.id, 100)
    promo = await grant(bank, account.id, 100, kind="promo")
    sooner = await grant(bank, account.id, 100, kind="promo", expires_at=datetime.now(UTC) + SOON)
    urgent = await grant(bank, account.id, 10, priority=1)
    row, _ = await bank.reserve(key, 250)
    await bank.finalize(row, 250)
    assert await left(bank, account.id) == {paid: 100, given: 60, promo: 0, sooner: 0, urgent: 0}


async def test_what_came_back_goes_where_it_came_from_the_last_drawn_first(bank: Bank) -> None:
    account, key = await bank.open_account(0)
    paid = await purchase(bank, account.id, 100)
    given = await grant(bank, account.id, 30)
    row, _ = await bank.reserve(key, 130)
    await bank.finalize(row, 70)
    assert await left(bank, account.id) == {paid: 60, given: 0}
    for amount, expected in ((30, {paid: 90, given: 0}), (None, {paid: 100, given: 30})):
        await bank.control.reverse(row.hold_id, amount, reference=None, actor="test", reason="why")
        assert await left(bank, account.id) == expected


async def test_what_was_lent_comes_back_as_a_lot_of_its_own(bank: Bank) -> None:
    account, key = await bank.open_account(10)
    row, _ = await bank.reserve(key, 10)
    await bank.finalize(row, 40)
    paid = await purchase(bank, account.id, 100)
    assert await left(bank, account.id) == {1: 0, paid: 70}
    await bank.control.reverse(row.hold_id, None, reference=None, actor="test", reason="why")
    found = await lots(bank, account.id)
    assert [(lot.kind, lot.remaining) for lot in found] == [("granted", 10), ("paid", 70), ("granted", 30)]


async def test_a_refund_of_a_half_spent_purchase_takes_the_rest_of_it_then_other_credits(bank: Bank) -> None:
    account, key = await bank.open_account(0)
    paid = await purchase(bank, account.id, 100)
    row, _ = await bank.reserve(key, 50)
    await bank.finalize(row, 50)
    given = await grant(bank, account.id, 20)
    taking = await take(bank, account.id, paid, 100)
    assert (taking.taken, taking.lent) == (100, 30)
    assert await bank.money(account.id) == (0, 0, 30)
    assert await left(bank, account.id) == {paid: 0, given: 0}
    # The next purchase pays the debt.
    later = await purchase(bank, account.id, 100)
    assert await left(bank, account.id) == {paid: 0, given: 0, later: 70}


async def test_what_calls_hold_is_taken_when_they_end_and_no_other_lot_for_it(bank: Bank) -> None:
    account, key = await bank.open_account(0)
    paid = await purchase(bank, account.id, 100)
    row, _ = await bank.reserve(key, 80)
    await take(bank, account.id, paid, 100)
    assert await lots(bank, account.id) == [Lot(paid, "paid", 80, 0, 80)]
    given = await grant(bank, account.id, 60)
    # The grant paid what it could of the debt, from the lot that owed it.
    assert await lots(bank, account.id) == [Lot(paid, "paid", 20, 0, 20), Lot(given, "granted", 60, 0, 0)]
    await bank.finalize(row, 30)
    assert await left(bank, account.id) == {paid: 0, given: 30}
    assert await bank.money(account.id) == (30, 0, 0)


async def test_a_refund_that_failed_gives_a_lot_back_what_it_took_and_what_it_owed(bank: Bank) -> None:
    account, key = await bank.open_account(0)
    paid = await purchase(bank, account.id, 100)
    row, _ = await bank.reserve(key, 80)
    taking = await take(bank, account.id, paid, 100)
    await bank.release(row)
    assert await lots(bank, account.id) == [Lot(paid, "paid", 0, 0, 0)]
    assert await give_back(bank, account.id, paid, 100, [taking.reference]) == "done"
    assert await give_back(bank, account.id, paid, 100, [taking.reference]) == "done"
    assert await lots(bank, account.id) == [Lot(paid, "paid", 100, 0, 0)]


async def test_a_return_finds_what_another_taking_of_the_same_purchase_took(bank: Bank) -> None:
    """A dispute of all of it, beside a refund of half: each takes and returns a difference, not its own."""
    account, _ = await bank.open_account(0)
    paid = await purchase(bank, account.id, 100)
    dispute = await take(bank, account.id, paid, 100, kind="dispute")
    references = ["re_unheard_of", dispute.reference]
    assert await give_back(bank, account.id, paid, 50, references) == "done"
    assert await give_back(bank, account.id, paid, 50, references[::-1], kind="dispute_return") == "done"
    assert await lots(bank, account.id) == [Lot(paid, "paid", 100, 0, 0)]


async def test_a_bonus_is_taken_as_far_as_it_is_left(bank: Bank) -> None:
    account, key = await bank.open_account(50)
    bonus = await grant(bank, account.id, 20, kind="promo")
    row, _ = await bank.reserve(key, 15)
    await bank.finalize(row, 15)
    taking = await take(bank, account.id, bonus, 20, at_most_lot=True)
    assert (taking.outcome, taking.taken, taking.lent) == ("done", 5, 0)
    assert (await take(bank, account.id, bonus, 20, at_most_lot=True)).outcome == "nothing"
    assert await bank.money(account.id) == (50, 0, 0)


async def test_a_taking_is_once_for_each_reference(bank: Bank) -> None:
    account, _ = await bank.open_account(0)
    other, _ = await bank.open_account(10)
    paid = await purchase(bank, account.id, 100)
    first = await take(bank, account.id, paid, 60)
    assert await take(bank, account.id, paid, 60, reference=first.reference) == first
    assert (await take(bank, other.id, 1, 60, reference=first.reference)).outcome == "conflict"
    assert await bank.money(account.id) == (40, 0, 0)


async def test_reserved_credits_are_drawn_by_nobody_else(bank: Bank) -> None:
    account, key = await bank.open_account(50)
    paid = await purchase(bank, account.id, 100)
    query = "SELECT farebox.reserve_lot($1, $2, $3)"
    for asked, got in ((70, 70), (70, 30), (70, 0)):
        assert (await locked(bank.owner, account.id, "x", uuid4().hex, query, account.id, paid, asked))[0] == got
    row, _ = await bank.reserve(key, 50)
    await bank.finalize(row, 50)
    assert await lots(bank, account.id) == [Lot(1, "granted", 0, 0, 0), Lot(paid, "paid", 100, 100, 0)]
    query = "SELECT farebox.unreserve_lot($1, $2, $3)"
    await locked(bank.owner, account.id, "x", uuid4().hex, query, account.id, paid, 70)
    assert (await lots(bank, account.id))[1] == Lot(paid, "paid", 100, 30, 0)


async def test_a_lot_expires_but_for_what_calls_begun_before_may_still_draw(bank: Bank) -> None:
    account, key = await bank.open_account(0)
    promo = await grant(bank, account.id, 100, kind="promo", expires_at=datetime.now(UTC) + SOON)
    paid = await purchase(bank, account.id, 100)
    before, _ = await bank.reserve(key, 60)
    await pass_end(bank, account.id)
    after, _ = await bank.reserve(key, 20)
    assert await bank.owner.fetchval("SELECT farebox.expire_lots($1)", account.id) == 40
    await bank.finalize(after, 20)
    assert await left(bank, account.id) == {promo: 60, paid: 80}
    await bank.finalize(before, 25)
    assert await left(bank, account.id) == {promo: 35, paid: 80}
    assert await bank.owner.fetchval("SELECT farebox.expire_lots($1)", account.id) == 35
    assert await bank.owner.fetchval("SELECT farebox.expire_lots($1)", account.id) == 0
    assert await bank.book(account.id) == [
        *(("promo", 100), ("purchase", 100), ("expiry", -40), ("charge", -20), ("charge", -25), ("expiry", -35))
    ]
    assert await bank.money(account.id) == (80, 0, 0)


async def test_a_grant_that_would_have_expired_is_refused(bank: Bank) -> None:
    account, _ = await bank.open_account(0)
    with pytest.raises(Conflict, match="expired"):
        await grant(bank, account.id, 5, expires_at=datetime.now(UTC) - SOON)
    with pytest.raises(InvalidValue, match="priority"):
        await grant(bank, account.id, 5, priority=1001)
    assert await bank.book(account.id) == []


async def test_lots_are_not_drawn_under_an_older_snapshot(bank: Bank) -> None:
    account, _ = await bank.open_account(5)
    async with bank.owner.transaction(isolation="repeatable_read"):
        with pytest.raises(asyncpg.ActiveSQLTransactionError):
            await draw(bank, account.id)


async def test_a_pass_leaves_an_account_whose_lots_are_wrong_and_says_which(own_bank: Bank) -> None:
    good, key = await own_bank.open_account(100)
    bad, bad_key = await own_bank.open_account(100)
    await draw(own_bank, bad.id)
    for each in (key, bad_key):
        row, _ = await own_bank.reserve(each, 60)
        await own_bank.finalize(row, 60)
    await own_bank.owner.execute("UPDATE farebox.lots SET remaining = 10 WHERE account_id = $1", bad.id)
    control = await connect(own_bank.database.app, Role.CONTROL)
    assert await draw_behind(control) == (1, 1)
    assert await left(own_bank, good.id) == {1: 40}
    with pytest.raises(asyncpg.DataCorruptedError, match="50 microcredits are missing"):
        await draw(own_bank, bad.id)
    await control.close()


async def test_one_pass_at_a_time_and_a_locked_account_keeps_no_other_waiting(own_bank: Bank) -> None:
    first, _ = await own_bank.open_account(100)
    second, _ = await own_bank.open_account(100)
    await draw(own_bank, first.id)
    await grant(own_bank, first.id, 1)
    control = await connect(own_bank.database.app, Role.CONTROL)
    transaction = own_bank.owner.transaction()
    await transaction.start()
    await own_bank.owner.execute("SELECT farebox.lock_lots($1)", first.id)
    assert await draw_behind(control) == (1, 0)
    await own_bank.owner.execute("SELECT farebox.draw_accounts(ARRAY[]::uuid[], 1)")
    assert await draw_behind(control) is None
    await transaction.rollback()
    assert await draw_behind(control) == (0, 0)
    assert await left(own_bank, second.id) == {1: 100}
    await control.close()


async def test_the_server_draws_and_expires_by_itself(own_bank: Bank) -> None:
    account, key = await own_bank.open_account(100)
    await grant(own_bank, account.id, 50, kind="promo", expires_at=datetime.now(UTC) + SOON)
    row, _ = await own_bank.reserve(key, 20)
    await own_bank.finalize(row, 20)
    await pass_end(own_bank, account.id)
    said: asyncio.Queue[LotState] = asyncio.Queue()
    keeper = LotKeeper(own_bank.database.app, observe=said.put_nowait, lots_seconds=0.02)
    keeper.start()
    try:
        assert await asyncio.wait_for(said.get(), 30) == LotState(behind=0, broken=0, expired=30)
        assert (await asyncio.wait_for(said.get(), 30)).expired == 0
    finally:
        await keeper.stop()
    assert await own_bank.money(account.id) == (100, 0, 0)


async def test_an_account_whose_lots_are_broken_keeps_no_other_s_credits_from_expiring(own_bank: Bank) -> None:
    accounts = await with_expired_lots(own_bank, 4)
    broken = min(accounts)
    await break_lots(own_bank, [broken])
    control = await connect(own_bank.database.app, Role.CONTROL)
    assert await expire(control) == 90
    await control.close()
    assert [(await own_bank.money(id))[0] for id in accounts] == [30 if id == broken else 0 for id in accounts]


async def test_so_many_broken_accounts_as_are_looked_at_once_keep_no_other_waiting(
    own_bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lots_pass, "EXPIRED_ACCOUNTS_MAX", 2)
    accounts = sorted(await with_expired_lots(own_bank, 7))
    broken, healthy = accounts[:4], accounts[4:]
    await break_lots(own_bank, broken)
    control = await connect(own_bank.database.app, Role.CONTROL)
    # Not all that there are in one round: the lots of others are to be drawn meanwhile.
    assert [await expire(control) for _ in range(3)] == [60, 30, 0]
    await control.close()
    assert [(await own_bank.money(id))[0] for id in healthy] == [0, 0, 0]
    assert [(await own_bank.money(id))[0] for id in broken] == [30] * 4


async def with_expired_lots(bank: Bank, count: int) -> list[UUID]:
    """Accounts with 30 microcredits each that should be gone by now."""
    accounts = []
    for _ in range(count):
        account, key = await bank.open_account()
        await grant(bank, account.id, 50, kind="promo", expires_at=datetime.now(UTC) + SOON)
        row, _ = await bank.reserve(key, 20)
        await bank.finalize(row, 20)
        await pass_end(bank, account.id)
        accounts.append(account.id)
    return accounts


async def break_lots(bank: Bank, accounts: list[UUID]) -> None:
    """The calls have drawn more than there is."""
    await bank.owner.execute("UPDATE farebox.lots SET remaining = 10 WHERE account_id = ANY ($1)", accounts)


async def test_a_round_ends_though_others_write_all_the_time(own_bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lots_pass, "ACCOUNTS_MAX", 1)
    account, _ = await own_bank.open_account(100)
    batches = 0
    draw_batch = lots_pass._draw_batch

    async def and_another(connection: Connection, account_ids: list[UUID]) -> asyncpg.Record | None:
        nonlocal batches
        batches += 1
        assert batches < 10, "it would go on for ever"
        row = await draw_batch(connection, account_ids)
        await grant(own_bank, account.id, 1)
        return row

    monkeypatch.setattr(lots_pass, "_draw_batch", and_another)
    control = await connect(own_bank.database.app, Role.CONTROL)
    assert await draw_behind(control, breath_seconds=0) == (0, 0)
    await control.close()


async def test_a_ledger_from_before_lots_is_drawn_in_stretches(own_bank: Bank) -> None:
    """100,000 transfers of ten accounts, grants and charges, none of which knows of a lot."""
    accounts = [(await own_bank.open_account(0))[0].id for _ in range(10)]
    # So many rows, and an audit of them, take their time on a machine that has other things to do.
    await own_bank.owner.execute("SET statement_timeout = 0")
    async with own_bank.owner.transaction():
        await own_bank.owner.execute(_OLD_BOOK, accounts)
        await own_bank.owner.execute(_OLD_ACCOUNTS, accounts)
    control = await connect(own_bank.database.app, Role.CONTROL, statement_seconds=100)
    assert await draw_behind(control, breath_seconds=0) == (0, 0)
    assert await expire(control) == 0
    await control.close()
    found = await own_bank.owner.fetch(
        "SELECT a.balance, sum(l.remaining) AS lots, count(*) AS grants FROM farebox.accounts a "
        "JOIN farebox.lots l ON l.account_id = a.id GROUP BY a.id"
    )
    assert [tuple(row) for row in found] == [(9_000, 9_000, 100)] * 10
    checks = {check.name: check for check in await audit(own_bank.owner)}
    assert checks["transfers_are_drawn_from_lots"].rows == 100_000
    wrong = {name for name, check in checks.items() if not check.ok}
    assert wrong == {"every_hold_was_charged_what_its_transfers_say"}, "the charges of this book have no holds"


# A grant of 1,090 and 99 charges of 10 or 11, a hundred times over: 9,000 are left in all.
_OLD_BOOK = """
    INSERT INTO farebox.transfers (account_id, version, kind, account_side, system_account, amount, balance_after,
                                   debt_after, hold_id, reference, created_at)
    SELECT a.id, n.v, CASE WHEN n.v % 100 = 1 THEN 'grant' ELSE 'charge' END,
           CASE WHEN n.v % 100 = 1 THEN 'credit' ELSE 'debit' END,
           CASE WHEN n.v % 100 = 1 THEN 'grants' ELSE 'revenue' END, n.amount,
           sum(CASE WHEN n.v % 100 = 1 THEN n.amount ELSE -n.amount END) OVER (PARTITION BY a.id ORDER BY n.v), 0,
           CASE WHEN n.v % 100 <> 1 THEN gen_random_uuid() END, NULL, clock_timestamp()
      FROM unnest($1::uuid[]) AS a (id),
           LATERAL (SELECT g AS v, CASE WHEN g % 100 = 1 THEN 1090 WHEN g % 100 < 11 THEN 11 ELSE 10 END AS amount
                      FROM generate_series(1, 10000) AS g) AS n
"""
_OLD_ACCOUNTS = "UPDATE farebox.accounts SET version = 10000, balance = 9000 WHERE id = ANY ($1)"
