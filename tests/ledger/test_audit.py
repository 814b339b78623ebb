"""The audit: passes on what the functions wrote, prints how much it looked at, and finds each single altered row."""

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from proxy.core.usage import Usage
from proxy.ledger.audit import Check, audit
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.records import ApiKey, Mark
from tests.ledger.bank import Bank


async def checks(connection: Connection) -> dict[str, Check]:
    return {check.name: check for check in await audit(connection)}


async def broken(connection: Connection) -> set[str]:
    return {name for name, check in (await checks(connection)).items() if not check.ok}


async def lively(bank: Bank) -> Bank:
    """Accounts on which everything has happened that can: charges, debt, true-ups, tombstones, reversals, limits."""
    for balance in (0, 10, 1_000, 1_000_000):
        account, key = await bank.open_account(balance, spend_limit=None if balance < 1_000 else 5_000_000)
        rows = [bank.a_reserve(key, 300, 0) for _ in range(6)]
        await bank.holds.batch([], rows)
        await bank.finalize(rows[0], 1_000)
        await bank.finalize(rows[1], 1_000, usage_source="counted")
        await bank.finalize(rows[2], 0, usage=Usage())
        await bank.release(rows[3])
        await bank.finalize(bank.a_reserve(key, 1), 77)
        await bank.release(bank.a_reserve(key, 1))
        if balance:
            await bank.control.reverse(rows[0].hold_id, 100, reference=None, actor="test", reason="why")
        await bank.holds.heartbeat(bank.worker_id, [Mark(rows[4].hold_id, Usage(output=20))])
        await bank.lapse()
        await bank.expire()
        await bank.holds.start_worker(bank.worker_id, "host", "0.1")
        await bank.finalize(rows[4], 250)
        await bank.control.grant(account.id, 5_000, reference=uuid4().hex, actor="test")
        await bank.reserve(key, 40)
    return bank


UNSEALED = {"sealed_transfers_are_as_they_were", "sealed_holds_are_as_they_were", "seals_chain_from_block_to_block"}

UNDRAWN = {"what_no_hold_was_lent_was_taken_back", "transfers_are_drawn_from_lots"}

UNSOLD = {
    *("orders_gave_up_what_their_refunds_say", "the_book_has_what_orders_gave_up", "refunds_under_way_are_held"),
    *("paid_orders_were_credited", "purchases_have_their_order"),
}


async def test_an_empty_ledger_is_right_and_says_that_it_is_empty(own_bank: Bank) -> None:
    found = await checks(own_bank.owner)
    assert all(check.ok for check in found.values())
    assert found["balance_is_the_sum_of_transfers"].rows == 0


async def test_what_the_functions_write_is_right(own_bank: Bank) -> None:
    await lively(own_bank)
    found = await checks(own_bank.owner)
    assert {name: check for name, check in found.items() if not check.ok} == {}
    assert {name for name, check in found.items() if check.rows == 0} == UNSEALED | UNDRAWN | UNSOLD
    assert found["balance_is_the_sum_of_transfers"].rows == 4
    assert found["every_hold_was_charged_what_its_transfers_say"].rows == 4 * 9


async def test_the_control_role_may_audit_and_the_others_may_not(own_bank: Bank) -> None:
    control = await connect(own_bank.database.app, Role.CONTROL)
    assert all(check.ok for check in await audit(control))
    await control.close()


