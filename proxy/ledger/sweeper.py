"""The sweeper: settles, every ten seconds or so, the holds of workers that are gone. Each process runs one.

A lease may look lapsed though its worker lives:

- when Postgres comes back, until the workers have renewed: a connection must have stood for a while before it sweeps;
- when the clock that leases run by has jumped, be it that somebody set it, or that a machine slept and only the clock
  went on. So before each sweep the database's clock is compared with this process's own, which counts the time for
  which the machine was awake; where the database's went further, nothing is swept for two leases.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial

import structlog

from proxy.ledger.clocks import awake
from proxy.ledger.lines import Calls, Keeper, Line, OpenLine
from proxy.ledger.records import Expired

__all__ = ["Sweeper"]

log = structlog.get_logger("farebox.ledger")

SWEEP_SECONDS = 10.0
SETTLED_SECONDS = 15.0
"""How long a connection must have stood: three renewals' time."""
HOLDS_MAX = 500
CALL_SECONDS = 10.0
JUMP_SECONDS = 2.0
"""Further than this the ledger's clock may not go ahead of ours from one look to the next."""
JUMPED_SECONDS = 60.0
"""How long nothing is swept after it did: two leases."""
VALID_SECONDS = 5.0
"""How long after the look a sweep may begin, by the ledger's clock: what has jumped since, nobody has seen."""


class Sweeper:
    """Calls ``expire_holds`` in a loop; ``on_expired`` is told of what it settled."""

    def __init__(
        self,
        open_line: OpenLine,
        *,
        on_expired: Callable[[Sequence[Expired]], None] = lambda expired: None,
        sweep_seconds: float = SWEEP_SECONDS,
        settled_seconds: float = SETTLED_SECONDS,
        jumped_seconds: float = JUMPED_SECONDS,
        clock: Callable[[], float] = awake,
    ) -> None:
        self._open_line = open_line
        self._keeper = Keeper(self._open, "sweeper")
        self._clock = clock
        self._on_expired = on_expired
        self._sweep_seconds = sweep_seconds
        self._settled_seconds = settled_seconds
        self._jumped_seconds = jumped_seconds
        self._not_before = 0.0
        """By our clock: nothing is swept until then."""
        self._ahead: float | None = None
        """By how much the ledger's clock is ahead of ours, at most, as it was last seen on this connection."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first sweep comes after the connection has stood long enough."""
        self._task = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """End. A sweep in flight is cut off: it is one transaction."""
        if self._task is not None:
            self._keeper.terminate()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._keeper.close()

    async def _open(self) -> Line:
        line = await self._open_line()
        self._ahead = None
        self._wait(self._settled_seconds)
        return line

    def _wait(self, seconds: float) -> None:
        self._not_before = max(self._not_before, self._clock() + seconds)

    async def _sweep(self) -> None:
        while True:
            try:
                more = await self._sweep_once()
            except Exception as error:  # noqa: BLE001 - the next sweep may fare better; the holds can wait for it
                log.warning("the sweep failed", reason=str(error))
                more = False
            if not more:
                # Jitter, so that the workers' sweeps don't fall together.
                await asyncio.sleep(self._sweep_seconds * random.uniform(0.8, 1.2))  # noqa: S311

    async def _sweep_once(self) -> bool:
        """Sweep, if it is time to; whether there may be more to sweep."""
        now = await self._look()
        if self._clock() < self._not_before:
            return False
        not_after = now + timedelta(seconds=VALID_SECONDS)
        expired = await self._keeper.call(partial(_expire, not_after), seconds=CALL_SECONDS)
        self._tell(expired)
        return len(expired) >= HOLDS_MAX

    async def _look(self) -> datetime:
        """The ledger's time; if its clock has jumped ahead since the last look, wait."""
        await self._keeper.line()
        before = self._clock()
        now = await self._keeper.call(_now, seconds=CALL_SECONDS)
        # It was read at some moment in between, so how far it is ahead is known within the time that the call took.
        least, most = now.timestamp() - self._clock(), now.timestamp() - before
        if self._ahead is not None and least - self._ahead > JUMP_SECONDS:
            log.warning("the ledger's clock has jumped: no sweep for a while", seconds=round(least - self._ahead, 1))
            self._wait(self._jumped_seconds)
        self._ahead = most
        return now

    def _tell(self, expired: Sequence[Expired]) -> None:
        for hold in expired:
            log.warning(
                "a hold whose worker is gone was settled",
                hold=str(hold.hold_id),
                account=str(hold.account_id),
                charge=hold.charge,
            )
        if expired:
            self._on_expired(expired)


async def _now(calls: Calls) -> datetime:
    return await calls.now()


async def _expire(not_after: datetime, calls: Calls) -> Sequence[Expired]:
    return await calls.expire_holds(HOLDS_MAX, not_after=not_after)
