"""Reconciliation by itself: hourly over the last three days, daily over the last thirty, by one server at a time.

Each of the two goes by itself, so that a month that takes long, or always fails, doesn't keep the hour's from its turn.
An advisory lock says who is at it; the ledger says when it was done last, so that many workers don't do it more often
than one. Nothing waits for it. What it finds is in the metrics of every server, whoever found it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog

from proxy.control.billing.errors import StripeError
from proxy.control.billing.reconcile import Reconciler, Reconciliation
from proxy.ledger.connect import Connection
from proxy.ledger.reconciliation import LastReconciliation, ReconciliationLedger, try_lock
from proxy.ledger.rounds import EXPECTED, Rounds

__all__ = ["SPANS", "ReconcileLoop", "Span", "reconcile_and_note"]

log = structlog.get_logger("farebox.reconcile")

LOOK_SECONDS = 300.0
"""How often a server asks whether it is time, and tells the metrics."""


@dataclass(frozen=True, slots=True)
class Span:
    """A time that is looked back over, and how often."""

    back: timedelta
    every: timedelta


SPANS: Mapping[str, Span] = {
    "recent": Span(timedelta(hours=72), timedelta(hours=1)),
    "month": Span(timedelta(days=30), timedelta(days=1)),
}
"""By the ledger's names (``reconciliation.WINDOWS``)."""


class ReconcileLoop:
    """Reconciles in a loop for each span. ``open_connection`` gives one for the lock, acting as ``Role.CONTROL``.

    ``observe`` is told after each round of the last reconciliation of each span.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        ledger: ReconciliationLedger,
        open_connection: Callable[[], Awaitable[Connection]],
        *,
        observe: Callable[[Mapping[str, LastReconciliation]], None] = lambda last: None,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._reconciler = reconciler
        self._ledger = ledger
        self._open_connection = open_connection
        self._observe = observe
        self._rounds = [
            Rounds(
                partial(self.round, name),
                seconds=look_seconds,
                complaint=f"not reconciled ({name})",
                expected=(*EXPECTED, StripeError),
            )
            for name in SPANS
        ]

    def start(self) -> None:
        """Begin; the first round comes soon."""
        for rounds in self._rounds:
            rounds.start()

    async def stop(self) -> None:
        """End. What is under way is cut off: the next one begins anew, and everything may be done twice."""
        await asyncio.gather(*(rounds.stop() for rounds in self._rounds))

    async def round(self, name: str) -> None:
        """Reconcile over that one of SPANS, if it is due and no other server is at it."""
        if self._due(name, await self._ledger.last()):
            # A connection for the round: the lock is its session's, and is gone with it whatever happens.
            connection = await self._open_connection()
            try:
                if await try_lock(connection, name) and self._due(name, await self._ledger.last()):
                    await self._reconcile(name)
            finally:
                connection.terminate()
        self._observe(await self._ledger.last())

    def _due(self, name: str, last: Mapping[str, LastReconciliation]) -> bool:
        return name not in last or datetime.now(UTC) - last[name].finished_at >= SPANS[name].every

    async def _reconcile(self, name: str) -> None:
        report = await reconcile_and_note(self._reconciler, self._ledger, datetime.now(UTC) - SPANS[name].back)
        said = log.info if report.clean else log.error
        said(
            "reconciled with Stripe",
            span=name,
            compared=report.compared,
            mended=len(report.mended),
            differing=len(report.differences),
            failures=report.failures[:5],
        )


async def reconcile_and_note(
    reconciler: Reconciler,
    ledger: ReconciliationLedger,
    since: datetime,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> Reconciliation:
    """Reconcile all that was made since then, and leave a note of it for each span that this covers."""
    started_at = datetime.now(UTC)
    report = await reconciler.run(since, progress=progress)
    for name in _covered(since, started_at):
        await ledger.note(
            name,
            started_at,
            compared=report.compared,
            mended=len(report.mended),
            differing=len(report.differences) + len(report.failures),
        )
    return report


def _covered(since: datetime, now: datetime) -> list[str]:
    """Those of SPANS that a look back to ``since`` covers."""
    return [name for name, span in SPANS.items() if now - since >= span.back - timedelta(minutes=1)]
