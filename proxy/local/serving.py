"""Serving an ASGI app from this process, and the ways in which that ends.

The socket is bound before anything else starts, so that a busy port is found out at once and not after a database was
started. uvicorn runs on this process's own loop; we, not uvicorn, take the signals: a first one drains and stops, a
second one doesn't wait. What draining means is draining.py's matter.
"""

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from proxy.local.state import LocalError

__all__ = ["STOP_SIGNALS", "Server", "Stop", "base_url", "hung_up", "listen", "serving"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.25
BACKLOG = 2048
SEND_BUFFER_BYTES = 64 * 1024
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
        # Connections take it over. Else the kernel buys megabytes for a client that doesn't read, and they are metered.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
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
        """Called once, at the second time of asking: nobody wants to wait any longer."""
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.retiring = asyncio.Event()
        """Another process has taken this one's place: end what runs, however long it takes, and then stop."""
        self.orphaned = False
        """Whoever held the listening socket with us is gone; its successor may want the port."""
        self._woken = asyncio.Event()
        self._parent = os.getppid() if with_parent else None

    @contextlib.contextmanager
    def on_signals(self, numbers: Sequence[int] = STOP_SIGNALS) -> Iterator[None]:
        """Take these signals of this process's for as long as this lasts."""
        loop = asyncio.get_running_loop()
        for number in numbers:
            loop.add_signal_handler(number, self.signalled)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def wait(self, failed: Callable[[], str | None] = lambda: None) -> None:
        """Return when it is time to stop. ``failed`` is asked now and then; what it says is raised as LocalError."""
        while not self.asked.is_set() and not self.retiring.is_set():
            reason = failed()
            if reason is not None:
                raise LocalError(reason)
            if self._parent is not None and os.getppid() != self._parent:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._woken.wait()

    def ask(self) -> None:
        """Stop."""
        self.asked.set()
        self._woken.set()

    def retire(self) -> None:
        """Stop when what runs has come to its end; another process serves in this one's place."""
        self.retiring.set()
        self._woken.set()

    def signalled(self) -> None:
        """Somebody wants this process to stop; the second time, not to wait."""
        if self.asked.is_set():
            self.hurry_up()
        self.ask()

    def hurry_up(self) -> None:
        """Stop, and don't wait for what runs."""
        self.ask()
        if not self.hurried.is_set():
            self.hurried.set()
            for hurry in self.hurry:
                hurry()


def hung_up(stop: Stop, restart: Callable[[], None]) -> Callable[[], None]:
    """What SIGHUP means to a supervisor: restart, unless its terminal was closed, which sends it too."""
    had_terminal = _has_terminal()

    def signalled() -> None:
        if had_terminal and not _has_terminal():
            stop.signalled()
        else:
            restart()

    return signalled


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers; it says when it listens, and can stop listening before it ends."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    def stop_listening(self) -> None:
        """Accept no more connections; those there are go on. What waits on a shared socket is another process's."""
        if self.started:
            for server in self.servers:
                server.close()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self.server_state.connections)

    def end_within(self, seconds: float) -> None:
        """What connections get to end in, once the server exits. Set it before."""
        self.config.timeout_graceful_shutdown = math.ceil(max(0.0, seconds) + CUT_SECONDS)


@asynccontextmanager
async def serving(
    app: Any,
    listener: socket.socket,
    *,
    http: Any = "httptools",
    shutdown_seconds: float = 5.0,
    drain: Callable[[Server], Awaitable[None]] | None = None,
) -> AsyncIterator[None]:
    """Serve ``app`` on ``listener``; on the way out ``drain`` is awaited first, while the server still listens.

    Then running requests get ``shutdown_seconds`` to end. The app's own end is waited for without a limit, for it may
    have to write down what they used.
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
    )
    server = Server(config)
    server.end_within(shutdown_seconds)
    task = asyncio.create_task(_serve(server, listener))
    try:
        listening = asyncio.create_task(server.listening.wait())
        await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if task.done():
            await task
        yield
    finally:
        try:
            if drain is not None and not task.done():
                await drain(server)
        finally:
            server.should_exit = True
            await task


async def _serve(server: Server, listener: socket.socket) -> None:
    try:
        await server.serve([listener])
    except SystemExit as error:
        # How uvicorn says that the app's lifespan didn't start; the app has logged why.
        raise LocalError("Farebox didn't start; the log says why.") from error
    finally:
        listener.close()
