"""Billing's line-up: what sells credits for money, made from the settings and handed to each other.

There is none unless FAREBOX_STRIPE_KEY is set. Its ledger calls have connections of their own: money that comes in
slowly must not hold up an operator's commands, nor the other way round.

To add to it: an object and its wiring in ``open_billing``, its routes in ``Billing.routes``, its loop (started there,
and stopped by the stack, which ends in reverse order).
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime

from starlette.routing import BaseRoute

from proxy.control.billing.disputes import DisputeDesk
from proxy.control.billing.event_types import Subject
from proxy.control.billing.events import Appliers, EventDesk
from proxy.control.billing.refunds import RefundDesk
from proxy.control.billing.resume import EventResumer
from proxy.control.billing.resume_refunds import RefundResumer
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.till import Till
from proxy.control.billing.webhooks import WebhookEndpoint, webhook_routes
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.disputes import DisputeLedger
from proxy.ledger.orders import OrderLedger
from proxy.ledger.refunds import RefundLedger
from proxy.ledger.stripe_events import EventLedger, Unprocessed
from proxy.metrics import Metrics
from proxy.settings import Settings, SettingsError

__all__ = ["Billing", "open_billing", "stripe_api"]

CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Billing:
    """What lives as long as the app does where credits are sold."""

    api: StripeApi
    orders: OrderLedger
    till: Till
    refunds: RefundDesk
    disputes: DisputeDesk
    webhooks: WebhookEndpoint

    def routes(self) -> Sequence[BaseRoute]:
        """Its endpoints."""
        return webhook_routes(self.webhooks)


def stripe_api(settings: Settings) -> StripeApi:
    """Stripe, as the settings say; for commands, too. Raises SettingsError where there is no key."""
    if settings.stripe_key is None:
        raise SettingsError("FAREBOX_STRIPE_KEY: is not set; it is a secret key of Stripe's")
    return StripeApi(settings.stripe_key.get_secret_value(), url=settings.stripe_url, seconds=settings.stripe_seconds)


async def open_billing(
    settings: Settings, metrics: Metrics, stack: AsyncExitStack, *, events_seconds: float
) -> Billing | None:
    """Billing, started; None where it is off. It ends with the stack. Raises SettingsError.

    ``events_seconds``: how often webhooks are looked for that were left.
    """
    if settings.stripe_key is None:
        return None
    if not settings.stripe_webhook_secrets:
        raise SettingsError(
            "FAREBOX_STRIPE_WEBHOOK_SECRETS: is needed beside FAREBOX_STRIPE_KEY, since a webhook that nobody signed"
            " could be anybody's; `farebox stripe setup` makes the endpoint and prints its secret"
        )
    dsn = settings.database_url_of("control")
    assert dsn is not None, "a server has a database"
    pool = await create_pool(dsn, Role.CONTROL, size=CONNECTIONS)
    stack.push_async_callback(pool.close)
    api = stripe_api(settings)
    stack.callback(api.close)
    orders = OrderLedger(pool)
    till = Till(api, orders, metrics=metrics)
    events = EventLedger(pool)
    requests = RefundLedger(pool)
    refunds = RefundDesk(api, requests, till, metrics=metrics)
    disputes = DisputeDesk(api, DisputeLedger(pool), till, metrics=metrics)
    desk = EventDesk(events, _appliers(till, refunds, disputes), metrics=metrics)

    def observe(left: Unprocessed) -> None:
        metrics.stripe_events_left(left.count, left.oldest.timestamp() if left.oldest else 0.0)

    resumer = EventResumer(events, desk, livemode=api.livemode, observe=observe, seconds=events_seconds)
    resumer.start()
    stack.push_async_callback(resumer.stop)

    def observe_refunds(held: int, oldest: datetime | None) -> None:
        metrics.refunds_held(held, oldest.timestamp() if oldest else 0.0)

    refund_resumer = RefundResumer(requests, refunds, observe=observe_refunds)
    refund_resumer.start()
    stack.push_async_callback(refund_resumer.stop)
    endpoint = WebhookEndpoint(
        events,
        desk,
        secrets=[secret.get_secret_value() for secret in settings.stripe_webhook_secrets],
        livemode=api.livemode,
        metrics=metrics,
    )
    return Billing(api, orders, till, refunds, disputes, endpoint)


def _appliers(till: Till, refunds: RefundDesk, disputes: DisputeDesk) -> Appliers:
    """Who applies what an event is about."""

    async def session(id: str) -> str:
        return (await till.apply_payment(session_id=id)).outcome

    async def payment(id: str) -> str:
        return (await till.apply_payment(payment_intent=id)).outcome

    return {
        Subject.SESSION: session,
        Subject.PAYMENT: payment,
        Subject.REFUND: refunds.apply,
        Subject.DISPUTE: disputes.apply,
    }
