"""gateway/models.py: the list of models that a key sees, and its prices to the last digit."""

from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from proxy.core.catalog import STANDARD, Catalog, Route, Upstream, Variant
from proxy.core.errors import NotFound, Refusal, Unauthenticated
from proxy.core.keys import KEY_RANDOM_BYTES, new_key
from proxy.core.pricing import Price
from proxy.core.usage import TOKEN_CLASSES
from proxy.gateway.models import model_body, models_body, routes
from proxy.ledger.records import ApiKey
from tests.gateway.test_auth import row_of

OPENAI = Upstream("openai", "openai", "https://upstream.test/v1", api_key_env="OPENAI_API_KEY")
KEYLESS = Upstream("keyless", "openai", "https://keyless.test/v1", api_key_env="MISSING")
PRICE = Price(
    input=1_000_000_000,
    cached_input=500_000_000,
    cache_write=1_250_000_000,
    audio_input=40_000_000_000,
    output=3_000_000_000,
    reasoning=3_000_000_001,
    audio_output=1,
    per_request=10_500,
)


def route(model: str, upstream: Upstream = OPENAI, price: Price = PRICE) -> Route:
    variants = {STANDARD: Variant(STANDARD, price)}
    return Route(model, upstream, model, "unknown", 16_384, MappingProxyType(variants))


def catalog_of(*all_routes: Route) -> Catalog:
    return Catalog("0" * 64, "{}", MappingProxyType({each.model: each for each in all_routes}))


CATALOG = catalog_of(route("gpt-4o"), route("claude-sonnet"), route("openai/gpt-4o"), route("lost", KEYLESS))


def has_key(upstream: Upstream) -> bool:
    return upstream is not KEYLESS


def ids(catalog: Catalog, allowed: frozenset[str] | None = None) -> list[str]:
    return [model["id"] for model in models_body(catalog, has_key, allowed)["data"]]


# Bodies.


def test_a_model_has_openais_members_and_its_prices() -> None:
    assert model_body(CATALOG, has_key, None, "gpt-4o") == {
        "id": "gpt-4o",
        "object": "model",
        "created": 0,
        "owned_by": "farebox",
        "max_output_tokens": 16_384,
        "prices": {
            "unit": "credits per 1000 tokens",
            "input": "1",
            "cached_input": "0.5",
            "cache_write": "1.25",
            "audio_input": "40",
            "output": "3",
            "reasoning": "3.000000001",
            "audio_output": "0.000000001",
            "per_request": "0.0105",
        },
        "priced_options": {},
    }


def test_a_priced_option_shows_its_own_prices() -> None:
    variants = {STANDARD: Variant(STANDARD, PRICE), "flex": Variant("flex", replace(PRICE, input=0))}
    flexible = replace(route("gpt-4o"), variants=MappingProxyType(variants))

    body = model_body(catalog_of(flexible), has_key, None, "gpt-4o")

    assert list(body["priced_options"]) == ["flex"]
    assert body["priced_options"]["flex"]["input"] == "0"


def test_the_list_is_sorted_and_leaves_out_what_can_not_be_served() -> None:
    assert ids(CATALOG) == ["claude-sonnet", "gpt-4o", "openai/gpt-4o"]
    assert ids(catalog_of()) == []


def test_a_keys_list_of_models_is_respected() -> None:
    assert ids(CATALOG, frozenset({"gpt-4o", "lost", "not sold"})) == ["gpt-4o"]
    assert ids(CATALOG, frozenset()) == []


@pytest.mark.parametrize(
    ("model", "allowed"),
    [("unknown", None), ("lost", None), ("claude-sonnet", frozenset({"gpt-4o"})), ("", None), ("x" * 10_000, None)],
)
def test_what_the_list_leaves_out_is_404(model: str, allowed: frozenset[str] | None) -> None:
    with pytest.raises(NotFound) as refused:
        model_body(CATALOG, has_key, allowed, model)

    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert len(refused.value.message) < 300


@given(st.lists(st.integers(0, 10**18), min_size=8, max_size=8))
def test_every_price_is_exact(numbers: list[int]) -> None:
    price = Price(*numbers)
    shown = model_body(catalog_of(route("m", price=price)), has_key, None, "m")["prices"]

    for name, rate in zip(TOKEN_CLASSES, price.rates(), strict=True):
        assert Decimal(shown[name]) * 10**9 == rate
        assert "E" not in shown[name]
    assert Decimal(shown["per_request"]) * 10**6 == price.per_request


# Endpoints.


class Door:
    """Stands in for the Authenticator: one key, found under any headers but none."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key

    async def __call__(self, headers: Iterable[tuple[bytes, bytes]], *, age_seconds_max: float | None = None) -> ApiKey:
        if b"authorization" not in dict(headers):
            raise Unauthenticated("No key.", code="api_key_missing")
        return self.key


async def write_refusal(request: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, Refusal)
    return JSONResponse(refusal.body(), refusal.status)


def client_with(key: ApiKey, catalog: Catalog = CATALOG) -> TestClient:
    app = Starlette(
        routes=routes(Door(key), lambda: catalog, has_key),
        exception_handlers={Refusal: write_refusal},
    )
    return TestClient(app, headers={"authorization": "Bearer x"})


KEY = row_of(new_key(bytes(KEY_RANDOM_BYTES)))


def test_200_list() -> None:
    answer = client_with(KEY).get("/v1/models")

    assert answer.status_code == 200
    assert answer.json() == models_body(CATALOG, has_key, None)


@pytest.mark.parametrize("path", ["gpt-4o", "openai/gpt-4o", "openai%2Fgpt-4o"])
def test_200_one_model_slashes_and_all(path: str) -> None:
    answer = client_with(KEY).get(f"/v1/models/{path}")

    assert answer.status_code == 200
    assert answer.json()["id"] == path.replace("%2F", "/")


def test_200_only_what_the_key_may_use() -> None:
    client = client_with(replace(KEY, models=frozenset({"gpt-4o"})))

    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["gpt-4o"]
    assert client.get("/v1/models/claude-sonnet").status_code == 404


def test_401_without_a_key() -> None:
    client = client_with(KEY)
    del client.headers["authorization"]

    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models/gpt-4o").status_code == 401


def test_403_without_a_scope_for_it() -> None:
    assert client_with(replace(KEY, scopes=frozenset({"billing"}))).get("/v1/models").status_code == 403
    for scope in ("inference", "read"):
        assert client_with(replace(KEY, scopes=frozenset({scope}))).get("/v1/models").status_code == 200


@pytest.mark.parametrize("path", ["nothing", "lost", "a/b/c", "%00", "%F0%9F%92%B8", "%ED%A0%80", "%FF"])
def test_404_in_openais_shape(path: str) -> None:
    answer = client_with(KEY).get(f"/v1/models/{path}")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
