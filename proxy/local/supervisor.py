"""The supervisor: holds the listening socket, and keeps so many worker processes that serve on it.

All workers accept from the one socket that was bound before they started, so a connection that waits in its queue is
lost with none of them (with a socket each, SO_REUSEPORT, a worker's end resets whatever waits in its own queue).

- A restart (SIGHUP) replaces one worker after the other: the new one must be ready before the old one retires. If it
  can't start, the restart is given up: the others stay as they are. Asked again meanwhile, it is done once more.
- A worker that died is replaced: at once the first time, then after growing pauses.
- A stop is for all of them, and ends whatever else was going on.
- While none serves, the supervisor answers in their stead that it is so (standin.py).
- Should the supervisor itself be killed, the workers see the line to it end, and stop by themselves.
"""

import asyncio
import random
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import structlog

from proxy.local.line import Briefing, Order
from proxy.local.serving import Stop
from proxy.local.standin import StandIn
from proxy.local.state import LocalError
from proxy.local.worker import Life, Worker, WorkerFailed, exit_words
from proxy.local.workers_metrics import WorkersMetrics

__all__ = ["Supervisor", "SupervisorLimits"]

log = structlog.get_logger("farebox.workers")


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """Seconds."""

    start: float = 60.0
    """What a worker gets to be ready in."""
    stop: float = 60.0
    """What it gets to end in, after which it is killed."""
    retire: float = 7_300.0
    """The same for one that was replaced: above what it gives its answers."""
    steady: float = 10.0
    """A worker that served for so long died of something new: it is replaced at once."""
    pause_min: float = 0.5
    pause_max: float = 30.0
    """Between two attempts to replace a worker; doubled from one to the other."""
    nobody: float = 3.0
    """How long requests wait for a worker, where none serves, before they are told so: most start in less."""
    look: float = 0.25
    """Between two looks whether any serves."""


