"""The journal before a real ledger: what waits is carried out by whoever comes next, once, and in no other database."""

import asyncio
import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from proxy.ledger.audit import audit
from proxy.ledger.batch import BatchedLedger, BatchLimits, LedgerStopped, RowRejected
from proxy.ledger.errors import JournalFull
from proxy.ledger.journal import JournalLimits
from proxy.ledger.journal_files import DAMAGED, DONE, OPEN, REJECTED, JournalDirectory, JournalFile
from proxy.ledger.journaled import JournaledLedger
from proxy.ledger.lines import lines_to
from proxy.ledger.records import FinalizeOutcome, Reserve
from proxy.ledger.takeover import Takeover, repeat
from tests.ledger.bank import BODY, Bank, open_bank
from tests.ledger.journals import Desk, Figures, a_release, contents_of, opened, until
from tests.postgres import Database

ROOT = Path(__file__).parents[2]
PATIENT = BatchLimits(reserve_seconds=60.0)


@asynccontextmanager
async def batched(bank: Bank, *, stop_seconds: float = 10.0) -> AsyncIterator[BatchedLedger]:
    ledger = BatchedLedger(lines_to(bank.database.app), limits=PATIENT)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.stop(stop_seconds)


@dataclass
class Scan:
    """A takeover, scanned by hand."""

    takeover: Takeover
    figures: Figures

    async def __call__(self) -> list[Any]:
        return await self.takeover.scan()


@asynccontextmanager
async def scanning(bank: Bank, path: Path) -> AsyncIterator[Scan]:
    async with batched(bank) as ledger:
        figures = Figures()
        yield Scan(
            Takeover(JournalDirectory(path), ledger, bank.holds, watch=figures, keep_seconds=100, kept_bytes_max=10**9),
            figures,
        )


async def left_behind(bank: Bank, path: Path, rows: list[Any]) -> Path:
    """A journal of a process that died with these rows durable."""
    async with opened(path, ledger_id=await bank.holds.ledger_id()) as desk:
        for row in rows:
            desk.write(row)
        await desk.written(len(rows))
    [left] = desk.files(OPEN)
    return left


async def audited(database: Database) -> None:
    connection = await asyncpg.connect(database.owner)
    try:
        assert [check for check in await audit(connection) if not check.ok] == []
    finally:
        await connection.close()


# The ledger with a journal before it.


@asynccontextmanager
async def journaled(
    bank: Bank, path: Path, *, limits: JournalLimits | None = None, stop_seconds: float = 10.0
) -> AsyncIterator[tuple[JournaledLedger, Desk]]:
    async with (
        opened(path, ledger_id=await bank.holds.ledger_id(), limits=limits) as desk,
        batched(bank, stop_seconds=stop_seconds) as ledger,
    ):
        yield JournaledLedger(ledger, desk.journal), desk


