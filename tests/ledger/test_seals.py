"""Seals: whatever is altered, removed or slipped in under them shows; writers neither wait for them nor upset them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.core.usage import Usage
from proxy.ledger.audit import SealHead, audit, book_state, seal_heads
from proxy.ledger.bookkeeper import seal
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.records import ApiKey, Mark
from tests.ledger.bank import Bank
from tests.ledger.crowd import fill

TRANSFERS, HOLDS, CHAIN = (
    "sealed_transfers_are_as_they_were",
    "sealed_holds_are_as_they_were",
    "seals_chain_from_block_to_block",
)


async def broken(connection: Connection, kept: Sequence[SealHead] = ()) -> set[str]:
    return {check.name for check in await audit(connection, kept=kept) if not check.ok}


@pytest.fixture
async def keeper(own_bank: Bank) -> AsyncIterator[Connection]:
    """A connection that may seal and audit."""
    connection = await connect(own_bank.database.app, Role.CONTROL, statement_seconds=60)
    yield connection
    await connection.close()


async def seal_all(keeper: Connection, rows: int = 1000) -> int:
    """Until nothing is left; how much it was."""
    total = 0
    while sealed := await seal(keeper, rows=rows):
        total += sealed
    return total


async def busy(bank: Bank, text: str = "why, čau") -> ApiKey:
    """An account with a transfer of every kind, an ended hold of every sort, and no column NULL that needn't be."""
    _, key = await bank.open_account(1_000, spend_limit=1_000_000)
    trued_up, capped, left, overrun = [(await bank.reserve(key, 100))[0] for _ in range(4)]
    await bank.holds.heartbeat(bank.worker_id, [Mark(left.hold_id, Usage(output=30)), Mark(capped.hold_id, Usage())])
    await bank.finalize(capped, 150, usage_source="counted")
    await bank.holds.heartbeat(bank.worker_id, [Mark(left.hold_id, Usage(output=30))])
    await bank.lapse()
    await bank.expire()
    await bank.holds.start_worker(bank.worker_id, "host", "0.1")
    await bank.finalize(trued_up, 40)
    await bank.finalize(overrun, 2_000)
    await bank.control.reverse(overrun.hold_id, 300, reference=uuid4().hex, actor="test", reason=text)
    await bank.control.grant(key.account_id, 5_000, reference=uuid4().hex, actor="test", reason=text)
    await bank.release((await bank.reserve(key, 10))[0])
    await bank.reserve(key, 10)
    return key


async def tampered(bank: Bank, *statements: str) -> set[str]:
    """What the audit says after a superuser has got past triggers and constraints; nothing of it stays."""
    superuser = await asyncpg.connect(bank.database.superuser)
    try:
        transaction = superuser.transaction()
        await transaction.start()
        await superuser.execute("SET LOCAL session_replication_role = replica")
        for table in ("transfers", "holds", "seals"):
            for name in await superuser.fetch(
                "SELECT conname FROM pg_constraint WHERE conrelid = $1::regclass AND contype = 'c'", f"farebox.{table}"
            ):
                await superuser.execute(f'ALTER TABLE farebox.{table} DROP CONSTRAINT "{name["conname"]}"')
        for statement in statements:
            changed = await superuser.execute(statement)
            assert not changed.endswith(" 0"), statement
        rows = await superuser.fetch("SELECT * FROM farebox.audit()")
        await transaction.rollback()
        return {row["name"] for row in rows if row["violations"]}
    finally:
        await superuser.close()


async def columns(connection: Connection, table: str) -> dict[str, str]:
    rows = await connection.fetch(
        "SELECT attname, atttypid::regtype::text AS type FROM pg_attribute"
        " WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped",
        f"farebox.{table}",
    )
    return {row["attname"]: row["type"] for row in rows}


OTHER = {
    "uuid": "gen_random_uuid()",
    "bigint": "coalesce({0}, 0) + 1",
    "text": "coalesce({0}, '') || 'x'",
    "bytea": "coalesce({0}, '') || '\\x00'",
    "bigint[]": "ARRAY[9, 9, 9, 9, 9, 9, 9]",
    "uuid[]": "{0} || gen_random_uuid()",
    "bytea[]": "{0} || '\\x00'::bytea",
    "timestamp with time zone": "coalesce({0}, now()) + interval '1 microsecond'",
}


