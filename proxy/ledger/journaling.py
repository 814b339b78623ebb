"""A process's journal and its takeover of others', made and ended together."""

import platform
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

import structlog

from proxy.ledger.journal import Journal, JournalLimits, JournalWatch
from proxy.ledger.journal_files import JournalDirectory
from proxy.ledger.journal_records import Head
from proxy.ledger.journaled import JournaledLedger, Ledger, SettlingLedger
from proxy.ledger.takeover import SCAN_SECONDS, Books, Takeover, TakeoverWatch

__all__ = ["JournalTerms", "Journaling"]

log = structlog.get_logger("farebox.journal")

# Versions whose prices are kept at hand: more than were served while any answer ran.
PRICE_BODIES_MAX = 1_000


@dataclass(frozen=True, slots=True)
class JournalTerms:
    """Where journals are kept and for how long; what each means stands in ``settings.py``. ``release``: this code's."""

    path: Path
    bytes_max: int
    keep_seconds: float
    kept_bytes_max: int
    release: str
    scan_seconds: float = SCAN_SECONDS


class Watch(JournalWatch, TakeoverWatch, Protocol):
    """What is told of both."""


class Journaling:
    """Without ``terms`` there is no journal. ``failure`` says why, once the journal can't be written any more."""

    def __init__(self, terms: JournalTerms | None, books: Books, watch: Watch) -> None:
        self._terms = terms
        self._books = books
        self._watch = watch
        self._prices: dict[str, str] = {}
        self.journal: Journal | None = None
        self.failure: str | None = None

    async def put_prices(self, version: str, body: str) -> None:
        """Have the ledger keep a price version, and have it at hand: a journal holds the prices that its rows name."""
        await self._books.put_price_version(version, body)
        self._prices[version] = body
        if len(self._prices) > PRICE_BODIES_MAX:
            del self._prices[next(iter(self._prices))]

    async def before(self, ledger: Ledger, worker_id: UUID, stack: AsyncExitStack) -> Ledger:
        """The ledger with a journal before it, which ends with the stack. Raises JournalError, LedgerUnavailable."""
        terms = self._terms
        if terms is None:
            log.warning("there is no journal (FAREBOX_JOURNAL_DIR is off): a kill costs what wasn't settled or marked")
            return ledger
        opened_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.journal = Journal(
            JournalDirectory(terms.path),
            Head(await self._books.ledger_id(), worker_id, platform.node(), terms.release, opened_at),
            price_body=self._prices.get,
            watch=self._watch,
            on_failed=self._failed,
            limits=JournalLimits(terms.bytes_max),
        )
        await self.journal.start()
        stack.push_async_callback(self.journal.close)
        return JournaledLedger(ledger, self.journal)

    def take_over(self, ledger: SettlingLedger, stack: AsyncExitStack) -> None:
        """From now on, until the stack ends, carry out the journals of processes that are gone."""
        terms = self._terms
        if terms is None:
            return
        takeover = Takeover(
            JournalDirectory(terms.path),
            ledger,
            self._books,
            watch=self._watch,
            keep_seconds=terms.keep_seconds,
            kept_bytes_max=terms.kept_bytes_max,
            scan_seconds=terms.scan_seconds,
        )
        takeover.start()
        stack.push_async_callback(takeover.stop)

    @property
    def refusal(self) -> str | None:
        """Why no new work may be admitted now; None where it may."""
        return None if self.journal is None else self.journal.refusal

    def _failed(self, reason: str) -> None:
        self.failure = reason
