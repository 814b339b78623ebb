"""The audit of what is new: as sharp as the full one there, and blind to nothing because somebody says so."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from proxy.core.usage import Usage
from proxy.ledger.audit import Check, audit, audit_since_last, book_state
from proxy.ledger.bookkeeper import Bookkeeper, seal
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.orders import OrderLedger
from proxy.ledger.records import ApiKey, Mark
from tests.ledger.bank import Bank
from tests.ledger.test_audit import lively
from tests.ledger.test_orders import a_new_order, a_payment


@pytest.fixture
async def keeper(own_bank: Bank) -> AsyncIterator[Connection]:
    """A connection that may seal and audit."""
    connection = await connect(own_bank.database.app, Role.CONTROL, statement_seconds=60)
    yield connection
    await connection.close()


async def found(keeper: Connection) -> dict[str, Check]:
    return {check.name: check for check in await audit_since_last(keeper)}


async def broken(keeper: Connection) -> set[str]:
    checks = await found(keeper)
    assert checks
    return {name for name, check in checks.items() if not check.ok}


async def test_it_looks_at_what_is_new_and_at_nothing_twice(own_bank: Bank, keeper: Connection) -> None:
    await lively(own_bank)
    assert (await book_state(keeper)).clean_at is None
    first = await found(keeper)
    assert {name for name, check in first.items() if not check.ok} == set()
    transfers = first["balances_chain_from_transfer_to_transfer"].rows
    assert transfers == await own_bank.owner.fetchval("SELECT count(*) FROM farebox.transfers")
    state = await book_state(keeper)
    assert (state.unaudited, state.transfers) == (0, transfers)
    assert state.clean_at is not None
    again = await found(keeper)
    assert again["balances_chain_from_transfer_to_transfer"].rows == 0
    assert again["balance_is_the_sum_of_transfers"].rows == 4
    key = (await own_bank.open_account(100))[1]
    await own_bank.finalize((await own_bank.reserve(key, 10))[0], 3)
    third = await found(keeper)
    assert third["balances_chain_from_transfer_to_transfer"].rows == 2
    assert {name for name, check in third.items() if not check.ok} == set()


async def test_a_backlog_is_looked_at_in_bounded_steps(own_bank: Bank, keeper: Connection) -> None:
    await lively(own_bank)
    left: list[int] = []
    while not left or left[-1]:
        checks = await audit_since_last(keeper, rows=7)
        assert [check for check in checks if not check.ok] == []
        left.append((await book_state(keeper)).unaudited)
    assert left == sorted(left, reverse=True)
    assert len(left) > 3


BALANCE, CHAIN, CHARGED = (
    "balance_is_the_sum_of_transfers",
    "balances_chain_from_transfer_to_transfer",
    "every_hold_was_charged_what_its_transfers_say",
)
VERSIONS, RECOMPUTE, STATES = (
    "versions_are_gapless",
    "charges_recompute_from_usage_and_price",
    "every_hold_ended_as_its_state_says",
)
NEW = (
    "(account_id, version) = ("
    "SELECT account_id, version FROM farebox.transfers WHERE kind = '{0}' ORDER BY created_at DESC LIMIT 1)"
)
LAST_HOLD = "id = (SELECT id FROM farebox.holds WHERE state = 'final' AND charge > 0 ORDER BY ended_at DESC LIMIT 1)"
RICHEST = "id = (SELECT id FROM farebox.accounts ORDER BY balance DESC LIMIT 1)"
TAMPERED = [
    (f"UPDATE farebox.accounts SET balance = balance + 1 WHERE {RICHEST}", {BALANCE}),
    (f"UPDATE farebox.accounts SET version = version + 1 WHERE {RICHEST}", {VERSIONS}),
    (f"UPDATE farebox.accounts SET version = version - 1 WHERE {RICHEST}", {VERSIONS}),
    (f"UPDATE farebox.accounts SET held = held + 1 WHERE {RICHEST}", {"held_is_the_sum_of_open_holds"}),
    (f"UPDATE farebox.transfers SET amount = amount + 1 WHERE {NEW.format('charge')}", {CHAIN, CHARGED}),
    (f"UPDATE farebox.transfers SET balance_after = 7 WHERE {NEW.format('charge')}", {CHAIN, BALANCE}),
    (f"UPDATE farebox.transfers SET hold_id = gen_random_uuid() WHERE {NEW.format('charge')}", {CHARGED}),
    (
        f"UPDATE farebox.transfers SET system_account = 'stripe' WHERE {NEW.format('grant')}",
        {"transfers_move_between_the_sides_of_their_kind"},
    ),
    (f"DELETE FROM farebox.transfers WHERE {NEW.format('charge')}", {VERSIONS, BALANCE, CHARGED}),
    (f"UPDATE farebox.holds SET charge = charge + 1 WHERE {LAST_HOLD}", {CHARGED, RECOMPUTE}),
    (f"UPDATE farebox.holds SET usage[5] = usage[5] + 1 WHERE {LAST_HOLD}", {RECOMPUTE}),
    (f"UPDATE farebox.holds SET state = 'released' WHERE {LAST_HOLD}", {STATES}),
    ("UPDATE farebox.price_versions SET body = body || ' '", {"price_versions_are_their_hash"}),
    ("ALTER TABLE farebox.transfers DISABLE TRIGGER append_only", {"guards_stand"}),
]


@pytest.mark.parametrize(("statement", "expected"), TAMPERED)
async def test_what_is_wrong_with_the_new_is_found_and_found_again(
    own_bank: Bank, keeper: Connection, statement: str, expected: set[str]
) -> None:
    _, old = await own_bank.open_account(1_000)
    await own_bank.finalize((await own_bank.reserve(old, 100))[0], 10)
    assert await broken(keeper) == set()
    _, key = await own_bank.open_account(5_000)
    await own_bank.finalize((await own_bank.reserve(key, 100))[0], 40)
    superuser = await asyncpg.connect(own_bank.database.superuser)
    await superuser.execute("SET session_replication_role = replica")
    await superuser.execute(statement)
    await superuser.close()
    assert await broken(keeper) == expected
    assert await broken(keeper) == expected, "what was found wrong isn't taken for seen"


PAID, HAVE, GAVE, BOOK = (
    "paid_orders_were_credited",
    "purchases_have_their_order",
    "orders_gave_up_what_their_refunds_say",
    "the_book_has_what_orders_gave_up",
)
TAMPERED_ORDERS = [
    ("UPDATE farebox.orders SET credits = credits + 1 WHERE bonus > 0", {PAID}),
    ("UPDATE farebox.orders SET bonus = bonus + 1 WHERE bonus > 0", {PAID}),
    ("UPDATE farebox.orders SET received = received - 1 WHERE bonus > 0", {PAID}),
    ("UPDATE farebox.orders SET credit_version = 77 WHERE bonus > 0", {HAVE}),
    ("UPDATE farebox.orders SET state = 'open', paid_at = NULL, received = NULL WHERE bonus > 0", {HAVE}),
    ("UPDATE farebox.orders SET taken = taken + 1 WHERE taken > 0", {GAVE, BOOK}),
    ("UPDATE farebox.stripe_refunds SET active = false", {GAVE}),
    ("UPDATE farebox.disputes SET withdrawn = false", {GAVE}),
    ("DELETE FROM farebox.stripe_refunds", {GAVE, BOOK}),
    # Of an order that was just paid, before anything goes back of it.
    ("UPDATE farebox.orders SET taken = 1 WHERE bonus > 0", {GAVE, BOOK}),
    ("UPDATE farebox.orders SET bonus_taken = 1 WHERE bonus > 0", {GAVE, BOOK}),
    ("UPDATE farebox.transfers SET reference = NULL WHERE kind = 'refund'", {BOOK}),
    ("UPDATE farebox.transfers SET reference = NULL WHERE kind = 'purchase'", {HAVE}),
]


REFUND = "SELECT farebox.apply_refund('re_1', $1, 400, 'usd', 'succeeded', NULL, NULL)"
DISPUTE = "SELECT farebox.apply_dispute('dp_1', $1, 400, 'usd', 'needs_response', true, 1)"


async def sell(bank: Bank, account_id: UUID, *, bonus: int = 0) -> str:
    """An order that is paid; its PaymentIntent."""
    orders = OrderLedger(bank.control._pool)
    created = await orders.create(a_new_order(account_id, bonus=bonus))
    assert created.order is not None
    await orders.pay(a_payment(created.order))
    paid = (await orders.find(created.order.id)).payment_intent
    assert paid is not None
    return paid


@pytest.mark.parametrize(("statement", "expected"), TAMPERED_ORDERS)
async def test_what_is_wrong_with_new_purchases_and_what_went_back_of_them_is_found(
    own_bank: Bank, keeper: Connection, statement: str, expected: set[str]
) -> None:
    await own_bank.open_account(1_000)
    assert await broken(keeper) == set()
    account, _ = await own_bank.open_account()
    await sell(own_bank, account.id, bonus=100)
    await own_bank.owner.execute(REFUND, await sell(own_bank, account.id))
    await own_bank.owner.execute(DISPUTE, await sell(own_bank, account.id))
    superuser = await asyncpg.connect(own_bank.database.superuser)
    await superuser.execute("SET session_replication_role = replica")
    await superuser.execute(statement)
    assert await broken(keeper) == expected
    assert await broken(keeper) == expected, "what was found wrong isn't taken for seen"
    await superuser.close()


async def test_new_purchases_are_looked_at_once(own_bank: Bank, keeper: Connection) -> None:
    account, _ = await own_bank.open_account()
    await sell(own_bank, account.id)
    await own_bank.owner.execute(REFUND, await sell(own_bank, account.id, bonus=100))
    first = await found(keeper)
    assert {name for name, check in first.items() if not check.ok} == set()
    assert [first[name].rows for name in (PAID, HAVE, GAVE, BOOK)] == [2, 2, 2, 2]
    again = await found(keeper)
    assert [again[name].rows for name in (PAID, HAVE, GAVE, BOOK)] == [0, 0, 0, 0]
    assert again["refunds_under_way_are_held"].ok


async def test_it_goes_to_what_is_new_by_its_key(own_bank: Bank, keeper: Connection) -> None:
    """However many accounts have something new: a minute's audit must never go over all of the book."""
    for number in range(5):
        account, _ = await own_bank.open_account(100)
        payment = await sell(own_bank, account.id, bonus=number)
        await own_bank.owner.execute(REFUND.replace("re_1", f"re_{number}"), payment)
    await own_bank.owner.execute("ANALYZE")
    async with own_bank.owner.transaction():
        await own_bank.owner.fetch("SELECT * FROM farebox.judged_orders_since(farebox.audit_steps(100))")
        scanned = await own_bank.owner.fetch(
            "SELECT relname FROM pg_stat_xact_user_tables WHERE schemaname = 'farebox' AND seq_scan > 0"
        )
    assert {row["relname"] for row in scanned} <= {"accounts", "audit_marks"}


