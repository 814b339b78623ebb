"""Checkout Sessions, and what a customer does on their page: pays at once or in days, is declined, or goes away.

Sums: subtotal (the line items) less discount plus tax is what the PaymentIntent asks for. With adaptive pricing the
customer pays in a currency of theirs; the session and the intent stay in ours, and say so in ``presentment_details``.
"""

from collections.abc import Sequence
from typing import Any

import stripe
from stripe.params.checkout import (
    SessionCreateParams,
    SessionExpireParams,
    SessionListLineItemsParams,
    SessionListParams,
    SessionRetrieveParams,
)

from tests.fakes.stripe.api import Call, Endpoint, listed, merged
from tests.fakes.stripe.customers import Behaviour, Customers
from tests.fakes.stripe.errors import invalid
from tests.fakes.stripe.invoices import Invoices
from tests.fakes.stripe.payments import Payments
from tests.fakes.stripe.shapes import Object, whole
from tests.fakes.stripe.state import State

__all__ = ["Checkout"]

OPEN_SECONDS = 24 * 3600
OPEN_SECONDS_MIN = 1800
NOWHERE: Object = {"address": None, "email": None, "name": None, "phone": None, "tax_exempt": "none", "tax_ids": []}


class Checkout:
    """``pay``, ``pay_later`` with ``settle``, ``decline`` and ``tick`` are what customers and time do."""

    def __init__(self, state: State, customers: Customers, payments: Payments, invoices: Invoices) -> None:
        self._state, self._customers, self._payments, self._invoices = state, customers, payments, invoices
        self._asked: dict[str, dict[str, Any]] = {}
        self._items: dict[str, list[Object]] = {}
        state.includable["checkout.session", "line_items"] = self._line_items

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("POST", "/v1/checkout/sessions", SessionCreateParams, self._create),
            Endpoint("GET", "/v1/checkout/sessions", SessionListParams, self._list),
            Endpoint("GET", "/v1/checkout/sessions/{id}", SessionRetrieveParams, self._retrieve),
            Endpoint("POST", "/v1/checkout/sessions/{id}/expire", SessionExpireParams, self._expire),
            Endpoint("GET", "/v1/checkout/sessions/{id}/line_items", SessionListLineItemsParams, self._list_items),
        )

    def pay(
        self,
        session: str,
        *,
        tax: int = 0,
        discount: int = 0,
        presentment: tuple[int, str] | None = None,
        saves: Behaviour = "succeed",
        free_status: str = "no_payment_required",
    ) -> str | None:
        """The customer pays with a card. Gives the PaymentIntent's id; None where a discount left nothing to pay, and
        the session's payment_status is ``free_status``. ``presentment``: the amount and the currency that the customer
        saw. ``saves``: what a method saved by this payment does later."""
        with self._state.lock:
            found = self._open(session, tax, discount, presentment)
            if found["amount_total"] == 0:
                found |= {"status": "complete", "payment_status": free_status}
                self._state.tell("checkout.session.completed", found)
                return None
            intent = self._intent(found, saves)
            self._payments.succeed(intent)
            if found["invoice_creation"]["enabled"]:
                self._invoices.of_session(found, intent, self._items[session][0]["description"])
            found |= {"status": "complete", "payment_status": "paid", "url": None}
            self._state.tell("checkout.session.completed", found)
            return str(intent["id"])

    def pay_later(self, session: str, *, tax: int = 0, discount: int = 0) -> str:
        """The customer pays by a method that takes days: completed, and unpaid. Gives the PaymentIntent's id."""
        with self._state.lock:
            found = self._open(session, tax, discount, None)
            intent = self._intent(found, "processing")
            self._payments.process(intent)
            found |= {"status": "complete", "payment_status": "unpaid", "url": None}
            self._state.tell("checkout.session.completed", found)
            return str(intent["id"])

    def settle(self, session: str, *, succeed: bool = True) -> None:
        """What was to be paid later has been paid, or wasn't."""
        with self._state.lock:
            found = self._state.find(session)
            self._payments.settle(found["payment_intent"], succeed=succeed)
            if succeed:
                found["payment_status"] = "paid"
            self._state.tell(f"checkout.session.async_payment_{'succeeded' if succeed else 'failed'}", found)

    def decline(self, session: str) -> str:
        """The customer's card is declined; the page stays, and they may try another. Gives the PaymentIntent's id."""
        with self._state.lock:
            found = self._open(session, 0, 0, None)
            intent = self._intent(found, "decline")
            self._payments.fail(intent, "decline")
            return str(intent["id"])

    def expire(self, session: str) -> None:
        """Nobody pays before the page's time is over."""
        with self._state.lock:
            self._expired(self._state.find(session))

    def tick(self) -> None:
        """Sessions whose time is over expire, as they do by themselves at Stripe."""
        with self._state.lock:
            for found in self._state.all("checkout.session"):
                if found["status"] == "open" and found["expires_at"] <= self._state.clock.now():
                    self._expired(found)

    def _open(self, session: str, tax: int, discount: int, presentment: tuple[int, str] | None) -> Object:
        found = self._state.find(session)
        assert found["status"] == "open", f"{session} is {found['status']}"
        assert 0 <= discount <= found["amount_subtotal"]
        found["total_details"] = {"amount_discount": discount, "amount_shipping": 0, "amount_tax": tax}
        found["amount_total"] = found["amount_subtotal"] - discount + tax
        if presentment is not None:
            assert found["adaptive_pricing"]["enabled"], "the session doesn't allow adaptive pricing"
            found["presentment_details"] = {
                "presentment_amount": presentment[0],
                "presentment_currency": presentment[1],
            }
        return found

    def _intent(self, session: Object, behaviour: Behaviour) -> Object:
        asked = self._asked[session["id"]]
        live = session["livemode"]
        if session["customer"] is None and asked.get("customer_creation") == "always":
            session["customer"] = self._state.add(stripe.Customer, "cus", live, metadata={}, balance=0)["id"]
        data = asked.get("payment_intent_data", {})
        saved = "setup_future_usage" in data
        method = self._customers.new_method(live, session["customer"] if saved else None, behaviour)
        intent = self._state.known(session["payment_intent"])
        if intent is None:
            intent = self._payments.new_intent(
                live,
                session["amount_total"],
                session["currency"],
                customer=session["customer"],
                metadata=data.get("metadata"),
                description=data.get("description"),
                receipt_email=data.get("receipt_email"),
                setup_future_usage=data.get("setup_future_usage"),
            )
            session["payment_intent"] = intent["id"]
        intent |= {"amount": session["amount_total"], "payment_method": method["id"]}
        intent["presentment_details"] = session["presentment_details"]
        return intent

    def _create(self, call: Call) -> Object:
        params = call.params
        self._check(call)
        items, currency = self._priced(params["line_items"])
        subtotal = sum(item["amount_subtotal"] for item in items)
        now = self._state.clock.now()
        session = self._state.add(
            stripe.checkout.Session,
            "cs_live" if call.live else "cs_test",
            call.live,
            adaptive_pricing={"enabled": params.get("adaptive_pricing", {}).get("enabled", True)},
            allow_promotion_codes=params.get("allow_promotion_codes"),
            amount_subtotal=subtotal,
            amount_total=subtotal,
            automatic_tax=_automatic_tax(params),
            cancel_url=params.get("cancel_url"),
            client_reference_id=params.get("client_reference_id"),
            currency=currency,
            custom_fields=[],
            custom_text={"after_submit": None, "submit": None, "shipping_address": None},
            customer=params.get("customer"),
            customer_creation=params.get("customer_creation", None if "customer" in params else "if_required"),
            customer_details=None if "customer" in params else NOWHERE,
            customer_email=params.get("customer_email"),
            discounts=[],
            expires_at=params.get("expires_at", now + OPEN_SECONDS),
            invoice_creation=_invoice_creation(params),
            metadata=merged({}, params.get("metadata")),
            mode="payment",
            payment_method_types=params.get("payment_method_types", ["card"]),
            payment_status="unpaid",
            shipping_options=[],
            status="open",
            success_url=params["success_url"],
            total_details={"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
            ui_mode="hosted_page",
        )
        session["url"] = f"https://checkout.stripe.com/c/pay/{session['id']}"
        self._asked[session["id"]], self._items[session["id"]] = params, items
        return session

    def _check(self, call: Call) -> None:
        params = call.params
        if params.get("mode") != "payment":
            raise invalid("The fake makes sessions of mode payment.", param="mode")
        if not params.get("line_items"):
            raise invalid("Missing required param: line_items.", code="parameter_missing", param="line_items")
        if "success_url" not in params:
            raise invalid("Missing required param: success_url.", code="parameter_missing", param="success_url")
        if "discounts" in params and "allow_promotion_codes" in params:
            raise invalid("You may only specify one of these parameters: allow_promotion_codes, discounts.")
        if len(params.get("client_reference_id", "")) > 200:
            raise invalid("client_reference_id takes 200 characters.", param="client_reference_id")
        if "customer" in params:
            self._state.get("customer", params["customer"], call.live, param="customer")
        if "customer" in params and "customer_email" in params:
            raise invalid("You may only specify one of these parameters: customer, customer_email.")
        if "customer" in params and "customer_creation" in params:
            raise invalid("`customer_creation` can't be set where there is a customer.", param="customer_creation")
        if "customer_update" in params and "customer" not in params:
            raise invalid("`customer_update` can only be used with `customer`.", param="customer_update")
        if _automatic_tax(params)["enabled"] and "customer" in params and "customer_update" not in params:
            raise invalid(
                "Automatic tax calculation in Checkout requires a valid address on the Customer. Add a valid address "
                "to the Customer or set either `customer_update[address]` to 'auto' or `customer_update[shipping]` to "
                "'auto' to save the address entered in Checkout to the Customer.",
                code="customer_tax_location_invalid",
            )
        until = params.get("expires_at")
        now = self._state.clock.now()
        if until is not None and not now + OPEN_SECONDS_MIN <= until <= now + OPEN_SECONDS:
            raise invalid(
                "The `expires_at` timestamp must be at least 30 minutes and at most 24 hours from Checkout Session "
                "creation.",
                param="expires_at",
            )

    def _priced(self, asked: list[dict[str, Any]]) -> tuple[list[Object], str]:
        items = []
        for number, item in enumerate(asked):
            at = f"line_items[{number}]"
            price, quantity = item.get("price_data"), item.get("quantity", 1)
            if price is None or "unit_amount" not in price:
                raise invalid(f"Missing required param: {at}[price_data][unit_amount].", code="parameter_missing")
            if ("product" in price) == ("product_data" in price):
                raise invalid(f"You must specify either `product` or `product_data` in {at}[price_data].")
            if price["unit_amount"] < 0 or quantity < 1:
                raise invalid("This value must be greater than or equal to 0.", param=at)
            total = price["unit_amount"] * quantity
            items.append(
                whole(
                    stripe.LineItem,
                    id=self._state.new_id("li"),
                    object="item",
                    amount_discount=0,
                    amount_subtotal=total,
                    amount_tax=0,
                    amount_total=total,
                    currency=price["currency"].lower(),
                    description=price.get("product_data", {}).get("name"),
                    quantity=quantity,
                )
            )
        currencies = {item["currency"] for item in items}
        if len(currencies) != 1:
            raise invalid("Checkout does not support multiple currencies in one session.")
        return items, currencies.pop()

    def _line_items(self, session: Object) -> Object:
        url = f"/v1/checkout/sessions/{session['id']}/line_items"
        return {"object": "list", "url": url, "has_more": False, "data": self._items[session["id"]]}

    def _list_items(self, call: Call) -> Object:
        return self._line_items(self._state.get("checkout.session", call.id, call.live))

    def _retrieve(self, call: Call) -> Object:
        return self._state.get("checkout.session", call.id, call.live)

    def _list(self, call: Call) -> Object:
        if "customer" in call.params:
            self._state.get("customer", call.params["customer"], call.live, param="customer")
        sessions = self._state.all("checkout.session", call.live)
        filters = ("customer", "payment_intent", "status")
        return listed(sessions, call, "/v1/checkout/sessions", filters=filters)

    def _expire(self, call: Call) -> Object:
        session = self._state.get("checkout.session", call.id, call.live)
        if session["status"] != "open":
            raise invalid(
                'Only Checkout Sessions with a status in ["open"] can be expired. This Checkout Session has a status '
                f"of `{session['status']}`."
            )
        self._expired(session)
        return session

    def _expired(self, session: Object) -> None:
        session |= {"status": "expired", "url": None}
        intent = self._state.known(session["payment_intent"])
        if intent is not None:
            self._payments.cancel(intent, "automatic")
        self._state.tell("checkout.session.expired", session)


def _automatic_tax(params: dict[str, Any]) -> Object:
    enabled = params.get("automatic_tax", {}).get("enabled", False)
    return {"enabled": enabled, "liability": None, "provider": "stripe" if enabled else None, "status": None}


def _invoice_creation(params: dict[str, Any]) -> Object:
    data = params.get("invoice_creation", {}).get("invoice_data", {})
    return {
        "enabled": params.get("invoice_creation", {}).get("enabled", False),
        "invoice_data": {
            "account_tax_ids": None,
            "custom_fields": None,
            "description": data.get("description"),
            "footer": data.get("footer"),
            "issuer": None,
            "metadata": data.get("metadata", {}),
            "rendering_options": None,
        },
    }
