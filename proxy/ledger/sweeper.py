"""The sweeper: settles, every ten seconds or so, the holds of workers that are gone. Each process runs one.

It sweeps only on a connection that has stood for a while: when Postgres comes back, every lease looks lapsed until the
workers have renewed.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import structlog

from proxy.ledger.lines import Calls, Keeper, Line, OpenLine
from proxy.ledger.records import Expired

__all__ = ["Sweeper"]

log = structlog.get_logger("farebox.ledger")

SWEEP_SECONDS = 10.0
SETTLED_SECONDS = 15.0
"""How long a connection must have stood: three renewals' time."""
HOLDS_MAX = 500
CALL_SECONDS = 10.0


class Sweeper:
    """Calls ``expire_holds`` in a loop; ``on_expired`` is told of what it settled."""

    def __init__(
        self,
        open_line: OpenLine,
        *,
        on_expired: Callable[[Sequence[Expired]], None] = lambda expired: None,
        sweep_seconds: float = SWEEP_SECONDS,
        settled_seconds: float = SETTLED_SECONDS,
    ) -> None:
        self._open_line = open_line
        self._keeper = Keeper(self._open, "sweeper")
        self._on_expired = on_expired
        self._sweep_seconds = sweep_seconds
        self._settled_seconds = settled_seconds
        self._opened_at = 0.0
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
        self._opened_at = time.monotonic()
        return line

    async def _sweep(self) -> None:
        while True:
            try:
                await self._keeper.line()
                more = False
                if time.monotonic() - self._opened_at >= self._settled_seconds:
                    expired = await self._keeper.call(_expire, seconds=CALL_SECONDS)
                    self._tell(expired)
                    more = len(expired) >= HOLDS_MAX
            except Exception as error:  # noqa: BLE001 - the next sweep may fare better; the holds can wait for it
                log.warning("the sweep failed", reason=str(error))
                more = False
            if not more:
                # Jitter, so that the workers' sweeps don't fall together.
                await asyncio.sleep(self._sweep_seconds * random.uniform(0.8, 1.2))  # noqa: S311

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


async def _expire(calls: Calls) -> Sequence[Expired]:
    return await calls.expire_holds(HOLDS_MAX)
