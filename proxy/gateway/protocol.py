"""The server's side of a slow client: uvicorn's HTTP protocol with a deadline and a size for the request's head.

uvicorn waits for ever for a request's first byte and for its headers' last one, and holds headers of any size: the app,
and with it ``limits.py``, is called only when they are complete. Here a connection on which the client owes something
(its next request's head, or the rest of a body that was answered early) is closed after ``receive_seconds``, however
busily it trickles. While a request is being served, the time is the app's: a body on its way is ``read_body``'s matter.

A server that is about to end takes its leave of a connection (``Parting``) instead of cutting it: the next answer says
``Connection: close``, and a connection without a request is closed when it has long been idle, so that no request on
its way is lost with it.
"""

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from proxy.gateway.client import ABORT
from proxy.gateway.limits import LimitsProfile

__all__ = ["GuardedProtocol", "Parting", "guarded_protocol"]

# The request line is no header, and a head that arrives in one piece is refused by the app, with a better answer.
_REQUEST_LINE_BYTES_MAX = 16 * 1024


# What waits here for a client beside what the kernel has. uvicorn's send waits while there is more.
_WRITE_BYTES_HIGH = 16 * 1024

_NO_LINGERING = struct.pack("ii", 1, 0)


class Parting:
    """Shared by the connections of one server: whether it takes its leave of them, and how long an idle one stays."""

    def __init__(self) -> None:
        self.idle_seconds: float | None = None
        """None: the server stays."""
        self._connections: set[GuardedProtocol] = set()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def begin(self, idle_seconds: float) -> None:
        """From now on each connection ends after its next answer, or after so long without a request."""
        self.idle_seconds = idle_seconds
        for connection in list(self._connections):
            connection.part()

    def came(self, connection: "GuardedProtocol") -> None:
        """A connection was accepted."""
        self._connections.add(connection)

    def went(self, connection: "GuardedProtocol") -> None:
        """A connection was lost."""
        self._connections.discard(connection)


class GuardedProtocol(HttpToolsProtocol):
    """One connection. ``limits``: ``receive_seconds`` and ``header_bytes_max`` are the ones kept here."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        limits: LimitsProfile,
        parting: Parting | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._limits = limits
        self._parting = parting or Parting()
        self._deadline: asyncio.TimerHandle | None = None
        self._unread = 0
        """Bytes that the client hadn't taken when the deadline was set."""
        self._head_bytes = 0
        self._beside_body = 0
        """Bytes since the last one of a body: what chunks are wrapped in, trailers, blank lines."""
        self._in_head = False
        self._beside_body = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_WRITE_BYTES_HIGH)
        self._parting.came(self)
        self._expect()

    def part(self) -> None:
        """Take leave of the client: what isn't answered yet is answered with ``Connection: close``.

        An answer whose head is out stays as it was announced: the client may send its next request the moment it ends.
        """
        if self.cycle is None or self.cycle.response_complete:
            self._expect_nothing()
            self._expect()
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def data_received(self, data: bytes) -> None:
        self._beside_body += len(data)
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.header_bytes_max + _REQUEST_LINE_BYTES_MAX:
                self._refuse_head()
        elif self._beside_body > self._limits.header_bytes_max + _REQUEST_LINE_BYTES_MAX:
            self._reset()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Later ones are the trailers of a chunked body: nobody asks for them, and they may not pass for headers.
        if self._in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._beside_body = 0
        super().on_message_complete()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        # An ASGI extension of ours: an app alone can't reset a connection, nor see how far it is.
        size = self.transport.get_write_buffer_size
        self.scope["extensions"] = {
            ABORT: {"abort": self._reset, "unsent": size, "queued": self._queued, "broken": self._expect}
        }

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._expect_nothing()
        super().on_headers_complete()
        if self._parting.idle_seconds is not None:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # With a pipelined request already begun, ``cycle`` is that one, and the client owes nothing.
        if self.cycle.response_complete:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._parting.went(self)
        self._expect_nothing()
        super().connection_lost(exc)

    def _queued(self) -> int:
        """Bytes that the client's machine hasn't taken. They become fewer where it reads, however slowly."""
        size = self.transport.get_write_buffer_size()
        raw = self.transport.get_extra_info("socket")
        with suppress(OSError, ValueError):  # not every system tells, and none of a socket that was closed meanwhile
            size += int.from_bytes(fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return size

    def _reset(self) -> None:
        """Close the connection now. Without lingering, or the kernel would go on offering what nobody reads."""
        raw = self.transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.transport.abort()

    def _expect(self) -> None:
        """The client owes its next request, or has yet to read what was written: a connection is closed only then."""
        unread = self._unread = self._queued() if self.transport.get_write_buffer_size() else 0
        if self._deadline is None and (unread or not self.transport.is_closing()):
            seconds = self._limits.receive_seconds
            if self._parting.idle_seconds is not None and not unread:
                seconds = min(seconds, self._parting.idle_seconds)
            self._deadline = self.loop.call_later(seconds, self._give_up)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.get_write_buffer_size():
            self.transport.close()
        elif self._queued() < self._unread:
            self._expect()  # it is reading its last answer, if slowly
        else:
            self._reset()  # it isn't, and closing would wait for that

    def _refuse_head(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(f"The request's headers are larger than {self._limits.header_bytes_max} bytes.")
        else:
            # An earlier request's answer is on its way, and may not be mixed with this refusal.
            self.transport.close()


def guarded_protocol(limits: LimitsProfile, parting: Parting | None = None) -> "Callable[..., GuardedProtocol]":
    """What ``uvicorn.Config(http=...)`` takes: makes a ``GuardedProtocol`` of these limits for each connection."""
    parting = parting or Parting()

    def make(config: Config, server_state: ServerState, app_state: dict[str, Any], **_: Any) -> GuardedProtocol:
        return GuardedProtocol(config, server_state, app_state, limits=limits, parting=parting)

    return make