BALANCE, HELD, DEBT = "balance_is_the_sum_of_transfers", "held_is_the_sum_of_open_holds", "debt_is_what_receivable_lent"
VERSIONS, CHAIN = "versions_are_gapless", "balances_chain_from_transfer_to_transfer"
CHARGED, RECOMPUTE = "every_hold_was_charged_what_its_transfers_say", "charges_recompute_from_usage_and_price"
WITHIN, LIMITS = "counted_charges_stay_within_their_hold", "spend_limits_count_what_was_spent"
PRICES, LIVE, NEGATIVE = (
    "price_versions_are_their_hash",
    "open_holds_belong_to_a_live_worker",
    "nothing_is_negative_and_debt_is_paid_first",
)
POSTGRES_IS_OLD = """
    CREATE OR REPLACE FUNCTION farebox.postgres_started() RETURNS timestamptz
    LANGUAGE sql AS $$ SELECT clock_timestamp() - interval '1 day' $$
"""
ONE_GRANT = "(account_id, version) = (SELECT account_id, version FROM farebox.transfers WHERE kind = 'grant' LIMIT 1)"
ONE_CHARGE = "(account_id, version) = (SELECT account_id, version FROM farebox.transfers WHERE kind = 'charge' LIMIT 1)"
CAME = "lots_came_with_their_transfers"
PLACE, GUARDS = "every_transfer_has_its_place", "guards_stand"
GUARDED = ("transfers", "prices", "price_versions", "accounts", "holds")
FK = "api_keys_account_id_fkey"
RICHEST = "id = (SELECT id FROM farebox.accounts ORDER BY balance DESC LIMIT 1)"
ONE_FINAL = "id = (SELECT id FROM farebox.holds WHERE state = 'final' AND charge > 0 AND capped IS NULL LIMIT 1)"
TAMPERED = [
    (f"UPDATE farebox.accounts SET balance = balance + 1 WHERE {RICHEST}", {BALANCE}),
    (f"UPDATE farebox.accounts SET held = held + 1 WHERE {RICHEST}", {HELD}),
    (f"UPDATE farebox.accounts SET debt = 7, balance = held WHERE {RICHEST}", {BALANCE, DEBT}),
    (f"UPDATE farebox.accounts SET version = version + 1 WHERE {RICHEST}", {VERSIONS}),
    (
        f"ALTER TABLE farebox.api_keys DROP CONSTRAINT {FK}; DELETE FROM farebox.accounts WHERE {RICHEST}",
        {BALANCE, HELD, DEBT, VERSIONS, NEGATIVE, PLACE},
    ),
    (f"UPDATE farebox.transfers SET amount = amount + 1 WHERE {ONE_GRANT}", {BALANCE, CHAIN, CAME}),
    (f"UPDATE farebox.transfers SET balance_after = balance_after + 1 WHERE {ONE_GRANT}", {CHAIN}),
    (f"UPDATE farebox.transfers SET debt_after = debt_after + 1 WHERE {ONE_GRANT}", {CHAIN}),
    (f"DELETE FROM farebox.transfers WHERE {ONE_GRANT}", {BALANCE, CHAIN, VERSIONS, CAME}),
    (f"UPDATE farebox.transfers SET hold_id = gen_random_uuid() WHERE {ONE_CHARGE}", {CHARGED}),
    (f"UPDATE farebox.holds SET charge = charge + 1 WHERE {ONE_FINAL}", {CHARGED, RECOMPUTE}),
    (f"UPDATE farebox.holds SET overrun = overrun + 1 WHERE {ONE_FINAL}", {CHARGED}),
    (f"UPDATE farebox.holds SET usage[5] = usage[5] + 1 WHERE {ONE_FINAL}", {RECOMPUTE}),
    (f"UPDATE farebox.holds SET model = 'another' WHERE {ONE_FINAL}", {RECOMPUTE}),
    (f"UPDATE farebox.holds SET usage = NULL WHERE {ONE_FINAL}", {RECOMPUTE}),
    ("UPDATE farebox.holds SET capped = NULL WHERE capped = 'counted_above_hold'", {RECOMPUTE}),
    ("UPDATE farebox.holds SET amount = amount - 1 WHERE capped = 'counted_above_hold' AND amount > 0", {WITHIN}),
    ("UPDATE farebox.holds SET amount = amount + 1 WHERE state = 'open'", {HELD, LIMITS}),
    ("UPDATE farebox.spend_limits SET spent = spent + 1", {LIMITS}),
    ("UPDATE farebox.prices SET per_request = per_request + 1 WHERE variant = 'metered'", {PRICES}),
    ("DELETE FROM farebox.prices WHERE variant = 'metered'", {PRICES}),
    ("UPDATE farebox.price_versions SET body = body || ' '", {PRICES}),
    ("UPDATE farebox.holds SET worker_id = gen_random_uuid() WHERE state = 'open'", {LIVE}),
]


@pytest.fixture
async def lively_bank(bank: Bank) -> Bank:
    """The module's database once everything has happened in it."""
    if not await bank.owner.fetchval("SELECT EXISTS (SELECT FROM farebox.transfers)"):
        await lively(bank)
    return bank


