"""What a key says about automatic top-ups, over HTTP, and a real ledger."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import httpx2
import pytest
from starlette.requests import Request

from proxy.control.admin import AdminToken
from proxy.control.billing.auto_settings import AutoSettings, admin_auto_topup_routes, auto_topup_routes
from proxy.control.operations import Operations
from proxy.core.errors import Unauthenticated
from proxy.core.packs import Offers, Pack
from proxy.ledger.autotopups import AutoTopupLedger
from proxy.ledger.orders import OrderLedger
from proxy.ledger.records import ApiKey
from tests.control.billing.shop import PACK, Shop
from tests.control.billing.till import Desk
from tests.control.conftest import ADMIN_TOKEN, client_of
from tests.ledger.bank import Bank

PATH = "/v1/billing/auto_topup"
PACKS = {
    PACK: Pack(id=PACK, name="1,000", credits=1_000, price=1_000, currency="usd", bonus=100),
    "yen": Pack(id="yen", name="yen", credits=1_000, price=1_500, currency="jpy"),
}
WISH = {"pack": PACK, "threshold": "0.00001", "monthly_max": "50"}


@asynccontextmanager
async def client_on(bank: Bank, **terms: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client whose key is the one that the header ``key`` names."""
    pool = bank.control._pool
    offers = Offers(packs=PACKS)
    settings = AutoSettings(AutoTopupLedger(pool), OrderLedger(pool), lambda: offers, livemode=False, **terms)

    async def authenticate(request: Request) -> ApiKey:
        key = await bank.holds.find_key(request.headers.get("key", ""))
        if key is None:
            raise Unauthenticated("No key.", code="invalid_api_key")
        return key

    async with client_of(auto_topup_routes(authenticate, settings)) as opened:
        yield opened


@pytest.fixture
async def client(bank: Bank) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_on(bank) as opened:
        yield opened


@pytest.fixture
async def shop(desk: Desk) -> Shop:
    return Shop(desk)


async def key_of(bank: Bank, account_id: UUID, *scopes: str) -> dict[str, str]:
    """A header with a key of that account."""
    return {"key": (await bank.open_key(account_id, scopes=scopes or ("billing",))).id}


async def test_it_is_put_shown_and_deleted(bank: Bank, shop: Shop, client: httpx2.AsyncClient) -> None:
    account = await shop.account()
    key = await key_of(bank, account)
    answer = await client.put(PATH, json=WISH, headers=key)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "private, no-store")
    view = answer.json()
    assert view == {
        "object": "auto_topup", "state": "ready", "pack": PACK, "credits": "0.001", "price": "10.00", "currency": "USD",
        "threshold": "0.00001", "monthly_max": "50.00", "spent_this_month": "0.00", "livemode": False, "order": None,
        "problem": None, "failures": 0, "next_attempt_at": None, "checkout_url": None,
        "changed_at": view["changed_at"],
    }  # fmt: skip
    assert (await client.get(PATH, headers=key)).json() == view
    assert (await client.get(PATH, headers=await key_of(bank, account, "read"))).json() == view
    stopped = (await client.delete(PATH, headers=key)).json()
    assert stopped == view | {"state": "off", "changed_at": stopped["changed_at"]}
    assert await shop.topups.attempt(account, PACK) is None
    again = await client.put(PATH, json=WISH, headers=key)
    assert again.json()["state"] == "ready"
    assert await shop.topups.attempt(account, PACK) is not None


async def test_it_says_how_it_stands(bank: Bank, shop: Shop, client: httpx2.AsyncClient) -> None:
    async def stands(account: UUID) -> dict[str, Any]:
        view: dict[str, Any] = (await client.get(PATH, headers=await key_of(bank, account))).json()
        return view

    declined, asked, slow = [await shop.account(card) for card in ("decline", "authentication_required", "processing")]
    for account in (declined, asked, slow):
        await shop.topups.attempt(account, PACK)
    view = await stands(declined)
    assert (view["state"], view["problem"], view["failures"]) == ("blocked", "generic_decline", 1)
    assert view["next_attempt_at"] is not None
    [failed] = await shop.attempts(asked)
    await shop.topups.send_link(failed)
    view = await stands(asked)
    assert (view["state"], view["problem"], view["next_attempt_at"]) == ("blocked", "authentication_required", None)
    assert view["checkout_url"].startswith("https://checkout.stripe.com/")
    view = await stands(slow)
    assert (view["state"], view["spent_this_month"]) == ("paying", "10.00")
    assert view["order"] == str((await shop.attempts(slow))[0].id)


