"""Takeover: the journals of workers that are gone are carried out by whichever process finds them.

Every process looks through the directory at its start and every few seconds. A journal whose lock is free has no
writer; its lock makes sure that one process carries it out, and the ledger's ids that twice would be once. Rows go to
the ledger they were written for, and to no other: a wiped or another database leaves them where they are.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar
from uuid import UUID

import structlog

from proxy.ledger.batch import RowRejected
from proxy.ledger.errors import InvalidValue, JournalError, LedgerUnavailable
from proxy.ledger.journal_files import DAMAGED, DONE, OPEN, REJECTED, JournalDirectory, JournalFile
from proxy.ledger.journal_records import Contents, JournalRow, Row, done_frame, read_journal, rejected_frame
from proxy.ledger.journaled import SettlingLedger, refusal_of
from proxy.ledger.records import Finalize, Finalized, Released
from proxy.ledger.rounds import Rounds

__all__ = ["Books", "Replayed", "Takeover", "TakeoverWatch", "repeat", "replay"]

log = structlog.get_logger("farebox.journal")

P = ParamSpec("P")
T = TypeVar("T")

SCAN_SECONDS = 5.0
WINDOW_ROWS = 256
"""Rows that are with the ledger at once, so that live settlements aren't kept waiting behind an old journal."""


class TakeoverWatch(Protocol):
    """What is told of journals that were carried out: ``Metrics``."""

    def journal_replayed(self, rows: int) -> None: ...
    def journal_rejected(self) -> None: ...
    def journal_damaged(self) -> None: ...


