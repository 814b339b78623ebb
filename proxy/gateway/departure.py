"""What becomes of an answer whose client has left: cut off, or read on to its report, and within what limits.

A client may take what it wanted to see and hang up before the usage comes, which stands last. So an answer is only cut
off where what was counted is as good as a report; the others are read on. That costs the operator a connection and the
customer the rest of the answer: it is limited in seconds, in tokens and in number.

- Nothing was sent to the upstream yet: nothing will be, and nothing is owed.
- The answer's text is complete and only its report is missing: that is waited for, whatever the policy, since nothing
  more will be written.
- The upstream has refused: the reason is of use to nobody.
- It is kept for a client that asks again under its Idempotency-Key: it is read on, unless a file says otherwise.
- Else the call's policy holds. An answer in one piece is always read on: what there is of it can't be counted.

What is cut off is charged as far as it was counted. A model that reasons unseen has then written more than was shown:
it is taken to have written its rate for as long as it was silent (METERING, rule 8).
"""

import asyncio
from collections.abc import Callable
from enum import StrEnum
from uuid import UUID

from proxy.core.catalog import OnDisconnect, Route
from proxy.core.chat import ChatRequest
from proxy.core.meter import Ending as AnswerEnding
from proxy.gateway.exchange import Ending, Exchange

__all__ = ["CutBy", "Departure", "Drains", "policy_of", "unseen_reasoning"]

# How long the report on a text that is complete is waited for, where the policy is to cancel.
REPORT_SECONDS = 5.0


_CUT_OFF = frozenset({Ending.CLIENT_LEFT_CUT, Ending.OUT_OF_CREDITS, Ending.SPEND_LIMIT})


class CutBy(StrEnum):
    """What an answer was cut off by, after its client had left; it stands in the receipt."""

    POLICY = "on_disconnect"
    SECONDS = "drain_seconds"
    TOKENS = "drain_tokens"
    NUMBER = "drains_max"
    HOLD = "hold"
    """More of it couldn't be held."""


def policy_of(route: Route, request: ChatRequest) -> OnDisconnect:
    """What becomes of the call's answer if its client leaves.

    Where no file states it, a call that is billed for more than the text that is seen, or whose prompt can't be
    counted, is read on, too, though its model by itself would be cancelled.
    """
    if not request.stream:
        return OnDisconnect.DRAIN
    if route.on_disconnect_stated or route.on_disconnect is OnDisconnect.DRAIN:
        return route.on_disconnect
    options = request.options
    uncounted = (
        options.hosted_tools,
        options.web_search,
        options.audio_out,
        options.prediction_bytes,
        options.reasoning_effort,
        request.encrypted_reasoning,
        request.attachments,
        any(image.width is None for image in request.images),
    )
    return OnDisconnect.DRAIN if any(uncounted) else OnDisconnect.CANCEL


