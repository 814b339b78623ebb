"""The channel between the pump that reads an upstream and the request that writes to its client.

One producer, one consumer, bounded bytes. Either side may go first: ``abandon`` says that nobody reads any more, and
from then on what is put is thrown away, so that the pump reads on without a client; ``end``, ``break_off`` and ``fail``
say that nothing more comes.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from proxy.core.errors import Refusal
from proxy.gateway.headers import Headers

__all__ = ["Abandoned", "BrokenOff", "Channel", "Head"]

# What may wait for a client here, beside one piece as it came from the upstream, and what it is handed at once. The
# server keeps less (``protocol.py``): together well below 256 KiB for a client that doesn't read.
BUFFER_BYTES_MAX = 16 * 1024
TAKEN_BYTES_MAX = 16 * 1024


class Abandoned(Exception):
    """The consumer's side was given up: there is nobody to write to."""


class BrokenOff(Exception):
    """The answer ended before its end: the client must not take it for a whole one."""


@dataclass(frozen=True, slots=True)
class Head:
    """The status and headers that start an answer."""

    status: int
    headers: Headers


class Channel:
    """Head, then bytes, then an end. All calls from one event loop."""

    def __init__(self) -> None:
        self.produced_bytes = 0
        """Bytes that were put in, all together."""
        self.sent_bytes = 0
        """Bytes that the consumer has handed to the server."""
        self.unsent_bytes: Callable[[], int] = _none
        """How many of those the server still has; the consumer puts its own here."""
        self._head: Head | Refusal | None = None
        self._chunks: list[bytes | memoryview] = []
        self._size = 0
        self._over = False
        self._broken = False
        self._abandoned = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    @property
    def abandoned(self) -> bool:
        return self._abandoned

    @property
    def delivered_bytes(self) -> int:
        """Bytes that have left this process for the client; all of them where there is no client any more."""
        return self.produced_bytes if self._abandoned else self.sent_bytes - self.unsent_bytes()

    @property
    def is_kept(self) -> bool:
        """Whether what goes through is kept to be given again, so that it has a reader though its client left."""
        return False

    @property
    def is_empty(self) -> bool:
        """Whether the consumer has taken all that there is so far."""
        return not self._chunks

    @property
    def started(self) -> bool:
        """Whether the head is there: from then on an error can only break the answer off."""
        return self._head is not None

    # The producer's side.

    def start(self, head: Head) -> None:
        """Give the head, once, before any bytes."""
        self._head = head
        _wake(self._reader)

    async def put(self, data: bytes) -> None:
        """Add bytes; waits while too many wait to be read. Bytes for nobody are thrown away."""
        self.put_at_once(data)
        while self._size > BUFFER_BYTES_MAX and not self._abandoned:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer

    def put_at_once(self, data: bytes) -> None:
        """Add bytes without waiting: for the last ones."""
        self.produced_bytes += len(data)
        if data and not self._abandoned:
            self._chunks.append(data)
            self._size += len(data)
            _wake(self._reader)

    def interject(self, data: bytes) -> None:
        """Add bytes of our own that are no part of the answer."""
        Channel.put_at_once(self, data)

    def end(self) -> None:
        """Nothing more comes: the answer is whole."""
        self._over = True
        _wake(self._reader)

    def break_off(self, last: bytes) -> None:
        """Nothing more comes and the answer is not whole; ``last`` still goes to the client."""
        if not self._over:
            self._broken = True
            self.put_at_once(last)
            self.end()

    def fail(self, refusal: Refusal) -> None:
        """There will be no answer but this refusal. Only before ``start``."""
        self._head = refusal
        self.end()

    # The consumer's side.

    async def head(self) -> Head:
        """The head, once it is there. Raises the refusal given instead, or Abandoned."""
        while self._head is None and not self._abandoned:
            await self._wait()
        if self._abandoned:
            raise Abandoned
        if isinstance(self._head, Refusal):
            raise self._head
        assert self._head is not None
        return self._head

    @property
    def finished(self) -> bool:
        """Whether everything has been read and the answer is whole."""
        return self._over and not self._broken and not self._chunks

    async def get(self) -> bytes:
        """What waits, not too much at once; ``b""`` at the end. Raises BrokenOff at a broken end, or Abandoned."""
        while not self._chunks and not self._over and not self._abandoned:
            await self._wait()
        if self._abandoned:
            raise Abandoned
        if not self._chunks:
            if self._broken:
                raise BrokenOff
            return b""
        if self._size <= TAKEN_BYTES_MAX:
            data = b"".join(self._chunks)
            self._chunks.clear()
        else:
            data = self._some()
        self._size -= len(data)
        if self._size <= BUFFER_BYTES_MAX:
            _wake(self._writer)
        return data

    def _some(self) -> bytes:
        """The first pieces, up to TAKEN_BYTES_MAX, of more than that."""
        chunks, room = self._chunks, TAKEN_BYTES_MAX
        if len(chunks[0]) > room:
            # Views, since a whole answer of many megabytes would be copied again for each piece of it.
            whole = memoryview(chunks[0])
            chunks[:1] = [whole[start : start + room] for start in range(0, len(whole), room)]
        count = 0
        while len(chunks[count]) <= room:
            room -= len(chunks[count])
            count += 1
        data = b"".join(chunks[:count])
        del chunks[:count]
        return data

    def abandon(self) -> None:
        """Nobody reads any more."""
        self._abandoned = True
        self._chunks.clear()
        self._size = 0
        _wake(self._reader)
        _wake(self._writer)

    async def _wait(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        await self._reader


def _none() -> int:
    return 0


def _wake(waiter: "asyncio.Future[None] | None") -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
