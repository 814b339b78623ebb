"""What an account buys without anybody asking: said by a key for its own account, or by the operator for any.

    GET    /v1/billing/auto_topup    what is set, and how it stands
    PUT    /v1/billing/auto_topup    {"pack", "threshold", "monthly_max"}; what stood in the way is forgotten
    DELETE /v1/billing/auto_topup    no more attempts

    GET, PUT, DELETE /admin/v1/accounts/{account}/auto_topup    the same, with the admin token

To change it a key needs the scope ``billing``; to look, that or ``read``. The pack's credits and price are kept as they
are now: one that has become worse isn't bought before its owner has agreed again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.admin import AdminToken, admin_actor
from proxy.control.fields import query_fields, receive_fields
from proxy.control.operations import Operations
from proxy.control.refusals import ledger_refusals
from proxy.control.views import View, time_text
from proxy.core.currencies import CurrencyError, format_amount, parse_money
from proxy.core.errors import Conflict, Forbidden, InvalidRequest
from proxy.core.money import format_credits
from proxy.core.packs import Offers, Pack
from proxy.ledger.autotopups import AutoTopup, AutoTopupLedger, Offer, Wanted
from proxy.ledger.orders import OrderLedger
from proxy.ledger.records import ApiKey

__all__ = ["AutoSettings", "Wish", "admin_auto_topup_routes", "auto_topup_routes", "auto_topup_view", "offer_of"]

Endpoint = Callable[[Request], Awaitable[Response]]

_PRIVATE = {"cache-control": "private, no-store"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for: ``threshold`` in microcredits, ``monthly_max`` as decimal money of the pack's currency."""

    pack: str
    threshold: int
    monthly_max: str


class AutoSettings:
    """The functions of the endpoint and the command. ``offers``: what is sold now.

    ``automatic_tax``: the operator has Stripe compute taxes, which it does for checkouts alone.
    """

    def __init__(
        self,
        ledger: AutoTopupLedger,
        orders: OrderLedger,
        offers: Callable[[], Offers],
        *,
        livemode: bool,
        automatic_tax: bool = False,
    ) -> None:
        self._ledger = ledger
        self._orders = orders
        self._offers = offers
        self._livemode = livemode
        self._automatic_tax = automatic_tax

    async def show(self, account_id: UUID) -> AutoTopup | None:
        """What is set; None: nothing ever was."""
        with ledger_refusals():
            return await self._ledger.find(account_id)

    async def set(self, account_id: UUID, wish: Wish, *, actor: str) -> AutoTopup | None:
        """This is wanted from now on. Raises InvalidRequest, and Conflict where it can't be had."""
        wanted = self._wanted(wish)
        if self._automatic_tax:
            raise Conflict(
                "Automatic top-ups are not available here: a tax is computed for each payment, which needs its payer.",
                code="auto_topup_unavailable",
            )
        with ledger_refusals():
            payer = await self._orders.customer(account_id, livemode=self._livemode)
            if payer is None or payer[1] is None:
                raise Conflict(
                    "No payment method is saved for this account: pay once by POST /v1/billing/checkout with"
                    " save_payment_method true.",
                    code="payment_method_required",
                )
            await self._ledger.set(account_id, wanted, actor=actor)
            return await self._ledger.find(account_id)

    async def stop(self, account_id: UUID, *, actor: str) -> AutoTopup | None:
        """No more attempts; one that is under way comes to its end."""
        with ledger_refusals():
            await self._ledger.stop(account_id, actor=actor)
            return await self._ledger.find(account_id)

    def _wanted(self, wish: Wish) -> Wanted:
        pack = self._offers().packs.get(wish.pack)
        if pack is None:
            raise InvalidRequest(
                "There is no such pack. GET /v1/billing/packs lists what is sold.", code="unknown_pack", param="pack"
            )
        try:
            monthly_max = parse_money(wish.monthly_max, pack.currency)
        except CurrencyError as error:
            raise InvalidRequest(f"monthly_max is wrong: {error}.", code="invalid_value", param="monthly_max") from None
        if monthly_max < pack.price:
            price = format_amount(pack.price, pack.currency)
            raise InvalidRequest(
                f"monthly_max is below the pack's price, {price} {pack.currency.upper()}: it would never be bought.",
                code="invalid_value",
                param="monthly_max",
            )
        return Wanted(
            threshold=wish.threshold,
            pack=pack.id,
            credits=pack.credits,
            currency=pack.currency,
            price=pack.price,
            monthly_max=monthly_max,
            livemode=self._livemode,
        )


