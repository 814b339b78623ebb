"""The relay: reads an upstream's answer to its end, whatever the client does, and meters it on the way.

The *pump* runs in a task of the settler's, not of the request's. It puts what it reads into a bounded channel, feeds
the dialect's decoder, and closes the exchange with how the answer ended. When the client leaves, it reads on without
one, or stops, as ``departure.py`` has it.

What the client may never see is a cut answer that looks whole: an upstream that breaks, stalls or stops without having
said that it was done ends in an error event and a broken socket.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import structlog

from proxy.core.catalog import Upstream
from proxy.core.errors import OutOfCredits, Refusal, Unavailable, UpstreamError
from proxy.core.excerpt import Excerpt
from proxy.core.meter import Ending as AnswerEnding
from proxy.core.meter import Meter
from proxy.core.sse import AnswerTooLarge
from proxy.dialects.dialect import Decoder, Dialect
from proxy.gateway.channel import Channel, Head
from proxy.gateway.departure import CutBy, Departure, Drains
from proxy.gateway.exchange import Ending, Exchange
from proxy.gateway.headers import Headers, answer_headers
from proxy.gateway.keepalive import KeepAlive
from proxy.gateway.settle import Settler
from proxy.gateway.steps import NotHeld, Stepper
from proxy.gateway.upstream import (
    Answer,
    UpstreamBroken,
    UpstreamClient,
    UpstreamFault,
    UpstreamStalled,
    UpstreamUnreachable,
)

__all__ = ["Order", "Pump", "Relay"]

log = structlog.get_logger("farebox.relay")

# An answer that isn't a stream is relayed when it is whole, so that one cut short can be refused with a status.
BODY_BYTES_MAX = 64 * 1024 * 1024
ERROR_BYTES_MAX = 1024 * 1024
# How long an upstream may keep its socket open after [DONE]: the client has everything and is waiting for the end.
TAIL_SECONDS = 5.0
# Shorter keys are placeholders ("ollama", "none"), and words that an answer may well contain.
SECRET_BYTES_MIN = 16
# Blanks that are looked through for an answer's beginning.
SNIFFED_BYTES_MAX = 4_096

_STREAM_HEADERS: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


@dataclass(frozen=True, slots=True)
class Order:
    """What to send to which upstream. ``secret`` is the upstream's key, to be kept out of what the client sees."""

    upstream: Upstream
    dialect: Dialect
    path: str
    headers: Headers
    body: bytes
    stream: bool
    choices: int
    usage_asked: bool
    usage_forced: bool
    secret: str | None


class Relay:
    """Starts pumps.

    ``drains_max`` bounds how many answers are read on at once for clients that have left. A stream that is silent for
    ``keepalive_seconds`` gets a comment; 0: none does.
    """

    def __init__(
        self,
        client: UpstreamClient,
        settler: Settler,
        stepper: Stepper,
        *,
        drains_max: int = 500,
        keepalive_seconds: float = 15.0,
    ) -> None:
        self.client = client
        self.settler = settler
        self.stepper = stepper
        self.drains = Drains(drains_max)
        self.keepalive_seconds = keepalive_seconds

    def start(self, exchange: Exchange, order: Order, channel: Channel) -> "Pump":
        """Send the order; its answer comes through the channel."""
        pump = Pump(self, exchange, order, channel)
        pump.start()
        return pump


