"""Redeeming a promo code over HTTP, and a real ledger."""

from collections.abc import AsyncIterator
from uuid import uuid4

import httpx2
import pytest
from starlette.requests import Request

from proxy.control.billing.promo_codes import ALPHABET, Promos, promo_routes
from proxy.core.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.promos import PromoLedger, PromoTerms
from proxy.ledger.records import ApiKey
from tests.control.conftest import client_of
from tests.ledger.bank import Bank


@pytest.fixture
async def promos(bank: Bank) -> AsyncIterator[Promos]:
    pool = await create_pool(bank.database.app, Role.CONTROL, size=2)
    yield Promos(PromoLedger(pool))
    await pool.close()


@pytest.fixture
async def client(bank: Bank, promos: Promos) -> AsyncIterator[httpx2.AsyncClient]:
    """A client whose key is the one that the header ``key`` names."""

    async def authenticate(request: Request) -> ApiKey:
        key = await bank.holds.find_key(request.headers.get("key", ""))
        if key is None:
            raise Unauthenticated("No key.", code="invalid_api_key")
        return key

    async with client_of(promo_routes(authenticate, promos)) as opened:
        yield opened


async def redeem(client: httpx2.AsyncClient, key: ApiKey, **body: object) -> httpx2.Response:
    return await client.post("/v1/billing/promo_codes/redeem", json=body, headers={"key": key.id})


async def test_200_with_the_credits_and_the_same_again(bank: Bank, promos: Promos, client: httpx2.AsyncClient) -> None:
    made = await promos.create(None, PromoTerms(credits=2_500_000), actor="test")
    account, key = await bank.open_account(scopes=["billing"])
    answer = await redeem(client, key, code=f" {made.code.lower()} ")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "private, no-store"
    first = answer.json()
    assert (first["object"], first["credits"], first["expires_at"], first["redeemed_before"]) == (
        "promo_redemption",
        "2.5",
        None,
        False,
    )
    assert first["transaction"] == f"{account.id}-1"
    assert (await redeem(client, key, code=made.code)).json() == first | {"redeemed_before": True}
    assert await bank.money(account.id) == (2_500_000, 0, 0)
    [transfer] = await bank.control.transfers(account.id)
    assert transfer.actor == f"key:{key.id}"


async def test_403_without_the_scope(bank: Bank, promos: Promos, client: httpx2.AsyncClient) -> None:
    made = await promos.create(None, PromoTerms(credits=1), actor="test")
    account, key = await bank.open_account(scopes=["inference", "read"])
    answer = await redeem(client, key, code=made.code)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")
    assert await bank.book(account.id) == []


@pytest.mark.parametrize("code", ["NO-SUCH-CODE", "%", "ſ" * 9, "x" * 150])
async def test_404_for_what_is_no_code(bank: Bank, client: httpx2.AsyncClient, code: str) -> None:
    _, key = await bank.open_account(scopes=["billing"])
    answer = await redeem(client, key, code=code)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "promo_code_unknown")


async def test_409_for_a_code_that_has_ended(bank: Bank, promos: Promos, client: httpx2.AsyncClient) -> None:
    made = await promos.create(None, PromoTerms(credits=1), actor="test")
    await promos.end(made.code)
    _, key = await bank.open_account(scopes=["billing"])
    answer = await redeem(client, key, code=made.code)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "promo_code_ended")
    assert answer.headers["x-should-retry"] == "false"


async def test_429_with_the_time_to_wait(bank: Bank, client: httpx2.AsyncClient) -> None:
    _, key = await bank.open_account(scopes=["billing"])
    for number in range(10):
        assert (await redeem(client, key, code=f"GUESS{number}")).status_code == 404
    answer = await redeem(client, key, code="GUESS10")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "promo_code_limit")
    assert 3_000 < int(answer.headers["retry-after"]) <= 3_600


@pytest.mark.parametrize("body", [{}, {"code": 1}, {"code": ""}, {"code": "A\x00B"}, {"code": "ABC", "account": "x"}])
async def test_400_for_another_body(bank: Bank, client: httpx2.AsyncClient, body: dict[str, object]) -> None:
    _, key = await bank.open_account(scopes=["billing"])
    assert (await redeem(client, key, **body)).status_code == 400


async def test_a_made_up_code_can_t_be_guessed_or_misread(promos: Promos) -> None:
    codes = [(await promos.create(None, PromoTerms(credits=1), actor="test")).code for _ in range(20)]
    assert len(set(codes)) == 20
    assert all(len(code) == 14 and set(code) <= set(ALPHABET) | {"-"} for code in codes)
    assert not set("ILOU") & set(ALPHABET)


async def test_what_the_operator_can_t_make(promos: Promos) -> None:
    for bad in ("AB", "with space", "-X-", "x" * 41, "ÜBER"):
        with pytest.raises(InvalidRequest, match="3 to 40"):
            await promos.create(bad, PromoTerms(credits=1), actor="test")
    name = f"welcome-{uuid4().hex[:8]}"
    made = await promos.create(name, PromoTerms(credits=1), actor="test")
    assert made.code == name.upper()
    with pytest.raises(Conflict):
        await promos.create(name, PromoTerms(credits=2), actor="test")
    with pytest.raises(NotFound):
        await promos.end("NOSUCH")
