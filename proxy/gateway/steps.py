"""Holding in steps: a stream's hold begins small and grows while the answer does, so that nobody is refused for a
maximum that nobody reaches.

A hold carries the prompt and so many tokens of output. When 80 % of the last slice is metered, the next one is asked
for: it is there before it is needed, and nothing waits. The rules:

- What isn't held isn't delivered. Where the meter's bound goes above the hold the text is counted exactly, and where
  that does too, the stream waits until more is held, or ends. Only text counts: what comes after an answer's last word,
  its usage above all, is never kept back.
- Slices double, so that a long answer asks a few times more than a short one. Of an account that has little, each takes
  a small part, so that many streams at once can share it.
- Credits that other calls hold, and a ledger that doesn't answer, are waited for: so long as a reserve may take, and no
  longer. What the account doesn't have, or its key may not spend, isn't waited for.
- Reasoning that isn't shown is metered by the time that it takes, also while nothing comes.
"""

import asyncio
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol
from uuid import UUID

import structlog

from proxy.core.catalog import Route
from proxy.core.money import AMOUNT_MAX
from proxy.core.pricing import Bounds, Price, affordable_output, quote
from proxy.gateway.departure import CutBy
from proxy.gateway.exchange import Ending, Exchange
from proxy.ledger.errors import LedgerError, LedgerUnavailable
from proxy.ledger.records import Extend, Extended, ExtendOutcome
from proxy.metrics import Metrics

__all__ = ["Allowance", "NotHeld", "StepSettings", "Stepper"]

log = structlog.get_logger("farebox.steps")

# A new slice is asked for when this much of the last one is left.
LEFT_SHARE = 5
# The largest slice, in first ones.
SLICE_TIMES_MAX = 8
# Where an account has less than so many slices, each is so small a part of what it has.
SLICES_IN_AVAILABLE = 64
# The least slice that is asked for while an answer runs.
GROWTH_TOKENS_MIN = 16
ACCOUNTS_SEEN_MAX = 10_000
POLL_SECONDS_MIN = 0.05
POLL_SECONDS_MAX = 0.25
LOOK_SECONDS = 1.0
# An event that is longer than this is too long for the decoder, too.
CARRIED_BYTES_MAX = 16 * 1024 * 1024

# Tokens that no answer has: for whoever may have as many as it likes.
_ALL = 2**62


class NotHeld(Exception):
    """What has come can't be held: the answer ends here, and so."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending


class ExtendingLedger(Protocol):
    """The part of ``BatchedLedger`` that lets holds grow."""

    async def extend(self, row: Extend) -> Extended:
        """Let an open hold grow; raises LedgerError."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """``tokens``: the first slice of output, for each choice, at most; 0: all is held at once.

    ``tokens_min``: the least slice. ``wait_seconds``: how long a stream may wait for credits that others hold, or for
    the ledger.
    """

    tokens: int = 1_000
    tokens_min: int = 64
    wait_seconds: float = 5.0


Own = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Stepper:
    """One for a worker: how large slices are, and the making of allowances."""

    def __init__(
        self, ledger: ExtendingLedger, *, own: Own, metrics: Metrics, settings: StepSettings | None = None
    ) -> None:
        self.ledger = ledger
        self.own = own
        self.metrics = metrics
        self.settings = settings or StepSettings()
        self._seen: OrderedDict[UUID, int] = OrderedDict()

    def saw(self, account_id: UUID, available: int) -> None:
        """What that account had available, in microcredits, when the ledger last spoke of it."""
        self._seen[account_id] = available
        self._seen.move_to_end(account_id)
        if len(self._seen) > ACCOUNTS_SEEN_MAX:
            self._seen.popitem(last=False)

    def slice_tokens(self, account_id: UUID, price: Price, bounds: Bounds, *, most: int, least: int) -> int:
        """As many output tokens as a call of that account had better hold at once: the account's wealth says it."""
        least = min(least, most)
        seen = self._seen.get(account_id)
        if seen is None:
            return least
        output_alone = replace(bounds, input=0, output=_ALL)
        plenty = affordable_output(price, output_alone, seen + price.per_request) // SLICES_IN_AVAILABLE
        return max(least, min(most, plenty))

    def first_tokens(self, account_id: UUID, price: Price, bounds: Bounds, route: Route) -> int | None:
        """The first slice, for each choice; None: hold everything at once. ``bounds`` are those of the whole answer."""
        if not self.settings.tokens or bounds.audio_out:
            # Sound can't be metered by its bytes.
            return None
        settings = self.settings
        tokens = self.slice_tokens(account_id, price, bounds, most=settings.tokens, least=settings.tokens_min)
        # What may be reasoned unseen before anybody looks.
        unseen = LOOK_SECONDS * route.reasoning_tokens_per_second if route.hidden_reasoning else 0
        return max(tokens, math.ceil(2 * unseen))

    def allow(self, exchange: Exchange) -> "Allowance | None":
        """What watches over this exchange; None where everything that it can cost is held."""
        ticket = exchange.ticket
        if not ticket.stream or exchange.granted >= min(quote(ticket.variant.price, ticket.bounds), AMOUNT_MAX):
            return None
        return Allowance(self, exchange)


