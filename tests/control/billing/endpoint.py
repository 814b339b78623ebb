"""The webhook endpoint on a real socket, behind the real door, with the till behind it: for tests that speak HTTP."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2
from starlette.routing import Router

from proxy.control.billing.event_types import Subject
from proxy.control.billing.events import Appliers, EventDesk
from proxy.control.billing.till import Till
from proxy.control.billing.webhooks import PATH, WebhookEndpoint, webhook_routes
from proxy.core.errors import NotFound
from proxy.gateway.front import Call, Front, Receive, Scope, Send
from proxy.ledger.connect import Pool
from proxy.ledger.stripe_events import EventLedger
from proxy.local.serving import base_url, listen, serving
from proxy.metrics import Metrics
from tests.control.billing.signing import OLD_SECRET, SECRET

__all__ = ["Endpoint", "payments", "running_endpoint"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """It runs. ``url`` is the webhook's whole address."""

    url: str
    events: EventLedger
    desk: EventDesk
    metrics: Metrics
    http: httpx2.AsyncClient


def payments(till: Till) -> Appliers:
    """What applies sessions and PaymentIntents."""

    async def session(object_id: str) -> str:
        return (await till.apply_payment(session_id=object_id)).outcome

    async def payment(object_id: str) -> str:
        return (await till.apply_payment(payment_intent=object_id)).outcome

    return {Subject.SESSION: session, Subject.PAYMENT: payment}


@asynccontextmanager
async def running_endpoint(
    pool: Pool, appliers: Appliers, *, livemode: bool = False, secrets: Sequence[str] = (SECRET, OLD_SECRET)
) -> AsyncIterator[Endpoint]:
    """The endpoint over the ledger of ``pool`` (of the role CONTROL), on a free port."""
    ledger, metrics = EventLedger(pool), Metrics()
    desk = EventDesk(ledger, appliers, metrics=metrics)
    endpoint = WebhookEndpoint(ledger, desk, secrets=secrets, livemode=livemode, metrics=metrics)
    front = Front(_no_chat, Router(routes=webhook_routes(endpoint), redirect_slashes=False), metrics=metrics)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        scope["app"] = front
        await front(scope, receive, send)

    listener = listen("127.0.0.1", 0)
    url = base_url(listener).removesuffix("/v1")
    async with httpx2.AsyncClient(base_url=url, timeout=30) as http, serving(app, listener):
        yield Endpoint(url + PATH, ledger, desk, metrics, http)


async def _no_chat(scope: Scope, receive: Receive, send: Send, call: Call) -> None:
    raise NotFound("No chat here.", code="unknown_url")