class Pump:
    """The reading of one answer."""

    def __init__(self, relay: Relay, exchange: Exchange, order: Order, channel: Channel) -> None:
        self.channel = channel
        self._relay = relay
        self._exchange = exchange
        self._order = order
        self._allowance = relay.stepper.allow(exchange)
        self._decoder: Decoder | None = None
        self._departure: Departure | None = None
        self._keepalive = KeepAlive(self.channel, relay.keepalive_seconds, self._may_comment)
        self._is_stream = False
        secret = (order.secret or "").encode()
        self._secret = secret if len(secret) >= SECRET_BYTES_MIN else None
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin, in a task that no request owns."""
        self._exchange.cut = self.cut
        self._exchange.progress.channel = self.channel
        self._task = self._relay.settler.own(self._run())

    def client_left(self) -> None:
        """Nobody reads any more: read on, or stop."""
        self.channel.abandon()
        self._keepalive.stop()
        if self._departure is None and self._exchange.ending is None:
            self._departure = Departure(self._exchange, self._relay.drains, self.cut, kept=self.channel.is_kept)
            self._departure.begin()

    def cut(self, ending: Ending) -> None:
        """End it now. It closes the exchange itself: a task that is cancelled before its first step never runs."""
        self._exchange.close(ending)
        self._give_up(_refusal(ending))
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        answer: Answer | None = None
        order, exchange = self._order, self._exchange
        if self._allowance is not None:
            self._allowance.start()
        try:
            exchange.sent_at = self._loop.time()
            answer = await self._relay.client.post(order.upstream, order.path, order.headers, order.body, self._asked)
            self._asked()
            await self._read(answer)
        except (UpstreamFault, AnswerTooLarge) as fault:
            ending = _ENDINGS.get(type(fault), Ending.UPSTREAM_INCOMPLETE)
            log.warning(
                "upstream failed",
                upstream=order.upstream.name,
                request_id=str(exchange.ticket.hold_id),
                reason=str(fault),
            )
            exchange.close(ending)
            self._give_up(_refusal(ending))
        except NotHeld as spent:
            exchange.close(spent.ending)
            self._give_up(_refusal(spent.ending))
        except asyncio.CancelledError:
            self.cut(Ending.SHUTDOWN)
            raise
        except Exception as error:
            log.error("relay failed", request_id=str(exchange.ticket.hold_id), exc_info=error)
            exchange.close(Ending.FAILED)
            self._give_up(_refusal(Ending.FAILED))
        finally:
            if self._allowance is not None:
                self._allowance.stop()
            self._keepalive.stop()
            if self._departure is not None:
                self._departure.end()
            if answer is not None:
                await answer.close()

    def _asked(self) -> None:
        """The upstream has the whole request, or answers without waiting for it."""
        if self._exchange.asked_at is None:
            self._exchange.asked_at = self._loop.time()

    def _give_up(self, refusal: Refusal) -> None:
        """No whole answer will come: a status where none was sent, else a broken end."""
        if self.channel.started:
            # In the middle of an event, one of our own would only make it unreadable; the broken socket says enough.
            between = self._decoder is None or self._decoder.between_events
            self.channel.break_off(_error_event(refusal) if between else b"")
        else:
            self.channel.fail(refusal)

    def _clean(self, data: bytes) -> bytes:
        """Without the upstream's key: some repeat it in their errors, and those may come with a 200 or in a stream."""
        if self._secret is None or self._secret not in data:
            return data
        return data.replace(self._secret, b"[redacted]")

    def _close(self, ending: Ending) -> None:
        left = self._departure is not None and ending is Ending.COMPLETE
        self._exchange.close(Ending.CLIENT_LEFT if left else ending)

    # One answer, by what it is.

    async def _read(self, answer: Answer) -> None:
        exchange = self._exchange
        exchange.upstream_status = answer.status
        headers = [(name, self._clean(value)) for name, value in answer_headers(answer.headers)]
        exchange.upstream_request_id = _text(headers, b"x-upstream-request-id")
        if not 200 <= answer.status < 300:
            await self._refuse(answer, headers)
        elif _is_encoded(answer):
            exchange.close(Ending.UPSTREAM_REFUSED)
            self.channel.fail(_upstream_error("upstream_encoded", "The upstream sent a compressed answer unasked."))
        elif self._order.stream:
            await self._read_streamed(Head(answer.status, headers), answer.chunks())
        else:
            await self._read_body(Head(answer.status, headers), answer.chunks())

    async def _read_streamed(self, head: Head, chunks: AsyncIterator[bytes]) -> None:
        """An answer that should be a stream. One in a single piece is passed on when it is whole, like any such."""
        self._is_stream = _is_event_stream(head.headers)
        if not self._is_stream:
            # Content types lie both ways; the first bytes don't.
            chunks, is_stream = await _sniffed(chunks, self._order.dialect)
            if not is_stream:
                await self._read_body(head, chunks)
                return
        self.channel.start(Head(head.status, [*head.headers, *_STREAM_HEADERS]))
        self._keepalive.start()
        await self._read_stream(chunks)

    def _may_comment(self) -> bool:
        """Whether a comment may stand here: in a stream that has begun as one and isn't over, between two events."""
        decoder = self._decoder
        if decoder is None or self._exchange.ending is not None or decoder.meter.done:
            return False
        return decoder.between_events and (self._is_stream or decoder.meter.chunks > 0)

    async def _read_stream(self, chunks: AsyncIterator[bytes]) -> None:
        order = self._order
        decoder = self._decoder = order.dialect.stream_decoder(
            order.usage_asked, usage_forced=order.usage_forced, choices=order.choices
        )
        meter = self._exchange.meter = decoder.meter
        async for chunk in chunks:
            if self._exchange.first_byte_at is None:
                self._exchange.first_byte_at = self._loop.time()
            await self._pass_on(decoder, chunk)
            if meter.done:
                await self._read_tail(decoder, chunks)
                break
        if self._allowance is not None:
            await self._pass(decoder, self._allowance.rest())
        before = Excerpt.of(meter)
        last = decoder.finish()
        if not await self._secured(before, meter):
            return
        ending = _STREAM_ENDINGS[meter.ending]
        self._close(ending)
        if ending is Ending.UPSTREAM_INCOMPLETE:
            self._give_up(_refusal(ending))
        else:
            # An error that the upstream sent as an event has been passed on: the client knows.
            self.channel.put_at_once(self._clean(last))
            self.channel.end()

    async def _pass_on(self, decoder: Decoder, chunk: bytes) -> None:
        if self._allowance is None or self._allowance.inert:
            await self._pass(decoder, chunk)
            return
        for piece in self._allowance.pieces(chunk):
            await self._pass(decoder, piece)

    async def _pass(self, decoder: Decoder, piece: bytes) -> None:
        """Meter it, hold what it costs, deliver it. Raises NotHeld."""
        exchange, meter = self._exchange, decoder.meter
        allowance = self._allowance
        before = None if allowance is None or allowance.inert else Excerpt.of(meter)
        exchange.progress.hold_back()
        data = decoder.feed(piece)
        if exchange.first_said_at is None and meter.delivered:
            exchange.first_said_at = self._loop.time()
        if meter.done and meter.usage_final:
            # Before the client sees it: some clients close at [DONE], and then ask for their balance. Where no report
            # has come yet, one may still come behind the end mark.
            self._close(_STREAM_ENDINGS[meter.ending])
        if before is not None and not await self._secured(before, meter):
            return
        exchange.progress.holding = False
        if data:
            self._keepalive.spoken()
            await self.channel.put(self._clean(data))
        if self._departure is not None:
            await self._departure.look()

    async def _secured(self, before: Excerpt, meter: Meter) -> bool:
        """Wait until what the meter has seen since ``before`` is held. Raises NotHeld; False where nobody reads it."""
        exchange, allowance = self._exchange, self._allowance
        if allowance is None or exchange.ending is not None or before.text_bytes == meter.text_bytes:
            return True
        if allowance.covers():
            return True
        # Whatever ends the answer while it waits: what is kept back here was not delivered.
        exchange.delivered = before
        try:
            await allowance.secure()
        except NotHeld:
            if self._departure is None:
                raise
            self._departure.cut(CutBy.HOLD)
            return False
        if exchange.ending is None:
            exchange.delivered = None
        return True

    async def _read_tail(self, decoder: Decoder, chunks: AsyncIterator[bytes]) -> None:
        """What comes after the end mark, if anything does: the answer is whole, so nothing here can spoil it."""
        try:
            async with asyncio.timeout(TAIL_SECONDS):
                async for chunk in chunks:
                    await self._pass_on(decoder, chunk)
        except (TimeoutError, UpstreamFault, AnswerTooLarge) as error:
            log.debug("upstream kept open after the end", upstream=self._order.upstream.name, reason=str(error))

    async def _read_body(self, head: Head, chunks: AsyncIterator[bytes]) -> None:
        """An answer in one piece, passed on when it is whole."""
        body = await self._read_all(chunks, BODY_BYTES_MAX)
        meter = self._exchange.meter = self._order.dialect.decode_body(body, choices=self._order.choices)
        if not meter.usage_final and not await self._secured(Excerpt.of(Meter()), meter):
            return
        self._close(_BODY_ENDINGS[meter.ending])
        if meter.ending is AnswerEnding.EMPTY:
            # It costs nothing, so it may not be an answer that only we failed to read.
            self.channel.fail(_upstream_error("upstream_unreadable", "The upstream's answer can't be read."))
        else:
            self._pass_whole(head, body)

    def _pass_whole(self, head: Head, body: bytes) -> None:
        body = self._clean(body)
        self.channel.start(Head(head.status, [*head.headers, (b"content-length", str(len(body)).encode())]))
        self.channel.put_at_once(body)
        self.channel.end()

    async def _refuse(self, answer: Answer, headers: Headers) -> None:
        """An answer that isn't a success. The hold is given back before the client reads why."""
        body = await self._read_error(answer)
        self._close(Ending.UPSTREAM_REFUSED)
        refusal = _operators_trouble(answer.status, body)
        if refusal is not None:
            log.error(
                "upstream refused the operator",
                upstream=self._order.upstream.name,
                status=answer.status,
                code=refusal.code,
            )
            self.channel.fail(refusal)
            return
        if self._order.secret:
            body = body.replace(self._order.secret.encode(), b"[redacted]")
        self._pass_whole(Head(answer.status, headers), _OPERATORS_IDS.sub(rb"\1[redacted]", body))

    async def _read_error(self, answer: Answer) -> bytes:
        """The body of a refusal; one of our own where that can't be read."""
        try:
            if not _is_encoded(answer):
                return await self._read_all(answer.chunks(), ERROR_BYTES_MAX)
            reason = "it is encoded"
        except (UpstreamFault, AnswerTooLarge) as error:
            reason = str(error)
        log.warning("upstream's error can't be read", upstream=self._order.upstream.name, reason=reason)
        message = f"The upstream refused with status {answer.status}, and its reason can't be read."
        return json.dumps(_upstream_error("upstream_unreadable", message).body()).encode()

    async def _read_all(self, chunks: AsyncIterator[bytes], bytes_max: int) -> bytes:
        """Everything, in one piece. Raises AnswerTooLarge."""
        parts: list[bytes] = []
        size = 0
        async for chunk in chunks:
            if self._exchange.first_byte_at is None:
                self._exchange.first_byte_at = self._loop.time()
            size += len(chunk)
            if size > bytes_max:
                raise AnswerTooLarge(f"the upstream's answer is larger than {bytes_max} bytes")
            parts.append(chunk)
        return b"".join(parts)


