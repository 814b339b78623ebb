"""Billing's line-up: what sells credits for money, made from the settings and handed to each other.

There is none unless FAREBOX_STRIPE_KEY is set. Its ledger calls have connections of their own: money that comes in
slowly must not hold up an operator's commands, nor the other way round.

To add to it: an object and its wiring in ``open_billing``, its routes in ``Billing.routes``, its loop (started there,
and stopped by the stack, which ends in reverse order).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime

from starlette.routing import BaseRoute

from proxy.control.account import Authenticate
from proxy.control.admin import AdminToken
from proxy.control.billing.admin_refunds import refund_routes
from proxy.control.billing.auto_settings import AutoSettings, admin_auto_topup_routes, auto_topup_routes, offer_of
from proxy.control.billing.autotopup import AutoTopups
from proxy.control.billing.checkout import Checkout, CheckoutTerms
from proxy.control.billing.desks import Desks, open_desks, open_reconciler
from proxy.control.billing.pages import page_routes
from proxy.control.billing.reconcile_loop import ReconcileLoop
from proxy.control.billing.refunding import Refunder
from proxy.control.billing.resume import EventResumer
from proxy.control.billing.resume_refunds import RefundResumer
from proxy.control.billing.routes import billing_routes
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.webhooks import WebhookEndpoint, webhook_routes
from proxy.control.operations import Operations
from proxy.core.packs import Offers
from proxy.core.return_urls import ReturnUrls
from proxy.gateway.ids import new_request_id
from proxy.ledger.autotopups import AutoTopupLedger
from proxy.ledger.connect import Pool, Role, connect, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.reader import AccountReader
from proxy.ledger.reconciliation import LastReconciliation, ReconciliationLedger
from proxy.ledger.stripe_events import Unprocessed
from proxy.metrics import Metrics
from proxy.settings import Settings, SettingsError

__all__ = ["Billing", "open_billing", "stripe_api"]

CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Billing:
    """What lives as long as the app does where credits are sold."""

    desks: Desks
    checkout: Checkout
    auto_topup: AutoSettings
    webhooks: WebhookEndpoint
    refunder: Refunder
    operations: Operations

    def routes(
        self, authenticate: Authenticate, reader: AccountReader, token: AdminToken | None
    ) -> Sequence[BaseRoute]:
        """Its endpoints; the operator's, too, where there is a ``token``."""
        return [
            *webhook_routes(self.webhooks),
            *billing_routes(authenticate, self.checkout, reader),
            *auto_topup_routes(authenticate, self.auto_topup),
            *page_routes(),
            *(refund_routes(token, self.refunder) if token else ()),
            *(admin_auto_topup_routes(token, self.operations, self.auto_topup) if token else ()),
        ]


def stripe_api(settings: Settings) -> StripeApi:
    """Stripe, as the settings say; for commands, too. Raises SettingsError where there is no key."""
    if settings.stripe_key is None:
        raise SettingsError("FAREBOX_STRIPE_KEY: is not set; it is a secret key of Stripe's")
    return StripeApi(settings.stripe_key.get_secret_value(), url=settings.stripe_url, seconds=settings.stripe_seconds)


