"""The control plane's tests talk HTTP to its routes, behind the real door, over a real ledger."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest
from starlette.routing import BaseRoute, Router

from proxy.control.admin import AdminToken, admin_routes
from proxy.control.operations import Operations
from proxy.core.errors import NotFound
from proxy.core.keys import Peppers
from proxy.gateway.front import Call, Front, Receive, Scope, Send
from proxy.metrics import Metrics
from tests.ledger.bank import Bank, open_bank
from tests.postgres import Database

ADMIN_TOKEN = "an-admin-token-of-more-than-32-characters"


async def _no_chat(scope: Scope, receive: Receive, send: Send, call: Call) -> None:
    raise NotFound("No chat here.", code="unknown_url")


@asynccontextmanager
async def client_of(
    routes: list[BaseRoute], headers: dict[str, str] | None = None
) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client whose server is these routes behind the door."""
    front = Front(_no_chat, Router(routes=routes, redirect_slashes=False), metrics=Metrics())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # As the composition root does: a router that knows its app raises what it doesn't find.
        scope["app"] = front
        await front(scope, receive, send)

    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://farebox.test", headers=headers) as client:
        yield client


@pytest.fixture
async def bank(module_database: Database) -> AsyncIterator[Bank]:
    """A module's tests share the database; each makes accounts of its own."""
    async with open_bank(module_database, size=2) as opened:
        yield opened


@pytest.fixture
def peppers() -> Peppers:
    return Peppers.parse("0123456789abcdef0123456789abcdef")


@pytest.fixture
def operations(bank: Bank, peppers: Peppers) -> Operations:
    return Operations(bank.control, peppers)


@pytest.fixture
async def admin(operations: Operations) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that carries the admin token."""
    routes = admin_routes(AdminToken(ADMIN_TOKEN), operations)
    async with client_of(routes, {"authorization": f"Bearer {ADMIN_TOKEN}"}) as client:
        yield client