def _operators_trouble(status: int, body: bytes) -> Refusal | None:
    """Our own refusal, where the upstream refuses the operator and not the client; its body then stays here.

    Passed on as it is, a 401 would tell an app that *its* key is bad.
    """
    if status == 429 and not _is_quota(body):
        return None
    return _upstream_error(*_OPERATORS[status], retry=False) if status in _OPERATORS else _no_error(status)


def _no_error(status: int) -> Refusal | None:
    if status < 400:
        return _upstream_error("upstream_redirect", "The upstream answered with a redirect, which isn't followed.")
    if status > 599:
        return _upstream_error("upstream_status", f"The upstream answered with status {status}, which HTTP hasn't.")
    return None


def _is_event_stream(headers: Headers) -> bool:
    return (_text(headers, b"content-type") or "").lower().startswith("text/event-stream")


async def _sniffed(chunks: AsyncIterator[bytes], dialect: Dialect) -> tuple[AsyncIterator[bytes], bool]:
    """The same chunks, and whether they are a stream. Waits for the first that tells."""
    first = b""
    is_stream = None
    async for chunk in chunks:
        first += chunk
        is_stream = dialect.is_stream(first)
        if is_stream is not None or len(first) > SNIFFED_BYTES_MAX:
            break

    async def again() -> AsyncIterator[bytes]:
        if first:
            yield first
        async for chunk in chunks:
            yield chunk

    return again(), is_stream is not False


