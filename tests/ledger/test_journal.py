"""The journal under load, on a disk that is slow, full or broken; real files throughout."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from proxy.core.usage import Usage
from proxy.ledger import journal as journal_module
from proxy.ledger.errors import JournalError
from proxy.ledger.journal import Entry, JournalLimits
from proxy.ledger.journal_files import DONE, OPEN, REJECTED, JournalFile
from proxy.ledger.journal_records import Row
from proxy.ledger.records import Finalize
from tests.ledger.journals import a_release, contents_of, opened, until

SMALL = JournalLimits(bytes_max=16 * 1024)
A_FINALIZE = Finalize(
    *(a_release().hold_id, a_release().account_id, "k", a_release().worker_id, 5, Usage(output=5), "reported"),
    *("v1", "m", "standard", "stop", "{}", b"f"),
)


@dataclass
class Disk:
    """What stands between a journal and the kernel, for a test to break."""

    syncs: int = 0
    sync_error: OSError | None = None
    write_error: OSError | None = None
    """Of the next write alone."""
    room: int | None = None
    """Bytes that may yet be written or taken ahead; None: any."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Syncs wait for it."""

    def take(self, size: int) -> None:
        if self.room is not None:
            if size > self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room -= size


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    disk.gate.set()
    sync, write_at, allocate = JournalFile.sync, JournalFile.write_at, JournalFile.allocate

    def slow_sync(file: JournalFile) -> None:
        disk.syncs += 1
        assert disk.gate.wait(30)
        if disk.sync_error is not None:
            raise disk.sync_error
        sync(file)

    def meagre_write(file: JournalFile, data: bytes, place: int) -> None:
        if disk.write_error is not None:
            error, disk.write_error = disk.write_error, None
            raise error
        disk.take(len(data))
        write_at(file, data, place)

    def meagre_allocate(file: JournalFile, size: int) -> None:
        disk.take(size)
        allocate(file, size)

    monkeypatch.setattr(JournalFile, "sync", slow_sync)
    monkeypatch.setattr(JournalFile, "write_at", meagre_write)
    monkeypatch.setattr(JournalFile, "allocate", meagre_allocate)
    yield disk
    disk.gate.set()


async def test_a_row_is_on_the_disk_before_it_is_handed_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as desk:
        rows: list[Row] = []

        def look(entry: object) -> None:
            [path] = desk.files(OPEN)
            rows.extend(row.row for row in contents_of(path).rows)

        row = a_release()
        desk.journal.write(row, look)
        assert rows == []
        await until(lambda: rows)
        assert rows == [row]


async def test_rows_that_come_during_a_sync_share_the_next(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path) as desk:
        disk.gate.clear()
        desk.write()
        await until(lambda: disk.syncs == 2)  # the head's, and the first row's
        for _ in range(50):
            desk.write()
        await asyncio.sleep(0.05)
        assert desk.handed == [], "nothing is handed on before its sync is over"
        disk.gate.set()
        await desk.written(51)
        assert desk.figures.synced == [1, 50]
        assert [entry.number for entry in desk.handed] == list(range(1, 52))


async def test_a_row_names_its_price_in_the_same_file_once(tmp_path: Path) -> None:
    async with opened(tmp_path, price_body="body of {}".format) as desk:
        for number, version in enumerate(["v1", "v2", "v1"], 1):
            desk.write(replace(A_FINALIZE, price_version=version))
            await desk.written(number)
        [path] = desk.files(OPEN)
        assert contents_of(path).prices == {"v1": "body of v1", "v2": "body of v2"}
        assert path.read_bytes().count(b"v1\n") == 1


async def test_what_is_done_is_marked_and_what_waits_stays_open(tmp_path: Path) -> None:
    async with opened(tmp_path) as desk:
        first, second = desk.write(), desk.write()
        entries = await desk.written(2)
        desk.journal.done(entries[0])
        [path] = desk.files(OPEN)
        await until(lambda: contents_of(path).done == {1})
        assert desk.journal.waiting == 1
    assert desk.files() == [path]
    assert [row.row for row in contents_of(path).rows] == [first, second]
    assert [row.row for row in contents_of(path).waiting] == [second]
    free = desk.directory.take(path)
    assert free is not None
    free.close()


