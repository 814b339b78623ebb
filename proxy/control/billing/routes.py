"""Self-service: what a key may buy for its account, and what it bought.

    GET  /v1/billing/packs          what is sold
    POST /v1/billing/checkout       an order, and the page where it is paid; Idempotency-Key
    GET  /v1/billing/orders         its orders, newest first; ?limit=&after=
    GET  /v1/billing/orders/{id}    one of them

To buy needs the scope ``billing``; to look, that or ``read``. Another account's order and an unknown one are one 404.
"""

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.billing.checkout import Checkout, Wanted
from proxy.control.billing.errors import StripeAway, StripeRefused
from proxy.control.billing.views import offers_view, order_view
from proxy.control.fields import Fields, parse_uuid, query_fields, receive_fields
from proxy.control.refusals import ledger_refusals
from proxy.control.views import page
from proxy.core.currencies import CurrencyError, parse_money
from proxy.core.errors import (
    Forbidden,
    InvalidRequest,
    NotFound,
    TooManyRequests,
    Unavailable,
    Unprocessable,
    UpstreamError,
)
from proxy.core.packs import CustomAmounts, Pack
from proxy.core.return_urls import URL_CHARS_MAX
from proxy.ledger.orders import UNFINISHED_MAX, CreateOutcome
from proxy.ledger.reader import AccountReader
from proxy.ledger.records import ApiKey

__all__ = ["billing_routes"]

Authenticate = Callable[[Request], Awaitable[ApiKey]]

# An order in somebody's cache would be yesterday's.
_PRIVATE = {"cache-control": "private, no-store"}
_REQUEST_KEY = re.compile(r"[!-~]{1,255}\Z", re.ASCII)


def billing_routes(authenticate: Authenticate, checkout: Checkout, reader: AccountReader) -> list[BaseRoute]:
    """The routes above. ``authenticate`` comes from the gateway."""

    async def looker(request: Request) -> ApiKey:
        key = await authenticate(request)
        if not key.scopes & {"billing", "read"}:
            raise Forbidden("This API key has neither the scope billing nor read.", code="insufficient_scope")
        return key

    async def packs(request: Request) -> Response:
        await looker(request)
        query_fields(request).done()
        return JSONResponse(offers_view(checkout.offers), headers=_PRIVATE)

    async def orders(request: Request) -> Response:
        key = await looker(request)
        query = query_fields(request)
        limit, after = query.limit(), query.uuid("after")
        query.done()
        with ledger_refusals():
            found = await reader.orders(key.account_id, after=after, limit=limit + 1)
        return JSONResponse(page(map(order_view, found), limit), headers=_PRIVATE)

    async def order(request: Request) -> Response:
        key = await looker(request)
        query_fields(request).done()
        order_id = parse_uuid(request.path_params["order_id"])
        with ledger_refusals():
            found = None if order_id is None else await reader.order(key.account_id, order_id)
        if found is None:
            raise NotFound("There is no such order.", code="order_not_found")
        return JSONResponse(order_view(found), headers=_PRIVATE)

    async def buy(request: Request) -> Response:
        key = await authenticate(request)
        if "billing" not in key.scopes:
            raise Forbidden("This API key doesn't have the scope billing.", code="insufficient_scope")
        request_key = _request_key(request)
        wanted = _wanted(await receive_fields(request), checkout)
        with ledger_refusals(), _stripe_refusals():
            created = await checkout.start(key.account_id, wanted, actor=key.id, request_key=request_key)
        if created.outcome is CreateOutcome.CONFLICT:
            raise Unprocessable(
                "This Idempotency-Key belongs to a checkout with another body.", code="idempotency_key_mismatch"
            )
        if created.order is None:
            raise TooManyRequests(
                f"{UNFINISHED_MAX} orders of this account wait for their payment already: pay one of them, or wait"
                " until they expire, a day after they were made.",
                code="too_many_unpaid_orders",
                headers={"retry-after": "3600"},
            )
        fresh = created.outcome is CreateOutcome.DONE
        return JSONResponse(order_view(created.order), status_code=201 if fresh else 200, headers=_PRIVATE)

    return [
        Route("/v1/billing/packs", packs),
        Route("/v1/billing/checkout", buy, methods=["POST"]),
        Route("/v1/billing/orders", orders),
        Route("/v1/billing/orders/{order_id}", order),
    ]


