"""Comes back for webhooks that were received and not processed: what a crash, an outage or a refusal has left.

Each server runs one. Who takes an event from the list is alone with it for its pause, which grows with each attempt; an
event is never given up. So the credits come even where Stripe's own deliveries have ended.
"""

from collections.abc import Callable

import structlog

from proxy.control.billing.errors import StripeError
from proxy.control.billing.events import EventDesk
from proxy.ledger.rounds import EXPECTED, Rounds
from proxy.ledger.stripe_events import EventLedger, Unprocessed

__all__ = ["EventResumer", "resume_events"]

log = structlog.get_logger("farebox.billing")

RESUME_SECONDS = 30.0
EVENTS_MAX = 20
"""In one round, one after the other: a backlog must not crowd out the calls of customers who wait."""
KEEP_SECONDS = 90 * 86_400.0
"""How long processed events are kept, for looking back. Stripe lists its own for 30 days."""
FORGET_MAX = 1_000


async def resume_events(
    ledger: EventLedger, desk: EventDesk, *, livemode: bool, limit: int = EVENTS_MAX, pause_seconds: float = 3_600.0
) -> tuple[int, int]:
    """Process at most ``limit`` events of our key's mode that are due; how many were processed, how many failed again.

    ``pause_seconds``: how long at most an event is left alone after an attempt. Raises LedgerError.
    """
    tried: list[str] = []
    failed = 0
    while len(tried) < limit:
        # One at a time: what waits for its turn here could be another's meanwhile.
        state = await ledger.claim(livemode=livemode, pause_seconds=pause_seconds, without=tried)
        if state is None:
            break
        tried.append(state.event.id)
        try:
            await desk.process(state.event)
        except Exception:  # noqa: BLE001 - the desk has noted why; the others are not to wait for this one
            failed += 1
    return len(tried) - failed, failed


class EventResumer:
    """Resumes events in a loop. ``observe`` is told after each round what is left."""

    def __init__(
        self,
        ledger: EventLedger,
        desk: EventDesk,
        *,
        livemode: bool,
        observe: Callable[[Unprocessed], None] = lambda left: None,
        seconds: float = RESUME_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._desk = desk
        self._livemode = livemode
        self._observe = observe
        self._rounds = Rounds(
            self._round, seconds=seconds, complaint="webhooks were not resumed", expected=(*EXPECTED, StripeError)
        )

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. What is being processed is cut off, and left to another attempt."""
        await self._rounds.stop()

    async def _round(self) -> None:
        processed, failed = await resume_events(self._ledger, self._desk, livemode=self._livemode)
        if processed or failed:
            log.info("webhooks were resumed", processed=processed, failed=failed)
        await self._ledger.forget(FORGET_MAX, keep_seconds=KEEP_SECONDS)
        self._observe(await self._ledger.unprocessed(livemode=self._livemode))
