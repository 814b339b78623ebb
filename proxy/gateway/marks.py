"""Marks: what a crash of this process would leave to be charged, gathered from all open exchanges with each heartbeat.

Counting goes in batches, off the event loop, and within a time: what a batch has found stays found when the time is up,
and the exchanges that were left out are the first ones next time. Only what has changed since the ledger last took it
is sent, so thousands of answers that are silent cost nothing.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from uuid import UUID

from proxy.core.usage import Usage
from proxy.gateway.exchange import Exchange
from proxy.gateway.progress import CountEach, Progress
from proxy.ledger.records import Mark
from proxy.metrics import Metrics

__all__ = ["Marks"]

BUDGET_SECONDS = 0.8
"""For all counting of one heartbeat; it must lie below what the lease waits."""
BATCH_CHARS = 65_536
BATCH_EXCHANGES = 200
# One statement locks and writes so many holds, and a settlement may have to wait for it.
MARKS_MAX = 5_000


class Marks:
    """The lease's ``MarkSource``. ``exchanges`` gives the open ones."""

    def __init__(
        self,
        exchanges: Callable[[], Collection[Exchange]],
        count_each: CountEach,
        *,
        metrics: Metrics,
        budget_seconds: float = BUDGET_SECONDS,
    ) -> None:
        self._exchanges = exchanges
        self._count_each = count_each
        self._metrics = metrics
        self._budget_seconds = budget_seconds
        self._gathered: dict[UUID, tuple[Progress, Usage]] = {}

    async def gather(self) -> Sequence[Mark]:
        """Every mark that the ledger doesn't have yet."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._budget_seconds):
                late = await self._count()
        except TimeoutError:
            late = True
        self._metrics.marks_gathered(loop.time() - began, late=late)
        self._gathered = {}
        marks: list[Mark] = []
        for exchange in list(self._exchanges()):
            progress, usage = exchange.progress, exchange.progress.marked
            if usage is not None and usage != progress.stored and len(marks) < MARKS_MAX:
                hold_id = exchange.ticket.hold_id
                self._gathered[hold_id] = progress, usage
                marks.append(Mark(hold_id, usage))
        return marks

    def stored(self, holds: Collection[UUID]) -> None:
        """The last marks gathered are in the ledger, for these holds."""
        for hold_id in holds:
            if hold_id in self._gathered:
                progress, usage = self._gathered[hold_id]
                progress.stored = usage
        self._gathered = {}

    async def _count(self) -> bool:
        """Bring all marks up to date. Whether the counter was of no help."""
        behind: list[Progress] = []
        for number, exchange in enumerate(list(self._exchanges()), 1):
            exchange.progress.note()
            if exchange.progress.to_mark:
                exchange.progress.prompt()
                behind.append(exchange.progress)
            if not number % BATCH_EXCHANGES:
                await asyncio.sleep(0)
        # A prompt that was counted when it came is known after one turn of the loop.
        await asyncio.sleep(0)
        # The longest without a mark first: the budget may not suffice for all.
        behind.sort(key=lambda progress: progress.marked_at)
        unknown = False
        for batch in _batches(behind):
            countings = [progress.counting(for_mark=True) for progress in batch]
            counts = await self._count_each([text for counting in countings for text in counting.texts])
            unknown |= counts is None
            start = 0
            for progress, counting in zip(batch, countings, strict=True):
                end = start + len(counting.texts)
                progress.mark(counting, None if counts is None else counts[start:end])
                start = end
        return unknown


def _batches(behind: Iterable[Progress]) -> Iterator[list[Progress]]:
    """In batches of text that a thread counts in a few hundredths of a second."""
    batch: list[Progress] = []
    chars = 0
    for progress in behind:
        if batch and (chars > BATCH_CHARS or len(batch) >= BATCH_EXCHANGES):
            yield batch
            batch, chars = [], 0
        batch.append(progress)
        chars += progress.uncounted_chars
    if batch:
        yield batch
