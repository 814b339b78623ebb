"""The client's side of one request: noticing that it left or doesn't read, and writing what the channel brings.

A handler is not told of a disconnect; only ``receive()`` is. So one task waits on it from the moment the body is in
until the answer is out, streaming or not. A client that keeps its socket open and doesn't read blocks ``send``, since
the server bounds what it buffers; after ``send_seconds`` without progress it counts as gone. One that reads slowly
makes progress.
"""

import asyncio
from collections.abc import Callable

from proxy.gateway.channel import Abandoned, BrokenOff, Channel
from proxy.gateway.front import Receive, Scope, Send
from proxy.gateway.headers import Headers

__all__ = ["ABORT", "Client"]

ABORT = "farebox.abort"
"""In ``scope["extensions"]``: its ``abort()`` resets the connection at once, unread bytes and all; ``unsent()`` is how
many bytes the server still has, ``queued()`` adds those that the kernel has and the client's machine hasn't taken, and
``broken()`` says that no end will follow, so that what is written is offered no longer than it is read. Our own
extension of ASGI (``protocol.py``), since an app by itself can only have a connection closed once everything was read,
and isn't told how far it was."""


class Client:
    """An async context manager around the time in which the client is waited on. Times are seconds."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, send_seconds: float) -> None:
        connection = scope.get("extensions", {}).get(ABORT, {})
        self._abort: Callable[[], None] | None = connection.get("abort")
        self._unsent: Callable[[], int] | None = connection.get("unsent")
        self._queued: Callable[[], int] = connection.get("queued", _unknown)
        self._receive = receive
        self._send = send
        self._send_seconds = send_seconds
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.Task[None] | None = None
        self._sending_since: float | None = None
        self._broken: Callable[[], None] = connection.get("broken", _nothing)
        self._queued_then: tuple[float, int] | None = None
        """The write that was under way at the last look, and how much was queued then."""
        self._moved_at = 0.0
        self._on_left: Callable[[], None] | None = None
        self._stalled = False
        self.left = False
        """Whether it is gone, or as good as gone."""
        self.first_sent_at: float | None = None
        """The loop's time when the answer's first bytes were handed to the server."""

    async def __aenter__(self) -> "Client":
        self._watch = self._loop.create_task(self._watch_for_leaving())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch is not None:
            # Not awaited: it ends by itself in the next turn of the loop, and nothing depends on when.
            self._watch.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def when_left(self, call: Callable[[], None]) -> None:
        """Have ``call`` called when the client leaves; at once where it has left already."""
        self._on_left = call
        if self.left:
            call()

    async def answer(self, channel: Channel, ours: Headers) -> None:
        """Write the channel's head, with our headers added, and its bytes as they come, to a whole end.

        Raises the refusal that the channel brings instead of a head (nothing was written then), Abandoned, or
        BrokenOff: the caller returns without an end, upon which the server breaks the socket.
        """
        self._writer = asyncio.current_task()
        self._timer = self._loop.call_later(self._send_seconds / 4, self._look)
        if self._unsent is not None:
            channel.unsent_bytes = self._unsent
        try:
            head = await channel.head()
            await self._write({"type": "http.response.start", "status": head.status, "headers": [*head.headers, *ours]})
            more = True
            while more:
                data = await channel.get()
                more = not channel.finished
                await self._write({"type": "http.response.body", "body": data, "more_body": more})
                channel.sent_bytes += len(data)
                if self.first_sent_at is None:
                    self.first_sent_at = self._loop.time()
        except BrokenOff:
            self._broken()
            raise
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            raise Abandoned from None

    async def _write(self, message: dict[str, object]) -> None:
        self._sending_since = self._loop.time()
        await self._send(message)
        self._sending_since = None

    def _look(self) -> None:
        """Every now and then: is a write stuck? One timer an answer costs less than a time limit on each write."""
        since, now, soon = self._sending_since, self._loop.time(), self._send_seconds / 4
        if since is not None:
            queued = self._queued()
            if self._queued_then is not None and self._queued_then[0] == since and queued < self._queued_then[1]:
                self._moved_at = now
            self._queued_then = since, queued
            left = max(since, self._moved_at) + self._send_seconds - now
            if left <= 0:
                self._give_up()
                return
            soon = min(soon, left)
        self._timer = self._loop.call_later(soon, self._look)

    def _give_up(self) -> None:
        self._stalled = True
        self._leave()
        if self._abort is not None:
            self._abort()
        elif self._writer is not None:
            self._writer.cancel()

    async def _watch_for_leaving(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self.left:
            self.left = True
            if self._on_left is not None:
                self._on_left()


def _unknown() -> int:
    return 0


def _nothing() -> None:
    pass