async def test_a_journal_in_which_nothing_waits_ends_as_done(tmp_path: Path) -> None:
    async with opened(tmp_path) as desk:
        desk.write()
        [entry] = await desk.written(1)
        desk.journal.done(entry)
    [path] = desk.files()
    assert path.suffix == DONE
    assert path.stat().st_size < 1_000, "the room taken ahead is given back"
    assert contents_of(path).waiting == []


async def test_a_journal_without_rows_leaves_no_file(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


async def test_a_rejected_row_keeps_its_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as desk:
        desk.write()
        [entry] = await desk.written(1)
        desk.journal.rejected(entry, "no such account")
    [path] = desk.files()
    assert path.suffix == REJECTED
    assert contents_of(path).rejected == {1: "no such account"}
    assert desk.figures.rejected == 1


async def test_files_follow_each_other_under_load_and_go_when_done(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=SMALL) as desk:

        def carry_out(entry: Entry) -> None:
            desk.handed.append(entry)
            desk.journal.done(entry)

        for number in range(600):
            desk.journal.write(a_release(), carry_out)
            if number % 7 == 0:
                await asyncio.sleep(0.001)
        await desk.written(600)
        await until(lambda: desk.files(DONE) and desk.journal.size < SMALL.bytes_max)
        assert desk.journal.refusal is None
    assert desk.files(OPEN) == []
    rows = [row.number for path in desk.files(DONE) for row in contents_of(path).rows]
    assert sorted(set(rows)) == list(range(1, 601))
    assert len(desk.files(DONE)) > 5
    assert desk.figures.skipped == 0


async def test_one_row_that_waits_does_not_keep_every_file_that_it_stood_in(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=SMALL) as desk:
        stuck = desk.write()
        await desk.written(1)
        for _ in range(100):
            entries = len(desk.handed)
            for _ in range(5):
                desk.write()
            for entry in (await desk.written(entries + 5))[entries:]:
                desk.journal.done(entry)
        await until(lambda: len(desk.files(OPEN)) <= 3)
        await until(lambda: desk.journal.waiting == 1)
        assert any(path.name.endswith("-000001.done") for path in desk.files(DONE)), "it was carried over"
    [path] = desk.files(OPEN)
    assert [row.row for row in contents_of(path).waiting] == [stuck]


async def test_too_much_that_waits_refuses_new_work_and_still_takes_settlements(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=SMALL) as desk:
        written = 0
        while desk.journal.refusal is None:
            desk.write()
            written += 1
            await desk.written(written)
        assert "full" in str(desk.journal.refusal)
        for _ in range(20):
            desk.write()
        await desk.written(written + 20)
        assert desk.figures.skipped == 0
        for entry in desk.handed:
            desk.journal.done(entry)
        await until(lambda: desk.journal.refusal is None)


async def test_a_full_disk_refuses_new_work_while_there_is_room_for_settlements(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path, limits=SMALL) as desk:
        # Room for what was taken ahead, and for no second file.
        disk.room = SMALL.file_bytes * 3 // 4
        written = 0
        while desk.journal.refusal is None:
            desk.write()
            written += 1
            await desk.written(written)
            await asyncio.sleep(0.001)
        assert desk.journal.refusal == "the journal's disk is full"
        assert desk.figures.skipped == 0, "new work was refused before the room for running answers was gone"
        desk.write()
        await desk.written(written + 1)
        assert desk.figures.skipped == 0
        disk.room = None
        await until(lambda: desk.journal.refusal is None)
        assert desk.failures == []


async def test_a_row_without_any_room_goes_to_the_ledger_all_the_same(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path, limits=SMALL) as desk:
        disk.room = 0
        desk.write()
        [entry] = await desk.written(1)
        assert desk.figures.skipped == 1
        assert desk.journal.refusal == "the journal's disk is full"
        desk.journal.done(entry)
        disk.room = None
        row = desk.write()
        await desk.written(2)
        assert [row.row for path in desk.files(OPEN) for row in contents_of(path).rows] == [row]
        assert desk.failures == []
    assert [path.suffix for path in desk.files()] == [OPEN]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_a_sync_that_failed_is_never_tried_again(tmp_path: Path, disk: Disk, number: int) -> None:
    async with opened(tmp_path) as desk:
        desk.write()
        await desk.written(1)
        syncs = disk.syncs
        disk.sync_error = OSError(number, "broken")
        desk.write()
        await desk.written(2)
        assert len(desk.failures) == 1
        assert str(tmp_path) in desk.failures[0]
        assert desk.journal.refusal == "the journal can't be written"
        disk.sync_error = None
        for _ in range(3):
            desk.write()
        await desk.written(5)
        assert disk.syncs == syncs + 1
        assert desk.figures.skipped == 4, "they still go to the ledger"
        assert len(desk.failures) == 1


async def test_a_write_that_failed_ends_the_journal_too(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path) as desk:
        disk.write_error = OSError(errno.EIO, "broken")
        desk.write()
        await desk.written(1)
        assert len(desk.failures) == 1
        assert desk.journal.refusal == "the journal can't be written"


async def test_what_was_durable_before_a_failure_can_be_read(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path) as desk:
        row = desk.write()
        await desk.written(1)
        disk.sync_error = OSError(errno.EIO, "broken")
        desk.write()
        await desk.written(2)
    [path] = desk.files(OPEN)
    assert contents_of(path).waiting[0].row == row


async def test_a_disk_that_does_not_answer_holds_up_no_settlement_for_long(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "PATIENCE_SECONDS", 0.2)
    async with opened(tmp_path) as desk:
        disk.gate.clear()
        desk.write()
        await desk.written(1)
        assert desk.journal.refusal == "the journal's disk doesn't answer"
        assert desk.figures.skipped == 1
        desk.journal.done(desk.handed[0])
        disk.gate.set()
        await until(lambda: desk.journal.refusal is None)
        desk.write()
        await desk.written(2)
        assert len(desk.handed) == 2, "and no row goes twice"
        desk.journal.done(desk.handed[1])
    assert [path.suffix for path in desk.files()] == [DONE]


async def test_a_disk_that_says_late_that_it_is_full_has_answered(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a row that is written said that the disk was back; while nothing is admitted, none may ever come."""
    monkeypatch.setattr(journal_module, "PATIENCE_SECONDS", 0.2)
    write_at = JournalFile.write_at

    def late_write(file: JournalFile, data: bytes, place: int) -> None:
        assert disk.gate.wait(30)
        write_at(file, data, place)

    async with opened(tmp_path) as desk:
        monkeypatch.setattr(JournalFile, "write_at", late_write)
        disk.gate.clear()
        desk.write()
        [entry] = await desk.written(1)
        desk.journal.done(entry)
        assert desk.journal.refusal == "the journal's disk doesn't answer"
        disk.write_error = OSError(errno.ENOSPC, "No space left on device")
        disk.gate.set()
        await until(lambda: desk.journal.refusal is None)


async def test_rows_that_are_done_before_they_could_be_written_wait_for_nobody(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a group of them stood behind a disk that didn't answer, and the ledger was faster."""
    monkeypatch.setattr(journal_module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(journal_module, "ROWS_MAX", 4)
    async with opened(tmp_path) as desk:
        disk.gate.clear()
        for _ in range(20):
            desk.write()
        for entry in reversed(await desk.written(20)):
            desk.journal.done(entry)
        disk.gate.set()
        await until(lambda: desk.journal.refusal is None)
    assert [path.suffix for path in desk.files()] == [DONE]
    [path] = desk.files(DONE)
    assert len(contents_of(path).rows) == 20


async def test_a_row_that_cannot_be_handed_on_stops_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as desk:

        def stumble(entry: object) -> None:
            raise RuntimeError("a mistake")

        desk.journal.write(a_release(), stumble)
        desk.write()
        await desk.written(1)


async def test_a_close_that_the_disk_holds_up_gives_up(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path) as desk:
        disk.gate.clear()
        desk.write()
        await asyncio.sleep(0.02)
        await desk.journal.close(limit_seconds=0.1)
        disk.gate.set()
        await desk.written(1)


async def test_a_start_without_room_says_so(tmp_path: Path, disk: Disk) -> None:
    disk.room = 10
    with pytest.raises(JournalError, match="No space"):
        async with opened(tmp_path):
            pass
