"""What the journal's tests share: a directory, a journal on it that notes what it tells, and rows to write."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

from proxy.ledger.journal import Entry, Journal, JournalLimits
from proxy.ledger.journal_files import JournalDirectory
from proxy.ledger.journal_records import Contents, Head, Row, read_journal
from proxy.ledger.records import Release
from tests.ledger.bank import BODY, VERSION

__all__ = ["Desk", "Figures", "a_release", "contents_of", "opened", "until"]


@dataclass
class Figures:
    """What the journal says of its work."""

    synced: list[int] = field(default_factory=list)
    skipped: int = 0
    rejected: int = 0
    replayed: int = 0
    damaged: int = 0

    def journal_synced(self, rows: int, seconds: float) -> None:
        self.synced.append(rows)

    def journal_skipped(self, rows: int) -> None:
        self.skipped += rows

    def journal_rejected(self) -> None:
        self.rejected += 1

    def journal_replayed(self, rows: int) -> None:
        self.replayed += rows

    def journal_damaged(self) -> None:
        self.damaged += 1


@dataclass
class Desk:
    """A journal and what came of it."""

    journal: Journal
    directory: JournalDirectory
    head: Head
    figures: Figures
    handed: list[Entry] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def write(self, row: Row | None = None) -> Row:
        """Take a row; what is handed on is noted."""
        row = row or a_release()
        self.journal.write(row, self.handed.append)
        return row

    async def written(self, count: int) -> list[Entry]:
        """The entries handed on, once there are so many."""
        await until(lambda: len(self.handed) >= count)
        return self.handed

    def files(self, *endings: str) -> list[Path]:
        return [file.path for file in self.directory.files(*endings)]


@asynccontextmanager
async def opened(
    path: Path,
    *,
    price_body: Callable[[str], str | None] = {VERSION: BODY}.get,
    limits: JournalLimits | None = None,
    ledger_id: UUID | None = None,
) -> AsyncIterator[Desk]:
    """A journal in that directory."""
    directory = JournalDirectory(path)
    head = Head(ledger_id or UUID(int=7), uuid4(), "host", "0.1", "2026-11-22T20:00:00Z")
    figures = Figures()
    failures: list[str] = []
    journal = Journal(
        directory,
        head,
        price_body=price_body,
        watch=figures,
        on_failed=failures.append,
        limits=limits,
    )
    await journal.start()
    try:
        yield Desk(journal, directory, head, figures, failures=failures)
    finally:
        await journal.close()


def a_release() -> Release:
    """A row as short as any."""
    return Release(uuid4(), uuid4(), uuid4())


def contents_of(path: Path) -> Contents:
    """What that file says."""
    return read_journal(path.read_bytes())


async def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until it is."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