async def test_a_corrected_provisional_end_is_right(own_bank: Bank, keeper: Connection) -> None:
    _, key = await own_bank.open_account(1_000)
    row, _ = await own_bank.reserve(key, 100)
    await own_bank.holds.heartbeat(own_bank.worker_id, [Mark(row.hold_id, Usage(output=30))])
    await own_bank.lapse()
    await own_bank.expire()
    assert await broken(keeper) == set()
    await own_bank.holds.start_worker(own_bank.worker_id, "host", "0.1")
    await own_bank.finalize(row, 2_000)
    await own_bank.control.reverse(row.hold_id, 5, reference=None, actor="test", reason=None)
    assert await broken(keeper) == set()
    await own_bank.control.reverse(row.hold_id, 5, reference="again", actor="test", reason=None)
    assert await broken(keeper) == set(), "its first reversal lies behind the mark"


async def test_two_at_once_are_one(own_bank: Bank, keeper: Connection) -> None:
    await lively(own_bank)
    other = await connect(own_bank.database.app, Role.CONTROL)
    async with other.transaction(isolation="repeatable_read"):
        assert await other.fetch("SELECT * FROM farebox.audit_since_last(1000)")
        assert await audit_since_last(keeper) == []
    assert await found(keeper)
    # One whose snapshot is older than what another has done meanwhile is told so.
    async with keeper.transaction(isolation="repeatable_read"):
        await keeper.fetchval("SELECT 1")
        await audit_since_last(other)
        with pytest.raises(LedgerUnavailable):
            await audit_since_last(keeper)
    await other.close()


