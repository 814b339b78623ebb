"""Settlement: who owes what when an answer ends, and an owner for it that outlives the request.

An *exchange* is registered when its hold is granted. Whatever ends it calls ``Exchange.close(ending)``: synchronous, so
that no cancellation can come between, and idempotent, so that the first word counts. From there the settler's own
tasks do the rest: find the usage, price it, and have the ledger finalize or release. The app's shutdown awaits
``drain``. Nothing here depends on how a request's task or generator came to its end.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID

import structlog

from proxy.core.money import format_credits
from proxy.gateway.due import IMPLAUSIBLE, Due, finalize_row, find_due, uncountable_due
from proxy.gateway.exchange import Ending, Exchange, Ticket
from proxy.gateway.progress import CountEach
from proxy.ledger.records import Finalize, Finalized, FinalizeOutcome, Released
from proxy.metrics import Metrics

__all__ = ["Settler"]

log = structlog.get_logger("farebox.settle")

TICK_SECONDS = 1.0
# What drain allows for the last settlements once every answer has ended or been cut.
SETTLE_SECONDS = 5.0


class SettlingLedger(Protocol):
    """The part of ``BatchedLedger`` that ends holds. Both take the row at once and repeat it until it is answered."""

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]": ...
    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]": ...


async def _uncounted(_texts: Sequence[str]) -> None:
    """Takes the place of a counter: progress is then told by bytes."""


class Settler:
    """The registry of exchanges, and the owner of every task that works on one.

    ``count_each`` counts answers on their way (``progress.py``). Every ``tick_seconds`` it is noted how far each
    is, and whether it has run for longer than its model may.
    """

    def __init__(
        self,
        ledger: SettlingLedger,
        *,
        metrics: Metrics,
        count_each: CountEach = _uncounted,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._count_each = count_each
        self._tick_seconds = tick_seconds
        self._open: set[Exchange] = set()
        self._open_of: Counter[str] = Counter()
        self._settling = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._stopping = False

    # What the request calls.

    @property
    def stopping(self) -> bool:
        """Whether no new exchange may be opened, since this process is ending."""
        return self._stopping

    @property
    def open_exchanges(self) -> int:
        return len(self._open)

    def open_of(self, key_id: str) -> int:
        """How many exchanges of that key are open."""
        return self._open_of.get(key_id, 0)

    @property
    def exchanges(self) -> Collection[Exchange]:
        """Those that are open."""
        return self._open

    @property
    def unsettled(self) -> int:
        """Exchanges that have ended and whose charge the ledger hasn't confirmed."""
        return self._settling

    def open(self, ticket: Ticket) -> Exchange:
        """Register a granted hold. Synchronous: between the grant and this there is nothing to be cancelled."""
        clock = asyncio.get_running_loop().time
        exchange = Exchange(ticket, self._settle, count_each=self._count_each, clock=clock)
        self._open.add(exchange)
        self._open_of[ticket.key_id] += 1
        self._metrics.hold_opened(ticket.granted)
        return exchange

    def own(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run work on an exchange in a task that no request's end can take away."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        return task

    # What the app calls.

    def start(self) -> None:
        """Begin to look after time limits and the lease."""
        self._ticker = asyncio.create_task(self._tick())

    def stop_admitting(self) -> None:
        """Open no more exchanges; those that are open go on."""
        self._stopping = True

    def cut_all(self, ending: Ending) -> None:
        """End every open exchange now: its client gets an error, what was used is charged."""
        for exchange in list(self._open):
            exchange.cut(ending)

    async def drain(self, limit_seconds: float) -> bool:
        """Wait until every exchange has ended and is settled; then True. False where the limit came first.

        Exchanges that are still open after the limit are cut. The last settlements get a moment, whatever is left of
        the limit: they take milliseconds, or the ledger is away and doesn't come back for our waiting.
        """
        self._stopping = True
        await self._wait_while(lambda: bool(self._open), limit_seconds)
        self.cut_all(Ending.SHUTDOWN)
        await self._wait_while(lambda: bool(self._tasks or self._open or self._settling), SETTLE_SECONDS)
        if self._ticker is not None:
            self._ticker.cancel()
        return not self._tasks and not self._open and not self._settling

    async def _wait_while(self, unfinished: Callable[[], bool], limit_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_seconds
        while unfinished() and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    # Looking after open exchanges.

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._tick_seconds)
            now = loop.time()
            for exchange in list(self._open):
                exchange.progress.note()
                if now - exchange.opened_at > exchange.ticket.route.seconds_max:
                    exchange.cut(Ending.TOO_LONG)

    def _disown(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of an exchange failed", exc_info=error)

    # Settling.

    def _settle(self, exchange: Exchange) -> None:
        self._open.discard(exchange)
        if exchange.left_at is not None:
            self._metrics.client_left(exchange.cut_by or _LEFT.get(exchange.ending, "read_on"))
        self._uncount(exchange.ticket.key_id)
        self._settling += 1
        self.own(self._end_hold(exchange))

    def _uncount(self, key_id: str) -> None:
        self._open_of[key_id] -= 1
        if not self._open_of[key_id]:
            # Or every key that ever called would stay here.
            del self._open_of[key_id]

    async def _end_hold(self, exchange: Exchange) -> None:
        try:
            due = await self._due(exchange)
            if due is None:
                await self._release(exchange)
            else:
                await self._charge(exchange, due)
        except Exception as error:
            # The ledger has stopped: the journal has the row for the next process. Or it rejects the row: then the hold
            # stays until this worker is gone, and the sweeper settles it at its mark.
            log.error(
                "a hold was left open", request_id=str(exchange.ticket.hold_id), ending=exchange.ending, exc_info=error
            )
        finally:
            self._settling -= 1

    async def _due(self, exchange: Exchange) -> Due | None:
        """What the answer costs; None where it is free."""
        try:
            return await find_due(exchange)
        except Exception as error:
            # A mistake of ours in counting must not become free service, nor leave the hold open.
            log.error("usage can't be found", request_id=str(exchange.ticket.hold_id), exc_info=error)
            return uncountable_due(exchange)

    async def _release(self, exchange: Exchange) -> None:
        ticket = exchange.ticket
        await self._ledger.release(ticket.hold_id, ticket.account_id, ticket.worker_id)
        self._metrics.hold_released(exchange.granted)
        log.info("released", request_id=str(ticket.hold_id), ending=exchange.ending)

    async def _charge(self, exchange: Exchange, due: Due) -> None:
        ticket = exchange.ticket
        result = await self._ledger.finalize(finalize_row(exchange, due))
        self._metrics.hold_charged(
            charge=result.charge, released=exchange.granted - result.charge, overrun=result.overrun
        )
        self._metrics.tokens(due.usage, due.source)
        if due.capped == IMPLAUSIBLE:
            self._metrics.implausible_usage()
        told = log.warning if due.capped or result.overrun else log.info
        told(
            "charged",
            request_id=str(ticket.hold_id),
            ending=exchange.ending,
            charge=format_credits(result.charge),
            overrun=format_credits(result.overrun),
            usage_source=due.source,
            capped=due.capped,
        )
        if result.outcome is not FinalizeOutcome.FINAL:
            log.error("a charge was refused", request_id=str(ticket.hold_id), outcome=result.outcome)


_LEFT: Mapping[Ending | None, str] = {Ending.CLIENT_LEFT_UNSENT: "unsent", Ending.UPSTREAM_REFUSED: "refused"}
"""What became of an answer whose client left, by its ending, where nothing cut it off."""
