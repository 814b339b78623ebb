"""`farebox journal`: what is listed, and what a replay does to a ledger that has forgotten or never knew."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.ledger.connect import Role, connect
from proxy.ledger.holds import HoldLedger
from proxy.ledger.journal_files import DONE, OPEN, REJECTED, JournalDirectory
from proxy.ledger.records import Finalize
from tests.cli.conftest import Farebox
from tests.ledger.bank import open_bank
from tests.ledger.journals import contents_of, opened
from tests.postgres import Database


@pytest.fixture
def directory(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    environment.setenv("FAREBOX_JOURNAL_DIR", str(tmp_path / "journal"))
    return tmp_path / "journal"


def left_behind(directory: Path, rows: list[Finalize], ledger_id: UUID, *, done: bool = False) -> Path:
    """A journal of a process that died, or ended, with these rows in it."""

    async def write() -> Path:
        async with opened(directory, ledger_id=ledger_id) as desk:
            for row in rows:
                desk.write(row)
            for entry in await desk.written(len(rows)):
                if done:
                    desk.journal.done(entry)
        return desk.files(DONE if done else OPEN)[-1]

    return asyncio.run(write())


def a_charge(database: Database, charge: int) -> tuple[Finalize, UUID]:
    """A call's end that the database hasn't heard of, by an account that it knows; and the ledger's id."""

    async def make() -> tuple[Finalize, UUID]:
        async with open_bank(database, size=1) as bank:
            _, key = await bank.open_account(1_000)
            return bank.a_finalize(bank.a_reserve(key, 100), charge), await bank.holds.ledger_id()

    return asyncio.run(make())


def balance(farebox: Farebox, row: Finalize) -> Any:
    return farebox("accounts", "show", str(row.account_id), "--json").json["balance"]


def test_nothing_is_listed_where_nothing_is(bare: Farebox, directory: Path) -> None:
    assert bare("journal", "list", "--json").json["data"] == []
    ran = bare("journal", "list")
    assert (ran.code, ran.out) == (0, f"No journals in {directory}.\n")
    assert not directory.exists()


def test_a_list_says_whose_they_are_and_what_waits(bare: Farebox, directory: Path, module_database: Database) -> None:
    row, ledger_id = a_charge(module_database, 30)
    path = left_behind(directory, [row], ledger_id)
    [listed] = bare("journal", "list", "--json").json["data"]
    assert (listed["file"], listed["state"], listed["ledger"]) == (path.name, "waiting", str(ledger_id))
    assert (listed["rows"], listed["waiting"], listed["rejected"], listed["problem"]) == (1, 1, 0, None)
    held = JournalDirectory(directory).take(path)
    assert held is not None
    assert bare("journal", "list", "--json").json["data"][0]["state"] == "live"
    held.close()
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    ran = bare("journal", "list")
    assert ran.code == 0
    assert "can't be read" in ran.out
    assert path.read_bytes() == data


def test_a_replay_charges_what_the_database_does_not_know_once(
    farebox: Farebox, directory: Path, module_database: Database
) -> None:
    row, ledger_id = a_charge(module_database, 30)
    path = left_behind(directory, [row], ledger_id, done=True)
    for _ in range(2):
        ran = farebox("journal", "replay", "--json")
        assert (ran.code, ran.json["data"]) == (0, [{"file": path.name, "rows": 1, "rejected": 0, "left": None}])
        assert balance(farebox, row) == "0.00097"
    assert [file.path for file in JournalDirectory(directory).files()] == [path]


def test_a_replay_takes_what_waits_too(farebox: Farebox, directory: Path, module_database: Database) -> None:
    row, ledger_id = a_charge(module_database, 30)
    path = left_behind(directory, [row], ledger_id)
    assert farebox("journal", "replay").code == 0
    assert balance(farebox, row) == "0.00097"
    assert contents_of(path.with_suffix(DONE)).waiting == []


def test_another_directory_can_be_named(farebox: Farebox, tmp_path: Path, module_database: Database) -> None:
    row, ledger_id = a_charge(module_database, 30)
    left_behind(tmp_path / "old machine", [row], ledger_id)
    assert farebox("journal", "replay", "--directory", str(tmp_path / "old machine")).code == 0
    assert balance(farebox, row) == "0.00097"


def test_another_databases_journal_is_left_and_said(
    farebox: Farebox, directory: Path, module_database: Database
) -> None:
    row, _ = a_charge(module_database, 30)
    path = left_behind(directory, [row], uuid4())
    ran = farebox("journal", "replay")
    assert ran.code == 1
    assert "another database" in ran.out
    assert path.exists()
    assert balance(farebox, row) == "0.001"


def test_a_row_that_is_rejected_fails_the_command(farebox: Farebox, directory: Path, module_database: Database) -> None:
    row, ledger_id = a_charge(module_database, 30)
    object.__setattr__(row, "account_id", uuid4())
    left_behind(directory, [row], ledger_id)
    ran = farebox("journal", "replay", "--json")
    assert (ran.code, ran.json["data"][0]["rejected"]) == (1, 1)
    [kept] = JournalDirectory(directory).files()
    assert kept.ending == REJECTED


@pytest.mark.parametrize("command", ["list", "replay"])
def test_without_a_journal_the_command_says_so(farebox: Farebox, environment: pytest.MonkeyPatch, command: str) -> None:
    environment.setenv("FAREBOX_JOURNAL_DIR", "off")
    ran = farebox("journal", command)
    assert ran.code == 1
    assert "FAREBOX_JOURNAL_DIR" in ran.err


def test_the_login_of_the_gateway_can_name_the_ledger(module_database: Database) -> None:
    async def name() -> UUID:
        connection = await connect(module_database.app, Role.GATEWAY)
        try:
            return await HoldLedger(connection).ledger_id()
        finally:
            await connection.close()

    assert asyncio.run(name()) == asyncio.run(name())