def _is_encoded(answer: Answer) -> bool:
    return _text(answer.headers, b"content-encoding") not in (None, "", "identity")


def _is_quota(body: bytes) -> bool:
    """Whether a 429 says that the operator's account is empty, which no retry of the client's mends."""
    try:
        error = json.loads(body).get("error")
        return "insufficient_quota" in (error.get("code"), error.get("type"))
    except (ValueError, AttributeError, RecursionError):
        return False


def _text(headers: Headers, name: bytes) -> str | None:
    for key, value in headers:
        if key.lower() == name:
            return value.decode("latin-1").strip()
    return None


def _error_event(refusal: Refusal) -> bytes:
    return b"data: " + json.dumps(refusal.body()).encode() + b"\n\n"


def _upstream_error(code: str, message: str, *, retry: bool = True) -> UpstreamError:
    return UpstreamError(message, code=code, headers={} if retry else {"x-should-retry": "false"})


def _refusal(ending: Ending) -> Refusal:
    """What the client is told of an ending that isn't its own."""
    kind, code, message = _TOLD[ending]
    return kind(message, code=code)


# Whose account at the provider pays: rate limit errors tell it.
_OPERATORS_IDS = re.compile(rb"\b(org-|proj_)[A-Za-z0-9]{6,}")

_CREDENTIALS = ("upstream_credentials", "The upstream refused Farebox's own credentials. Your API key is not at fault.")
_QUOTA = ("upstream_quota", "The upstream refused: the operator's account there is exhausted. Your credits are not.")
_OPERATORS = {401: _CREDENTIALS, 403: _CREDENTIALS, 407: _CREDENTIALS, 402: _QUOTA, 429: _QUOTA}