def _wanted(body: Fields, checkout: Checkout) -> Wanted:
    """What the body asks for, from what is sold, returning to where it may."""
    pack, amount, currency = body.text("pack"), body.text("amount"), body.text("currency")
    urls = [_url(body, name, checkout) for name in ("success_url", "cancel_url")]
    save = body.flag("save_payment_method") or False
    body.done()
    success_url = urls[0] or checkout.success_url
    if success_url is None:
        body.refuse("success_url", "is required: this server has no page of its own to return to")
    goods, chosen = _goods(body, checkout, pack, amount, currency)
    cancel_url = urls[1] or checkout.cancel_url
    return Wanted(goods=goods, amount=chosen, success_url=success_url, cancel_url=cancel_url, save_payment_method=save)


def _goods(
    body: Fields, checkout: Checkout, pack: str | None, amount: str | None, currency: str | None
) -> tuple[Pack | CustomAmounts, int]:
    """A pack, or the limits of an amount and the amount."""
    if pack is not None:
        if amount is not None or currency is not None:
            body.refuse("pack", "has its own price: give either pack, or amount and currency")
        found = checkout.offers.packs.get(pack)
        if found is None:
            raise InvalidRequest(
                "There is no such pack. GET /v1/billing/packs lists what is sold.", code="unknown_pack", param="pack"
            )
        return found, 0
    if amount is None:
        body.refuse("pack", "is required, or amount and currency")
    if currency is None:
        body.refuse("currency", "is required beside amount")
    amounts = checkout.offers.custom_amounts.get(currency.lower())
    if amounts is None:
        raise InvalidRequest(
            "No amount of this currency can be chosen. GET /v1/billing/packs lists what is sold.",
            code="unknown_currency",
            param="currency",
        )
    try:
        chosen = parse_money(amount, currency)
        amounts.credits_for(chosen)
    except CurrencyError as error:
        body.refuse("amount", f"is wrong: {error}")
    except ValueError as error:
        body.refuse("amount", str(error))
    return amounts, chosen


def _url(body: Fields, name: str, checkout: Checkout) -> str | None:
    url = body.text(name, chars_max=URL_CHARS_MAX)
    if url is not None and not checkout.terms.return_urls.allow(url):
        raise InvalidRequest(
            f"{name} is not among the addresses that a payment may return to here (FAREBOX_BILLING_RETURN_URLS).",
            code="return_url_refused",
            param=name,
        )
    return url


def _request_key(request: Request) -> str | None:
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not _REQUEST_KEY.match(given[0]):
        raise InvalidRequest(
            "The Idempotency-Key must be given once, with 1 to 255 visible ASCII characters.",
            code="idempotency_key_invalid",
        )
    return given[0]


@contextmanager
def _stripe_refusals() -> Iterator[None]:
    try:
        yield
    except StripeAway as error:
        raise Unavailable(
            "The payment provider can't be asked at the moment. Nothing was charged; try again, with the same"
            " Idempotency-Key if there was one.",
            code="payment_provider_unavailable",
            headers={"retry-after": "5", "x-should-retry": "true"},
        ) from error
    except StripeRefused as error:
        _refused(error)


def _refused(error: StripeRefused) -> NoReturn:
    # What Stripe said may name the operator's account or key: it stands in the log.
    raise UpstreamError(
        "The payment provider refused to make the checkout; the operator's log says why. Nothing was charged.",
        code="payment_provider_refused",
    ) from error
