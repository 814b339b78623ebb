"""A faulty link: a TCP proxy between two parts of a test that delays, slices, throttles, stalls, cuts and resets.

    async with Link(("127.0.0.1", port)) as link:
        link.spoil("back", Throttle(1000))
        ...
        link.heal()

``"to"`` is what goes to the target, ``"back"`` what comes from it. A fault holds for bytes that pass while it is set,
on connections old and new; ``heal`` ends it, and what it held back goes on.
"""

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Literal

__all__ = ["Cut", "Delay", "Direction", "Fault", "Link", "Refuse", "Slice", "Stall", "Throttle"]

Direction = Literal["to", "back"]
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Delay:
    """Each piece waits so long."""

    seconds: float


@dataclass(frozen=True)
class Throttle:
    """So many bytes a second, at most."""

    bytes_per_second: int


@dataclass(frozen=True)
class Slice:
    """Pieces of so many bytes, each a packet of its own."""

    size: int
    pause_seconds: float = 0.0005


@dataclass(frozen=True)
class Stall:
    """Nothing passes. Neither side is told."""


@dataclass(frozen=True)
class Cut:
    """Each connection ends after so many bytes more: with FIN, or with RST."""

    after_bytes: int
    reset: bool = False


@dataclass(frozen=True)
class Refuse:
    """Every connection is closed at once, and none is accepted."""


Fault = Delay | Throttle | Slice | Stall | Cut | Refuse


class Link:
    """Use as an async context manager. ``target``: (host, port), or the path of a Unix socket. ``port``: ours."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self._faults: dict[Direction, Fault | None] = {"to": None, "back": None}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.hit = 0
        """How often a fault touched something."""

    def spoil(self, direction: Direction, fault: Fault) -> None:
        """From now on, in that direction."""
        self._faults[direction] = fault
        if isinstance(fault, Refuse):
            self._end_all(reset=True)

    def heal(self) -> None:
        """A good link again."""
        self._faults = {"to": None, "back": None}

    async def __aenter__(self) -> "Link":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._end_all(reset=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if isinstance(self._faults["to"], Refuse) or isinstance(self._faults["back"], Refuse):
            self.hit += 1
            _end(writer, reset=True)
            return
        try:
            there, their_writer = await self._connect()
        except OSError:
            _end(writer, reset=True)
            return
        ends = {writer, their_writer}
        self._writers |= ends
        ways = [
            asyncio.create_task(self._pass("to", reader, their_writer, ends)),
            asyncio.create_task(self._pass("back", there, writer, ends)),
        ]
        try:
            # Ended by ``__aexit__`` alone, where a cancelled task would be reported as one that failed.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                # One side has closed: what the other still says goes through, as with a half-closed connection.
                await asyncio.wait(ways, timeout=0.2)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in ends:
                _end(end)
            self._writers -= ends

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, str):
            return await asyncio.open_unix_connection(self._target)
        return await asyncio.open_connection(*self._target)

    async def _pass(
        self,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: set[asyncio.StreamWriter],
    ) -> None:
        passed, under = 0, self._faults[direction]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while data := await reader.read(65_536):
                while data:
                    piece, data = await self._next(direction, data)
                    fault = self._faults[direction]
                    passed, under = (passed if under is fault else 0) + len(piece), fault
                    if isinstance(fault, Cut) and passed > fault.after_bytes:
                        self.hit += 1
                        writer.write(piece[: len(piece) + fault.after_bytes - passed])
                        for end in ends:
                            _end(end, reset=fault.reset)
                        return
                    writer.write(piece)
                    await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

    async def _next(self, direction: Direction, data: bytes) -> tuple[bytes, bytes]:
        """The piece that may pass now, once it may, and the rest."""
        while isinstance(self._faults[direction], Stall):
            self.hit += 1
            await asyncio.sleep(POLL_SECONDS)
        match self._faults[direction]:
            case Delay(seconds):
                self.hit += 1
                await asyncio.sleep(seconds)
            case Throttle(rate):
                self.hit += 1
                piece = max(rate // 50, 1)
                await asyncio.sleep(min(piece, len(data)) / rate)
                return data[:piece], data[piece:]
            case Slice(size, pause):
                self.hit += 1
                await asyncio.sleep(pause)
                return data[:size], data[size:]
        return data, b""

    def _end_all(self, *, reset: bool) -> None:
        for writer in self._writers:
            self.hit += 1
            _end(writer, reset=reset)


def _end(writer: asyncio.StreamWriter, *, reset: bool = False) -> None:
    if reset:
        with contextlib.suppress(OSError, AttributeError):
            # Zero seconds of lingering: what is closed so is reset.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()
