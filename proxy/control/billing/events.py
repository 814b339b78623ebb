"""From an event to what became of it: the object that it names is fetched and applied, and the event marked processed.

The endpoint, the loop that comes back for what was left, and the reconciliation all process events here. To do so
twice, late, or at the same time elsewhere changes nothing: what is applied is keyed by the object. Whatever fails
leaves the event unprocessed, with the reason, for the next attempt.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from proxy.control.billing.errors import StripeUnknown
from proxy.control.billing.event_types import EVENT_TYPES, Subject
from proxy.core.keys import without_keys
from proxy.ledger.errors import LedgerError
from proxy.ledger.stripe_events import Event, EventLedger
from proxy.metrics import Metrics

__all__ = ["IGNORED", "NOT_OURS", "Appliers", "Apply", "EventDesk", "outcome_without_work"]

log = structlog.get_logger("farebox.billing")

Apply = Callable[[str], Awaitable[str]]
"""Fetches the object of this id from Stripe and applies it; says in a word or two what that came to."""

Appliers = Mapping[Subject, Apply]

IGNORED = "ignored"
"""The outcome of an event that means nothing here."""
NOT_OURS = "not_ours"
"""The outcome of an event about another business, or another part of this one, on the same Stripe account."""

PROCESS_SECONDS_MAX = 20.0
"""Stripe waits no longer for an answer than some tens of seconds; what takes longer is left to the next attempt."""
FAIL_SECONDS_MAX = 2.0


class EventDesk:
    """Processes events that were written down."""

    def __init__(
        self, ledger: EventLedger, appliers: Appliers, *, metrics: Metrics, seconds: float = PROCESS_SECONDS_MAX
    ) -> None:
        self._ledger = ledger
        self._appliers = appliers
        self._metrics = metrics
        self._seconds = seconds

    async def process(self, event: Event) -> str:
        """Fetch and apply what the event names; its outcome. Raises what came in between, having noted it."""
        # A type that isn't there was written down by a release that knew more of them.
        subject = EVENT_TYPES.get(event.type)
        apply = None if subject is None else self._appliers.get(subject)
        try:
            async with asyncio.timeout(self._seconds):
                outcome = IGNORED if apply is None else await apply(event.object_id)
                await self._ledger.finish(event.id, outcome)
        except Exception as error:
            await self._failed(event, error)
            raise
        self._metrics.stripe_event(outcome)
        log.info("a webhook was processed", event_id=event.id, type=event.type, about=event.object_id, outcome=outcome)
        return outcome

    async def _failed(self, event: Event, error: Exception) -> None:
        reason = without_keys(_reason(event, error))
        self._metrics.stripe_event("failed")
        log.warning("a webhook was not processed", event_id=event.id, type=event.type, reason=reason)
        try:
            async with asyncio.timeout(FAIL_SECONDS_MAX):
                await self._ledger.fail(event.id, reason)
        except (LedgerError, TimeoutError) as trouble:
            # It is unprocessed all the same: only the reason is missing.
            log.warning("why a webhook was not processed could not be noted", event_id=event.id, reason=str(trouble))


def _reason(event: Event, error: Exception) -> str:
    """Why an event was not processed, and of what an operator can mend, which settings to look at."""
    if not isinstance(error, StripeUnknown):
        return f"{type(error).__name__}: {error}"
    # What another business on the same account has, our key can fetch; and nothing that these types tell of is ever
    # removed at Stripe.
    return (
        f"FAREBOX_STRIPE_KEY, in {'live' if event.livemode else 'test'} mode, knows no {event.object_id}: the endpoint "
        "whose secret in FAREBOX_STRIPE_WEBHOOK_SECRETS signed this is of another Stripe account than the key. Where "
        f"the key is the right one, `farebox stripe dismiss {event.id}` gives it up. {error}"
    )


def outcome_without_work(event_type: str, account: str | None) -> str | None:
    """The outcome of an event that nothing has to be done about; None where its object has to be fetched.

    ``account``: the connected account that it came from. Farebox sells through its own account alone.
    """
    if event_type not in EVENT_TYPES:
        return IGNORED
    return NOT_OURS if account is not None else None