async def test_an_account_that_never_said_anything_is_off(bank: Bank, client: httpx2.AsyncClient) -> None:
    account, _ = await bank.open_account()
    key = await key_of(bank, account.id)
    off = {"object": "auto_topup", "state": "off"}
    assert (await client.get(PATH, headers=key)).json() == off
    assert (await client.delete(PATH, headers=key)).json() == off


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"pack": "none"}, "unknown_pack", "pack"),
        ({"pack": None}, "invalid_value", "pack"),
        ({"threshold": "0"}, "invalid_value", "threshold"),
        ({"threshold": 5}, "invalid_value", "threshold"),
        ({"monthly_max": "9.99"}, "invalid_value", "monthly_max"),
        ({"monthly_max": "50.001"}, "invalid_value", "monthly_max"),
        ({"monthly_max": "x"}, "invalid_value", "monthly_max"),
        ({"pack": "yen", "monthly_max": "1500.5"}, "invalid_value", "monthly_max"),
        ({"treshold": "1"}, "unknown_parameter", "treshold"),
    ],
    ids=str,
)
async def test_400_for_what_cannot_be_wanted(
    bank: Bank, shop: Shop, client: httpx2.AsyncClient, changes: dict[str, Any], code: str, param: str
) -> None:
    account = await shop.account()
    answer = await client.put(PATH, json=WISH | changes, headers=await key_of(bank, account))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


async def test_409_without_a_saved_payment_method(bank: Bank, shop: Shop, client: httpx2.AsyncClient) -> None:
    account, stranger = await shop.account(None), (await bank.open_account())[0].id
    for one in (account, stranger):
        answer = await client.put(PATH, json=WISH, headers=await key_of(bank, one))
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "payment_method_required")
        assert answer.headers["x-should-retry"] == "false"
    view = (await client.get(PATH, headers=await key_of(bank, account))).json()
    assert (view["state"], view["problem"]) == ("blocked", "no_payment_method")


async def test_409_where_taxes_are_computed(bank: Bank, shop: Shop) -> None:
    account = await shop.account()
    async with client_on(bank, automatic_tax=True) as client:
        answer = await client.put(PATH, json=WISH, headers=await key_of(bank, account))
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "auto_topup_unavailable")


async def test_the_operator_does_the_same_for_any_account(bank: Bank, shop: Shop) -> None:
    pool, account = bank.control._pool, await shop.account()
    settings = AutoSettings(AutoTopupLedger(pool), OrderLedger(pool), lambda: Offers(packs=PACKS), livemode=False)
    path = f"/admin/v1/accounts/{account}/auto_topup"
    routes = admin_auto_topup_routes(AdminToken(ADMIN_TOKEN), Operations(bank.control, None), settings)
    async with client_of(routes) as client:
        for method in ("GET", "PUT", "DELETE"):
            answer = await client.request(method, path, json=WISH if method == "PUT" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_token")
        client.headers |= {"authorization": f"Bearer {ADMIN_TOKEN}", "x-farebox-actor": "ann"}
        made = await client.put(path, json=WISH)
        assert (made.status_code, made.json()["state"]) == (200, "ready")
        assert (await client.get(path)).json() == made.json()
        assert (await client.put(path, json=WISH | {"pack": "none"})).status_code == 400
        assert (await client.delete(path)).json()["state"] == "off"
        assert (await client.get("/admin/v1/accounts/nobody/auto_topup")).status_code == 404
    actor = await bank.owner.fetchval("SELECT actor FROM farebox.auto_topups WHERE account_id = $1", account)
    assert actor == "admin:ann"


async def test_403_without_the_scope(bank: Bank, shop: Shop, client: httpx2.AsyncClient) -> None:
    account = await shop.account()
    for scopes, methods in ((("inference",), ("GET", "PUT", "DELETE")), (("read",), ("PUT", "DELETE"))):
        for method in methods:
            answer = await client.request(method, PATH, headers=await key_of(bank, account, *scopes))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")
