"""A few threads for calls that block: Stripe's client is synchronous.

They are daemons. A call that is under way when the process ends is abandoned, as by a crash: every call here carries an
idempotency key or changes nothing, and what it was for is resumed from the ledger.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["Busy", "Threads"]

Result = TypeVar("Result")

_Job = Callable[[], None]


class Busy(Exception):
    """So many calls wait for a thread already."""


class Threads:
    """At most ``count`` threads, started as they are needed, and at most ``waiting_max`` calls that wait for one."""

    def __init__(self, name: str, *, count: int, waiting_max: int) -> None:
        self._name = name
        self._count = count
        self._waiting_max = waiting_max
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = 0
        self._open = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns or raises, from one of the threads. Raises Busy.

        A caller that is cancelled leaves the call running, and nobody hears of its end.
        """
        if self._open >= self._count + self._waiting_max:
            raise Busy(f"{self._open} calls are under way")
        self._open += 1
        future: Future[Result] = Future()
        loop = asyncio.get_running_loop()

        def job() -> None:
            try:
                _carry_out(future, work)
            finally:
                _tell(loop, self._ended)

        self._jobs.put(job)
        if self._started < min(self._open, self._count):
            self._started += 1
            threading.Thread(target=self._serve, name=f"{self._name}-{self._started}", daemon=True).start()
        ended = asyncio.wrap_future(future)
        # Whoever asked may be gone by then, and a failure that nobody wants to know of is no fault of ours.
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(ended)

    def close(self) -> None:
        """The threads end, each after the call that it is at."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _ended(self) -> None:
        self._open -= 1

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _carry_out(future: "Future[Result]", work: Callable[[], Result]) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - whatever it is belongs to who asked
        future.set_exception(error)
    else:
        future.set_result(result)


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(what)
    except RuntimeError:
        # The loop is closed: the process is about to end, and nobody counts any more.
        return
