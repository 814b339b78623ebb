"""OpenAI's chat completions, as OpenAI and some forty others speak it.

Client bytes are the upstream's bytes. Three things alone may differ, and only where the client had not asked for usage:

- a chunk whose ``choices`` is ``[]``, whose ``usage`` is an object and that says nothing else is dropped;
- a ``"usage": null`` that our own ``include_usage`` caused is cut out of its chunk;
- nothing else.

So an answer to a client that asked is passed on without waiting for anything. Otherwise an event is held until its
last byte, since it may have to be dropped; everything outside of events goes at once.
"""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from proxy.core.bounds import FAMILIES
from proxy.core.catalog import Route
from proxy.core.chat import ChatRequest
from proxy.core.families import UNKNOWN
from proxy.core.meter import Meter
from proxy.core.spans import read_object, without_members
from proxy.core.sse import AnswerTooLarge, Piece, Splitter
from proxy.dialects.dialect import AnswerError, UpstreamRequest

__all__ = ["AnswerDecoder", "OpenAI"]

PATH = "/chat/completions"

# Members of a chunk without choices that only describe the answer. Any other that isn't empty is content.
_CONTENT = ("prompt_filter_results", "prompt_annotations", "content_filter_results", "moderation", "error")

_BODY_STARTS = (b"{", b"[", b"<")
_BLANKS_AND_BOM = b" \t\r\n\xef\xbb\xbf"


class OpenAI:
    """The dialect. It keeps nothing between calls."""

    def encode(self, request: ChatRequest, route: Route, output_cap: int | None = None) -> UpstreamRequest:
        """The client's body with the upstream's model name, ``include_usage`` and, where given, a cap."""
        include_usage = request.stream and route.upstream.quirks.include_usage
        body = request.rewritten(
            route.upstream_model,
            include_usage,
            output_cap,
            cap_key=FAMILIES.get(route.family, FAMILIES[UNKNOWN]).cap_key,
        )
        accept = "text/event-stream" if request.stream else "application/json"
        # identity: an encoded answer could not be metered as it passes.
        headers = {"content-type": "application/json", "accept": accept, "accept-encoding": "identity"}
        return UpstreamRequest(PATH, MappingProxyType(headers), body, include_usage and not request.usage_asked)

    def is_stream(self, first: bytes) -> bool | None:
        """An object, an array or HTML is an answer in one piece."""
        start = first.lstrip(_BLANKS_AND_BOM)
        return start[:1] not in _BODY_STARTS if start else None

    def stream_decoder(self, usage_asked: bool, *, usage_forced: bool = True, choices: int = 1) -> "AnswerDecoder":
        """A decoder for an answer that the client wants streamed."""
        return AnswerDecoder(usage_asked=usage_asked, usage_forced=usage_forced, choices=choices)

    def decode_body(self, body: bytes, *, choices: int = 1) -> Meter:
        """The meter of a whole answer; also of a stream that came where JSON was asked for."""
        decoder = AnswerDecoder(usage_asked=True, choices=choices, body_bytes_max=len(body), event_bytes_max=len(body))
        decoder.feed(body)
        decoder.finish()
        return decoder.meter

    def read_error(self, body: bytes) -> AnswerError | None:
        """What an error body says, in any of the shapes that providers use; None where it is none of them."""
        value = _first(_loads(body))
        return _error(value) if isinstance(value, dict) else None


class AnswerDecoder:
    """One answer. Whether it is a stream or a JSON body is seen from its first bytes: content types lie."""

    def __init__(
        self,
        *,
        usage_asked: bool,
        usage_forced: bool = True,
        choices: int = 1,
        event_bytes_max: int = 16 * 1024 * 1024,
        body_bytes_max: int = 64 * 1024 * 1024,
    ) -> None:
        """``usage_forced``: the upstream was asked for usage by us, not by the client."""
        self.meter = Meter(choices)
        self._as_it_comes = usage_asked
        self._cut_nulls = usage_forced and not usage_asked
        self._splitter = Splitter(event_bytes_max)
        self._body_bytes_max = body_bytes_max
        self._body: bytearray | None = None
        self._sniffing = True  # nothing but blanks so far
        self._dropped = False  # the last piece that didn't join another

    @property
    def between_events(self) -> bool:
        """Whether an event of our own could be sent to the client here."""
        # Unless bytes go as they come, what the splitter has begun to read the client hasn't seen.
        return not self._as_it_comes or self._splitter.between_events

    def feed(self, data: bytes) -> bytes:
        """The bytes that the client gets for these. Raises AnswerTooLarge."""
        if self._sniffing:
            self._sniff(data)
        if self._body is not None:
            self._body += data
            if len(self._body) > self._body_bytes_max:
                raise AnswerTooLarge(f"the answer is larger than {self._body_bytes_max} bytes")
            return b""
        pieces = self._splitter.feed(data)
        if self._as_it_comes:
            for piece in pieces:
                if piece.data is not None:
                    self._meter(piece)
            return data
        return b"".join([self._relay(piece) for piece in pieces])

    def finish(self) -> bytes:
        """What was held back at the end: an event or a line that never ended, or an answer in one piece.

        Half of such an answer would be text that can be read and not be counted, so it goes whole or not at all.
        """
        if self._body is not None:
            self._read_body()
            return bytes(self._body)
        left = b"".join([self._relay(piece) for piece in self._splitter.finish()])
        return b"" if self._as_it_comes else left

    def _sniff(self, data: bytes) -> None:
        """Decide what this is, once there is something to see; if a body, take back what the splitter held."""
        start = data.lstrip(_BLANKS_AND_BOM)
        self._sniffing = not start
        if start[:1] in _BODY_STARTS:
            held = b"".join(piece.raw for piece in self._splitter.finish())
            self._body = bytearray(b"" if self._as_it_comes else held)

    def _relay(self, piece: Piece) -> bytes:
        if piece.data is None:
            if not piece.joins:
                self._dropped = False
            return b"" if self._dropped else piece.raw
        chunk = self._meter(piece)
        self._dropped = False
        if chunk is None or "usage" not in chunk or self._as_it_comes:
            return piece.raw
        usage = chunk["usage"]
        if usage is None:
            return _without_null_usage(piece) if self._cut_nulls else piece.raw
        self._dropped = _is_usage_alone(chunk, usage)
        return b"" if self._dropped else piece.raw

    def _meter(self, piece: Piece) -> dict[str, Any] | None:
        """Show the event to the meter; its chunk, if it is one."""
        data = piece.data
        assert data is not None
        if data[:1] != b"{" and data.strip() == b"[DONE]":
            self.meter.observe_done()
            return None
        chunk = _loads(data)
        if not isinstance(chunk, dict):
            if data.strip():
                self.meter.observe_unreadable()
            return None
        self.meter.observe(chunk)
        if piece.event == b"error" and self.meter.error is None:
            self.meter.observe_error(chunk)
        return chunk

    def _read_body(self) -> None:
        body = _first(_loads(bytes(self._body or b"")))
        if isinstance(body, dict):
            self.meter.observe_body(body)
        else:
            self.meter.observe_unreadable()


