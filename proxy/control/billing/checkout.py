"""The checkout: from what a customer wants to a page of Stripe's where they pay for it.

The order is written down first, and its id is the idempotency key there: a reply that was lost, or a crash in between,
is gone on from by asking again, and makes no second page that anybody would be sent to. What an order sells is copied
into it. That it was paid, the till alone says; returning from Stripe's page proves nothing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import structlog

from proxy.control.billing.errors import StripeRefused, StripeUnknown
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import Session
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from proxy.core.money import format_credits
from proxy.core.packs import CustomAmounts, Offers, Pack
from proxy.core.return_urls import ReturnUrls
from proxy.ledger.control import ControlLedger
from proxy.ledger.orders import Created, CreateOutcome, NewOrder, Order, OrderLedger

__all__ = ["CANCEL_PATH", "SUCCESS_PATH", "Checkout", "CheckoutTerms", "Wanted", "session_params"]

log = structlog.get_logger("farebox.checkout")

SUCCESS_PATH = "/billing/success"
CANCEL_PATH = "/billing/cancel"


@dataclass(frozen=True, slots=True)
class CheckoutTerms:
    """How the operator wants to be paid. ``url``: this server as customers reach it; None: unknown."""

    automatic_tax: bool = False
    invoice_creation: bool = False
    adaptive_pricing: bool = False
    promotion_codes: bool = False
    url: str | None = None
    return_urls: ReturnUrls = ReturnUrls(())  # noqa: RUF009 - it never changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a customer wants: a pack, or an amount of their own choice (in minor units)."""

    goods: Pack | CustomAmounts
    amount: int = 0
    success_url: str
    cancel_url: str | None
    save_payment_method: bool = False

    @property
    def digest(self) -> bytes:
        """The same for the same request, whatever the pack has come to cost meanwhile."""
        what = self.goods.id if isinstance(self.goods, Pack) else f"{self.amount} {self.goods.currency}"
        parts = [type(self.goods).__name__, what, self.success_url, self.cancel_url, self.save_payment_method]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


class Checkout:
    """Makes orders, and pages of Stripe's to pay them on. ``new_id``: a fresh order's id."""

    def __init__(
        self,
        api: StripeApi,
        orders: OrderLedger,
        accounts: ControlLedger,
        offers: Callable[[], Offers],
        terms: CheckoutTerms,
        *,
        new_id: Callable[[], UUID],
    ) -> None:
        self._api = api
        self._orders = orders
        self._accounts = accounts
        self._offers = offers
        self._new_id = new_id
        self.terms = terms

    @property
    def offers(self) -> Offers:
        """What is sold at the moment."""
        return self._offers()

    @property
    def success_url(self) -> str | None:
        """Our own page for those who have paid; None where nobody told us our address."""
        return None if self.terms.url is None else self.terms.url + SUCCESS_PATH

    @property
    def cancel_url(self) -> str | None:
        """Our own page for those who haven't."""
        return None if self.terms.url is None else self.terms.url + CANCEL_PATH

    async def start(self, account_id: UUID, wanted: Wanted, *, actor: str, request_key: str | None) -> Created:
        """An order with the page to pay it on; under the same request key again, the same one.

        Raises StripeAway (asking again under the same key goes on), StripeRefused, LedgerError.
        """
        new = replace(_sold(wanted), id=self._new_id(), account_id=account_id, livemode=self._api.livemode, actor=actor)
        if request_key is not None:
            # Beside them stand keys of our own, which no client can guess at.
            new = replace(new, request_key=f"client:{request_key}", request_digest=wanted.digest)
        return await self._opened(self._discounted(new))

    async def checkout_instead(self, failed: Order) -> Order:
        """A checkout of what an automatic order could not buy, the same one at each call, with its URL.

        Raises StripeError, LedgerError; StripeRefused where nobody told us our address.
        """
        if self.success_url is None:
            raise StripeRefused("there is no page to return to from a checkout: set FAREBOX_BILLING_URL")
        new = NewOrder(
            id=self._new_id(),
            account_id=failed.account_id,
            kind="checkout",
            pack=failed.pack,
            credits=failed.credits,
            bonus=failed.bonus,
            credits_seconds=failed.credits_seconds,
            bonus_seconds=failed.bonus_seconds,
            currency=failed.currency,
            price=failed.price,
            livemode=failed.livemode,
            actor=failed.actor,
            request_key=f"instead:{failed.id}",
            request_digest=failed.id.bytes,
            save_payment_method=True,
            success_url=self.success_url,
            cancel_url=self.cancel_url,
        )
        created = await self._opened(self._discounted(new))
        if created.order is None:
            raise StripeRefused("too many orders of the account wait for their payment already")
        return created.order

    def _discounted(self, new: NewOrder) -> NewOrder:
        """What a promotion code may take off: nothing, or where the operator lets customers enter them, anything."""
        return replace(new, discount_max=new.price if self.terms.promotion_codes else 0)

    async def _opened(self, new: NewOrder) -> Created:
        created = await self._orders.create(new)
        order = created.order
        if created.outcome not in {CreateOutcome.DONE, CreateOutcome.KNOWN} or order is None:
            return created
        if order.state != "created" or order.session_id is not None or order.livemode != self._api.livemode:
            return created
        try:
            session = await self._session(order)
        except StripeRefused as refused:
            log.error("checkout_refused", order_id=str(order.id), reason=str(refused))
            if order.request_key is None:
                # Nobody can ask for it again.
                await self._orders.advance(order.id, "failed", problem=refused.code or "refused")
            raise
        opened = await self._orders.opened(order.id, session.id, session.url, customer=session.customer)
        return replace(created, order=opened)

    async def _session(self, order: Order) -> Session:
        customer = await self._customer(order.account_id)
        try:
            return await self._made(order, customer)
        except StripeUnknown as unknown:
            if unknown.param != "customer":
                raise
            # Deleted at Stripe, or another Stripe account's: whoever paid by it is known by their orders.
            log.warning("stripe_customer_gone", account=str(order.account_id), customer=customer)
            return await self._made(order, await self._customer(order.account_id, instead_of=customer))

    async def _made(self, order: Order, customer: str) -> Session:
        params = session_params(order, customer, self._name_of(order), self.terms)
        return await self._api.create_session(params, key=str(order.id))

    def _name_of(self, order: Order) -> str:
        """What customers read on the page."""
        pack = self.offers.packs.get(order.pack or "")
        return pack.name if pack else f"{format_credits(order.credits)} credits"

    async def _customer(self, account_id: UUID, *, instead_of: str | None = None) -> str:
        """Who the account is to Stripe, made there once; however many ask at once, all get the same."""
        livemode = self._api.livemode
        known = await self._orders.customer(account_id, livemode=livemode)
        if known is not None and known[0] != instead_of:
            return known[0]
        account = await self._accounts.find_account(account_id)
        params: dict[str, Any] = {"metadata": {ACCOUNT_KEY: str(account_id)}, "description": account.name[:350]}
        if account.email is not None:
            params["email"] = account.email
        mode = "live" if livemode else "test"
        key = f"customer:{account_id}:{mode}" + (f":{instead_of}" if instead_of else "")
        made = await self._api.create_customer(params, key=key)
        return await self._orders.put_customer(account_id, made, livemode=livemode, instead_of=instead_of)


