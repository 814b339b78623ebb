"""Serving an ASGI app from this process, and the ways in which that ends.

The socket is bound before anything else starts, so that a busy port is found out at once and not after a database was
started. uvicorn runs on this process's own loop; we, not uvicorn, take the signals: a first one drains and stops, a
second one doesn't wait.
"""

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from proxy.local.state import LocalError

__all__ = ["Stop", "base_url", "listen", "serving"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.25
BACKLOG = 2048
# Longer than clients keep a connection idle (httpx: 5 s, as uvicorn), or one is closed under a request on its way.
KEEP_ALIVE_SECONDS = 75
CUT_SECONDS = 2.0
"""What an app has, after its own time is up, to end its connections in its own way."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises LocalError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise LocalError(f"{host} is no address of this machine (FAREBOX_HOST): {error.strerror}.") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise LocalError(_why_not(host, port, error)) from error
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is in use by another program. "
            f"Stop that one, or take another port: FAREBOX_PORT={port + 1 if port < 65_535 else 8080}"
        )
    if error.errno == errno.EACCES:
        return f"Port {port} may not be used by this user; set FAREBOX_PORT to one above 1023."
    return f"Port {port} of {host} can't be used (FAREBOX_HOST, FAREBOX_PORT): {error.strerror}."


def base_url(listener: socket.socket) -> str:
    """What clients on this machine set as ``base_url``."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (read, not bound)
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Stop:
    """When to stop: at a signal, or when one of the things that are watched says so."""

    def __init__(self, *, with_parent: bool = False) -> None:
        self.hurry: list[Callable[[], None]] = []
        """Called at every signal after the first: nobody wants to wait any longer."""
        self._asked = asyncio.Event()
        self._parent = os.getppid() if with_parent else None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take this process's signals for as long as this lasts."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    async def wait(self, failed: Callable[[], str | None] = lambda: None) -> None:
        """Return when it is time to stop. ``failed`` is asked now and then; what it says is raised as LocalError."""
        while not self._asked.is_set():
            reason = failed()
            if reason is not None:
                raise LocalError(reason)
            if self._parent is not None and os.getppid() != self._parent:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._asked.wait()

    def _signalled(self) -> None:
        if self._asked.is_set():
            for hurry in self.hurry:
                hurry()
        self._asked.set()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers; it says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def serving(
    app: Any,
    listener: socket.socket,
    *,
    http: Any = "httptools",
    shutdown_seconds: float = 5.0,
    stop: Stop | None = None,
    on_stop: Callable[[], None] = lambda: None,
    on_hurry: Callable[[], None] = lambda: None,
) -> AsyncIterator[None]:
    """Serve ``app`` on ``listener``; on the way out running requests get ``shutdown_seconds`` to end.

    ``on_stop`` is called first then, for an app that ends its requests itself in that time; one that doesn't has them
    cut a little later. ``on_hurry`` is called when ``stop`` is signalled again: the app should end them now. Its own
    end is waited for all the same, for it may have to write down what they used.
    """
    config = uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(shutdown_seconds + CUT_SECONDS),
    )
    server = _Server(config)
    if stop is not None:
        stop.hurry.append(on_hurry)
    task = asyncio.create_task(_serve(server, listener))
    try:
        listening = asyncio.create_task(server.listening.wait())
        await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if task.done():
            await task
        yield
    finally:
        on_stop()
        server.should_exit = True
        await task


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await server.serve([listener])
    except SystemExit as error:
        # How uvicorn says that the app's lifespan didn't start; the app has logged why.
        raise LocalError("Farebox didn't start; the log says why.") from error
    finally:
        listener.close()
