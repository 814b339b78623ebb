"""Reconciliation by itself: hourly over the last three days, daily over the last thirty, by one server at a time.

An advisory lock says who is at it; the ledger says when it was done last, so that many workers don't do it more often
than one. Nothing waits for it. What it finds is in the metrics of every server, whoever found it.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

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
    # The longer one first: where both are due, it leaves the other nothing to do.
    "month": Span(timedelta(days=30), timedelta(days=1)),
    "recent": Span(timedelta(hours=72), timedelta(hours=1)),
}
"""By the ledger's names (``reconciliation.WINDOWS``)."""


class ReconcileLoop:
    """Reconciles in a loop. ``open_connection`` gives one for the lock, acting as ``Role.CONTROL``.

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
        self._rounds = Rounds(
            self.round, seconds=look_seconds, complaint="not reconciled", expected=(*EXPECTED, StripeError)
        )

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. What is under way is cut off: the next one begins anew, and everything may be done twice."""
        await self._rounds.stop()

    async def round(self) -> None:
        """Reconcile what is due, unless another server is at it."""
        if self._due(await self._ledger.last()):
            # A connection for the round: the lock is its session's, and is gone with it whatever happens.
            connection = await self._open_connection()
            try:
                if await try_lock(connection):
                    for name in self._due(await self._ledger.last()):
                        await self._reconcile(name)
            finally:
                connection.terminate()
        self._observe(await self._ledger.last())

    def _due(self, last: Mapping[str, LastReconciliation]) -> list[str]:
        now = datetime.now(UTC)
        due = [name for name, span in SPANS.items() if name not in last or now - last[name].finished_at >= span.every]
        return due[:1]

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
    longest = _span_of(since, started_at)
    for name in list(SPANS)[list(SPANS).index(longest) :] if longest else []:
        await ledger.note(
            name,
            started_at,
            compared=report.compared,
            mended=len(report.mended),
            differing=len(report.differences) + len(report.failures),
        )
    return report


def _span_of(since: datetime, now: datetime) -> str | None:
    """The longest of SPANS that a look back to ``since`` covers; None: not even the shortest."""
    covered = [name for name, span in SPANS.items() if now - since >= span.back - timedelta(minutes=1)]
    return covered[0] if covered else None
