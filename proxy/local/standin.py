"""Who answers while no worker serves: the supervisor itself, with one sentence and a 503.

Without it, connections would wait in the socket's queue for as long as their clients do, and a load balancer would
learn nothing. It reads a request no further than it must, and never looks into it.
"""

import asyncio
import json
import re
import socket

__all__ = ["StandIn"]

REQUEST_SECONDS = 5.0
HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
CONNECTIONS_MAX = 500

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
_BODY = json.dumps(
    {
        "error": {
            "message": "Farebox has no worker that serves at the moment. Try again in a few seconds.",
            "type": "server_error",
            "param": None,
            "code": "no_worker",
        }
    }
).encode()
_ANSWER = b"\r\n".join(
    [
        b"HTTP/1.1 503 Service Unavailable",
        b"content-type: application/json",
        b"content-length: %d" % len(_BODY),
        b"access-control-allow-origin: *",
        b"cache-control: no-store",
        b"retry-after: 5",
        b"x-should-retry: true",
        b"connection: close",
        b"",
        _BODY,
    ]
)


class StandIn:
    """Answers on ``listener``, which stays open, between ``begin`` and ``end``; both may be called again."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def answers(self) -> bool:
        """Whether it does at the moment."""
        return self._server is not None

    async def begin(self) -> None:
        """Accept connections."""
        if self._server is None:
            # A descriptor of its own: the server closes the one that it was given.
            own = self._listener.dup()
            own.setblocking(False)
            self._server = await asyncio.start_server(self._accepted, sock=own, limit=HEAD_BYTES_MAX)

    def end(self) -> None:
        """Accept no more; those that were accepted are answered."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """End, and wait until all have been answered."""
        self.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if len(self._tasks) <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_SECONDS):
                    await _answer(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            # It came to nothing, and there is nobody to tell.
            writer.transport.abort()
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    # Answered before the body is read, for clients that wait for leave to send it; but closing a socket with unread
    # bytes would reset it, and the answer with it.
    writer.write(_ANSWER)
    await writer.drain()
    writer.write_eof()
    length = _LENGTH.search(head)
    left = min(int(length[1]), BODY_BYTES_MAX) if length else 0
    while left > 0 and (piece := await reader.read(min(left, HEAD_BYTES_MAX))):
        left -= len(piece)
