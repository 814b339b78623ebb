"""The ledger with a journal before it: a hold's end is durable on this machine before the database hears of it."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol
from uuid import UUID

from proxy.ledger.batch import RowRejected
from proxy.ledger.errors import JournalFull, LedgerError
from proxy.ledger.journal import Entry, Journal
from proxy.ledger.journal_records import Row
from proxy.ledger.records import (
    Extend,
    Extended,
    Finalize,
    Finalized,
    FinalizeOutcome,
    Release,
    Released,
    Reserve,
    Reserved,
)

__all__ = ["JournaledLedger", "SettlingLedger", "refusal_of"]


class SettlingLedger(Protocol):
    """The part of ``BatchedLedger`` that ends holds. Both take the row at once and repeat it until it is answered."""

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]": ...
    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]": ...


class Ledger(SettlingLedger, Protocol):
    """What the gateway uses of ``BatchedLedger``."""

    async def reserve(self, row: Reserve) -> Reserved: ...
    async def extend(self, row: Extend) -> Extended: ...


class JournaledLedger:
    """Speaks as ``ledger`` does. What the ledger never answers stays in the journal, for the next process."""

    def __init__(self, ledger: Ledger, journal: Journal) -> None:
        self._ledger = ledger
        self._journal = journal

    async def reserve(self, row: Reserve) -> Reserved:
        """As the ledger's; raises JournalFull where the end of the hold might not be written down."""
        if (refusal := self._journal.refusal) is not None:
            raise JournalFull(refusal)
        return await self._ledger.reserve(row)

    async def extend(self, row: Extend) -> Extended:
        """As the ledger's: what runs may go on whatever the journal's state."""
        return await self._ledger.extend(row)

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]":
        """As the ledger's. Taken at once; the database hears of it when it is durable here."""
        return self._settle(row, lambda: self._ledger.finalize(row))

    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]":
        """As the ledger's, and ``finalize``."""
        row = Release(hold_id, account_id, worker_id)
        return self._settle(row, lambda: self._ledger.release(hold_id, account_id, worker_id))

    def _settle(self, row: Row, settle: "Callable[[], asyncio.Future[Any]]") -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def carry_out(entry: Entry) -> None:
            try:
                settling = settle()
            except LedgerError as error:
                # The ledger has stopped: the row stays in the journal.
                _fail(answer, error)
            else:
                settling.add_done_callback(lambda settled: self._settled(entry, settled, answer))

        self._journal.write(row, carry_out)
        return answer

    def _settled(self, entry: Entry, settled: "asyncio.Future[Any]", answer: "asyncio.Future[Any]") -> None:
        """The ledger has answered, or never will."""
        if settled.cancelled():
            answer.cancel()
            return
        error = settled.exception()
        if error is None:
            result = settled.result()
            refusal = refusal_of(result)
            if not answer.done():
                answer.set_result(result)
        else:
            refusal = str(error) if isinstance(error, RowRejected) else None
            _fail(answer, error)
        if refusal is not None:
            self._journal.rejected(entry, refusal)
        elif error is None:
            self._journal.done(entry)


def refusal_of(result: Finalized | Released) -> str | None:
    """Why the ledger will not do what the row says, now or later; None where it has done it."""
    if isinstance(result, Finalized):
        return None if result.outcome is FinalizeOutcome.FINAL else f"outcome {result.outcome.value}"
    return f"state {result.state}" if result.state in ("conflict", "unknown") else None


def _fail(answer: "asyncio.Future[Any]", error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
