"""The worker's lease: this process's right to admit calls, renewed from the start, and judged without asking anybody.

The ledger gives 30 s from when it hears us. We count from *before* we spoke, on a clock that only goes forward and
goes on while the machine is suspended, and stop a second early: so a worker always knows that its lease is over before
the sweeper may touch its holds.

A renewal carries the progress of the open holds. It never waits for it: what hasn't been counted in time goes with the
next one.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol
from uuid import UUID, uuid4

import structlog

from proxy.ledger.clocks import elapsed
from proxy.ledger.lines import NO_CONNECTION, Calls, Keeper, OpenLine
from proxy.ledger.records import Mark, Renewed
from proxy.ledger.rounds import was_cancelled

__all__ = ["MARKS_SECONDS", "MarkSource", "WorkerLease"]

log = structlog.get_logger("farebox.ledger")

LEASE_SECONDS = 30.0
MARGIN_SECONDS = 1.0
"""For the owner to close its exchanges in, and for clocks that don't run equally fast."""
RENEW_SECONDS = 5.0
RETRY_SECONDS = 1.0
CALL_SECONDS = 6.0
MARKS_SECONDS = 1.0
"""What a renewal waits for the marks, at most."""
LOOK_SECONDS = 1.0
"""How often the lease's end is looked at: a timer alone would sleep with the machine."""


class MarkSource(Protocol):
    """Whoever knows the progress of the open holds."""

    async def gather(self) -> Sequence[Mark]:
        """What has changed. It may be cancelled at any await."""
        ...

    def stored(self, holds: Collection[UUID]) -> None:
        """The last ones gathered are in the ledger, for these holds."""
        ...


class WorkerLease:
    """One process's lease. ``worker_id`` is random, so that no two starts of a process are taken for each other.

    ``marks`` is asked for the progress of the open holds before each renewal. ``on_lapse`` is told once each time the
    lease lapses: admit nothing, close the exchanges. Renewals go on, and when one succeeds the lease is held again.
    ``clock`` goes on while the machine is suspended.
    """

    def __init__(
        self,
        open_line: OpenLine,
        *,
        hostname: str,
        release: str,
        marks: MarkSource,
        on_lapse: Callable[[], None],
        clock: Callable[[], float] = elapsed,
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
        self._beats = 0
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
            # After a renewal that failed there is no time to lose, nor may it have been for what a mark says.
            marks = await self._gather() if pause == self._renew_seconds else ()
            pause = self._retry_seconds
            try:
                began, renewed = await self._keeper.call(partial(self._beat, marks), seconds=CALL_SECONDS)
            except Exception as error:  # noqa: BLE001 - one bad beat may not stop the heart: it would cost every exchange
                log.warning("the lease was not renewed", worker=str(self.worker_id), reason=str(error))
                continue
            if renewed:
                self._renewed(began)
                self._marks.stored(renewed.marked)
                pause = self._renew_seconds
            else:
                await self._register_again()

    async def _register_again(self) -> None:
        """The ledger doesn't know this worker: it has been stopped, which is for good, or a failover or a restored
        backup has forgotten it."""
        try:
            began, registered = await self._keeper.call(self._register, seconds=CALL_SECONDS)
        except Exception as error:  # noqa: BLE001 - the next renewal fares as this one did, and comes here again
            log.warning("the worker was not registered again", worker=str(self.worker_id), reason=str(error))
            return
        if registered:
            self._renewed(began)
            log.warning("the ledger had forgotten this worker, and knows it again", worker=str(self.worker_id))
        else:
            log.error("the ledger has stopped this worker: start another", worker=str(self.worker_id))

    async def _register(self, calls: Calls) -> tuple[float, object]:
        began = self._clock()
        return began, await calls.start_worker(self.worker_id, self._hostname, self._release)

    async def _gather(self) -> Sequence[Mark]:
        """The marks; none where they don't come in time: the lease is worth more than they are."""
        try:
            async with asyncio.timeout(MARKS_SECONDS):
                return await self._marks.gather()
        except asyncio.CancelledError as error:
            # Where not we were cancelled but something that the marks waited for, that's no reason to end, either.
            if was_cancelled():
                raise
            log.error("progress isn't known", worker=str(self.worker_id), reason=repr(error))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the marks, the lease has to be renewed
            log.error("progress isn't known", worker=str(self.worker_id), reason=repr(error))
        return ()

    async def _beat(self, marks: Sequence[Mark], calls: Calls) -> tuple[float, Renewed]:
        self._beats += 1
        began = self._clock()
        return began, await calls.heartbeat(self.worker_id, marks, beat=self._beats)

    def _renewed(self, began: float) -> None:
        """Held for the lease's length from ``began``, when the renewal was sent."""
        self._held_until = began + self._lease_seconds
        if self._lapse is not None:
            self._lapse.cancel()
        self._look()

    def _look(self) -> None:
        """Is it over? If not, look again when it will be, or after a while: the loop's timers see no suspension."""
        left = self._held_until - self._clock()
        if left > 0:
            self._lapse = asyncio.get_running_loop().call_later(min(left, LOOK_SECONDS), self._look)
            return
        self._lapse = None
        log.error("the lease has lapsed: nothing is admitted until it is renewed", worker=str(self.worker_id))
        self._on_lapse()
