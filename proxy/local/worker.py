"""One worker as its supervisor sees it: a process that is started, serves, is replaced or stopped, and is gone.

Its life: starting -> serving -> retiring or stopping -> gone. From each it may go straight to gone, by itself.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum

import structlog

from proxy.local.line import Briefing, Order, Peer
from proxy.local.state import LocalError

__all__ = ["Life", "Worker", "WorkerFailed", "exit_words", "worker_command"]

log = structlog.get_logger("farebox.workers")

# The child sees the modules that we see: a folder called proxy, wherever we were started, mustn't come before them.
_RUN = "import sys; sys.path[:] = {path!r}; from proxy.cli.worker import main; sys.exit(main(sys.argv[1:]))"


def worker_command() -> tuple[str, ...]:
    """Runs a worker; the numbers of its inherited descriptors follow: line, listening socket, metrics."""
    return sys.executable, "-P", "-c", _RUN.format(path=[entry or os.getcwd() for entry in sys.path])


class Life(Enum):
    """Where a worker stands."""

    STARTING = "starting"
    SERVING = "serving"
    RETIRING = "retiring"
    STOPPING = "stopping"
    GONE = "gone"


class WorkerFailed(LocalError):
    """A worker didn't come to serve; the message says why."""


class Worker:
    """A worker's process. ``on_exit`` is called once, when it is gone."""

    def __init__(self, slot: int, on_exit: "Callable[[Worker], None]") -> None:
        self.slot = slot
        self.life = Life.STARTING
        self.served_since: float | None = None
        self.status: int | None = None
        """As of ``wait``: below 0 the signal that killed it."""
        self.metrics: socket.socket | None = None
        """Our end of the line on which it is asked for its metrics; whoever asks closes it."""
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._peer: Peer | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def start(self, command: Sequence[str], listener: socket.socket, briefing: Briefing) -> None:
        """Start the process and tell it what to do. Raises WorkerFailed where there can be no process."""
        ours, theirs = socket.socketpair()
        self.metrics, their_metrics = socket.socketpair()
        descriptors = (theirs.fileno(), listener.fileno(), their_metrics.fileno())
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                *map(str, descriptors),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                # A Ctrl-C in the terminal is for the supervisor alone: it tells us once, and in the right order.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            self.metrics.close()
            raise WorkerFailed(f"no process can be started: {error.strerror}") from error
        finally:
            theirs.close()
            their_metrics.close()
        ours.setblocking(False)
        peer = await Peer.on(ours)
        # Before any order: these are the first words that it understands.
        peer.brief(briefing)
        self._peer = peer
        listening = asyncio.create_task(self._listen(peer))
        self._waiting = asyncio.create_task(self._wait(self._process, listening))

    async def ready(self, limit_seconds: float) -> None:
        """Return once it serves. Raises WorkerFailed, and then it is gone or soon will be."""
        try:
            async with asyncio.timeout(limit_seconds):
                await asyncio.shield(self._ready)
        except TimeoutError:
            self.kill()
            raise WorkerFailed(f"it was not ready within {limit_seconds:g} seconds") from None
        if self.life is Life.GONE:
            raise WorkerFailed(f"it {exit_words(self.status)} as soon as it was ready")
        self.life = Life.SERVING
        self.served_since = time.monotonic()

    def retire(self) -> None:
        """Another one has taken its place: it ends what runs, and then itself."""
        self.life = Life.RETIRING
        self.order(Order.RETIRE)

    def stop(self) -> None:
        """It ends what runs within the shutdown's limit, and then itself."""
        if self.life is not Life.GONE:
            self.life = Life.STOPPING
            self.order(Order.STOP)

    def order(self, order: Order) -> None:
        """Say so. Nothing happens where it is gone."""
        if self._peer is not None:
            self._peer.say(order=order)

    def kill(self) -> None:
        """End it at once; what it leaves is the journal's and the sweeper's."""
        if self._process is not None and self.life is not Life.GONE:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    async def gone(self) -> None:
        """Return once its process has ended."""
        await self._gone.wait()

    async def _listen(self, peer: Peer) -> None:
        while (words := await peer.hear()) is not None:
            if words.get("said") == "ready" and not self._ready.done():
                self._ready.set_result(None)
            elif words.get("said") == "failed" and not self._ready.done():
                self._ready.set_exception(WorkerFailed(str(words.get("reason"))))

    async def _wait(self, process: asyncio.subprocess.Process, listening: "asyncio.Task[None]") -> None:
        self.status = await process.wait()
        # What it said last may still have to be read.
        await asyncio.gather(listening, return_exceptions=True)
        if not self._ready.done():
            self._ready.set_exception(WorkerFailed(f"it {exit_words(self.status)} before it was ready"))
        self._ready.exception()
        before, self.life = self.life, Life.GONE
        log.debug("a worker is gone", slot=self.slot, pid=self.pid, status=self.status, was=before.value)
        if self._peer is not None:
            await self._peer.close()
        self._gone.set()
        self._on_exit(self)


def exit_words(status: int | None) -> str:
    """What became of a process, for a message: ``ended with status 1``."""
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