async def open_billing(
    settings: Settings,
    metrics: Metrics,
    offers: Callable[[], Offers],
    stack: AsyncExitStack,
    *,
    events_seconds: float,
    auto_topup_seconds: float,
) -> Billing | None:
    """Billing, started; None where it is off. It ends with the stack. Raises SettingsError.

    ``offers``: what is sold now. ``events_seconds``: how often webhooks are looked for that were left;
    ``auto_topup_seconds``: and accounts that buy by themselves.
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
    desks = open_desks(api, pool, lambda: offers().plans, metrics=metrics)
    _resume_events(desks, metrics, stack, seconds=events_seconds)
    _resume_refunds(desks, metrics, stack)
    _reconcile(desks, pool, dsn, metrics, stack)
    checkout = _checkout(settings, desks, pool, offers)
    auto_topup = _auto_topup(settings, desks, pool, checkout, metrics, stack, seconds=auto_topup_seconds)
    endpoint = WebhookEndpoint(
        desks.event_ledger,
        desks.events,
        secrets=[secret.get_secret_value() for secret in settings.stripe_webhook_secrets],
        livemode=api.livemode,
        metrics=metrics,
    )
    refunder = Refunder(desks.orders, desks.refund_requests, desks.refunds, livemode=api.livemode)
    # Accounts are found, and no keys are made here.
    operations = Operations(ControlLedger(pool), peppers=None)
    return Billing(desks, checkout, auto_topup, endpoint, refunder, operations)


def _checkout(settings: Settings, desks: Desks, pool: Pool, offers: Callable[[], Offers]) -> Checkout:
    """What sells, on the operator's terms."""
    terms = CheckoutTerms(
        automatic_tax=settings.stripe_automatic_tax,
        invoice_creation=settings.stripe_invoice_creation,
        adaptive_pricing=settings.stripe_adaptive_pricing,
        promotion_codes=settings.stripe_promotion_codes,
        url=settings.billing_url,
        return_urls=ReturnUrls(settings.billing_return_urls),
    )
    return Checkout(desks.api, desks.orders, ControlLedger(pool), offers, terms, new_id=new_request_id)


def _auto_topup(
    settings: Settings,
    desks: Desks,
    pool: Pool,
    checkout: Checkout,
    metrics: Metrics,
    stack: AsyncExitStack,
    *,
    seconds: float,
) -> AutoSettings:
    """What buys packs for accounts by itself, and what they say about it."""
    ledger, taxed = AutoTopupLedger(pool), settings.stripe_automatic_tax
    loop = AutoTopups(
        desks.api,
        ledger,
        desks.orders,
        desks.till,
        checkout,
        lambda pack: offer_of(checkout.offers.packs.get(pack)),
        metrics=metrics,
        opens=not taxed,
        look_seconds=seconds,
    )
    loop.start()
    stack.push_async_callback(loop.stop)
    return AutoSettings(ledger, desks.orders, lambda: checkout.offers, livemode=desks.api.livemode, automatic_tax=taxed)


def _resume_events(desks: Desks, metrics: Metrics, stack: AsyncExitStack, *, seconds: float) -> None:
    """What comes back for webhooks that were received and not processed."""

    def observe(left: Unprocessed) -> None:
        metrics.stripe_events_left(left.count, left.oldest.timestamp() if left.oldest else 0.0)

    resumer = EventResumer(
        desks.event_ledger, desks.events, livemode=desks.api.livemode, observe=observe, seconds=seconds
    )
    resumer.start()
    stack.push_async_callback(resumer.stop)


def _resume_refunds(desks: Desks, metrics: Metrics, stack: AsyncExitStack) -> None:
    """What goes on with refunds that we asked for and got no answer to."""

    def observe(held: int, oldest: datetime | None) -> None:
        metrics.refunds_held(held, oldest.timestamp() if oldest else 0.0)

    resumer = RefundResumer(desks.refund_requests, desks.refunds, observe=observe)
    resumer.start()
    stack.push_async_callback(resumer.stop)


def _reconcile(desks: Desks, pool: Pool, dsn: str, metrics: Metrics, stack: AsyncExitStack) -> None:
    """What holds Stripe's book against ours, hourly and daily."""

    def observe(last: Mapping[str, LastReconciliation]) -> None:
        for name, found in last.items():
            clean_at = found.clean_at.timestamp() if found.clean_at else 0.0
            metrics.reconciliation(name, mended=found.mended, differing=found.differing, clean_at=clean_at)

    ledger = ReconciliationLedger(pool)
    reconciler = open_reconciler(desks, ledger)
    loop = ReconcileLoop(reconciler, ledger, lambda: connect(dsn, Role.CONTROL), observe=observe)
    loop.start()
    stack.push_async_callback(loop.stop)