class Allowance:
    """What one stream may deliver."""

    def __init__(self, stepper: Stepper, exchange: Exchange) -> None:
        ticket = exchange.ticket
        self._stepper = stepper
        self._exchange = exchange
        self._price = ticket.variant.price
        self._bounds = ticket.bounds
        self._whole = self._cost(self._bounds.output)
        self._loop = asyncio.get_running_loop()
        self._growing = asyncio.Lock()
        self._asking: asyncio.Task[None] | None = None
        self._ask_again_at = 0.0
        self._securing = False
        self._timer: asyncio.TimerHandle | None = None
        self._carried = bytearray()
        self._covered = self._ask_at = 0
        self._slice = min(affordable_output(self._price, self._bounds, exchange.granted), self._bounds.output)
        self._take(exchange.granted)

    def start(self) -> None:
        """Look after it also while nothing comes, if it may be reasoning then."""
        if self._exchange.ticket.route.hidden_reasoning:
            self._look_later()

    def stop(self) -> None:
        """The answer is over."""
        if self._timer is not None:
            self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    # What is delivered.

    @property
    def inert(self) -> bool:
        """Whether all is held by now, so that there is nothing to watch over."""
        return self._covered == _ALL and not self._carried

    def pieces(self, chunk: bytes) -> list[bytes]:
        """The chunk, to be passed on piece by piece: whole events, one by one where the hold is nearly used up.

        An event that isn't all there yet is kept for the next chunk: the client couldn't read it anyway.
        """
        data = self._whole_events(chunk)
        if not data:
            return []
        # No text has more tokens than bytes; twice that, for what a provider adds to each.
        if self._exchange.progress.metered + 2 * len(data) <= self._covered:
            return [data]
        return [found.group() for found in _EVENT.finditer(data)]

    def _whole_events(self, chunk: bytes) -> bytes:
        carried = self._carried
        if not carried and chunk.endswith(_EVENT_ENDS):
            return chunk
        # Only what is new is looked through, and the beginning of an end that it may complete.
        start, end = max(len(carried) - 3, 0), 0
        carried += chunk
        for found in _EVENT_END.finditer(carried, start):
            end = found.end()
        if len(carried) - end > CARRIED_BYTES_MAX:
            end = len(carried)
        data = bytes(carried[:end])
        del carried[:end]
        return data

    def rest(self) -> bytes:
        """The stream is over: what is left of it."""
        rest = bytes(self._carried)
        self._carried.clear()
        return rest

    def covers(self) -> bool:
        """Whether what has come is held, for certain. Asks for more in time."""
        metered = self._exchange.progress.metered
        if metered >= self._ask_at and self._asking is None and self._loop.time() >= self._ask_again_at:
            self._asking = self._stepper.own(self._ask())
        return metered <= self._covered

    async def secure(self) -> None:
        """Wait until what has come is held. Raises NotHeld where it never will be."""
        if self.covers():
            return
        self._securing = True
        try:
            await self._secure()
        finally:
            self._securing = False

    async def _secure(self) -> None:
        until, pause = self._loop.time() + self._stepper.settings.wait_seconds, POLL_SECONDS_MIN
        while self._exchange.ending is None:
            await self._exchange.progress.count()
            metered = self._exchange.progress.metered
            if metered <= self._covered:
                return
            outcome = await self._grow(metered, least=metered)
            if outcome is ExtendOutcome.EXTENDED:
                continue
            waiting = outcome is None or outcome in _PASSING
            left = until - self._loop.time()
            if not waiting or left <= 0:
                ending = _ENDINGS.get(outcome, Ending.LEDGER_LOST)
                self._stepper.metrics.answer_not_held(ending)
                self._exchange.cut_at = self._loop.time()
                raise NotHeld(ending)
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, POLL_SECONDS_MAX)

    # Growing.

    async def _ask(self) -> None:
        """In advance: the next slice, or as much of it as there is."""
        try:
            await self._exchange.progress.count()
            metered = self._exchange.progress.metered
            if metered < self._ask_at or self._exchange.ending is not None:
                return
            least = min(self._covered + GROWTH_TOKENS_MIN, self._bounds.output)
            if await self._grow(metered, least=least) is not ExtendOutcome.EXTENDED:
                self._ask_again_at = self._loop.time() + LOOK_SECONDS
        finally:
            self._asking = None

    async def _grow(self, metered: int, *, least: int) -> ExtendOutcome | None:
        """Hold another slice beyond ``metered`` tokens, at least ``least`` in all. None: the ledger didn't answer."""
        exchange, stepper, ticket = self._exchange, self._stepper, self._exchange.ticket
        async with self._growing:
            if least <= self._covered:
                return ExtendOutcome.EXTENDED
            most = max(self._slice, min(2 * self._slice, SLICE_TIMES_MAX * stepper.settings.tokens))
            self._slice = stepper.slice_tokens(
                ticket.account_id, self._price, self._bounds, most=most, least=GROWTH_TOKENS_MIN
            )
            at_least = self._cost(least)
            total = max(self._cost(max(metered, self._covered) + self._slice), at_least)
            # Until the ledger has answered: the exchange may be closed, and its charge reckoned, at any moment.
            before, exchange.hold_in_doubt = exchange.hold_in_doubt, True
            try:
                extended = await stepper.ledger.extend(
                    Extend(ticket.hold_id, ticket.account_id, ticket.worker_id, total, at_least)
                )
            except LedgerError as error:
                # It may have grown all the same: what ends the hold gives that back.
                stepper.metrics.hold_not_extended("failed")
                log.warning("a hold could not be extended", request_id=str(ticket.hold_id), reason=str(error))
                return None if isinstance(error, LedgerUnavailable) else ExtendOutcome.UNKNOWN
            if extended.outcome is ExtendOutcome.EXTENDED and extended.total >= total:
                # Otherwise: said again by the ledger, it may yet be carried out twice, and get then what wasn't to be
                # had before.
                exchange.hold_in_doubt = before
            self._told(extended)
            return extended.outcome

    def _told(self, extended: Extended) -> None:
        """The ledger has answered."""
        exchange, stepper = self._exchange, self._stepper
        if extended.outcome in _KNOWS_THE_ACCOUNT:
            stepper.saw(exchange.ticket.account_id, 0 if extended.debt else extended.balance - extended.held)
        if extended.outcome is not ExtendOutcome.EXTENDED:
            stepper.metrics.hold_not_extended(extended.outcome)
            return
        stepper.metrics.hold_extended(extended.total - exchange.granted)
        exchange.extensions += 1
        self._take(extended.total)

    def _cost(self, output: int) -> int:
        """Microcredits that hold so many output tokens, and what is billed beside them."""
        output = min(output + self._exchange.ticket.output_beside, self._bounds.output)
        return min(quote(self._price, replace(self._bounds, output=output)), AMOUNT_MAX)

    def _take(self, granted: int) -> None:
        """The hold holds so much now."""
        self._exchange.granted = granted
        if granted >= self._whole:
            self._covered = self._ask_at = _ALL
        else:
            self._covered = affordable_output(self._price, self._bounds, granted) - self._exchange.ticket.output_beside
            self._ask_at = self._covered - self._slice // LEFT_SHARE

    # While nothing comes.

    def _look_later(self) -> None:
        """When a model that thinks at its rate will have come to where more is asked for; soon, if it is there."""
        rate = self._exchange.ticket.route.reasoning_tokens_per_second
        left = max(self._ask_at - self._exchange.progress.metered, 0)
        soonest = POLL_SECONDS_MIN if left else POLL_SECONDS_MAX
        seconds = max(soonest, left / rate) if rate else LOOK_SECONDS
        self._timer = self._loop.call_later(min(seconds, LOOK_SECONDS), self._look)

    def _look(self) -> None:
        if self._exchange.ending is not None or self._covered == _ALL:
            return
        self._look_later()
        if not self.covers() and not self._securing:
            self._securing = True
            self._stepper.own(self._secure_or_cut())

    async def _secure_or_cut(self) -> None:
        try:
            await self._secure()
        except NotHeld as spent:
            if self._exchange.left_at is None:
                self._exchange.cut(spent.ending)
            else:
                self._exchange.cut_by = CutBy.HOLD
                self._exchange.cut(Ending.CLIENT_LEFT_CUT)
        finally:
            self._securing = False


_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_EVENT_END = re.compile(rb"\r?\n\r?\n|\r\r")
_EVENT = re.compile(rb".+?(?:\r?\n\r?\n|\r\r|\Z)", re.DOTALL)

# What may be otherwise a moment later.
_PASSING = frozenset({ExtendOutcome.CREDITS_HELD, ExtendOutcome.WORKER_LAPSED, ExtendOutcome.BUSY})
_KNOWS_THE_ACCOUNT = frozenset(
    {
        ExtendOutcome.EXTENDED,
        ExtendOutcome.INSUFFICIENT,
        ExtendOutcome.CREDITS_HELD,
        ExtendOutcome.SPEND_LIMIT,
    }
)
_ENDINGS: Mapping[ExtendOutcome | None, Ending] = {
    ExtendOutcome.INSUFFICIENT: Ending.OUT_OF_CREDITS,
    ExtendOutcome.CREDITS_HELD: Ending.OUT_OF_CREDITS,
    ExtendOutcome.SPEND_LIMIT: Ending.SPEND_LIMIT,
}
