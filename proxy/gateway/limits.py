"""What a request may weigh, checked before anything reads it: its headers, its body, and the time it takes to come.

The limits that need the parsed body (messages, choices, JSON depth) are carried here too and checked by
``core/chat.py``, so that one profile holds them all. Every refusal names the limit and the setting that moves it.

No refusal here is a 408: SDKs retry 408 and 409, and a client that was too slow once would send its body three times.
A late body is a 400 with ``connection: close``, since what is left of it on the wire can't be told from a next request.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from proxy.core.errors import InvalidRequest, TooLarge

__all__ = [
    "CHAT",
    "DEFAULT",
    "ClientLeft",
    "Limits",
    "LimitsProfile",
    "check_headers",
    "read_body",
]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
RawHeaders = Iterable[tuple[bytes, bytes]]

# After a body that is too large, this much more of it is read and thrown away before the refusal: a server that closes
# with unread bytes in its socket resets the connection, and the client never sees the answer.
_DISCARD_BYTES_MAX = 32 * 1024 * 1024
_DISCARD_SECONDS_MAX = 5.0

_CLOSE = {"connection": "close"}


class ClientLeft(Exception):
    """The client went away before its request had arrived whole: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class LimitsProfile:
    """How much one request may ask. Sizes are bytes, times are seconds; a value equal to the limit is allowed."""

    name: str
    body_bytes_max: int
    messages_max: int
    json_depth_max: int = 64
    json_values_max: int = 100_000
    """Values in the body, nested ones included: what bounds the time that reading it keeps the event loop."""
    choices_max: int = 8
    header_bytes_max: int = 32 * 1024
    receive_seconds: float = 30.0

    def setting(self, limit: str) -> str:
        """Where ``limit`` is set, as a refusal names it."""
        if self.name == DEFAULT.name:
            return f"limit {limit}, set by FAREBOX_{limit.upper()}"
        return f"limit {limit} of the profile {self.name!r}, chosen per key or by FAREBOX_LIMITS_PROFILE"


DEFAULT = LimitsProfile("default", body_bytes_max=10 * 1024 * 1024, messages_max=2_000)
CHAT = LimitsProfile("chat", body_bytes_max=32 * 1024, messages_max=100)


@dataclass(frozen=True, slots=True)
class Limits:
    """The profiles of this server, and the name of the one for keys that name none."""

    profiles: Mapping[str, LimitsProfile] = field(default_factory=lambda: _by_name(DEFAULT, CHAT))
    default: str = DEFAULT.name

    def __post_init__(self) -> None:
        if self.default not in self.profiles:
            raise ValueError(f"there is no limits profile {self.default!r}, only {', '.join(self.profiles)}")

    @classmethod
    def of(cls, default: LimitsProfile, *, profile: str = DEFAULT.name) -> "Limits":
        """Limits whose default profile is ``default``; the chat profile is never wider than it."""
        chat = replace(
            default,
            name=CHAT.name,
            body_bytes_max=min(CHAT.body_bytes_max, default.body_bytes_max),
            messages_max=min(CHAT.messages_max, default.messages_max),
        )
        return cls(_by_name(replace(default, name=DEFAULT.name), chat), profile)

    def named(self, profile: str | None) -> LimitsProfile:
        """The profile of that name; the server's own for None, and for a name that this release doesn't know."""
        return self.profiles.get(profile or self.default) or self.profiles[self.default]


def check_headers(headers: RawHeaders, limits: LimitsProfile) -> None:
    """Raises InvalidRequest where all header names and values (and four bytes a line) are above the limit."""
    size = sum(len(name) + len(value) + 4 for name, value in headers)
    if size > limits.header_bytes_max:
        raise InvalidRequest(
            f"The request's headers are larger than {limits.header_bytes_max} bytes "
            f"({limits.setting('header_bytes_max')}).",
            code="headers_too_large",
        )


async def read_body(receive: Receive, headers: RawHeaders, limits: LimitsProfile) -> bytes:
    """The request's whole body, at most ``body_bytes_max`` bytes, received within ``receive_seconds``.

    A declared length above the limit is refused before the first byte is kept; chunked bodies are counted as they come.
    Raises TooLarge, InvalidRequest (a late body, an encoded one, a length that is no number) or ClientLeft.
    """
    fields = {name.lower(): value for name, value in headers}
    _refuse_encoded(fields.get(b"content-encoding", b""))
    declared = _declared_length(fields.get(b"content-length"))
    arriving = _Arriving(receive)
    if declared <= limits.body_bytes_max:
        try:
            async with asyncio.timeout(limits.receive_seconds):
                body = await arriving.take(limits.body_bytes_max)
        except TimeoutError:
            raise _late(limits) from None
        if body is not None:
            return body
    # A client that asked for a go-ahead has sent no body yet, and the first receive() would tell it to.
    if fields.get(b"expect", b"").lower() != b"100-continue":
        await arriving.discard()
    raise _too_large(limits)


class _Arriving:
    """A body on its way, which knows whether more of it is to come: asking past the end would wait for ever."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True

    async def take(self, bytes_max: int) -> bytes | None:
        """The whole body, or None as soon as it is above ``bytes_max``."""
        chunks: list[bytes] = []
        size = 0
        while self._more:
            chunk = await self._next()
            size += len(chunk)
            if size > bytes_max:
                return None
            if chunk:
                chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def discard(self) -> None:
        """Read on and keep nothing, within bounds; a courtesy to the client, so running out of them is no error."""
        size = 0
        try:
            async with asyncio.timeout(_DISCARD_SECONDS_MAX):
                while self._more and size < _DISCARD_BYTES_MAX:
                    size += len(await self._next())
        except TimeoutError:
            return

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        self._more = message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body


def _refuse_encoded(encoding: bytes) -> None:
    if encoding.strip().lower() in (b"", b"identity"):
        return
    raise InvalidRequest(
        "Encoded request bodies are not accepted: send the JSON as it is, without content-encoding.",
        code="content_encoding_unsupported",
    )


def _declared_length(value: bytes | None) -> int:
    """The content-length, or 0 where the client declared none."""
    if value is None:
        return 0
    text = value.strip()
    # More digits than this is above every limit, and int() of a megabyte of digits is slow.
    if not text.isdigit() or len(text) > 18:
        raise InvalidRequest("The content-length is not a number.", code="content_length_invalid", headers=_CLOSE)
    return int(text)


def _too_large(limits: LimitsProfile) -> TooLarge:
    return TooLarge(
        f"The request body is larger than {limits.body_bytes_max} bytes ({limits.setting('body_bytes_max')}).",
        code="request_too_large",
        headers=_CLOSE,
    )


def _late(limits: LimitsProfile) -> InvalidRequest:
    return InvalidRequest(
        f"The request body did not arrive within {limits.receive_seconds:g} seconds "
        f"({limits.setting('receive_seconds')}).",
        code="request_too_slow",
        headers=_CLOSE,
    )


def _by_name(*profiles: LimitsProfile) -> Mapping[str, LimitsProfile]:
    return MappingProxyType({profile.name: profile for profile in profiles})