@dataclass(slots=True)
class _Slot:
    """A worker's place."""

    number: int
    worker: Worker | None = None
    """The one that serves; None while there is none."""
    failures: int = 0
    """Deaths and failed starts in a row."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever is putting a worker here."""
    impatient: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to end the pause before the next attempt."""


class Supervisor:
    """``command`` runs a worker, ``brief`` says how the one of a slot is to serve. Use it in one event loop."""

    def __init__(
        self,
        command: Sequence[str],
        listener: socket.socket,
        brief: Callable[[int], Briefing],
        *,
        count: int,
        metrics: WorkersMetrics,
        limits: SupervisorLimits | None = None,
    ) -> None:
        self._command = command
        self._listener = listener
        self._brief = brief
        self._metrics = metrics
        self._limits = limits or SupervisorLimits()
        self._slots = [_Slot(number) for number in range(1, count + 1)]
        self._alive: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._restart = asyncio.Event()
        self._changed = asyncio.Event()
        self._stopping = False
        self._stand_in = StandIn(listener)

    async def run(self, stop: Stop, *, on_ready: Callable[[], None], failed: Callable[[], str | None]) -> None:
        """Serve until it is time to stop. ``on_ready`` is called once, when every worker serves.

        Raises LocalError where a worker can't start at first, where ``failed`` says why not to go on, and where a
        worker didn't end as it should.
        """
        stop.hurry.append(self._hurry)
        self._metrics.watch(self._counts)
        stopped = asyncio.create_task(stop.wait(failed))
        starting = asyncio.create_task(self._start_all())
        try:
            await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                await starting
                on_ready()
                self._own(self._restart_when_asked())
                self._own(self._stand_in_when_needed())
            await stopped
        finally:
            for task in (stopped, starting):
                task.cancel()
            await asyncio.gather(stopped, starting, return_exceptions=True)
            ending = await self._stop_all()
            await self._stand_in.close()
        _require_good_ends(ending)

    def restart_soon(self) -> None:
        """Replace every worker, one after the other."""
        self._restart.set()

    # Starting

    async def _start_all(self) -> None:
        """All at once: nothing serves yet. Raises the first WorkerFailed."""
        await asyncio.gather(*(self._fill(slot) for slot in self._slots))

    async def _fill(self, slot: _Slot) -> None:
        async with slot.lock:
            slot.worker = await self._started(slot)

    async def _started(self, slot: _Slot) -> Worker:
        """A new worker for the slot, serving. Raises WorkerFailed."""
        worker = Worker(slot.number, self._on_exit)
        self._alive.add(worker)
        # Cancelled half way, a start would leave a process that nobody knows.
        starting = asyncio.create_task(self._start(worker, self._brief(slot.number)))
        starting.add_done_callback(_retrieve)
        await asyncio.shield(starting)
        await worker.ready(self._limits.start)
        log.info("a worker serves", slot=slot.number, worker_pid=worker.pid)
        return worker

    async def _start(self, worker: Worker, briefing: Briefing) -> None:
        try:
            await worker.start(self._command, self._listener, briefing)
        except WorkerFailed:
            self._alive.discard(worker)
            self._changed.set()
            raise
        self._metrics.add(worker)
        if self._stopping:
            worker.stop()

    # Replacing

    def _on_exit(self, worker: Worker) -> None:
        self._alive.discard(worker)
        self._metrics.remove(worker)
        self._changed.set()
        slot = self._slots[worker.slot - 1]
        if slot.worker is not worker or self._stopping:
            return
        slot.worker = None
        self._metrics.died()
        log.error("a worker died", slot=worker.slot, worker_pid=worker.pid, how=exit_words(worker.status))
        self._own(self._replace(slot, time.monotonic() - (worker.served_since or time.monotonic())))

    async def _replace(self, slot: _Slot, served_seconds: float) -> None:
        """Put a worker where one died, as often as it takes."""
        async with slot.lock:
            slot.failures = 0 if served_seconds >= self._limits.steady else slot.failures + 1
            while slot.worker is None:
                await self._pause(slot)
                try:
                    slot.worker = await self._started(slot)
                except WorkerFailed as error:
                    slot.failures += 1
                    self._metrics.start_failed()
                    log.error("a worker can't start", slot=slot.number, failures=slot.failures, reason=str(error))

    async def _pause(self, slot: _Slot) -> None:
        if slot.failures < 2:
            return
        limits = self._limits
        longest = min(limits.pause_max, limits.pause_min * 2.0 ** (slot.failures - 2))
        seconds = longest * random.uniform(0.75, 1.0)  # noqa: S311 - so that workers don't come back all at once
        slot.impatient.clear()
        log.warning("a worker will be started again", slot=slot.number, seconds=round(seconds, 1))
        try:
            async with asyncio.timeout(seconds):
                await slot.impatient.wait()
        except TimeoutError:
            return

    async def _stand_in_when_needed(self) -> None:
        """Answer while no worker does, but for the moment that it takes to replace the only one."""
        while True:
            await asyncio.sleep(self._limits.look)
            if any(slot.worker is not None for slot in self._slots):
                self._stand_in.end()
            elif not self._stand_in.answers:
                await asyncio.sleep(self._limits.nobody)
                if all(slot.worker is None for slot in self._slots):
                    log.error("no worker serves: requests are answered with 503")
                    await self._stand_in.begin()

    # Restarting

    async def _restart_when_asked(self) -> None:
        while True:
            await self._restart.wait()
            self._restart.clear()
            log.info("restarting the workers, one after the other")
            replaced = 0
            try:
                for slot in self._slots:
                    replaced += await self._restart_in(slot)
            except WorkerFailed as error:
                self._metrics.restarted(ok=False)
                log.error(
                    "the restart is given up: a new worker can't start, the others go on as they are",
                    reason=str(error),
                    replaced=replaced,
                    workers=len(self._slots),
                )
            else:
                self._metrics.restarted(ok=True)
                log.info("the workers are restarted", replaced=replaced, retiring=len(self._retiring()))

    async def _restart_in(self, slot: _Slot) -> bool:
        """Put a new worker in the place of the one that serves there. False where none does. Raises WorkerFailed."""
        if slot.worker is None:
            # Whoever starts one there at this moment starts a new one: all it needs is not to wait.
            slot.impatient.set()
            return False
        # Each retiring worker is a process with its connections: there may be as many again as serve, no more.
        while len(self._retiring()) >= len(self._slots):
            self._changed.clear()
            await self._changed.wait()
        async with slot.lock:
            new = await self._started(slot)
            old, slot.worker = slot.worker, new
            slot.failures = 0
            if old is not None:
                old.retire()
                self._own(self._see_off(old))
        return True

    async def _see_off(self, worker: Worker) -> None:
        """A worker ends by itself when its time is over; one that hangs would stand in the way for ever."""
        try:
            async with asyncio.timeout(self._limits.retire):
                await worker.gone()
        except TimeoutError:
            log.error("a retired worker didn't end in time and is killed", slot=worker.slot, worker_pid=worker.pid)
            worker.kill()

    def _retiring(self) -> list[Worker]:
        return [worker for worker in self._alive if worker.life is Life.RETIRING]

    # Stopping

    async def _stop_all(self) -> list[Worker]:
        """End every task and every worker; those that were told to end."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ending = sorted(self._alive, key=lambda worker: worker.slot)
        for worker in ending:
            worker.stop()
        if not await self._all_gone(self._limits.stop):
            for worker in list(self._alive):
                log.error("a worker didn't stop in time and is killed", slot=worker.slot, worker_pid=worker.pid)
                worker.kill()
            await self._all_gone(self._limits.stop)
        return ending

    async def _all_gone(self, limit_seconds: float) -> bool:
        try:
            async with asyncio.timeout(limit_seconds):
                while self._alive:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _hurry(self) -> None:
        for worker in self._alive:
            worker.order(Order.HURRY)

    # Odds and ends

    def _own(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._disown)

    def _disown(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a task of the supervisor failed", reason=str(error), exc_info=error)

    def _counts(self) -> dict[str, int]:
        """How many workers there are, by where they stand."""
        counts = {life.value: 0 for life in Life if life is not Life.GONE}
        for worker in self._alive:
            counts[worker.life.value] += 1
        return counts


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Nobody may be waiting for this task any more; what went wrong is the business of who was."""
    if not task.cancelled():
        task.exception()


def _require_good_ends(ending: Sequence[Worker]) -> None:
    """Raise LocalError unless every worker that was stopped ended well."""
    bad = [worker for worker in ending if worker.status != 0]
    if bad:
        ends = ", ".join(f"{worker.slot} {exit_words(worker.status)}" for worker in bad)
        raise LocalError(f"Not every worker ended as it should: {ends}. The log says why.")