def _is_usage_alone(chunk: Mapping[str, Any], usage: Any) -> bool:
    return chunk.get("choices") == [] and isinstance(usage, dict) and not any(chunk.get(name) for name in _CONTENT)


# A null usage with only flat members between it and one end of the data: the brace there is its own object's, so it
# stands at the top. (The quote before ``usage`` can't end a string: what follows would not be JSON.)
_WS = rb"[ \t\r\n]*"
_FLAT = _WS + rb'"[^"\\]*"' + _WS + b":" + _WS + rb'(?:"[^"\\]*"|[a-z0-9.+E-]+)' + _WS
_NULL_USAGE = rb'"usage"' + _WS + b":" + _WS + b"null"
_LAST_NULL_USAGE = re.compile(b"," + _WS + _NULL_USAGE + b"(?=" + _WS + b"(?:," + _FLAT + rb")*\}" + _WS + rb"\Z)")
_EARLY_NULL_USAGE = re.compile(_WS + rb"\{(?:" + _FLAT + b",)*" + _WS + b"(" + _NULL_USAGE + _WS + b"," + _WS + b")")


def _without_null_usage(piece: Piece) -> bytes:
    """The event without its top-level ``"usage": null``; every other byte as it was."""
    if len(piece.places) != 1:
        return piece.raw  # data on several lines: harmless as it is, and never seen on any wire
    start, end = piece.places[0]
    data = piece.raw[start:end]
    if data.count(b'"usage"') == 1:
        comma = data.rfind(b",", 0, data.find(b'"usage"'))
        match = _LAST_NULL_USAGE.match(data, comma) if comma >= 0 else None
        where = match.span() if match else (0, 0)
        if not match and (early := _EARLY_NULL_USAGE.match(data)):
            where = early.span(1)
        if where[1]:
            return piece.raw[: start + where[0]] + piece.raw[start + where[1] :]
    try:
        text = data.decode()
        members, _ = read_object(text, 0, _DECODER)
    except (ValueError, RecursionError):
        return piece.raw
    if any(member.value is not None for member in members if member.key == "usage"):
        return piece.raw
    return piece.raw[:start] + without_members(text, members, {"usage"}).encode() + piece.raw[end:]


def _nothing(_constant: str) -> None:
    return None


def _bounded_int(digits: str) -> int:
    # More digits than Python converts is no count of anything; any absurd number says the same.
    return int(digits) if len(digits) <= 64 else 10**64


_DECODER = json.JSONDecoder(strict=False, parse_constant=_nothing)
_PATIENT_DECODER = json.JSONDecoder(strict=False, parse_constant=_nothing, parse_int=_bounded_int)


def _loads(data: bytes) -> Any:
    """The JSON value in these bytes, read as leniently as it can be; None where there is none."""
    text = data.decode(errors="replace")
    if text[:1] != "{":
        text = text.lstrip("\ufeff \t\r\n")
    for decoder in (_DECODER, _PATIENT_DECODER):
        try:
            return decoder.raw_decode(text)[0]
        except json.JSONDecodeError:
            return None
        except RecursionError:
            return None
        except ValueError:
            continue
    return None


def _first(value: Any) -> Any:
    """Google's errors come in an array."""
    return value[0] if isinstance(value, list) and value else value


def _error(body: Mapping[str, Any]) -> AnswerError | None:
    error = body.get("error", body)
    if isinstance(error, str):
        return AnswerError(error)
    if not isinstance(error, dict):
        return None
    message = error.get("message", error.get("detail"))
    if message is None and error is body:
        return None
    kind = error.get("type") or error.get("status") or ""
    texts = [
        value if isinstance(value, str) else json.dumps(value)
        for value in (message or "", kind, error.get("code") or "")
    ]
    return AnswerError(texts[0], texts[1], texts[2], str(error.get("param") or ""))