class Books(Protocol):
    """The part of ``HoldLedger`` that a replay needs beside the settlements."""

    async def ledger_id(self) -> UUID: ...
    async def put_price_version(self, version: str, body: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a journal's rows. ``left``: why it stays as it is, where it does."""

    path: Path
    rows: int = 0
    rejected: int = 0
    left: str | None = None


class Takeover:
    """Looks for orphaned journals between ``start`` and ``stop``, and removes what was kept for long enough."""

    def __init__(
        self,
        directory: JournalDirectory,
        ledger: SettlingLedger,
        books: Books,
        *,
        watch: TakeoverWatch,
        keep_seconds: float,
        kept_bytes_max: int,
        scan_seconds: float = SCAN_SECONDS,
    ) -> None:
        self._directory = directory
        self._ledger = ledger
        self._books = books
        self._watch = watch
        self._keep_seconds = keep_seconds
        self._kept_bytes_max = kept_bytes_max
        self._told: set[Path] = set()
        self._rounds = Rounds(
            self._round,
            seconds=scan_seconds,
            complaint="the journals of others can't be looked at",
            at_once=True,
            expected=(LedgerUnavailable,),
        )

    def start(self) -> None:
        """Begin, with a look at once."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. A journal that is being carried out is left to the next process; twice is once."""
        await self._rounds.stop()

    async def scan(self) -> list[Replayed]:
        """One look: carry out every journal that nobody has; one that can't be is left, and keeps no other waiting.

        Raises LedgerUnavailable, and OSError where the directory can't be read.
        """
        outcomes = []
        for known in await asyncio.to_thread(self._directory.files, OPEN):
            # Not in a thread: a cancel would lose the file, and its lock with it. It doesn't wait for the disk.
            try:
                file = self._directory.take(known.path)
            except OSError as error:
                outcomes.append(self._tell(Replayed(known.path, left=str(error))))
                continue
            if file is None:
                continue
            try:
                outcomes.append(self._tell(await self._take_over(file)))
            finally:
                file.close()
        return outcomes

    async def _round(self) -> None:
        await self.scan()
        await self._prune()

    async def _take_over(self, file: JournalFile) -> Replayed:
        try:
            return await replay(file, self._ledger, self._books, self._watch)
        except LedgerUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - one that can't be read may not keep all behind it waiting
            return Replayed(file.path, left=f"{type(error).__name__}: {error}")

    def _tell(self, outcome: Replayed) -> Replayed:
        if outcome.left is None:
            log.warning(
                "the journal of a process that is gone was carried out",
                journal=str(outcome.path),
                rows=outcome.rows,
                rejected=outcome.rejected,
            )
        elif outcome.path not in self._told:
            self._told.add(outcome.path)
            log.error("a journal is left as it is", journal=str(outcome.path), reason=outcome.left)
        return outcome

    async def _prune(self) -> None:
        early = await asyncio.to_thread(
            self._directory.prune, keep_seconds=self._keep_seconds, bytes_max=self._kept_bytes_max
        )
        if early:
            log.warning("journals were removed before their time: FAREBOX_JOURNAL_KEPT_BYTES_MAX", files=early)


async def replay(file: JournalFile, ledger: SettlingLedger, books: Books, watch: TakeoverWatch) -> Replayed:
    """Carry out what waits in a journal that is ours by its lock, and give it the name of what it is then.

    Raises LedgerUnavailable: the journal is then as it was.
    """
    return await _with_lock(file, ledger, books, watch, everything=False)


async def repeat(
    directory: JournalDirectory, path: Path, ledger: SettlingLedger, books: Books, watch: TakeoverWatch
) -> Replayed:
    """Say all that a journal says once more, what was done or rejected too, for a ledger that has forgotten.

    A journal that somebody writes at this moment is read and left to its writer. Raises LedgerUnavailable.
    """
    try:
        file = directory.take(path)
        if file is not None:
            try:
                return await _with_lock(file, ledger, books, watch, everything=True)
            finally:
                file.close()
        contents = await asyncio.to_thread(_contents_of, path)
        rejected = await _tell_all(contents, contents.rows, ledger, books)
    except (JournalError, OSError) as error:
        # One that can't be read may not keep those behind it from being repeated.
        return Replayed(path, left=str(error))
    return Replayed(path, len(contents.rows) - len(rejected), len(rejected))


async def _with_lock(
    file: JournalFile, ledger: SettlingLedger, books: Books, watch: TakeoverWatch, *, everything: bool
) -> Replayed:
    try:
        contents = await _to_its_end(_contents, file)
        rows = contents.rows if everything else contents.waiting
        rejected = await _tell_all(contents, rows, ledger, books)
    except JournalError as error:
        return Replayed(file.path, left=str(error))
    watch.journal_replayed(len(rows) - len(rejected))
    unfit = contents.rejected.keys() - {row.number for row in contents.rows}
    for number in sorted(unfit):
        log.error("no ledger would take a row", journal=str(file.path), row=number, reason=contents.rejected[number])
    for _ in (*rejected, *unfit):
        watch.journal_rejected()
    if contents.damaged and file.path.suffix != DAMAGED:
        watch.journal_damaged()
        log.critical(
            "a journal is damaged: charges in these bytes are lost but for their progress marks; the file is kept",
            journal=str(file.path),
            bytes=contents.damaged,
        )
    await _to_its_end(_finish, file, contents, [row.number for row in rows], rejected)
    return Replayed(file.path, len(rows) - len(rejected), len(rejected))


async def _tell_all(
    contents: Contents, rows: Sequence[JournalRow], ledger: SettlingLedger, books: Books
) -> dict[int, str]:
    """Have the ledger carry out the rows. Raises JournalError where they are another ledger's."""
    ledger_id = await books.ledger_id()
    if any(row.ledger_id != ledger_id for row in rows):
        raise JournalError("it belongs to another database: nothing of it may be carried out in this one")
    await _put_prices(contents, rows, books)
    return await _carry_out(rows, ledger)


async def _to_its_end(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run it in a thread. A cancel waits for its end, lest its file be closed under it."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _contents(file: JournalFile) -> Contents:
    return read_journal(file.read())


def _contents_of(path: Path) -> Contents:
    return read_journal(path.read_bytes())


async def _put_prices(contents: Contents, rows: Sequence[JournalRow], books: Books) -> None:
    """A restored older database may lack the prices that a charge names."""
    named = {row.row.price_version for row in rows if isinstance(row.row, Finalize)}
    for version, body in contents.prices.items():
        if version in named:
            try:
                await books.put_price_version(version, body)
            except InvalidValue as error:
                # The charge stands without it: only its recomputation needs the prices.
                log.error("a journal's prices can't be kept", price_version=version, reason=str(error))


async def _carry_out(rows: Sequence[JournalRow], ledger: SettlingLedger) -> dict[int, str]:
    """Have the ledger carry the rows out; those that it never will, by number, and why."""
    rejected = {}
    for begin in range(0, len(rows), WINDOW_ROWS):
        window = rows[begin : begin + WINDOW_ROWS]
        answers = await asyncio.gather(*(_settle(ledger, row.row) for row in window), return_exceptions=True)
        for row, answer in zip(window, answers, strict=True):
            reason = _refusal(answer)
            if reason is not None:
                rejected[row.number] = reason
                log.error(
                    "a row of a journal is put aside: the ledger rejects it",
                    hold=str(row.row.hold_id),
                    account=str(row.row.account_id),
                    reason=reason,
                )
    return rejected


def _settle(ledger: SettlingLedger, row: Row) -> Awaitable[Finalized | Released]:
    if isinstance(row, Finalize):
        return ledger.finalize(row)
    return ledger.release(row.hold_id, row.account_id, row.worker_id)


def _refusal(answer: "Finalized | Released | BaseException") -> str | None:
    if isinstance(answer, RowRejected):
        return str(answer)
    if isinstance(answer, BaseException):
        raise answer
    return refusal_of(answer)


def _finish(file: JournalFile, contents: Contents, tried: list[int], rejected: dict[int, str]) -> None:
    """Mark behind the last valid frame what became of the rows that were tried, and give the file its new name."""
    if not (contents.rows or contents.rejected or contents.damaged):
        file.remove()
        return
    if tried:
        marks = [rejected_frame(number, reason) for number, reason in rejected.items()]
        marks.append(done_frame(number for number in tried if number not in rejected))
        data = b"".join(marks)
        file.write_at(data, contents.end)
        file.cut_at(contents.end + len(data))
        file.sync()
    if contents.damaged:
        ending = DAMAGED
    elif rejected or contents.rejected.keys() - set(tried):
        ending = REJECTED
    else:
        ending = DONE
    if file.path.suffix != ending:
        file.rename(ending)
