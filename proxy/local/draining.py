"""How a serving process ends without cutting anything that it need not cut.

Stopping: not ready, and nothing new after that; what runs may go on for the app's ``shutdown_seconds``. The socket
goes on listening all the while, so that whoever asks learns that it isn't ready, and a request gets an answer it may
repeat elsewhere, where a closed port would tell nobody why.

Retiring, when another process has taken this one's place on the same socket: no more connections are accepted, those
there are get every answer, and nobody is refused anything. Connections whose clients are between two requests are left
open for a while with ``Connection: close`` for the next one, since closing one at once could cut a request on its way.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from proxy.gateway.protocol import Parting
from proxy.local.serving import CUT_SECONDS, Server, Stop

__all__ = ["IDLE_SECONDS", "Drain", "DrainLimits"]

log = structlog.get_logger("farebox.serve")

IDLE_SECONDS = 10.0
"""How long a connection without a request stays: longer than most clients keep one they don't use (httpx: 5 s)."""
LOOK_SECONDS = 0.02


class Drained(Protocol):
    """What an app is asked while it is drained."""

    @property
    def open_exchanges(self) -> int: ...
    @property
    def stop_at(self) -> float | None: ...
    def leave(self) -> None: ...
    def begin_shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DrainLimits:
    """Seconds. ``delay``: how long requests are still taken after the process has said that it isn't ready.
    ``retire``: how long what runs may go on after another process has taken over. ``idle``: see IDLE_SECONDS."""

    delay: float = 0.0
    retire: float = 7_200.0
    idle: float = IDLE_SECONDS


class Drain:
    """What ``serving`` awaits before it ends."""

    def __init__(self, app: Drained, stop: Stop, parting: Parting, limits: DrainLimits) -> None:
        self._app = app
        self._stop = stop
        self._parting = parting
        self._limits = limits

    async def __call__(self, server: Server) -> None:
        """Let what runs come to its end, within the limits."""
        if self._stop.retiring.is_set() and not self._stop.asked.is_set():
            await self._retire(server)
        else:
            await self._leave(server)
        self._app.begin_shutdown()
        # What is open at its end is cut by the app, and takes a moment to be gone.
        await _while(lambda: self._app.open_exchanges > 0, self._left_seconds() + CUT_SECONDS)
        server.end_within(self._left_seconds())

    def _left_seconds(self) -> float:
        return (self._app.stop_at or 0.0) - asyncio.get_running_loop().time()

    async def _retire(self, server: Server) -> None:
        server.stop_listening()
        self._parting.begin(self._limits.idle)
        log.info("retiring", connections=server.connections, open_exchanges=self._app.open_exchanges)

        def busy() -> bool:
            return bool(server.connections or self._app.open_exchanges)

        await _while(lambda: busy() and not self._stop.asked.is_set(), self._limits.retire)
        if busy():
            log.warning("retired too soon", connections=server.connections, open_exchanges=self._app.open_exchanges)

    async def _leave(self, server: Server) -> None:
        self._app.leave()
        self._parting.begin(self._limits.idle)
        if self._stop.orphaned:
            server.stop_listening()
        elif self._limits.delay:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.delay):
                    await self._stop.hurried.wait()


async def _while(busy: Callable[[], bool], limit_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_seconds
    while busy() and loop.time() < deadline:  # noqa: ASYNC110 - a look costs nothing, and events would stand everywhere
        await asyncio.sleep(LOOK_SECONDS)