async def test_every_column_of_a_sealed_transfer_is_under_the_seal(own_bank: Bank, keeper: Connection) -> None:
    key = await busy(own_bank)
    await seal_all(keeper)
    assert await broken(keeper) == set()
    for column, type_ in (await columns(own_bank.owner, "transfers")).items():
        for version in (1, 4):
            row = f"account_id = '{key.account_id}' AND version = {version}"
            if column == "version":
                changed = f"UPDATE farebox.transfers SET version = 1000 WHERE {row}"
            else:
                changed = f"UPDATE farebox.transfers SET {column} = {OTHER[type_].format(column)} WHERE {row}"
            assert TRANSFERS in await tampered(own_bank, changed), column
            if column in ("hold_id", "reference", "actor", "reason"):
                emptied = f"UPDATE farebox.transfers SET {column} = ''::text::{type_} WHERE {row} AND {column} IS NULL"
                if type_ == "text" and version == 4:
                    assert TRANSFERS in await tampered(own_bank, emptied), f"{column}: NULL is not an empty text"


@pytest.mark.parametrize("ending", ["state = 'final' AND charge > 0", "state = 'released'", "state = 'provisional'"])
async def test_every_column_of_a_sealed_ended_hold_is_under_the_seal(
    own_bank: Bank, keeper: Connection, ending: str
) -> None:
    await busy(own_bank)
    await seal_all(keeper)
    one = f"id = (SELECT id FROM farebox.holds WHERE {ending} ORDER BY id LIMIT 1)"
    for column, type_ in (await columns(own_bank.owner, "holds")).items():
        found = await tampered(
            own_bank, f"UPDATE farebox.holds SET {column} = {OTHER[type_].format(column)} WHERE {one}"
        )
        # What was given back is the sum of the reversals, which are under the seal.
        expected = HOLDS if column != "reversed" else "every_hold_was_charged_what_its_transfers_say"
        assert expected in found, column


async def test_every_column_of_a_seal_is_under_the_chain(own_bank: Bank, keeper: Connection) -> None:
    key = await busy(own_bank)
    await seal_all(keeper)
    await own_bank.control.grant(key.account_id, 5, reference="later", actor="test")
    await seal_all(keeper)
    row = f"account_id = '{key.account_id}' AND number = 1"
    for column, type_ in (await columns(own_bank.owner, "seals")).items():
        other = "1000" if column == "number" else OTHER[type_].format(column)
        found = await tampered(own_bank, f"UPDATE farebox.seals SET {column} = {other} WHERE {row}")
        assert CHAIN in found, column


async def test_what_is_removed_or_slipped_in_shows(own_bank: Bank, keeper: Connection) -> None:
    key = await busy(own_bank)
    await seal_all(keeper)
    of = f"WHERE account_id = '{key.account_id}' AND version = 3"
    assert TRANSFERS in await tampered(own_bank, f"DELETE FROM farebox.transfers {of}")
    copied = (
        "account_id, {0}, kind, account_side, system_account, amount, balance_after, debt_after, hold_id, NULL, actor"
    )
    insert = f"INSERT INTO farebox.transfers SELECT {copied}, reason, created_at FROM farebox.transfers {of}"
    drop = "DROP INDEX farebox.transfers_once_a_hold"
    for version in ("0", "-5", "1000"):
        found = await tampered(own_bank, drop, insert.format(version).replace("NULL, actor", "NULL, 'x'"))
        assert found & {"every_transfer_has_its_place", "versions_are_gapless"}, version
    assert HOLDS in await tampered(own_bank, "DELETE FROM farebox.holds WHERE state = 'released'")
    await own_bank.control.grant(key.account_id, 5, reference="later", actor="test")
    await seal_all(keeper)
    assert CHAIN in await tampered(
        own_bank, f"DELETE FROM farebox.seals WHERE account_id = '{key.account_id}' AND number = 1"
    )


