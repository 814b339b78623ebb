"""Comes back for refunds that were asked for and not answered: their credits are held until it is known what became of
them.

Each server runs one. Who takes a request from the ledger is alone with it for a pause that grows with its age.
"""

import asyncio
import random
from collections.abc import Callable
from datetime import datetime

import structlog

from proxy.control.billing.refunds import RefundDesk
from proxy.ledger.refunds import RefundLedger

__all__ = ["RefundResumer"]

log = structlog.get_logger("farebox.billing")

RESUME_SECONDS = 60.0
AGE_SECONDS = 60.0
"""How old a request is before it is looked at: whoever made it is at it until then."""
PAUSE_SECONDS_MAX = 3_600.0
REQUESTS_MAX = 20


class RefundResumer:
    """Carries on with held requests in a loop. ``observe`` is told after each round how many are left, and since when
    the oldest waits."""

    def __init__(
        self,
        ledger: RefundLedger,
        desk: RefundDesk,
        *,
        observe: Callable[[int, datetime | None], None] = lambda count, oldest: None,
        seconds: float = RESUME_SECONDS,
        age_seconds: float = AGE_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._desk = desk
        self._observe = observe
        self._seconds = seconds
        self._age_seconds = age_seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End. A request that is being seen to stays held, for another round."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            # Jitter, so that the workers' rounds don't fall together.
            await asyncio.sleep(self._seconds * random.uniform(0.5, 1.0))  # noqa: S311
            try:
                await self._round()
            except Exception as error:  # noqa: BLE001 - the next round may fare better; the requests can wait for it
                log.warning("refund requests were not resumed", reason=str(error))

    async def _round(self) -> None:
        claimed = await self._ledger.claim(
            age_seconds=self._age_seconds, pause_seconds=PAUSE_SECONDS_MAX, limit=REQUESTS_MAX
        )
        resumed = await self._desk.carry_on(claimed)
        for request in resumed.ended:
            log.info("a refund request was resumed", request_id=str(request.id), state=request.state)
        self._observe(*await self._ledger.waiting())