def auto_topup_routes(authenticate: Callable[[Request], Awaitable[ApiKey]], settings: AutoSettings) -> list[BaseRoute]:
    """The routes above. ``authenticate`` comes from the gateway."""

    async def show(request: Request) -> Response:
        key = await authenticate(request)
        if not key.scopes & {"billing", "read"}:
            raise Forbidden("This API key has neither the scope billing nor read.", code="insufficient_scope")
        query_fields(request).done()
        return _answer(await settings.show(key.account_id))

    async def put(request: Request) -> Response:
        key = await buyer(request)
        return _answer(await settings.set(key.account_id, await _wish(request), actor=f"key:{key.id}"))

    async def delete(request: Request) -> Response:
        key = await buyer(request)
        query_fields(request).done()
        return _answer(await settings.stop(key.account_id, actor=f"key:{key.id}"))

    async def buyer(request: Request) -> ApiKey:
        key = await authenticate(request)
        if "billing" not in key.scopes:
            raise Forbidden("This API key doesn't have the scope billing.", code="insufficient_scope")
        return key

    return [_route("/v1/billing/auto_topup", show, put, delete)]


def admin_auto_topup_routes(token: AdminToken, operations: Operations, settings: AutoSettings) -> list[BaseRoute]:
    """The operator's."""

    async def account(request: Request) -> UUID:
        token.check(request)
        return (await operations.account(request.path_params["account"], by_name=False)).id

    async def show(request: Request) -> Response:
        found = await account(request)
        query_fields(request).done()
        return _answer(await settings.show(found))

    async def put(request: Request) -> Response:
        found = await account(request)
        return _answer(await settings.set(found, await _wish(request), actor=admin_actor(request)))

    async def delete(request: Request) -> Response:
        found = await account(request)
        query_fields(request).done()
        return _answer(await settings.stop(found, actor=admin_actor(request)))

    return [_route("/admin/v1/accounts/{account}/auto_topup", show, put, delete)]


def auto_topup_view(found: AutoTopup | None) -> View:
    """How it stands, in a word: ``off``, ``ready``, ``paying`` (an attempt is under way) or ``blocked`` by the problem,
    until ``next_attempt_at``; null there: until somebody has done something about it."""
    if found is None:
        return {"object": "auto_topup", "state": "off"}
    wanted = found.wanted
    return {
        "object": "auto_topup",
        "state": _state(found),
        "pack": wanted.pack,
        "credits": format_credits(wanted.credits),
        "price": format_amount(wanted.price, wanted.currency),
        "currency": wanted.currency.upper(),
        "threshold": format_credits(wanted.threshold),
        "monthly_max": format_amount(wanted.monthly_max, wanted.currency),
        "spent_this_month": format_amount(found.spent, wanted.currency),
        "livemode": wanted.livemode,
        "order": None if found.attempt is None else str(found.attempt),
        "problem": _problem(found),
        "failures": found.failures,
        "next_attempt_at": None if found.blocked_for_good else time_text(found.blocked_until),
        "checkout_url": found.checkout_url,
        "changed_at": time_text(found.changed_at),
    }


def offer_of(pack: Pack | None) -> Offer | None:
    """What the ledger needs to know of a pack."""
    if pack is None:
        return None
    return Offer(
        credits=pack.credits,
        bonus=pack.bonus,
        credits_seconds=pack.credits_seconds,
        bonus_seconds=pack.bonus_seconds,
        currency=pack.currency,
        price=pack.price,
    )


def _route(path: str, show: Endpoint, put: Endpoint, delete: Endpoint) -> Route:
    by_method = {"GET": show, "HEAD": show, "PUT": put, "DELETE": delete}

    async def endpoint(request: Request) -> Response:
        return await by_method[request.method](request)

    return Route(path, endpoint, methods=list(by_method))


async def _wish(request: Request) -> Wish:
    body = await receive_fields(request)
    wish = Wish(
        pack=body.required_text("pack"),
        threshold=body.required_amount("threshold"),
        monthly_max=body.required_text("monthly_max"),
    )
    body.done()
    return wish


def _state(found: AutoTopup) -> str:
    if found.attempt is not None:
        return "paying"
    if not found.wanted.enabled:
        return "off"
    blocked = found.blocked_for_good or (found.blocked_until is not None and found.blocked_until > datetime.now(UTC))
    return "blocked" if blocked or not found.has_payment_method else "ready"


def _problem(found: AutoTopup) -> str | None:
    return found.problem or (None if found.has_payment_method else "no_payment_method")


def _answer(found: AutoTopup | None) -> Response:
    return JSONResponse(auto_topup_view(found), headers=_PRIVATE)