class Drains:
    """The answers that are being read on, at most ``drains_max`` at once.

    One too many cuts off the oldest of the account that has the most: whoever opens many and leaves them takes the
    place of his own, never of other people's.
    """

    def __init__(self, drains_max: int) -> None:
        self.drains_max = drains_max
        self._by_account: dict[UUID, dict[Departure, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def join(self, departure: "Departure") -> None:
        """Read this answer on. It may be the one that is cut off for it."""
        self._by_account.setdefault(departure.account_id, {})[departure] = None
        self._count += 1
        if self._count > self.drains_max:
            most = max(self._by_account.values(), key=len)
            next(iter(most)).cut(CutBy.NUMBER)

    def leave(self, departure: "Departure") -> None:
        """It has ended. Twice is as good as once."""
        ours = self._by_account.get(departure.account_id, {})
        if departure in ours:
            del ours[departure]
            self._count -= 1
            if not ours:
                del self._by_account[departure.account_id]


class Departure:
    """One answer without a client. ``cut_off`` ends it; it is called at most once.

    ``kept``: the answer is kept for a client that asks for it again, so it isn't read for nobody.
    """

    def __init__(
        self, exchange: Exchange, drains: Drains, cut_off: Callable[[Ending], None], *, kept: bool = False
    ) -> None:
        self.account_id = exchange.ticket.account_id
        self._exchange = exchange
        self._drains = drains
        self._kept = kept
        self._cut_off = cut_off
        self._timers: list[asyncio.TimerHandle] = []
        self._said_at_leaving: int | None = None

    def begin(self) -> None:
        """The client has just left: cut the answer off, or set the limits to reading it on."""
        exchange, ticket = self._exchange, self._exchange.ticket
        exchange.left_at = asyncio.get_running_loop().time()
        if exchange.asked_at is None:
            self._cut_off(Ending.CLIENT_LEFT_UNSENT)
            return
        if exchange.upstream_status is not None and not 200 <= exchange.upstream_status < 300:
            self._cut_off(Ending.UPSTREAM_REFUSED)
            return
        said_all = exchange.meter is not None and exchange.meter.ending is AnswerEnding.COMPLETE
        wanted = self._kept and not ticket.route.on_disconnect_stated
        cancel = ticket.on_disconnect is OnDisconnect.CANCEL and not wanted
        if cancel and not said_all:
            self.cut(CutBy.POLICY)
            return
        if ticket.route.drain_tokens == 0 and not said_all:
            self.cut(CutBy.TOKENS)
            return
        self._after(REPORT_SECONDS if cancel else ticket.route.drain_seconds, self.cut, CutBy.SECONDS)
        if ticket.route.drain_tokens and ticket.route.reasoning_tokens_per_second:
            self._after(ticket.route.drain_tokens / ticket.route.reasoning_tokens_per_second, self._still_silent)
        self._drains.join(self)

    async def look(self) -> None:
        """More of the answer has come: cut it off where that is too much. Waits for a count only near the limit."""
        limit = self._exchange.ticket.route.drain_tokens
        if limit is None or self._exchange.ending is not None:
            return
        if self._said_at_leaving is None:
            self._said_at_leaving = await self._said()
            return
        # The first figure is an upper bound and costs nothing.
        at_most = self._exchange.progress.metered - self._said_at_leaving
        if at_most >= limit and await self._said() - self._said_at_leaving >= limit:
            self.cut(CutBy.TOKENS)

    def cut(self, by: CutBy) -> None:
        """A limit was reached."""
        exchange = self._exchange
        if exchange.cut_by is None:
            exchange.cut_by, exchange.cut_at = by, asyncio.get_running_loop().time()
            self.end()
            self._cut_off(Ending.CLIENT_LEFT_CUT)

    def end(self) -> None:
        """The answer has ended, however it did."""
        self._drains.leave(self)
        for timer in self._timers:
            timer.cancel()

    def _after(self, seconds: float, call: Callable[..., None], *values: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, call, *values))

    def _still_silent(self) -> None:
        """A model that reasons unseen has by now written as many tokens as may be read, were it at its usual rate."""
        if self._exchange.first_said_at is None:
            self.cut(CutBy.TOKENS)

    async def _said(self) -> int:
        usage = await self._exchange.progress.count()
        return usage.output + usage.reasoning + usage.audio_output


def unseen_reasoning(exchange: Exchange) -> int:
    """The tokens that a model which reasons unseen is taken to have written before it showed anything.

    For an answer that was cut off for its client's leaving, or since its account couldn't carry more of it; 0 where the
    upstream has told of its output, running or whole. The time from the request's end to the first text, or to the end
    where there was none, at the route's rate.
    """
    route, meter = exchange.ticket.route, exchange.meter
    if exchange.ending not in _CUT_OFF or exchange.asked_at is None or exchange.cut_at is None:
        return 0
    reported = None if meter is None else meter.reported(route.upstream.quirks)
    if reported is not None and reported.completion_known:
        return 0
    shown_at = exchange.cut_at if exchange.first_said_at is None else exchange.first_said_at
    return int((shown_at - exchange.asked_at) * route.reasoning_tokens_per_second)
