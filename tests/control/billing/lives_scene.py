"""A scene where money comes in: the webhook endpoint on a real socket, the till and the desks behind it, on a real
ledger and with the fake Stripe."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import uvicorn
from starlette.routing import Router
from structlog.testing import capture_logs

from proxy.control.billing.disputes import DisputeDesk
from proxy.control.billing.event_types import EVENT_TYPES, Subject
from proxy.control.billing.events import EventDesk
from proxy.control.billing.refunds import RefundDesk
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from proxy.control.billing.webhooks import PATH, WebhookEndpoint, webhook_routes
from proxy.core.errors import NotFound
from proxy.gateway.front import Call, Front, Receive, Scope, Send
from proxy.ledger.audit import audit
from proxy.ledger.connect import Pool, Role, create_pool
from proxy.ledger.disputes import DisputeLedger
from proxy.ledger.orders import Order
from proxy.ledger.refunds import RefundLedger
from proxy.ledger.stripe_events import EventLedger
from proxy.metrics import Metrics
from tests.control.billing.till import Desk, open_desk
from tests.fakes.stripe import FakeStripe
from tests.fakes.till_oracle import Books
from tests.ledger.bank import Bank, open_bank
from tests.postgres import Database

__all__ = ["Scene", "open_scene"]

BOOKS = """
    SELECT o.state, o.taken, o.bonus_taken, a.balance, a.held, a.debt, a.frozen_at IS NOT NULL AS frozen,
           (SELECT count(*) FROM farebox.transfers t WHERE t.account_id = a.id AND t.kind = 'purchase') AS purchases
      FROM farebox.orders o JOIN farebox.accounts a ON a.id = o.account_id
     WHERE o.id = $1
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the lives of purchases happen at."""

    bank: Bank
    desk: Desk
    stripe: FakeStripe
    owner: Pool

    async def books(self, order_id: UUID) -> Books:
        """What the ledger says of an order, and of its account. Fails where the two can't be."""
        row = await self.owner.fetchrow(BOOKS, order_id)
        assert row is not None
        assert row["held"] > 0 or row["balance"] == 0 or row["debt"] == 0, f"{order_id} owes what it has"
        return Books(
            state={"created": "open"}.get(row["state"], row["state"]),
            taken=row["taken"],
            bonus_taken=row["bonus_taken"],
            net=row["balance"] - row["debt"],
            frozen=row["frozen"],
            purchases=row["purchases"],
        )

    async def audit(self) -> list[str]:
        """The ledger's invariants that don't hold."""
        return [f"the audit: {check}" for check in await audit(self.bank.owner) if not check.ok]

    async def off_session(self, order: Order) -> str:
        """A PaymentIntent without a session, as an automatic top-up makes it, that takes days: its id."""
        params: dict[str, Any] = {
            "amount": order.price,
            "currency": order.currency,
            "payment_method": "pm_sepaDebit",
            "confirm": True,
            "metadata": {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(order.account_id)},
        }
        made: str = await self.desk.api.call(lambda client: client.v1.payment_intents.create(params).id)  # type: ignore[arg-type]
        return made


@contextlib.asynccontextmanager
async def open_scene(database: Database, stripe: FakeStripe) -> AsyncIterator[Scene]:
    """A scene on that database, to which that Stripe's events go."""
    async with contextlib.AsyncExitStack() as stack:
        # Thousands of lines that nobody reads, some with a traceback, take longer than what they tell of.
        stack.enter_context(capture_logs())
        bank = await stack.enter_async_context(open_bank(database))
        desk = await stack.enter_async_context(open_desk(bank, stripe))
        control = await stack.enter_async_context(await create_pool(database.app, Role.CONTROL, size=10))
        owner = await stack.enter_async_context(await asyncpg.create_pool(database.owner, min_size=1, max_size=4))
        port = await stack.enter_async_context(_serving(_endpoint(control, desk, stripe.secret)))
        stripe.listen(f"http://127.0.0.1:{port}{PATH}", sorted(EVENT_TYPES))
        yield Scene(bank, desk, stripe, owner)


def _endpoint(pool: Pool, desk: Desk, secret: str) -> WebhookEndpoint:
    refunds = RefundDesk(desk.api, RefundLedger(pool), desk.till)
    disputes = DisputeDesk(desk.api, DisputeLedger(pool), desk.till)

    async def session(id: str) -> str:
        return (await desk.till.apply_payment(session_id=id)).outcome

    async def intent(id: str) -> str:
        return (await desk.till.apply_payment(payment_intent=id)).outcome

    ledger, metrics = EventLedger(pool), Metrics()
    appliers = {
        Subject.SESSION: session,
        Subject.PAYMENT: intent,
        Subject.REFUND: refunds.apply,
        Subject.DISPUTE: disputes.apply,
    }
    events = EventDesk(ledger, appliers, metrics=metrics)
    return WebhookEndpoint(ledger, events, secrets=[secret], livemode=desk.api.livemode, metrics=metrics)


@contextlib.asynccontextmanager
async def _serving(endpoint: WebhookEndpoint) -> AsyncIterator[int]:
    """The endpoint behind the real door, on a port of 127.0.0.1."""
    front = Front(_no_chat, Router(routes=webhook_routes(endpoint), redirect_slashes=False), metrics=Metrics())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = front
        await front(scope, receive, send)

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    task = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listening.close()


async def _no_chat(scope: Scope, receive: Receive, send: Send, call: Call) -> None:
    raise NotFound("No chat here.", code="unknown_url")