async def test_under_another_isolation_it_refuses(own_bank: Bank, keeper: Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="REPEATABLE READ"):
        await keeper.fetch("SELECT * FROM farebox.audit_since_last(1)")


async def test_beside_writers_there_is_no_false_alarm(own_bank: Bank, keeper: Connection) -> None:
    opened = [await own_bank.open_account(100_000) for _ in range(4)]
    stop = asyncio.Event()

    async def write(key: ApiKey) -> None:
        while not stop.is_set():
            row, reserved = await own_bank.reserve(key, 20)
            if reserved.granted:
                await own_bank.finalize(row, 3)

    writers = [asyncio.create_task(write(key)) for _, key in opened for _ in range(3)]
    for _ in range(30):
        assert await broken(keeper) == set()
    stop.set()
    await asyncio.gather(*writers)
    assert await broken(keeper) == set()
    assert (await book_state(keeper)).unaudited == 0


async def test_the_bookkeeper_seals_and_audits_by_itself_and_says_what_is_wrong(own_bank: Bank) -> None:
    """Two of them, as two servers have; a backlog, then a look at what somebody has altered."""
    await lively(own_bank)
    seen: asyncio.Queue[tuple[int, int, set[str]]] = asyncio.Queue()
    keepers = [
        Bookkeeper(
            own_bank.database.app,
            observe=lambda state, checks: seen.put_nowait(
                (state.unsealed, state.unaudited, {check.name for check in checks})
            ),
            seal_seconds=0.05,
            audit_seconds=0.05,
        )
        for _ in range(2)
    ]
    for one in keepers:
        one.start()
    async with asyncio.timeout(30):
        while await seen.get() != (0, 0, set()):
            pass
        superuser = await asyncpg.connect(own_bank.database.superuser)
        await superuser.execute("SET session_replication_role = replica; UPDATE farebox.accounts SET held = held + 1")
        while (await seen.get())[2] != {"held_is_the_sum_of_open_holds"}:
            pass
        await superuser.execute("UPDATE farebox.accounts SET held = held - 1")
        await superuser.close()
        while await seen.get() != (0, 0, set()):
            pass
    for one in keepers:
        await one.stop()
    control = await connect(own_bank.database.app, Role.CONTROL)
    assert [check for check in await audit(control) if not check.ok] == []
    assert await seal(control) == 0
    await control.close()
