"""The checkout over HTTP: orders on a real ledger, pages at the fake Stripe, and what is in between when it breaks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from proxy.control.billing.checkout import Checkout, CheckoutTerms
from proxy.control.billing.errors import StripeRefused
from proxy.control.billing.pages import page_routes
from proxy.control.billing.routes import billing_routes
from proxy.core.packs import CustomAmounts, Offers, Pack
from proxy.core.return_urls import ReturnUrls
from proxy.gateway.ids import new_request_id
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.reader import AccountReader
from proxy.ledger.records import ApiKey
from tests.control.billing.till import Desk
from tests.control.conftest import client_of
from tests.fakes.stripe import ErrorAfter, ErrorBefore, LostReply, LostRequest

STARTER = Pack("starter", "Starter", 1_000_000_000, 1_050, "usd", 100_000_000, 365 * 86_400, 90 * 86_400)
TINY = Pack("tiny", "Tiny", 1_000_000, 100, "eur")
OFFERS = Offers({"starter": STARTER, "tiny": TINY}, {"usd": CustomAmounts("usd", 500, 50_000, 1_000_000)})
TERMS = CheckoutTerms(url="https://api.test", return_urls=ReturnUrls(["https://app.test/billing"]))


@dataclass(frozen=True, slots=True)
class Shop:
    """A customer's key and their HTTP client, and the operator's side of it."""

    desk: Desk
    checkout: Checkout
    http: httpx2.AsyncClient
    key: ApiKey

    async def buy(self, request_key: str | None = None, **body: Any) -> httpx2.Response:
        headers = {} if request_key is None else {"idempotency-key": request_key}
        return await self.http.post("/v1/billing/checkout", json=body, headers=headers)

    def made(self, path: str = "/v1/checkout/sessions") -> list[Any]:
        """What Stripe was asked to make for this account, replays left out."""
        mark = str(self.key.account_id)
        return [asked for asked in self.desk.stripe.asked if asked.name == f"POST {path}" and mark in str(asked.params)]


@asynccontextmanager
async def open_shop(desk: Desk, terms: CheckoutTerms = TERMS, *scopes: str) -> AsyncIterator[Shop]:
    _, key = await desk.bank.open_account(scopes=scopes or ["billing"])
    checkout = Checkout(desk.api, desk.orders, desk.bank.control, lambda: OFFERS, terms, new_id=new_request_id)
    pool = await create_pool(desk.bank.database.app, Role.READER, size=2)

    async def authenticate(_request: object) -> ApiKey:
        return key

    routes = [*billing_routes(authenticate, checkout, AccountReader(pool)), *page_routes()]
    try:
        async with client_of(routes) as http:
            yield Shop(desk, checkout, http, key)
    finally:
        await pool.close()


@pytest.fixture
async def shop(desk: Desk) -> AsyncIterator[Shop]:
    async with open_shop(desk) as opened:
        yield opened


async def test_a_pack_is_bought_from_order_to_credits(shop: Shop) -> None:
    bought = await shop.buy(pack="starter", save_payment_method=True)
    order = bought.json()
    assert (bought.status_code, order["state"], order["credits"], order["bonus"]) == (201, "open", "1000", "100")
    assert (order["price"], order["currency"], order["livemode"]) == ("10.50", "USD", False)
    stored = await shop.desk.orders.search(order["id"])
    assert stored is not None
    assert stored.session_id is not None
    session = shop.desk.stripe.object(stored.session_id)
    assert (order["url"], session["client_reference_id"]) == (session["url"], order["id"])
    assert (session["success_url"], session["cancel_url"]) == (
        "https://api.test/billing/success", "https://api.test/billing/cancel",
    )  # fmt: skip
    intent = shop.desk.stripe.checkout.pay(stored.session_id)
    assert intent is not None
    metadata = shop.desk.stripe.object(intent)["metadata"]
    assert metadata == {"farebox_order": order["id"], "farebox_account": str(shop.key.account_id)}
    assert (await shop.desk.till.apply_payment(payment_intent=intent)).outcome == "paid"
    paid = (await shop.http.get(f"/v1/billing/orders/{order['id']}")).json()
    assert (paid["state"], paid["received"], paid["tax"], paid["url"]) == ("paid", "10.50", "0.00", None)
    assert await shop.desk.balance(stored) == 1_100_000_000
    customer = await shop.desk.orders.customer(shop.key.account_id, livemode=False)
    assert customer == (session["customer"], shop.desk.stripe.object(intent)["payment_method"])


async def test_an_amount_of_choice_buys_at_its_rate(shop: Shop) -> None:
    order = (await shop.buy(amount="12.34", currency="USD")).json()
    assert (order["price"], order["credits"], order["pack"]) == ("12.34", "1234", None)


async def test_the_same_key_is_the_same_order_and_another_body_is_refused(shop: Shop) -> None:
    first, again = await shop.buy("k1", pack="tiny"), await shop.buy("k1", pack="tiny")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = await shop.buy("k1", pack="starter")
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_mismatch")
    assert len(shop.made()) == 1


async def test_eight_at_once_are_one_order_one_page_and_one_customer(shop: Shop) -> None:
    answers = await asyncio.gather(*(shop.buy("k1", pack="tiny") for _ in range(8)))
    found = {answer.json()["id"] for answer in answers if answer.status_code < 300}
    assert len(found) == 1
    assert {answer.status_code for answer in answers} <= {200, 201, 503}, "503: Stripe was at it for another of them"
    last = await shop.buy("k1", pack="tiny")
    assert last.json()["id"] in found
    assert len({asked.key for asked in shop.made("/v1/customers")}) == 1
    assert len({asked.key for asked in shop.made()}) == 1


@pytest.mark.parametrize("fault", [ErrorBefore(), ErrorAfter(), LostReply(), LostRequest()], ids=repr)
@pytest.mark.parametrize("path", ["/v1/customers", "/v1/checkout/sessions"])
async def test_what_breaks_on_the_way_to_stripe_is_gone_on_with(shop: Shop, path: str, fault: Any) -> None:
    shop.desk.stripe.faults.on(f"POST {path}", fault)
    broken = await shop.buy("k1", pack="tiny")
    assert (broken.status_code, broken.json()["error"]["code"]) == (503, "payment_provider_unavailable")
    assert broken.headers["x-should-retry"] == "true"
    again = await shop.buy("k1", pack="tiny")
    order = again.json()
    assert (again.status_code, order["state"]) == (200, "open")
    stored = await shop.desk.orders.search(order["id"])
    assert stored is not None
    assert stored.session_id is not None
    shop.desk.stripe.checkout.pay(stored.session_id)
    assert (await shop.desk.till.apply_payment(stored.id)).outcome == "paid"
    assert len(await shop.desk.orders.list_orders(shop.key.account_id)) == 1
    # What Stripe keeps a failure under is followed by the next; nothing else is.
    customer = f"customer:{shop.key.account_id}:test"
    for made, key in (("/v1/customers", customer), ("/v1/checkout/sessions", str(stored.id))):
        failed = made == path and isinstance(fault, ErrorBefore | ErrorAfter)
        assert {asked.key for asked in shop.made(made)} == ({key, f"{key}:2"} if failed else {key})


async def test_a_page_that_we_never_heard_of_is_found_again(shop: Shop) -> None:
    shop.desk.stripe.faults.on("POST /v1/checkout/sessions", LostReply())
    assert (await shop.buy(pack="tiny")).status_code == 503
    [order] = await shop.desk.orders.list_orders(shop.key.account_id)
    assert (order.state, order.session_id) == ("created", None)
    assert (await shop.desk.till.apply_payment(order.id)).outcome == "open"
    found = await shop.desk.orders.find(order.id)
    assert found.state == "open"
    assert found.session_id is not None


async def test_a_customer_that_was_deleted_at_stripe_is_made_anew(shop: Shop) -> None:
    await shop.buy(pack="tiny")
    [customer, _] = await shop.desk.orders.customer(shop.key.account_id, livemode=False) or ("", "")
    await shop.desk.api.call(lambda client: client.v1.customers.delete(customer or ""))
    again = await shop.buy(pack="tiny")
    assert again.status_code == 201
    other = await shop.desk.orders.customer(shop.key.account_id, livemode=False)
    assert other is not None
    assert other[0] != customer


async def test_what_stripe_refuses_is_a_502_that_doesnt_repeat_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_arguments: object, **_options: object) -> None:
        raise StripeRefused("Stripe refused (401): Invalid API Key: sk_test_secret", status=401)

    monkeypatch.setattr(shop.desk.api, "create_session", refuse)
    refused = await shop.buy(pack="tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "payment_provider_refused")
    assert "sk_test" not in refused.text
    [order] = await shop.desk.orders.list_orders(shop.key.account_id)
    assert order.state == "failed", "nobody can ask for it again"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "pack"),
        ({"pack": "none"}, "unknown_pack", "pack"),
        ({"pack": "tiny", "amount": "5"}, "invalid_value", "pack"),
        ({"amount": "5"}, "invalid_value", "currency"),
        ({"amount": "5", "currency": "XXX"}, "unknown_currency", "currency"),
        ({"amount": "4.99", "currency": "usd"}, "invalid_value", "amount"),
        ({"amount": "500.01", "currency": "usd"}, "invalid_value", "amount"),
        ({"amount": "5.001", "currency": "usd"}, "invalid_value", "amount"),
        ({"amount": 5, "currency": "usd"}, "invalid_value", "amount"),
        ({"amount": "-5", "currency": "usd"}, "invalid_value", "amount"),
        ({"pack": "tiny", "success_url": "https://evil.test/"}, "return_url_refused", "success_url"),
        ({"pack": "tiny", "cancel_url": "https://app.test.evil.test/billing"}, "return_url_refused", "cancel_url"),
        ({"pack": "tiny", "price": "0.01"}, "unknown_parameter", "price"),
        ({"pack": "tiny", "credits": "1000000"}, "unknown_parameter", "credits"),
        ({"pack": "tiny", "save_payment_method": "yes"}, "invalid_value", "save_payment_method"),
    ],
    ids=str,
)
async def test_a_wrong_body_names_what_is_wrong_and_makes_no_order(
    shop: Shop, body: dict[str, Any], code: str, param: str
) -> None:
    refused = await shop.buy(**body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, code, param)
    assert await shop.desk.orders.list_orders(shop.key.account_id) == []


@pytest.mark.parametrize("request_key", ["", "a b", "x" * 256])
async def test_a_wrong_idempotency_key_is_refused(shop: Shop, request_key: str) -> None:
    refused = await shop.buy(request_key, pack="tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "idempotency_key_invalid")


async def test_a_payment_returns_where_the_operator_allows_it(shop: Shop) -> None:
    url = "https://app.test/billing/done?session={CHECKOUT_SESSION_ID}"
    order = (await shop.buy(pack="tiny", success_url=url, cancel_url="https://app.test/billing")).json()
    stored = await shop.desk.orders.search(order["id"])
    assert stored is not None
    assert (stored.success_url, stored.cancel_url) == (url, "https://app.test/billing")


async def test_a_server_without_an_address_needs_a_success_url(desk: Desk) -> None:
    terms = CheckoutTerms(return_urls=TERMS.return_urls)
    async with open_shop(desk, terms) as shop:
        assert (await shop.buy(pack="tiny")).json()["error"]["param"] == "success_url"
        order = (await shop.buy(pack="tiny", success_url="https://app.test/billing")).json()
        stored = await desk.orders.search(order["id"])
        assert stored is not None
        assert stored.cancel_url is None
        with pytest.raises(StripeRefused, match="FAREBOX_BILLING_URL"):
            await shop.checkout.checkout_instead(stored)


@pytest.mark.parametrize(
    ("scope", "looks", "buys"), [("billing", 200, 201), ("read", 200, 403), ("inference", 403, 403)]
)
async def test_a_key_does_what_its_scope_says(desk: Desk, scope: str, looks: int, buys: int) -> None:
    async with open_shop(desk, TERMS, scope) as shop:
        paths = ["/v1/billing/packs", "/v1/billing/orders", f"/v1/billing/orders/{uuid4()}"]
        seen = [(await shop.http.get(path)).status_code for path in paths]
        assert seen == [looks, looks, 404 if looks == 200 else 403]
        assert (await shop.buy(pack="tiny")).status_code == buys


async def test_packs_say_what_is_sold(shop: Shop) -> None:
    listed = (await shop.http.get("/v1/billing/packs")).json()
    assert [(pack["id"], pack["price"], pack["currency"], pack["bonus"]) for pack in listed["data"]] == [
        ("starter", "10.50", "USD", "100"), ("tiny", "1.00", "EUR", "0"),
    ]  # fmt: skip
    assert listed["custom_amounts"][0] == {
        "object": "custom_amounts",
        "currency": "USD",
        "least": "5.00",
        "most": "500.00",
        "credits_per_minor_unit": "1",
        "expires_days": None,
    }


async def test_orders_are_listed_by_pages_and_are_nobody_elses(shop: Shop, desk: Desk) -> None:
    bought = [(await shop.buy(pack="tiny")).json()["id"] for _ in range(3)]
    first = (await shop.http.get("/v1/billing/orders", params={"limit": 2})).json()
    assert ([order["id"] for order in first["data"]], first["has_more"]) == ([bought[2], bought[1]], True)
    rest = (await shop.http.get("/v1/billing/orders", params={"limit": 2, "after": first["last_id"]})).json()
    assert ([order["id"] for order in rest["data"]], rest["has_more"]) == ([bought[0]], False)
    async with open_shop(desk) as other:
        assert (await other.http.get("/v1/billing/orders")).json()["data"] == []
        assert (await other.http.get(f"/v1/billing/orders/{bought[0]}")).status_code == 404


async def test_so_many_unpaid_orders_are_enough(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    create = shop.desk.orders.create
    monkeypatch.setattr(shop.checkout._orders, "create", lambda new: create(new, unfinished_max=2))
    assert [(await shop.buy(pack="tiny")).status_code for _ in range(3)] == [201, 201, 429]


async def test_terms_are_what_stripe_is_asked_for(desk: Desk) -> None:
    terms = CheckoutTerms(True, True, True, True, "https://api.test")
    async with open_shop(desk, terms) as shop:
        order = (await shop.buy(pack="starter")).json()
        stored = await desk.orders.search(order["id"])
        assert stored is not None
        assert stored.session_id is not None
        session = desk.stripe.object(stored.session_id)
        assert session["automatic_tax"]["enabled"]
        assert session["invoice_creation"]["enabled"]
        assert session["adaptive_pricing"] == {"enabled": True}
        assert session["allow_promotion_codes"] is True
        # A whole price off, the operator's own code: nothing to pay, and the credits all the same.
        assert desk.stripe.checkout.pay(stored.session_id, discount=1_050) is None
        assert (await desk.till.apply_payment(stored.id)).outcome == "paid"
        paid = await desk.orders.find(stored.id)
        assert (paid.received, paid.discount, paid.payment) == (0, 1_050, stored.session_id)
        assert await desk.balance(paid) == 1_100_000_000


async def test_a_checkout_instead_of_an_automatic_order_is_one(shop: Shop) -> None:
    failed = await shop.desk.order(shop.key.account_id, kind="auto", credits=7, bonus=1, price=700)
    first, again = [await shop.checkout.checkout_instead(failed) for _ in range(2)]
    assert first == again
    assert (first.credits, first.bonus, first.price, first.kind, first.save_payment_method) == (
        7,
        1,
        700,
        "checkout",
        True,
    )
    assert first.url is not None


@pytest.mark.parametrize("path", ["/billing/success", "/billing/cancel"])
async def test_our_own_pages_are_plain(shop: Shop, path: str) -> None:
    page = await shop.http.get(path)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<script" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["cache-control"] == "no-store"