def _sold(wanted: Wanted) -> NewOrder:
    """The order of what is wanted, before anybody's name stands on it."""
    goods = wanted.goods
    pack = goods if isinstance(goods, Pack) else None
    return NewOrder(
        id=UUID(int=0),
        account_id=UUID(int=0),
        livemode=False,
        actor="",
        kind="checkout",
        pack=pack.id if pack else None,
        credits=pack.credits if pack else _credits_for(goods, wanted.amount),
        bonus=pack.bonus if pack else 0,
        credits_seconds=goods.credits_seconds,
        bonus_seconds=pack.bonus_seconds if pack else None,
        currency=goods.currency,
        price=pack.price if pack else wanted.amount,
        save_payment_method=wanted.save_payment_method,
        success_url=wanted.success_url,
        cancel_url=wanted.cancel_url,
    )


def session_params(order: Order, customer: str, name: str, terms: CheckoutTerms) -> Mapping[str, Any]:
    """What is asked of Stripe for an order: the same for the same order, so that its key can be used again.

    The order's id stands in the session and in its PaymentIntent, whose metadata alone the till believes. Tax: whether
    it comes on top follows from the account's own settings at Stripe, since the price names no behaviour.
    """
    metadata = {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(order.account_id)}
    price = {"currency": order.currency, "unit_amount": order.price, "product_data": {"name": name}}
    payment: dict[str, Any] = {"metadata": metadata, "description": name}
    params: dict[str, Any] = {
        "mode": "payment",
        "client_reference_id": str(order.id),
        "customer": customer,
        "line_items": [{"price_data": price, "quantity": 1}],
        "metadata": metadata,
        "payment_intent_data": payment,
        "success_url": order.success_url,
        # Without a word of ours Stripe would do as its dashboard says.
        "adaptive_pricing": {"enabled": terms.adaptive_pricing},
    }
    if order.cancel_url is not None:
        params["cancel_url"] = order.cancel_url
    if order.save_payment_method:
        payment["setup_future_usage"] = "off_session"
    if terms.automatic_tax:
        params |= {"automatic_tax": {"enabled": True}, "customer_update": {"address": "auto"}}
    if terms.invoice_creation:
        params["invoice_creation"] = {"enabled": True, "invoice_data": {"metadata": metadata}}
    if order.discount_max:
        params["allow_promotion_codes"] = True
    return params


def _credits_for(goods: Pack | CustomAmounts, amount: int) -> int:
    assert isinstance(goods, CustomAmounts), "a pack has its own"
    return goods.credits_for(amount)
