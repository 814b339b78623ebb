"""Settlement: who owes what when an answer ends, and an owner for it that outlives the request.

An *exchange* is registered when its hold is granted. Whatever ends it calls ``Exchange.close(ending)``: synchronous, so
that no cancellation can come between, and idempotent, so that the first word counts. From there the settler's own
tasks do the rest: find the usage, price it, and have the ledger finalize or release. The app's shutdown awaits
``drain``. Nothing here depends on how a request's task or generator came to its end.

Rules of the charge:

- what the upstream reported is charged; what it didn't is counted on the joined text of each choice;
- an answer of which nothing came through is free where that isn't the client's doing;
- a counted charge never exceeds the hold; a reported one may, but above four times what is possible it isn't believed:
  the hold is charged and the answer is flagged. Possible is what the model can say, not what the client's cap allows:
  some servers know one name of the cap and ignore the other, and a cap of one token would buy a whole answer.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

import structlog

from proxy.core.catalog import Route, Variant
from proxy.core.meter import Meter
from proxy.core.money import format_credits
from proxy.core.pricing import Bounds, charge
from proxy.core.reckon import needs_count, reckon
from proxy.core.usage import Usage, UsageSource
from proxy.ledger.records import Finalize, Finalized, FinalizeOutcome, Released
from proxy.metrics import Metrics

__all__ = ["Ending", "Exchange", "Settler", "Ticket"]

log = structlog.get_logger("farebox.settle")

# Reported usage above this many times what is possible isn't believed.
BELIEVED_TIMES_POSSIBLE = 4
# No provider's answer takes longer; a stream that does is stuck.
EXCHANGE_SECONDS_MAX = 7_200.0
TICK_SECONDS = 1.0
# What drain allows for the last settlements once every answer has been cut.
SETTLE_SECONDS = 5.0
IMPLAUSIBLE = "implausible_usage"
COUNTED_ABOVE_HOLD = "counted_above_hold"


class Ending(StrEnum):
    """How an answer ended; it stands in the receipt."""

    COMPLETE = "complete"
    CLIENT_LEFT = "client_left"
    """The client left; the upstream was read on to its end."""
    CLIENT_LEFT_CUT = "client_left_cut"
    """The client left, and the upstream wasn't done when the drain's limit came."""
    CLIENT_LEFT_UNSENT = "client_left_unsent"
    """The client left before anything went to the upstream."""
    UPSTREAM_REFUSED = "upstream_refused"
    """An error status, or an answer that can't be relayed."""
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_ERROR = "upstream_error"
    """An error in an answer that had begun with 200."""
    UPSTREAM_INCOMPLETE = "upstream_incomplete"
    """It broke, or ended without saying that it was done."""
    UPSTREAM_STALLED = "upstream_stalled"
    SHUTDOWN = "shutdown"
    LEASE_LAPSED = "lease_lapsed"
    TOO_LONG = "too_long"
    """It ran longer than any answer may."""
    FAILED = "failed"
    """A mistake of ours."""


# Nothing was asked of the upstream, or it said no: free whatever was seen.
_FREE = frozenset({Ending.CLIENT_LEFT_UNSENT, Ending.UPSTREAM_REFUSED, Ending.UPSTREAM_UNREACHABLE})
# The upstream did its work, or would have but for the client: the prompt is charged even if no text came.
_CHARGED = frozenset({Ending.COMPLETE, Ending.CLIENT_LEFT, Ending.CLIENT_LEFT_CUT})


class SettlingLedger(Protocol):
    """The part of ``BatchedLedger`` that ends holds. Both take the row at once and repeat it until it is answered."""

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]": ...
    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]": ...


Count = Callable[[Meter | None], Awaitable[tuple[int, int]]]
"""Counts what the upstream didn't report: the tokens of the prompt, and those of what was said (0 without a meter)."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an exchange is opened with: all that its charge will need. Amounts are microcredits."""

    hold_id: UUID
    account_id: UUID
    key_id: str
    worker_id: UUID
    route: Route
    variant: Variant
    price_version: str
    bounds: Bounds
    output_possible: int
    """The most output tokens, over all choices, were the client's own cap ignored."""
    granted: int
    stream: bool
    cap_sent: int | None
    """The output cap that was sent because of the balance, for each choice; None where none was."""
    count: Count


