"""Comes back for refunds that were asked for and not answered: their credits are held until it is known what became of
them.

Each server runs one. Who takes a request from the ledger is alone with it for a pause that grows with its age.
"""

from collections.abc import Callable
from datetime import datetime

import structlog

from proxy.control.billing.errors import StripeError
from proxy.control.billing.refunds import RefundDesk
from proxy.ledger.refunds import RefundLedger
from proxy.ledger.rounds import EXPECTED, Rounds

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
        self._age_seconds = age_seconds
        self._rounds = Rounds(
            self._round,
            seconds=seconds,
            complaint="refund requests were not resumed",
            expected=(*EXPECTED, StripeError),
        )

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. A request that is being seen to stays held, for another round."""
        await self._rounds.stop()

    async def _round(self) -> None:
        claimed = await self._ledger.claim(
            age_seconds=self._age_seconds, pause_seconds=PAUSE_SECONDS_MAX, limit=REQUESTS_MAX
        )
        resumed = await self._desk.carry_on(claimed)
        for request in resumed.ended:
            log.info("a refund request was resumed", request_id=str(request.id), state=request.state)
        self._observe(*await self._ledger.waiting())
