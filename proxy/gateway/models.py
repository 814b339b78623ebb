"""GET /v1/models and /v1/models/{id}: what is for sale, in OpenAI's list shape with the prices as extra members.

A route whose upstream has no key at hand can't be served, and a model that isn't on the key's list can't be used: both
are left out, and asking for one by its id is the same 404 as for a model that doesn't exist.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from proxy.core import catalog
from proxy.core.errors import NotFound
from proxy.core.pricing import Price
from proxy.core.usage import TOKEN_CLASSES
from proxy.gateway.auth import require_scope
from proxy.ledger.records import ApiKey

__all__ = ["Authenticate", "HasKey", "model_body", "models_body", "routes"]

# A rate is microcredits per million tokens; a price per thousand, in credits, is a thousandth of a millionth of it.
_RATE_DECIMALS = 9
_REQUEST_DECIMALS = 6

HasKey = Callable[[catalog.Upstream], bool]
"""Whether the upstream's API key can be had now, or none is needed."""


class Authenticate(Protocol):
    """What these endpoints need of ``auth.Authenticator``."""

    def __call__(
        self, headers: Iterable[tuple[bytes, bytes]], *, age_seconds_max: float | None = None
    ) -> Awaitable[ApiKey]: ...


def routes(authenticate: Authenticate, current: Callable[[], catalog.Catalog], has_key: HasKey) -> list[BaseRoute]:
    """Starlette's routes for both paths. ``current`` gives the catalog that is served at the time of the request."""

    async def list_models(request: Request) -> JSONResponse:
        key = await _reader(request)
        return JSONResponse(models_body(current(), has_key, key.models))

    async def retrieve_model(request: Request) -> JSONResponse:
        key = await _reader(request)
        return JSONResponse(model_body(current(), has_key, key.models, request.path_params["model"]))

    async def _reader(request: Request) -> ApiKey:
        # Prices are no secret of the account's, so the cache's own few seconds will do here.
        key = await authenticate(request.headers.raw)
        require_scope(key, "inference", "read")
        return key

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        # A model's name may hold slashes: openai/gpt-4o.
        Route("/v1/models/{model:path}", retrieve_model, methods=["GET"]),
    ]


def models_body(current: catalog.Catalog, has_key: HasKey, allowed: frozenset[str] | None) -> dict[str, Any]:
    """OpenAI's list object of every model that a key with this list of models can use, by name."""
    usable = (route for _, route in sorted(current.routes.items()) if _usable(route, has_key, allowed))
    return {"object": "list", "data": [_model(route) for route in usable]}


def model_body(current: catalog.Catalog, has_key: HasKey, allowed: frozenset[str] | None, model: str) -> dict[str, Any]:
    """OpenAI's model object of one model. Raises NotFound where the list would not show it."""
    route = current.routes.get(model)
    if route is None or not _usable(route, has_key, allowed):
        raise NotFound(f"The model {model[:200]!r} does not exist.", code="model_not_found", param="model")
    return _model(route)


def _usable(route: catalog.Route, has_key: HasKey, allowed: frozenset[str] | None) -> bool:
    return (allowed is None or route.model in allowed) and has_key(route.upstream)


def _model(route: catalog.Route) -> dict[str, Any]:
    return {
        "id": route.model,
        "object": "model",
        # The date of a model is not known here, and clients need a number.
        "created": 0,
        "owned_by": "farebox",
        "max_output_tokens": route.output_tokens_max,
        "prices": _prices(route.variants[catalog.STANDARD].price),
        "priced_options": {
            name: _prices(variant.price) for name, variant in sorted(route.variants.items()) if name != catalog.STANDARD
        },
    }


def _prices(price: Price) -> dict[str, str]:
    """Decimal credits per 1,000 tokens by class, and ``per_request`` in credits."""
    rates = zip(TOKEN_CLASSES, price.rates(), strict=True)
    prices = {name: _decimal(rate, _RATE_DECIMALS) for name, rate in rates}
    return {"unit": "credits per 1000 tokens", **prices, "per_request": _decimal(price.per_request, _REQUEST_DECIMALS)}


def _decimal(number: int, decimals: int) -> str:
    """``number / 10**decimals``, exact, without trailing zeros."""
    whole, rest = divmod(number, 10**decimals)
    return f"{whole}.{rest:0{decimals}d}".rstrip("0") if rest else str(whole)