class Exchange:
    """One request in flight: open until ``close``. What the pump learns on the way stands here, for the receipt."""

    def __init__(self, ticket: Ticket, closed: "Callable[[Exchange], None]", opened_at: float) -> None:
        self.ticket = ticket
        self.opened_at = opened_at
        """The loop's time, as every time here."""
        self.meter: Meter | None = None
        self.ending: Ending | None = None
        self.sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.upstream_status: int | None = None
        self.upstream_request_id: str | None = None
        self.cut: Callable[[Ending], None] = self.close
        """Stops the work on the answer, whatever it is at, and closes with that ending. The pump puts its own here."""
        self._closed = closed

    def close(self, ending: Ending) -> None:
        """The answer has ended so. Never waits, never raises; only the first call counts."""
        if self.ending is None:
            self.ending = ending
            self._closed(self)


@dataclass(frozen=True, slots=True)
class Due:
    """What an ended answer costs. ``capped`` says why ``charge`` is less than the usage costs, where it is."""

    charge: int
    usage: Usage
    source: UsageSource
    capped: str | None
    flags: tuple[str, ...] = ()
    """What was odd about the report or the count."""


class Settler:
    """The registry of exchanges, and the owner of every task that works on one.

    ``seconds_max`` bounds an exchange's life; it is looked at every ``tick_seconds``.
    """

    def __init__(
        self,
        ledger: SettlingLedger,
        *,
        metrics: Metrics,
        seconds_max: float = EXCHANGE_SECONDS_MAX,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._seconds_max = seconds_max
        self._tick_seconds = tick_seconds
        self._open: set[Exchange] = set()
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

    @property
    def unsettled(self) -> int:
        """Exchanges that have ended and whose charge the ledger hasn't confirmed."""
        return self._settling

    def open(self, ticket: Ticket) -> Exchange:
        """Register a granted hold. Synchronous: between the grant and this there is nothing to be cancelled."""
        exchange = Exchange(ticket, self._settle, asyncio.get_running_loop().time())
        self._open.add(exchange)
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

        Exchanges that are still open after the limit are cut, and get a moment more to settle.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        await self._wait_until(loop.time() + limit_seconds)
        if self._tasks or self._open:
            self.cut_all(Ending.SHUTDOWN)
            await self._wait_until(loop.time() + SETTLE_SECONDS)
        if self._ticker is not None:
            self._ticker.cancel()
        return not self._tasks and not self._open and not self._settling

    async def _wait_until(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while (self._tasks or self._open or self._settling) and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    # Looking after open exchanges.

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._tick_seconds)
            now = loop.time()
            for exchange in list(self._open):
                if now - exchange.opened_at > self._seconds_max:
                    exchange.cut(Ending.TOO_LONG)

    def _disown(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of an exchange failed", exc_info=error)

    # Settling.

    def _settle(self, exchange: Exchange) -> None:
        self._open.discard(exchange)
        self._settling += 1
        self.own(self._end_hold(exchange))

    async def _end_hold(self, exchange: Exchange) -> None:
        try:
            due = await self._due(exchange)
            if due is None:
                await self._release(exchange)
            else:
                await self._charge(exchange, due)
        except Exception as error:
            # The ledger has stopped or rejects the row: the sweeper will settle the hold when this worker is gone.
            log.error(
                "a hold was left open", request_id=str(exchange.ticket.hold_id), ending=exchange.ending, exc_info=error
            )
        finally:
            self._settling -= 1

    async def _due(self, exchange: Exchange) -> Due | None:
        """What the answer costs; None where it is free."""
        try:
            return await _due(exchange)
        except Exception as error:
            # A mistake of ours in counting must not become free service, nor leave the hold open.
            ticket = exchange.ticket
            log.error("usage can't be found", request_id=str(ticket.hold_id), exc_info=error)
            usage = Usage(input=ticket.bounds.input, output=ticket.bounds.output)
            return Due(min(ticket.granted, charge(ticket.variant.price, usage)), usage, "counted", "uncountable")

    async def _release(self, exchange: Exchange) -> None:
        ticket = exchange.ticket
        await self._ledger.release(ticket.hold_id, ticket.account_id, ticket.worker_id)
        self._metrics.hold_released(ticket.granted)
        log.info("released", request_id=str(ticket.hold_id), ending=exchange.ending)

    async def _charge(self, exchange: Exchange, due: Due) -> None:
        ticket = exchange.ticket
        result = await self._ledger.finalize(_finalize(exchange, due))
        self._metrics.hold_charged(
            charge=result.charge, released=ticket.granted - result.charge, overrun=result.overrun
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


async def _due(exchange: Exchange) -> Due | None:
    ticket, meter, ending = exchange.ticket, exchange.meter, exchange.ending
    if ending in _FREE:
        return None
    quirks = ticket.route.upstream.quirks
    if meter is None or not (meter.delivered or meter.reported(quirks)):
        if ending not in _CHARGED:
            return None
        prompt, _ = await ticket.count(None)
        return _counted(ticket, Usage(input=prompt), "counted")
    prompt, said = await ticket.count(meter) if needs_count(meter, quirks) else (0, 0)
    found = reckon(meter, quirks, counted_input=prompt, counted_output=said, bounds=ticket.bounds)
    reported = found.source == "reported"
    due = _reported(ticket, found.usage) if reported else _counted(ticket, found.usage, found.source)
    return replace(due, flags=found.flags)


def _counted(ticket: Ticket, usage: Usage, source: UsageSource) -> Due:
    cost = charge(ticket.variant.price, usage)
    return Due(min(cost, ticket.granted), usage, source, COUNTED_ABOVE_HOLD if cost > ticket.granted else None)


def _reported(ticket: Ticket, usage: Usage) -> Due:
    cost = charge(ticket.variant.price, usage)
    tokens_in = usage.input + usage.cached_input + usage.cache_write + usage.audio_input
    tokens_out = usage.output + usage.reasoning + usage.audio_output
    times = BELIEVED_TIMES_POSSIBLE
    believed = tokens_in <= times * ticket.bounds.input and tokens_out <= times * ticket.output_possible
    if believed or cost <= ticket.granted:
        return Due(cost, usage, "reported", None)
    return Due(ticket.granted, usage, "reported", IMPLAUSIBLE)


def _finalize(exchange: Exchange, due: Due) -> Finalize:
    ticket, ending = exchange.ticket, exchange.ending
    assert ending is not None
    facts = json.dumps(
        [str(ticket.hold_id), due.charge, due.usage.as_tuple(), due.source, ticket.price_version, ending]
    )
    return Finalize(
        hold_id=ticket.hold_id,
        account_id=ticket.account_id,
        key_id=ticket.key_id,
        worker_id=ticket.worker_id,
        charge=due.charge,
        usage=due.usage,
        usage_source=due.source,
        price_version=ticket.price_version,
        model=ticket.route.model,
        variant=ticket.variant.name,
        ending=ending,
        receipt=json.dumps(_receipt(exchange, due)),
        fingerprint=hashlib.sha256(facts.encode()).digest(),
        capped=due.capped,
    )


def _receipt(exchange: Exchange, due: Due) -> dict[str, Any]:
    """What a person who asks about the charge needs beside the figures: never a word of the prompt or the answer."""
    ticket, meter = exchange.ticket, exchange.meter
    raw = None if meter is None else meter.usage_json()
    return {
        "stream": ticket.stream,
        "upstream": ticket.route.upstream.name,
        "upstream_model": ticket.route.upstream_model,
        "upstream_status": exchange.upstream_status,
        "upstream_request_id": exchange.upstream_request_id,
        "usage_reported": None if raw is None else json.loads(raw),
        "finish_reasons": [] if meter is None else meter.finish_reasons,
        "cap_sent": ticket.cap_sent,
        "capped": due.capped,
        "usage_flags": due.flags,
        "seconds_to_first_byte": _between(exchange.sent_at, exchange.first_byte_at),
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)
