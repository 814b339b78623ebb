"""The composition root: the one place where objects are made from the settings and handed to each other.

``create_app`` gives the ASGI app. Its lifespan makes the ``Services`` and ends them in reverse order.

To add routes: write a function in your module that takes the objects it needs and returns Starlette routes, and add one
line to ``_routes`` below. Endpoints raise ``core.errors.Refusal``; ``gateway/front.py`` writes every error, adds
x-request-id (also in ``request.state.request_id``) and CORS headers, and forgives base URLs without /v1.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from starlette.routing import BaseRoute, Router

from proxy.core.errors import Unavailable
from proxy.gateway.front import Call, Front, Receive, Scope, Send
from proxy.settings import Settings

__all__ = ["Farebox", "Services", "create_app"]

log = structlog.get_logger("farebox.app")


@dataclass(slots=True)
class Services:
    """Everything that lives as long as the app does."""

    settings: Settings


def create_app(settings: Settings) -> "Farebox":
    """The ASGI app. Nothing is connected or read until its lifespan starts."""
    return Farebox(settings)


class Farebox:
    """The ASGI app: lifespan, then every request through the front door."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._front: Front | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http" and self._front is not None:
            scope["app"] = self
            await self._front(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            raise RuntimeError(f"no {scope['type']} before the lifespan has started")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Start, wait for the end, end. A start that fails is told to the server: an exception would not stop it."""
        await receive()
        started = False
        try:
            async with _running(self._settings) as services:
                self._front = _front(services)
                started = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            log.error("can't shut down" if started else "can't start", reason=str(error), exc_info=error)
            await send({"type": f"lifespan.{'shutdown' if started else 'startup'}.failed", "message": str(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})


@asynccontextmanager
async def _running(settings: Settings) -> AsyncIterator[Services]:
    """The services, started; on the way out they end in reverse order."""
    yield Services(settings=settings)


def _routes(services: Services) -> list[BaseRoute]:
    """Every route but chat completions: one line a module."""
    return []


def _front(services: Services) -> Front:
    settings = services.settings
    return Front(
        _not_yet,
        Router(routes=_routes(services), redirect_slashes=False),
        cors_origins=settings.cors_origins,
        exhausted_status=settings.exhausted_status,
    )


async def _not_yet(scope: Scope, receive: Receive, send: Send, call: Call) -> None:
    raise Unavailable("Chat completions aren't wired yet.", code="unavailable")