async def test_seals_that_were_made_anew_are_seen_by_heads_kept_elsewhere(own_bank: Bank, keeper: Connection) -> None:
    key = await busy(own_bank)
    await seal_all(keeper)
    kept = await seal_heads(keeper)
    assert await broken(keeper, kept) == set()
    await own_bank.control.grant(key.account_id, 5, reference="later", actor="test")
    await seal_all(keeper)
    assert await broken(keeper, kept) == set(), "what came since is no difference"
    superuser = await asyncpg.connect(own_bank.database.superuser)
    await superuser.execute(
        "SET session_replication_role = replica;"
        "UPDATE farebox.transfers SET reason = 'another' WHERE kind = 'grant' AND version > 1;"
        "DELETE FROM farebox.seals; UPDATE farebox.sealing SET holds_to = '-infinity'"
    )
    await superuser.close()
    await seal_all(keeper)
    assert await broken(keeper) == set(), "nothing inside the database tells"
    assert await broken(keeper, kept) == {"seals_are_those_kept_elsewhere"}
    gone = SealHead(uuid4(), 1, 1, "0" * 64)
    assert await broken(keeper, [gone]) == {"seals_are_those_kept_elsewhere"}


async def test_a_true_up_and_a_reversal_are_no_tampering(own_bank: Bank, keeper: Connection) -> None:
    _, key = await own_bank.open_account(1_000)
    left, same, given_up = [(await own_bank.reserve(key, 100))[0] for _ in range(3)]
    marks = [Mark(row.hold_id, Usage(output=30)) for row in (left, same, given_up)]
    await own_bank.holds.heartbeat(own_bank.worker_id, marks)
    await own_bank.lapse()
    await own_bank.expire()
    await own_bank.holds.start_worker(own_bank.worker_id, "host", "0.1")
    assert await seal_all(keeper) == 4 + 3
    assert await broken(keeper) == set()
    await own_bank.finalize(left, 50)
    await own_bank.finalize(same, 30)
    await own_bank.release(given_up)
    assert await broken(keeper) == set()
    assert await seal_all(keeper) == 2 + 3
    await own_bank.control.reverse(left.hold_id, 10, reference=None, actor="test", reason="why")
    assert await broken(keeper) == set()
    assert await seal_all(keeper) == 1
    changed = f"UPDATE farebox.holds SET receipt = 'x' WHERE id = '{same.hold_id}'"
    assert HOLDS in await tampered(own_bank, changed), "as it ended at last, it is under a seal"
    back = f"UPDATE farebox.holds SET state = 'released' WHERE id = '{same.hold_id}'"
    assert HOLDS in await tampered(own_bank, back)


@pytest.mark.parametrize(
    "settings",
    [
        {"bytea_output": "escape", "timezone": "Asia/Tokyo", "datestyle": "German, DMY", "intervalstyle": "iso_8601"},
        {"client_encoding": "LATIN1", "extra_float_digits": "-5", "array_nulls": "off", "lc_monetary": "C"},
        {"max_parallel_workers_per_gather": "0", "enable_indexscan": "off", "work_mem": "64kB"},
    ],
)
async def test_a_seal_is_the_same_under_any_session_s_settings(
    own_bank: Bank, keeper: Connection, settings: dict[str, str]
) -> None:
    await busy(own_bank)
    odd = await asyncpg.connect(own_bank.database.app, server_settings=settings | {"role": "farebox_control"})
    try:
        await odd.fetchval("SELECT farebox.seal(1000, '0')")
        assert await broken(keeper) == set()
        await busy(own_bank)
        await seal_all(keeper)
        async with odd.transaction(isolation="repeatable_read"):
            rows = await odd.fetch("SELECT name FROM farebox.audit() WHERE violations > 0")
        assert rows == []
    finally:
        await odd.close()


async def test_an_old_ledger_is_sealed_in_bounded_steps_and_then_behind_the_writers(
    own_bank: Bank, keeper: Connection
) -> None:
    await fill(own_bank.owner, accounts=3, calls=200)
    _, key = await own_bank.open_account(100)
    steps = []
    while sealed := await seal(keeper, rows=100):
        steps.append(sealed)
    assert sum(steps) == 3 * (201 + 200) + 1
    # A step ends with the account that it is at.
    assert max(steps) <= 100 + 201 + 100
    assert (await book_state(keeper)).unsealed == 0
    assert await broken(keeper) == set()
    await own_bank.finalize((await own_bank.reserve(key, 10))[0], 3)
    assert (await book_state(keeper)).unsealed == 1
    assert await seal(keeper, pause_seconds=60) == 0, "not yet"
    assert await seal(keeper) == 2
    assert await broken(keeper) == set()


