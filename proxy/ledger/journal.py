"""The journal: what a worker is about to say to the ledger stands on its own disk first.

A row is *written* (appended, in a group, by a thread), *durable* (synced: from here on its charge survives this process
and this machine), then *carried out* by the ledger, and marked *done*. What isn't done when the process dies is carried
out by another (``takeover.py``).

The rules it keeps:
- One thread touches the files. The event loop never waits for the disk: it is told when a group is durable. Groups
  form by themselves, from what arrives while the last one is being synced, and within ``GROUP_SECONDS`` of it: a row
  that comes alone waits for nothing, and a busy process syncs 200 times a second and no more.
- A sync or a write that fails for another reason than a full disk is never tried again: nothing is known about the file
  any more. ``on_failed`` is told, this process has to end, and what it still settles goes to the ledger at once.
- Room is taken ahead: while half a file is left for running answers, the next file is made. Where it can't be, or too
  much waits, ``refusal`` says that no new work may be admitted; settlements go on.
- A disk that doesn't answer holds nothing up for longer than ``PATIENCE_SECONDS``: the ledger's own disk is one, too.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from proxy.ledger.errors import JournalError
from proxy.ledger.journal_files import DONE, REJECTED, JournalDirectory, JournalFile, is_full
from proxy.ledger.journal_records import Head, Row, done_frame, head_frame, price_frame, rejected_frame, row_frame
from proxy.ledger.records import Release

__all__ = ["Entry", "Journal", "JournalLimits", "JournalWatch"]

log = structlog.get_logger("farebox.journal")

GROUP_SECONDS = 0.005
PATIENCE_SECONDS = 2.0
TICK_SECONDS = 0.25
ROWS_MAX = 1_000
"""Rows in a group, so that none takes long."""
CARRIED_SHARE = 8
"""Where at most one in so many rows of a full file still waits, it is carried over to the current one."""


class JournalWatch(Protocol):
    """What is told of the journal's work: ``Metrics``."""

    def journal_synced(self, rows: int, seconds: float) -> None: ...
    def journal_skipped(self, rows: int) -> None: ...
    def journal_rejected(self) -> None: ...


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """``bytes_max``: of files in which rows wait, above which no new work is admitted. ``file_bytes``: of one file."""

    bytes_max: int = 256 * 1024 * 1024
    file_bytes_max: int = 4 * 1024 * 1024

    @property
    def file_bytes(self) -> int:
        """A file holds as much, and a group more: done rows in the current one mustn't count for much."""
        return min(self.file_bytes_max, self.bytes_max // 4)


class Entry:
    """A row on its way. ``carry_out`` is called once, in the event loop, when the row is durable (or can't be)."""

    __slots__ = ("carry_out", "file", "handed_on", "number", "row", "skipped", "taken_at")

    def __init__(self, number: int, row: Row, carry_out: "Callable[[Entry], None]", taken_at: float) -> None:
        self.number = number
        self.row = row
        self.carry_out = carry_out
        self.taken_at = taken_at
        self.handed_on = False
        self.skipped = False
        """There was no room for it."""
        self.file: _File | None = None


class _File:
    """A file that this worker writes. ``waiting``: what stands in it and isn't carried out."""

    __slots__ = ("file", "has_rejected", "prices", "rows", "used", "waiting")

    def __init__(self, file: JournalFile, used: int) -> None:
        self.file = file
        self.used = used
        self.rows = 0
        self.waiting: dict[int, Entry] = {}
        self.prices: set[str] = set()
        self.has_rejected = False


class _SyncFailed(Exception):
    """What was to be durable may not be, and can't be made so."""


class Journal:
    """One worker's journal, between ``start`` and ``close``, in one event loop.

    ``price_body`` gives a price version's body, so that each file has those that its rows name.
    ``on_failed`` is told once, in the event loop, when the journal can't be written any more.
    """

    def __init__(
        self,
        directory: JournalDirectory,
        head: Head,
        *,
        price_body: Callable[[str], str | None],
        watch: JournalWatch,
        on_failed: Callable[[str], None],
        limits: JournalLimits | None = None,
    ) -> None:
        self._directory = directory
        self._head = head
        self._price_body = price_body
        self._watch = watch
        self._on_failed = on_failed
        self._limits = limits or JournalLimits()
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        # Both sides: appended to by the loop, emptied by the thread.
        self._rows: deque[Entry] = deque()
        self._marks: deque[tuple[Entry, str | None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        # The loop's own.
        self._numbers = self._confirmed = 0
        self._undurable: dict[int, Entry] = {}
        self._ticking = False
        self._stalled = False
        self._ended: asyncio.Event
        # The thread's own; the loop only reads the figures.
        self._files = 0
        self._current: _File
        self._spare: _File | None = None
        self._older: list[_File] = []
        self._full: str | None = None
        self._failure: str | None = None
        self._bytes = 0
        self._next_group_at = 0.0

    # What the event loop calls.

    async def start(self) -> None:
        """Make the first file and begin. Raises JournalError."""
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        await asyncio.to_thread(self._directory.make)
        try:
            self._current = await asyncio.to_thread(self._new_file)
        except OSError as error:
            raise JournalError(f"No journal can be made in {self._directory.path}: {error.strerror}.") from error
        self._count_bytes()
        self._thread = threading.Thread(target=self._run, name="farebox-journal", daemon=True)
        self._thread.start()

    def write(self, row: Row, carry_out: Callable[[Entry], None]) -> Entry:
        """Take a row. Never waits, never refuses."""
        self._numbers += 1
        entry = Entry(self._numbers, row, carry_out, self._loop.time())
        self._undurable[entry.number] = entry
        if self._failure is not None:
            self._loop.call_soon(self._hand_on_without_journal, [entry])
            return entry
        self._rows.append(entry)
        self._wake.set()
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_SECONDS, self._tick)
        return entry

    def done(self, entry: Entry) -> None:
        """The ledger has carried out the row."""
        self._confirmed += 1
        self._marks.append((entry, None))

    def rejected(self, entry: Entry, reason: str) -> None:
        """The ledger will never carry out the row: it is kept, its file with it, and not tried again by itself."""
        log.error(
            "a row is put aside in the journal: the ledger rejects it", hold=str(entry.row.hold_id), reason=reason
        )
        self._watch.journal_rejected()
        self._confirmed += 1
        self._marks.append((entry, reason))

    @property
    def refusal(self) -> str | None:
        """Why no new work may be admitted now; None where it may."""
        if self._failure is not None:
            return "the journal can't be written"
        if self._full is not None:
            return self._full
        if self._stalled:
            return "the journal's disk doesn't answer"
        if self._bytes >= self._limits.bytes_max:
            return "the journal is full of charges that wait for the ledger"
        return None

    @property
    def size(self) -> int:
        """Bytes of the files in which rows wait, or may yet."""
        return self._bytes

    @property
    def waiting(self) -> int:
        """Rows that were taken and that the ledger hasn't confirmed."""
        return self._numbers - self._confirmed

    async def close(self, limit_seconds: float = 5.0) -> None:
        """Write down what is to be marked and let go of the files. What waits in them is carried out by others."""
        if self._thread is None:
            return
        # Answers that came a moment ago have yet to become marks.
        for _ in range(3):
            await asyncio.sleep(0)
        self._closing = True
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._ended.wait()
        if not self._ended.is_set():
            log.error("the journal's disk doesn't answer: it is left as it is")

    # The event loop's side of the thread's news.

    def _durable(self, entries: Iterable[Entry]) -> None:
        self._stalled = False
        self._hand_on(entries)

    def _without_room(self, entries: list[Entry]) -> None:
        """The disk is full. But it has answered."""
        self._stalled = False
        self._hand_on_without_journal(entries)

    def _hand_on_without_journal(self, entries: list[Entry]) -> None:
        """These go to the ledger although they aren't durable here: nothing better can be done for them."""
        self._watch.journal_skipped(len(entries))
        self._hand_on(entries)

    def _hand_on(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._undurable.pop(entry.number, None)
            if entry.handed_on:
                continue
            entry.handed_on = True
            try:
                entry.carry_out(entry)
            except Exception as error:
                # One row's trouble may not keep the others from the ledger.
                log.critical("a row was not handed on", hold=str(entry.row.hold_id), exc_info=error)

    def _tick(self) -> None:
        """Look whether rows wait for the disk for too long."""
        patient_since = self._loop.time() - PATIENCE_SECONDS
        late = [entry for entry in self._undurable.values() if entry.taken_at <= patient_since]
        if late:
            if not self._stalled:
                log.error("the journal's disk doesn't answer: nothing new is admitted", rows=len(late))
            self._stalled = True
            self._hand_on_without_journal(late)
        self._ticking = bool(self._undurable)
        if self._ticking:
            self._loop.call_later(TICK_SECONDS, self._tick)

    def _told_failure(self, reason: str, entries: list[Entry]) -> None:
        log.critical("the journal can't be written: this process has to end", reason=reason)
        self._on_failed(reason)
        self._hand_on_without_journal([*entries, *self._rows])
        self._rows.clear()

    # The thread.

    def _run(self) -> None:
        rows: list[Entry] = []
        try:
            while not (self._closing and not self._rows):
                self._wait()
                self._gather()
                rows = _take(self._rows)
                if rows:
                    self._write_group(rows)
                    rows = []
                self._write_marks()
                self._tidy()
            while self._marks:
                self._write_marks()
            self._let_go()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may be written behind it
            self._failure = f"{self._directory.path}: {type(error).__name__}: {error}"
            self._tell(self._told_failure, self._failure, rows)
        self._tell(self._ended.set)

    def _wait(self) -> None:
        if self._rows:
            return
        waits = self._full is not None or self._current.waiting or self._older or self._marks
        self._wake.wait(TICK_SECONDS if waits else None)
        self._wake.clear()

    def _gather(self) -> None:
        """Let a group come together where the last one was a moment ago. Nobody's answer waits for it."""
        pause = self._next_group_at - time.monotonic()
        if self._rows and pause > 0 and not self._closing:
            time.sleep(pause)
        self._next_group_at = time.monotonic() + GROUP_SECONDS

    def _write_group(self, rows: list[Entry]) -> None:
        """Make the rows durable and say so. Without room for them they go on as they are, and no new work is taken."""
        try:
            self._append(self._current, rows)
        except OSError as error:
            if not is_full(error):
                raise
            self._no_room(rows=len(rows))
            for entry in rows:
                entry.skipped = True
            self._tell(self._without_room, rows)
        else:
            self._tell(self._durable, rows)

    def _append(self, file: _File, rows: list[Entry]) -> None:
        """Write and sync. Raises OSError: where it says that the disk is full, before anything was synced."""
        versions = {entry.row.price_version for entry in rows if not isinstance(entry.row, Release)} - file.prices
        frames = [price_frame(version, body) for version in versions if (body := self._price_body(version))]
        frames += [row_frame(entry.number, self._head.ledger_id, entry.row) for entry in rows]
        data = b"".join(frames)
        file.file.write_at(data, file.used)
        self._sync(file, len(rows))
        file.used += len(data)
        file.rows += len(rows)
        file.prices |= versions
        for entry in rows:
            entry.file = file
            file.waiting[entry.number] = entry
        self._count_bytes()

    def _sync(self, file: _File, rows: int) -> None:
        began = time.perf_counter()
        try:
            file.file.sync()
        except OSError as error:
            raise _SyncFailed(str(error)) from error
        self._watch.journal_synced(rows, time.perf_counter() - began)

    def _write_marks(self) -> None:
        """Mark rows as done or rejected in the files where they stand. Not synced: a lost mark costs a repetition."""
        done: dict[_File, list[int]] = {}
        for entry, reason in _take(self._marks):
            file = entry.file
            if file is None:
                # Handed on while the disk didn't answer: the row has yet to be written.
                if not entry.skipped:
                    self._marks.append((entry, reason))
                continue
            del file.waiting[entry.number]
            if reason is None:
                done.setdefault(file, []).append(entry.number)
            else:
                file.has_rejected = True
                self._mark(file, rejected_frame(entry.number, reason))
        for file, numbers in done.items():
            self._mark(file, done_frame(numbers))

    def _mark(self, file: _File, frame: bytes) -> None:
        try:
            file.file.write_at(frame, file.used)
        except OSError as error:
            if not is_full(error):
                raise
            return
        file.used += len(frame)

    # The thread: from file to file.

    def _to_next_file(self) -> None:
        """From the current file to the one that is ready."""
        assert self._spare is not None
        self._older.append(self._current)
        self._current, self._spare = self._spare, None
        self._carry_over()

    def _carry_over(self) -> None:
        """A few rows that wait for long would keep whole files: they are written anew, and their file is done."""
        for file in self._older:
            if file.waiting and CARRIED_SHARE * len(file.waiting) <= file.rows:
                try:
                    self._append(self._current, list(file.waiting.values()))
                except OSError as error:
                    if not is_full(error):
                        raise
                    return
                file.waiting.clear()

    def _tidy(self) -> None:
        """Have the next file ready before this one is full, go on to it then, and finish those in which nothing waits.

        Without a next one the current file grows beyond its bytes.
        """
        size = self._limits.file_bytes
        if self._spare is None and (self._full is not None or 2 * self._current.used >= size):
            self._make_spare()
        elif self._full is not None:
            self._room_again()
        if self._spare is not None and self._current.used >= size:
            self._to_next_file()
        for file in [file for file in self._older if not file.waiting]:
            self._older.remove(file)
            self._finish(file)
        self._count_bytes()

    def _make_spare(self) -> None:
        try:
            self._spare = self._new_file()
        except OSError as error:
            if not is_full(error):
                raise
            self._no_room()
        else:
            if self._full is not None:
                self._room_again()

    def _no_room(self, **facts: int) -> None:
        if self._full is None:
            log.error("the journal's disk is full: nothing new is admitted", path=str(self._directory.path), **facts)
        self._full = "the journal's disk is full"

    def _room_again(self) -> None:
        self._full = None
        log.info("the journal has room again")

    def _new_file(self) -> _File:
        self._files += 1
        head = head_frame(self._head)
        worker_id, size = self._head.worker_id, self._limits.file_bytes
        return _File(self._directory.create(worker_id, self._files, head, size), len(head))

    def _finish(self, file: _File) -> None:
        """Nothing waits in it: it is kept for a while under another name."""
        if file.rows:
            file.file.cut_at(file.used)
            file.file.sync()
            file.file.rename(REJECTED if file.has_rejected else DONE)
        else:
            file.file.remove()
        file.file.close()

    def _let_go(self) -> None:
        """The end: what has rows waiting stays open for whoever finds its lock free."""
        for file in (self._current, *self._older, *([self._spare] if self._spare else [])):
            if file.waiting:
                log.error("rows stay in the journal for the next process", rows=len(file.waiting))
                file.file.close()
            else:
                self._finish(file)

    def _count_bytes(self) -> None:
        self._bytes = self._current.used + sum(file.used for file in self._older)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        """Have the event loop do this; there may be none any more."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *arguments)


T = TypeVar("T")


def _take(queue: deque[T]) -> list[T]:
    """What is in the queue, to which the other thread goes on appending."""
    return [queue.popleft() for _ in range(min(len(queue), ROWS_MAX))]
