"""What a dialect is: how a provider's wire format is written and read. Bytes in, bytes out, never a socket."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from proxy.core.catalog import Route
from proxy.core.chat import ChatRequest
from proxy.core.meter import Meter

__all__ = ["AnswerError", "Decoder", "Dialect", "UpstreamRequest"]


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """What to send: ``path`` goes behind the upstream's base URL; credentials are not a dialect's business.

    ``usage_forced``: ``include_usage`` is in the body though the client hadn't asked for it.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes
    usage_forced: bool


@dataclass(frozen=True, slots=True)
class AnswerError:
    """What an upstream's error body says; empty strings where it doesn't."""

    message: str
    type: str = ""
    code: str = ""
    param: str = ""


class Decoder(Protocol):
    """One answer on its way through: upstream's bytes in, client's bytes out, the meter fed in passing.

    ``feed`` and ``finish`` raise ``core.sse.AnswerTooLarge`` where what must be kept to meter grows above its limit.
    """

    meter: Meter

    @property
    def between_events(self) -> bool:
        """Whether an event of our own could be sent to the client here."""
        ...

    def feed(self, data: bytes) -> bytes:
        """The bytes that the client gets now; empty while they may still have to be held back."""
        ...

    def finish(self) -> bytes:
        """The upstream's answer has ended: what was still held back."""
        ...


class Dialect(Protocol):
    """A wire format."""

    def encode(self, request: ChatRequest, route: Route, output_cap: int | None = None) -> UpstreamRequest:
        """The request as this upstream wants it. ``output_cap`` is sent only where it isn't None."""
        ...

    def is_stream(self, first: bytes) -> bool | None:
        """Whether an answer that begins so is a stream and not one piece; None where that can't be told yet."""
        ...

    def stream_decoder(self, usage_asked: bool, *, usage_forced: bool = True, choices: int = 1) -> Decoder:
        """A decoder for an answer that the client wants streamed, whatever the answer's content type claims.

        ``usage_asked``: the client did; ``usage_forced``: it hadn't, but the upstream was asked. ``choices``: n.
        """
        ...

    def decode_body(self, body: bytes, *, choices: int = 1) -> Meter:
        """The meter of a whole answer, which goes to the client as it is."""
        ...

    def read_error(self, body: bytes) -> AnswerError | None:
        """What an error body says; None where it is no error that this dialect knows."""
        ...