async def test_a_clock_that_was_put_back_loses_no_hold(own_bank: Bank, keeper: Connection) -> None:
    """Ends from before the clock went back lie in what is the future now; those after it are sealed all the same."""
    _, key = await own_bank.open_account(1_000)
    await own_bank.finalize((await own_bank.reserve(key, 10))[0], 3)
    superuser = await asyncpg.connect(own_bank.database.superuser)
    await superuser.execute("SET session_replication_role = replica")
    await superuser.execute("UPDATE farebox.holds SET ended_at = ended_at + interval '1 day'")
    await seal_all(keeper)
    await superuser.execute("UPDATE farebox.sealing SET holds_to = now() + interval '1 day'")
    await superuser.close()
    await own_bank.finalize((await own_bank.reserve(key, 10))[0], 3)
    assert await seal_all(keeper) == 2
    sealed = await own_bank.owner.fetchval("SELECT sum(cardinality(hold_ids)) FROM farebox.seals")
    assert sealed == 2, "each once"
    assert await broken(keeper) == set()


async def test_one_session_seals_at_a_time_and_only_under_read_committed(own_bank: Bank, keeper: Connection) -> None:
    await busy(own_bank)
    other = await connect(own_bank.database.app, Role.CONTROL)
    transaction = other.transaction()
    await transaction.start()
    assert await seal(other)
    assert await seal(keeper) is None
    await transaction.rollback()
    assert await seal(keeper)
    await other.close()
    with pytest.raises(asyncpg.PostgresError, match="READ COMMITTED"):
        async with keeper.transaction(isolation="repeatable_read"):
            await seal(keeper)


async def test_a_gap_is_not_sealed_over(own_bank: Bank, keeper: Connection) -> None:
    key = await busy(own_bank)
    superuser = await asyncpg.connect(own_bank.database.superuser)
    await superuser.execute("SET session_replication_role = replica")
    await superuser.execute("DELETE FROM farebox.transfers WHERE account_id = $1 AND version = 3", key.account_id)
    await superuser.close()
    await seal_all(keeper)
    assert await own_bank.owner.fetchval("SELECT max(last_version) FROM farebox.seals") == 0
    assert "versions_are_gapless" in await broken(keeper)


@pytest.mark.timeout(120)
async def test_sealing_beside_writers_never_leaves_out_or_upsets_anything(own_bank: Bank, keeper: Connection) -> None:
    """Forty writers, some slow to commit; sealing and auditing go on all the while."""
    opened = [await own_bank.open_account(100_000) for _ in range(4)]
    stop = asyncio.Event()

    async def write(key: ApiKey) -> None:
        while not stop.is_set():
            row, reserved = await own_bank.reserve(key, 20)
            if reserved.granted:
                await own_bank.finalize(row, 3)

    async def dawdle(account_id: UUID) -> None:
        """Takes versions early and commits late."""
        slow = await connect(own_bank.database.app, Role.CONTROL, lock_ms=30_000, statement_seconds=30)
        while not stop.is_set():
            async with slow.transaction():
                await slow.execute(
                    "SELECT farebox.grant_credits($1, 'grant', 1, $2, 'test', NULL)", account_id, uuid4().hex
                )
                await asyncio.sleep(0.05)
        await slow.close()

    writers = [asyncio.create_task(write(key)) for _, key in opened for _ in range(9)]
    writers += [asyncio.create_task(dawdle(account.id)) for account, _ in opened]
    for _ in range(25):
        await seal(keeper, rows=200)
        assert await broken(keeper) == set()
    stop.set()
    await asyncio.gather(*writers)
    await seal_all(keeper)
    assert await broken(keeper) == set()
    state = await book_state(keeper)
    assert (state.unsealed, state.transfers > 100) == (0, True)
    ended = await own_bank.owner.fetchval("SELECT count(*) FROM farebox.holds WHERE state <> 'open'")
    assert await own_bank.owner.fetchval("SELECT sum(cardinality(hold_ids)) FROM farebox.seals") == ended


async def test_a_pause_longer_than_the_work_costs_nothing(own_bank: Bank, keeper: Connection) -> None:
    await busy(own_bank)
    assert await keeper.fetchval("SELECT farebox.seal(1000, $1)", timedelta(seconds=60)), "the first needs no pause"
    await busy(own_bank)
    assert await seal(keeper, pause_seconds=60) == 0