async def test_a_charge_is_durable_then_booked_then_marked_done(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    async with journaled(bank, tmp_path) as (ledger, desk):
        row = bank.a_reserve(key, 100)
        await ledger.reserve(row)
        other = bank.a_reserve(key, 100)
        await ledger.reserve(other)
        charged = ledger.finalize(bank.a_finalize(row, 30))
        released = ledger.release(other.hold_id, other.account_id, other.worker_id)
        assert (await charged).outcome is FinalizeOutcome.FINAL
        assert (await released).released == 100
        assert desk.journal.waiting == 0
    [path] = desk.files()
    assert path.suffix == DONE
    assert [row.row.hold_id for row in contents_of(path).rows] == [row.hold_id, other.hold_id]
    assert await bank.money(account.id) == (970, 0, 0)


async def test_what_the_ledger_did_not_answer_before_the_stop_waits_in_the_journal(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    blocker = await asyncpg.connect(bank.database.owner)
    transaction = blocker.transaction()
    row = bank.a_reserve(key, 100)
    await bank.holds.reserve(row)
    async with journaled(bank, tmp_path, stop_seconds=0.3) as (ledger, desk):
        await transaction.start()
        await blocker.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", account.id)
        charged = ledger.finalize(bank.a_finalize(row, 30))
    with pytest.raises(LedgerStopped):
        await charged
    await transaction.rollback()
    await blocker.close()
    assert [path.suffix for path in desk.files()] == [OPEN]
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
        assert (outcome.rows, outcome.rejected, outcome.left) == (1, 0, None)
        assert await scan() == []
    [path] = desk.files()
    assert path.suffix == DONE
    assert contents_of(path).waiting == []
    assert await bank.money(account.id) == (970, 0, 0)
    assert scan.figures.replayed == 1


async def test_a_full_journal_holds_nothing_new_and_settles_what_is_held(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(100_000)
    blocker = await asyncpg.connect(bank.database.owner)
    async with journaled(bank, tmp_path, limits=JournalLimits(bytes_max=16 * 1024)) as (ledger, desk):
        rows = [bank.a_reserve(key, 10) for _ in range(60)]
        for row in rows:
            await ledger.reserve(row)
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", account.id)
        charged = [ledger.finalize(bank.a_finalize(row, 7)) for row in rows]
        await until(lambda: desk.journal.refusal is not None)
        with pytest.raises(JournalFull, match="full"):
            await ledger.reserve(bank.a_reserve(key, 10))
        await transaction.rollback()
        assert {(await one).charge for one in charged} == {7}
        await until(lambda: desk.journal.refusal is None)
        assert (await ledger.reserve(bank.a_reserve(key, 10))).granted == 10
    await blocker.close()
    assert await bank.money(account.id) == (100_000 - 420, 10, 0)


async def test_a_row_that_the_ledger_rejects_is_put_aside_once(bank: Bank, tmp_path: Path) -> None:
    _, key = await bank.open_account(1_000)
    row = bank.a_reserve(key, 100)
    await bank.holds.reserve(row)
    poison = bank.a_finalize(row, 10)
    object.__setattr__(poison, "receipt", "\0")
    stranger = replace(bank.a_finalize(bank.a_reserve(key, 1), 10), account_id=uuid4())
    async with journaled(bank, tmp_path) as (ledger, desk):
        with pytest.raises(RowRejected):
            await ledger.finalize(poison)
        assert (await ledger.finalize(stranger)).outcome is FinalizeOutcome.UNKNOWN
    [path] = desk.files()
    assert path.suffix == REJECTED
    assert len(contents_of(path).rejected) == 2
    assert desk.figures.rejected == 2
    async with scanning(bank, tmp_path) as scan:
        assert await scan() == [], "it is nobody's to try again"


async def test_answers_for_a_caller_that_is_gone_are_still_marked(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    async with journaled(bank, tmp_path) as (ledger, desk):
        row = bank.a_reserve(key, 100)
        await ledger.reserve(row)
        ledger.finalize(bank.a_finalize(row, 30)).cancel()
        await until(lambda: not desk.journal.waiting)
    assert await bank.money(account.id) == (970, 0, 0)


# Journals of the dead.


async def test_a_charge_survives_a_lost_reserve_and_an_older_database(own_bank: Bank, tmp_path: Path) -> None:
    """Neither the hold nor the price version is known any more: the row and its file say all that is needed."""
    bank = own_bank
    account, key = await bank.open_account(1_000)
    body = BODY.replace('"m"', '"n"')
    row = bank.a_finalize(bank.a_reserve(key, 100), 30)
    version = hashlib.sha256(body.encode()).hexdigest()
    async with opened(tmp_path, ledger_id=await bank.holds.ledger_id(), price_body={version: body}.get) as desk:
        desk.write(replace(row, price_version=version, model="n"))
        await desk.written(1)
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
    assert outcome.rows == 1
    assert await bank.money(account.id) == (970, 0, 0)
    assert await bank.owner.fetchval("SELECT body FROM farebox.price_versions WHERE version = $1", version) == body
    await audited(bank.database)


async def test_a_provisional_charge_is_trued_up_by_the_journal(own_bank: Bank, tmp_path: Path) -> None:
    bank = own_bank
    account, key = await bank.open_account(1_000)
    kept, given_back = bank.a_reserve(key, 100), bank.a_reserve(key, 100)
    for row in (kept, given_back):
        await bank.holds.reserve(row)
    await bank.lapse()
    assert len(await bank.expire()) == 2
    await left_behind(
        bank,
        tmp_path,
        [
            bank.a_finalize(kept, 30),
            replace(a_release(), hold_id=given_back.hold_id, account_id=account.id, worker_id=bank.worker_id),
        ],
    )
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
    assert (outcome.rows, outcome.rejected) == (2, 0)
    assert await bank.money(account.id) == (970, 0, 0)
    await audited(bank.database)


async def test_two_that_find_one_journal_carry_it_out_once(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(100_000)
    rows: list[Reserve] = [bank.a_reserve(key, 10) for _ in range(300)]
    for row in rows:
        await bank.holds.reserve(row)
    left = await left_behind(bank, tmp_path, [bank.a_finalize(row, 7) for row in rows])
    async with scanning(bank, tmp_path) as first, scanning(bank, tmp_path) as second:
        outcomes = await asyncio.gather(first(), second())
        assert sorted(len(outcome) for outcome in outcomes) == [0, 1]
        # And were the lock no lock (a copied directory, a network file system), the ledger's ids would make it once.
        done = left.with_suffix(DONE)
        copies = [tmp_path / "a" / left.name, tmp_path / "b" / left.name]
        for copy in copies:
            copy.parent.mkdir()
            copy.write_bytes(done.read_bytes())
        async with batched(bank) as one, batched(bank) as other:
            repeated = await asyncio.gather(
                *(
                    repeat(JournalDirectory(copy.parent), copy, ledger, bank.holds, Figures())
                    for copy, ledger in zip(copies, (one, other), strict=True)
                )
            )
        assert [outcome.rows for outcome in repeated] == [300, 300]
    assert await bank.money(account.id) == (100_000 - 2_100, 0, 0)
    assert len(await bank.book(account.id)) == 301


async def test_another_databases_journal_is_left_alone(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    async with opened(tmp_path, ledger_id=uuid4()) as desk:
        desk.write(bank.a_finalize(bank.a_reserve(key, 100), 30))
        await desk.written(1)
    before = desk.files(OPEN)[0].read_bytes()
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
        assert "another database" in str(outcome.left)
    assert desk.files() == desk.files(OPEN)
    assert desk.files(OPEN)[0].read_bytes() == before
    assert await bank.money(account.id) == (1_000, 0, 0)


async def test_a_ledgers_name_is_its_own_and_stays(database: Database, bank: Bank) -> None:
    async with open_bank(database, size=1) as another:
        assert await another.holds.ledger_id() != await bank.holds.ledger_id()
        assert await another.holds.ledger_id() == await another.holds.ledger_id()


async def test_damage_in_the_middle_costs_its_row_alone_and_is_kept(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    rows = [bank.a_reserve(key, 100) for _ in range(3)]
    for row in rows:
        await bank.holds.reserve(row)
    left = await left_behind(bank, tmp_path, [bank.a_finalize(row, 10) for row in rows])
    data = bytearray(left.read_bytes())
    place = data.index(rows[1].hold_id.hex.encode())
    data[place] ^= 1
    left.write_bytes(data)
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
        assert (outcome.rows, outcome.rejected) == (2, 0)
        assert scan.figures.damaged == 1
        assert await scan() == []
    [path] = JournalDirectory(tmp_path).files()
    assert path.ending == DAMAGED
    assert data[place : place + 32] in path.path.read_bytes()
    assert await bank.money(account.id) == (980, 100, 0)


async def test_a_torn_tail_is_no_damage(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    rows = [bank.a_reserve(key, 100) for _ in range(2)]
    left = await left_behind(bank, tmp_path, [bank.a_finalize(row, 10) for row in rows])
    left.write_bytes(left.read_bytes()[: contents_of(left).end - 5])
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
        assert (outcome.rows, scan.figures.damaged) == (1, 0)
    [path] = JournalDirectory(tmp_path).files()
    assert path.ending == DONE
    assert await bank.money(account.id) == (990, 0, 0)


async def test_a_rejected_row_of_an_orphan_is_put_aside_and_can_be_repeated(bank: Bank, tmp_path: Path) -> None:
    _, key = await bank.open_account(1_000)
    stranger = replace(bank.a_finalize(bank.a_reserve(key, 1), 10), account_id=uuid4())
    good = bank.a_finalize(bank.a_reserve(key, 1), 10)
    await left_behind(bank, tmp_path, [stranger, good])
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
        assert (outcome.rows, outcome.rejected) == (1, 1)
        assert await scan() == []
    [path] = JournalDirectory(tmp_path).files(REJECTED)
    async with batched(bank) as ledger:
        again = await repeat(JournalDirectory(tmp_path), path.path, ledger, bank.holds, Figures())
        assert (again.rows, again.rejected) == (1, 1)
        # The account has come back, as with a restored backup.
        await bank.owner.execute("SELECT farebox.create_account($1, 'back', NULL, NULL)", stranger.account_id)
        again = await repeat(JournalDirectory(tmp_path), path.path, ledger, bank.holds, Figures())
        assert (again.rows, again.rejected) == (2, 0)
    [path] = JournalDirectory(tmp_path).files()
    assert path.ending == DONE


async def test_what_was_done_can_be_repeated_into_a_ledger_that_forgot(own_bank: Bank, tmp_path: Path) -> None:
    """Also while the journal's own worker goes on writing it."""
    bank = own_bank
    account, key = await bank.open_account(1_000)
    async with journaled(bank, tmp_path) as (ledger, desk):
        row = bank.a_reserve(key, 100)
        await ledger.reserve(row)
        await ledger.finalize(bank.a_finalize(row, 30))
        superuser = await asyncpg.connect(bank.database.superuser)
        await superuser.execute(
            """
            SET session_replication_role = replica;
            DELETE FROM farebox.holds; DELETE FROM farebox.transfers WHERE kind = 'charge';
            UPDATE farebox.accounts SET balance = 1000, held = 0, version = 1;
            """
        )
        await superuser.close()
        assert await bank.money(account.id) == (1_000, 0, 0)
        [path] = desk.files(OPEN)
        async with batched(bank) as other:
            outcome = await repeat(desk.directory, path, other, bank.holds, Figures())
        assert (outcome.rows, outcome.left) == (1, None)
        assert desk.files() == [path]
    assert await bank.money(account.id) == (970, 0, 0)
    await audited(bank.database)


async def test_a_journal_that_cannot_be_opened_keeps_none_behind_it_waiting(bank: Bank, tmp_path: Path) -> None:
    """Such as one that another user of this machine has left there."""
    account, key = await bank.open_account(1_000)
    row = bank.a_reserve(key, 100)
    await bank.holds.reserve(row)
    await left_behind(bank, tmp_path, [bank.a_finalize(row, 42)])
    unopenable = tmp_path / "old.open"
    unopenable.mkdir()
    os.utime(unopenable, (0, 0))
    async with scanning(bank, tmp_path) as scan:
        unread, outcome = await scan()
        assert "Is a directory" in (unread.left or "")
        assert (outcome.rows, outcome.left) == (1, None)
    async with batched(bank) as ledger:
        again = await repeat(JournalDirectory(tmp_path), unopenable, ledger, bank.holds, Figures())
    assert "Is a directory" in (again.left or "")
    assert await bank.money(account.id) == (958, 0, 0)


async def test_a_journal_that_fails_keeps_none_behind_it_waiting(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account, key = await bank.open_account(1_000)
    row = bank.a_reserve(key, 100)
    await bank.holds.reserve(row)
    bad = await left_behind(bank, tmp_path, [bank.a_finalize(bank.a_reserve(key, 1), 1)])
    os.utime(bad, (0, 0))
    async with opened(tmp_path, ledger_id=await bank.holds.ledger_id()) as desk:
        desk.write(bank.a_finalize(row, 42))
        await desk.written(1)
    read = JournalFile.read

    def failing(file: JournalFile) -> bytes:
        if file.path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(file)

    monkeypatch.setattr(JournalFile, "read", failing)
    async with scanning(bank, tmp_path) as scan:
        unread, outcome = await scan()
        assert "Input/output error" in (unread.left or "")
        assert (outcome.rows, outcome.left) == (1, None)
    assert await bank.money(account.id) == (958, 0, 0)
    assert bad.exists()


async def test_a_row_that_no_ledger_would_take_is_kept_even_if_it_is_alone(bank: Bank, tmp_path: Path) -> None:
    _, key = await bank.open_account(1_000)
    row = bank.a_finalize(bank.a_reserve(key, 1), 1)
    object.__setattr__(row, "charge", -1)
    await left_behind(bank, tmp_path, [row])
    async with scanning(bank, tmp_path) as scan:
        await scan()
        assert scan.figures.rejected == 1
    [kept] = JournalDirectory(tmp_path).files()
    assert kept.ending == REJECTED
    assert "-1 microcredits" in contents_of(kept.path).rejected[1]


async def test_an_orphan_without_rows_leaves_nothing(bank: Bank, tmp_path: Path) -> None:
    directory = JournalDirectory(tmp_path)
    directory.create(uuid4(), 1, b"", 4096).close()
    async with scanning(bank, tmp_path) as scan:
        await scan()
    assert directory.files() == []


DIE = """
import asyncio, os, pickle, signal, sys
from pathlib import Path
from uuid import UUID
from tests.ledger.journals import opened

async def main():
    rows = pickle.loads(sys.stdin.buffer.read())
    async with opened(Path(sys.argv[1]), ledger_id=UUID(sys.argv[2])) as desk:
        for row in rows:
            desk.write(row)
        await desk.written(len(rows))
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_killed_process_leaves_its_rows_to_the_next(bank: Bank, tmp_path: Path) -> None:
    account, key = await bank.open_account(1_000)
    row = bank.a_reserve(key, 100)
    await bank.holds.reserve(row)
    command = [sys.executable, "-c", DIE, str(tmp_path), str(await bank.holds.ledger_id())]
    dead = await asyncio.to_thread(
        subprocess.run, command, input=pickle.dumps([bank.a_finalize(row, 42)]), cwd=ROOT, timeout=60
    )
    assert dead.returncode == -signal.SIGKILL
    async with scanning(bank, tmp_path) as scan:
        [outcome] = await scan()
    assert (outcome.rows, outcome.rejected) == (1, 0)
    assert await bank.money(account.id) == (958, 0, 0)


async def test_the_loop_scans_by_itself_and_prunes(bank: Bank, tmp_path: Path) -> None:
    _, key = await bank.open_account(1_000)
    await left_behind(bank, tmp_path, [bank.a_finalize(bank.a_reserve(key, 1), 1)])
    old = tmp_path / "old.done"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    async with batched(bank) as ledger:
        figures = Figures()
        takeover = Takeover(
            *(JournalDirectory(tmp_path), ledger, bank.holds),
            watch=figures,
            keep_seconds=100,
            kept_bytes_max=10**9,
            scan_seconds=0.05,
        )
        takeover.start()
        await until(lambda: figures.replayed and not old.exists())
        await takeover.stop()
    assert len(JournalDirectory(tmp_path).files(DONE)) == 1