@pytest.mark.parametrize(("statement", "expected"), TAMPERED)
async def test_a_single_altered_row_is_found(lively_bank: Bank, statement: str, expected: set[str]) -> None:
    owner = lively_bank.owner
    transaction = owner.transaction()
    await transaction.start()
    for table in GUARDED:
        await owner.execute(f"ALTER TABLE farebox.{table} DISABLE TRIGGER USER")
    await owner.execute("SET CONSTRAINTS ALL DEFERRED")
    changed = await owner.execute(statement)
    assert not changed.endswith(" 0"), changed
    await owner.execute("SET CONSTRAINTS ALL IMMEDIATE")
    for table in GUARDED:
        await owner.execute(f"ALTER TABLE farebox.{table} ENABLE TRIGGER USER")
    found = {row["name"]: row for row in await owner.fetch("SELECT * FROM farebox.audit()")}
    assert {name for name, row in found.items() if row["violations"]} == expected
    assert all(found[name]["example"] for name in expected)
    await transaction.rollback()
    assert await broken(owner) == set()


GUARDS_GONE = [
    ("ALTER TABLE farebox.transfers DISABLE TRIGGER append_only", "trigger append_only on transfers"),
    ("ALTER TABLE farebox.transfers ENABLE REPLICA TRIGGER append_only", "trigger append_only on transfers"),
    ("DROP TRIGGER immutable ON farebox.prices", "trigger immutable on prices"),
    ("DROP INDEX farebox.transfers_once_a_hold", "index transfers_once_a_hold"),
    ("ALTER TABLE farebox.holds DROP CONSTRAINT holds_pkey", "index holds_pkey"),
]


@pytest.mark.parametrize(("statement", "missing"), GUARDS_GONE)
async def test_a_guard_that_is_gone_is_found(bank: Bank, statement: str, missing: str) -> None:
    transaction = bank.owner.transaction()
    await transaction.start()
    await bank.owner.execute(statement)
    found = {row["name"]: row for row in await bank.owner.fetch("SELECT * FROM farebox.audit()")}
    assert (found[GUARDS]["violations"], found[GUARDS]["example"]) == (1, missing)
    await transaction.rollback()


async def test_holds_that_a_dead_worker_left_are_found_once_a_live_one_should_have_swept_them(own_bank: Bank) -> None:
    _, key = await own_bank.open_account(100)
    await own_bank.reserve(key, 10)
    await own_bank.owner.execute(POSTGRES_IS_OLD)
    await own_bank.owner.execute("UPDATE farebox.workers SET lease_until = lease_until - interval '10 minutes'")
    assert await broken(own_bank.owner) == set(), "nobody is there to sweep"
    sweeper = uuid4()
    await own_bank.holds.start_worker(sweeper, "host", "0.1")
    assert await broken(own_bank.owner) == set(), "it has only begun"
    await own_bank.owner.execute(
        "UPDATE farebox.workers SET started_at = started_at - interval '10 minutes' WHERE id = $1", sweeper
    )
    assert await broken(own_bank.owner) == set(), "it has only now got at the database again"
    await own_bank.owner.execute(
        "UPDATE farebox.workers SET held_since = held_since - interval '10 minutes' WHERE id = $1", sweeper
    )
    assert await broken(own_bank.owner) == {LIVE}
    await own_bank.expire()
    assert await broken(own_bank.owner) == set()


async def test_an_audit_that_row_level_security_would_blind_fails_aloud(own_bank: Bank) -> None:
    await own_bank.open_account(100)
    await own_bank.owner.execute("ALTER TABLE farebox.accounts FORCE ROW LEVEL SECURITY")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await audit(own_bank.owner)


async def test_the_audit_sees_one_moment(own_bank: Bank) -> None:
    """Writers go on meanwhile; none of them can make it see half of what they did."""
    opened = [await own_bank.open_account(10_000) for _ in range(3)]
    stop = asyncio.Event()

    async def write(key: ApiKey) -> None:
        while not stop.is_set():
            reserve, reserved = await own_bank.reserve(key, 20)
            if reserved.granted:
                await own_bank.finalize(reserve, 3)

    writers = [asyncio.create_task(write(key)) for _, key in opened for _ in range(2)]
    for _ in range(15):
        assert await broken(own_bank.owner) == set()
    stop.set()
    await asyncio.gather(*writers)
