"""The worker's lease: this process's right to admit calls, renewed from the start, and judged without asking anybody.

The ledger gives 30 s from when it hears us. We count from *before* we spoke, on a clock that only goes forward, and
stop a second early: so a worker always knows that its lease is over before the sweeper may touch its holds.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import UUID, uuid4

import structlog

from proxy.ledger.lines import NO_CONNECTION, Calls, Keeper, OpenLine
from proxy.ledger.records import Mark

__all__ = ["WorkerLease"]

log = structlog.get_logger("farebox.ledger")

LEASE_SECONDS = 30.0
MARGIN_SECONDS = 1.0
"""For the owner to close its exchanges in, and for clocks that don't run equally fast."""
RENEW_SECONDS = 5.0
RETRY_SECONDS = 1.0
CALL_SECONDS = 6.0


class WorkerLease:
    """One process's lease. ``worker_id`` is random, so that no two starts of a process are taken for each other.

    ``marks`` is asked for the progress of the open holds at each renewal. ``on_lapse`` is told once each time the lease
    lapses: admit nothing, close the exchanges. Renewals go on, and when one succeeds the lease is held again.
    """

    def __init__(
        self,
        open_line: OpenLine,
        *,
        hostname: str,
        release: str,
        marks: Callable[[], Sequence[Mark]],
        on_lapse: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        lease_seconds: float = LEASE_SECONDS - MARGIN_SECONDS,
        renew_seconds: float = RENEW_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.worker_id: UUID = uuid4()
        self._keeper = Keeper(open_line, "lease")
        self._hostname = hostname
        self._release = release
        self._marks = marks
        self._on_lapse = on_lapse
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._retry_seconds = retry_seconds
        self._held_until = float("-inf")
        self._lapse: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, limit_seconds: float = 10.0) -> None:
        """Register this process. Raises TimeoutError, LedgerUnavailable or what the ledger says against it."""
        async with asyncio.timeout(limit_seconds):
            began, _ = await self._keeper.call(self._register, seconds=CALL_SECONDS)
        self._renewed(began)
        self._task = asyncio.create_task(self._renew())

    def held(self) -> bool:
        """Whether this worker may admit calls now."""
        return self._clock() < self._held_until

    async def stop(self) -> None:
        """End the lease at once, so that the sweeper needn't wait for what is left. Never raises."""
        self._held_until = float("-inf")
        if self._lapse is not None:
            self._lapse.cancel()
        if self._task is not None:
            # The line is cut first: a task cancelled inside asyncpg would wait for the server.
            self._keeper.terminate()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            with suppress(*NO_CONNECTION):
                async with asyncio.timeout(2.0):
                    await self._keeper.call(lambda calls: calls.stop_worker(self.worker_id), seconds=1.0)
        await self._keeper.close()

    async def _renew(self) -> None:
        pause = self._renew_seconds
        while True:
            await asyncio.sleep(pause)
            pause = self._retry_seconds
            try:
                began, held = await self._keeper.call(self._beat, seconds=CALL_SECONDS)
            except Exception as error:  # noqa: BLE001 - one bad beat may not stop the heart: it would cost every exchange
                log.warning("the lease was not renewed", worker=str(self.worker_id), reason=str(error))
                continue
            if held:
                self._renewed(began)
                pause = self._renew_seconds
            else:
                log.error("the ledger doesn't know this worker, or has stopped it", worker=str(self.worker_id))

    async def _register(self, calls: Calls) -> tuple[float, object]:
        began = self._clock()
        return began, await calls.start_worker(self.worker_id, self._hostname, self._release)

    async def _beat(self, calls: Calls) -> tuple[float, bool]:
        began = self._clock()
        return began, await calls.heartbeat(self.worker_id, self._marks())

    def _renewed(self, began: float) -> None:
        """Held for the lease's length from ``began``, when the renewal was sent."""
        self._held_until = began + self._lease_seconds
        if self._lapse is not None:
            self._lapse.cancel()
        left = max(self._held_until - self._clock(), 0.0)
        self._lapse = asyncio.get_running_loop().call_later(left, self._lapsed)

    def _lapsed(self) -> None:
        log.error("the lease has lapsed: nothing is admitted until it is renewed", worker=str(self.worker_id))
        self._on_lapse()