_ENDINGS: Mapping[type[Exception], Ending] = {
    UpstreamUnreachable: Ending.UPSTREAM_UNREACHABLE,
    UpstreamStalled: Ending.UPSTREAM_STALLED,
    UpstreamBroken: Ending.UPSTREAM_INCOMPLETE,
}

_STREAM_ENDINGS: Mapping[AnswerEnding, Ending] = {
    AnswerEnding.COMPLETE: Ending.COMPLETE,
    AnswerEnding.ERROR: Ending.UPSTREAM_ERROR,
    AnswerEnding.TRUNCATED: Ending.UPSTREAM_INCOMPLETE,
    AnswerEnding.EMPTY: Ending.UPSTREAM_INCOMPLETE,
}
# A body that came to its end is what the upstream had to say, even if it isn't an answer: it is passed on, and free.
_BODY_ENDINGS: Mapping[AnswerEnding, Ending] = {
    AnswerEnding.COMPLETE: Ending.COMPLETE,
    AnswerEnding.ERROR: Ending.UPSTREAM_ERROR,
    AnswerEnding.TRUNCATED: Ending.UPSTREAM_ERROR,
    AnswerEnding.EMPTY: Ending.UPSTREAM_ERROR,
}

_SPENT = "The account's credits ran out during this answer. What was delivered is charged; top the account up for more."
_LIMITED = "The API key's own spend limit was reached during this answer. What was delivered is charged."
_UNHELD = "Credits for more of this answer can't be held at the moment. What was delivered is charged; please retry."
_BROKEN = "The upstream's answer broke off before its end."
_TOLD: Mapping[Ending, tuple[type[Refusal], str, str]] = {
    Ending.UPSTREAM_UNREACHABLE: (UpstreamError, "upstream_unreachable", "The upstream can't be reached."),
    Ending.UPSTREAM_STALLED: (UpstreamError, "upstream_timeout", "The upstream didn't answer in time."),
    Ending.UPSTREAM_INCOMPLETE: (UpstreamError, "upstream_incomplete", _BROKEN),
    Ending.CLIENT_LEFT_CUT: (UpstreamError, "client_left", "The client left."),
    Ending.CLIENT_LEFT_UNSENT: (UpstreamError, "client_left", "The client left."),
    Ending.UPSTREAM_REFUSED: (UpstreamError, "client_left", "The client left."),
    Ending.SHUTDOWN: (Unavailable, "shutting_down", "Farebox is shutting down; what was answered so far is charged."),
    Ending.LEASE_LAPSED: (Unavailable, "ledger_unavailable", "Farebox lost its ledger and had to stop this answer."),
    Ending.TOO_LONG: (UpstreamError, "upstream_too_long", "The answer took longer than any answer may."),
    Ending.OUT_OF_CREDITS: (OutOfCredits, "insufficient_quota", _SPENT),
    Ending.SPEND_LIMIT: (OutOfCredits, "spend_limit_reached", _LIMITED),
    Ending.LEDGER_LOST: (Unavailable, "ledger_unavailable", _UNHELD),
    Ending.FAILED: (Unavailable, "internal_error", "Farebox failed while it relayed this answer."),
}
