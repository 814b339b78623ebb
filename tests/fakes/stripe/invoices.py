"""Products, prices, and subscriptions' invoices: what plans are paid by, month after month."""

from collections.abc import Sequence
from typing import Any

import stripe
from stripe.params import InvoiceLineItemListParams as LinesParams
from stripe.params import (
    InvoiceListParams,
    InvoicePaymentListParams,
    InvoicePaymentRetrieveParams,
    InvoiceRetrieveParams,
    PriceCreateParams,
    PriceListParams,
    PriceRetrieveParams,
    ProductCreateParams,
    ProductListParams,
    ProductRetrieveParams,
    SubscriptionListParams,
    SubscriptionRetrieveParams,
)

from tests.fakes.stripe.api import Call, Endpoint, listed, merged
from tests.fakes.stripe.customers import Customers
from tests.fakes.stripe.errors import invalid
from tests.fakes.stripe.payments import Payments
from tests.fakes.stripe.shapes import Object, whole
from tests.fakes.stripe.state import State

__all__ = ["Invoices"]

MONTH_SECONDS = 30 * 24 * 3600
NO_TAX: Object = {"enabled": False, "disabled_reason": None, "liability": None}


class Invoices:
    """``price``, ``subscribe``, ``bill``, ``pay`` and ``fail`` are what operators, customers and months do."""

    def __init__(self, state: State, customers: Customers, payments: Payments) -> None:
        self._state, self._customers, self._payments = state, customers, payments
        state.includable["invoice", "payments"] = self._payments_of

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("POST", "/v1/products", ProductCreateParams, self._create_product),
            Endpoint("GET", "/v1/products", ProductListParams, self._lister("product", "/v1/products", "active")),
            Endpoint("GET", "/v1/products/{id}", ProductRetrieveParams, self._getter("product")),
            Endpoint("POST", "/v1/prices", PriceCreateParams, self._create_price),
            Endpoint("GET", "/v1/prices", PriceListParams, self._lister("price", "/v1/prices", "active", "product")),
            Endpoint("GET", "/v1/prices/{id}", PriceRetrieveParams, self._getter("price")),
            Endpoint(
                "GET",
                "/v1/subscriptions",
                SubscriptionListParams,
                self._lister("subscription", "/v1/subscriptions", "customer", "status"),
            ),
            Endpoint("GET", "/v1/subscriptions/{id}", SubscriptionRetrieveParams, self._getter("subscription")),
            Endpoint(
                "GET",
                "/v1/invoices",
                InvoiceListParams,
                self._lister("invoice", "/v1/invoices", "customer", "status", "collection_method"),
            ),
            Endpoint("GET", "/v1/invoices/{id}", InvoiceRetrieveParams, self._getter("invoice")),
            Endpoint("GET", "/v1/invoices/{id}/lines", LinesParams, self._list_lines),
            Endpoint("GET", "/v1/invoice_payments", InvoicePaymentListParams, self._list_payments),
            Endpoint("GET", "/v1/invoice_payments/{id}", InvoicePaymentRetrieveParams, self._getter("invoice_payment")),
        )

    def price(self, amount: int, currency: str = "usd", *, live: bool = False) -> str:
        """A monthly price of a new product. Gives its id."""
        with self._state.lock:
            product = self._new_product(live, {"name": "A plan"})
            asked = {"unit_amount": amount, "currency": currency, "recurring": {"interval": "month"}}
            return str(self._new_price(live, product["id"], asked)["id"])

    def subscribe(self, customer: str, price: str, *, quantity: int = 1, metadata: dict[str, str] | None = None) -> str:
        """A customer subscribes; nothing is billed yet. Gives the subscription's id."""
        with self._state.lock:
            live = self._state.is_live(customer)
            found = self._state.find(price)
            now = self._state.clock.now()
            subscription = self._state.add(
                stripe.Subscription,
                "sub",
                live,
                automatic_tax=NO_TAX,
                billing_cycle_anchor=now,
                billing_mode={"type": "flexible"},
                billing_schedules=[],
                cancel_at_period_end=False,
                collection_method="charge_automatically",
                currency=found["currency"],
                customer=customer,
                discounts=[],
                invoice_settings={"issuer": {"type": "self"}},
                items={"object": "list", "has_more": False, "url": "/v1/subscription_items", "data": []},
                metadata=metadata or {},
                start_date=now,
                status="active",
                default_payment_method=self._customers.new_method(live, customer, "succeed")["id"],
            )
            subscription["items"]["data"].append(self._item(subscription, found, quantity))
            self._state.tell("customer.subscription.created", subscription)
            return str(subscription["id"])

    def bill(
        self,
        subscription: str,
        *,
        tax: int = 0,
        discount: int = 0,
        proration: int = 0,
        balance: int = 0,
        pay: bool = True,
        reason: str = "subscription_cycle",
    ) -> str:
        """A period's invoice: finalized, and paid unless ``pay`` is False. ``proration``: a second line, of a change
        in the middle of a period. ``balance``: how much of it the customer's credit balance pays. Gives the invoice's
        id."""
        with self._state.lock:
            found = self._state.find(subscription)
            invoice = self._of_subscription(found, tax, discount, proration, reason)
            invoice |= {"starting_balance": -balance, "ending_balance": 0}
            for name in ("amount_due", "amount_remaining"):
                invoice[name] -= balance
            self._state.tell("invoice.created", invoice)
            invoice |= {"status": "open"}
            invoice["status_transitions"]["finalized_at"] = self._state.clock.now()
            self._state.tell("invoice.finalized", invoice)
            if pay:
                self._pay(invoice)
            return str(invoice["id"])

    def pay(self, invoice: str) -> str | None:
        """An open invoice is paid. Gives the PaymentIntent's id; None where there was nothing to pay."""
        with self._state.lock:
            return self._pay(self._state.find(invoice))

    def pay_elsewhere(self, invoice: str) -> None:
        """The operator marks it as paid outside of Stripe: no money came in here."""
        with self._state.lock:
            found = self._state.find(invoice)
            found["amount_paid_off_stripe"] = found["amount_due"]
            self._paid(found)

    def fail(self, invoice: str) -> None:
        """A payment for it is declined; it stays open."""
        with self._state.lock:
            found = self._state.find(invoice)
            self._payments.fail(self._intent(found), "decline")
            found |= {"attempted": True, "attempt_count": found["attempt_count"] + 1}
            self._state.tell("invoice.payment_failed", found)

    def of_session(self, session: Object, intent: Object, name: str | None) -> None:
        """The invoice of a checkout with ``invoice_creation``: its ``invoice.paid`` looks like a plan's, and names no
        subscription."""
        live = session["livemode"]
        price = self._new_price(
            live,
            self._new_product(live, {"name": name or "A purchase"})["id"],
            {"unit_amount": session["amount_subtotal"], "currency": session["currency"]},
        )
        details = session["total_details"]
        invoice = self._new_invoice(
            live, session["currency"], session["customer"], details["amount_tax"], details["amount_discount"], "manual"
        )
        self._add_line(invoice, price, 1, session["amount_subtotal"], {"type": "invoice_item_details"})
        session["invoice"] = invoice["id"]
        self._state.tell("invoice.created", invoice)
        invoice |= {"status": "open"}
        self._add_payment(invoice, intent)
        self._settle(invoice)

    def _pay(self, invoice: Object) -> str | None:
        if invoice["amount_due"] == 0:
            self._paid(invoice)
            return None
        intent = self._intent(invoice)
        self._payments.succeed(intent)
        self._settle(invoice)
        return str(intent["id"])

    def _settle(self, invoice: Object) -> None:
        payment = next(one for one in self._payments_of(invoice)["data"])
        payment |= {"status": "paid", "amount_paid": invoice["amount_due"]}
        payment["status_transitions"]["paid_at"] = self._state.clock.now()
        self._paid(invoice)

    def _paid(self, invoice: Object) -> None:
        assert invoice["status"] == "open", f"{invoice['id']} is {invoice['status']}"
        invoice |= {
            "status": "paid",
            "amount_paid": invoice["amount_due"],
            "amount_remaining": 0,
            "attempted": True,
            "attempt_count": invoice["attempt_count"] + 1,
        }
        invoice["status_transitions"]["paid_at"] = self._state.clock.now()
        self._state.tell("invoice.paid", invoice)
        self._state.tell("invoice.payment_succeeded", invoice)

    def _intent(self, invoice: Object) -> Object:
        payments = self._payments_of(invoice)["data"]
        if payments:
            return self._state.find(payments[0]["payment"]["payment_intent"])
        subscription = self._state.find(invoice["parent"]["subscription_details"]["subscription"])
        intent = self._payments.new_intent(
            invoice["livemode"],
            invoice["amount_due"],
            invoice["currency"],
            customer=invoice["customer"],
            description="Subscription update",
            payment_method=subscription["default_payment_method"],
        )
        self._add_payment(invoice, intent)
        return intent

    def _add_payment(self, invoice: Object, intent: Object) -> None:
        self._state.add(
            stripe.InvoicePayment,
            "inpay",
            invoice["livemode"],
            amount_requested=invoice["amount_due"],
            currency=invoice["currency"],
            invoice=invoice["id"],
            is_default=True,
            payment={"type": "payment_intent", "payment_intent": intent["id"]},
            status="open",
            status_transitions={"canceled_at": None, "paid_at": None},
        )

    def _of_subscription(self, subscription: Object, tax: int, discount: int, proration: int, reason: str) -> Object:
        invoice = self._new_invoice(
            subscription["livemode"], subscription["currency"], subscription["customer"], tax, discount, reason
        )
        details = {"metadata": subscription["metadata"], "subscription": subscription["id"]}
        invoice["parent"] = {
            "type": "subscription_details",
            "quote_details": None,
            "subscription_details": details | {"subscription_proration_date": None},
        }
        items = subscription["items"]["data"]
        asked = [(item, item["price"]["unit_amount"] * item["quantity"], False) for item in items]
        for item, amount, prorated in asked + ([(items[0], proration, True)] if proration else []):
            parent = {
                "type": "subscription_item_details",
                "invoice_item_details": None,
                "subscription_item_details": {
                    "invoice_item": None,
                    "proration": prorated,
                    "proration_details": None,
                    "subscription": subscription["id"],
                    "subscription_item": item["id"],
                },
            }
            self._add_line(invoice, item["price"], item["quantity"], amount, parent)
        return invoice

    def _new_invoice(
        self, live: bool, currency: str, customer: str | None, tax: int, discount: int, reason: str
    ) -> Object:
        """One with no lines yet, that asks for its tax less its discount."""
        now = self._state.clock.now()
        name = self._state.new_id("in")
        return self._state.add(
            stripe.Invoice,
            "in",
            live,
            id=name,
            amount_due=tax - discount,
            amount_overpaid=0,
            amount_paid=0,
            amount_paid_off_stripe=0,
            amount_remaining=tax - discount,
            amount_shipping=0,
            attempt_count=0,
            attempted=False,
            auto_advance=True,
            automatic_tax=NO_TAX | {"provider": None, "status": None},
            billing_reason=reason,
            collection_method="charge_automatically",
            currency=currency,
            customer=customer,
            default_tax_rates=[],
            discounts=[],
            issuer={"type": "self"},
            lines={"object": "list", "has_more": False, "url": f"/v1/invoices/{name}/lines", "data": []},
            metadata={},
            payment_settings={"default_mandate": None, "payment_method_options": None, "payment_method_types": None},
            period_start=now,
            period_end=now,
            post_payment_credit_notes_amount=0,
            pre_payment_credit_notes_amount=0,
            starting_balance=0,
            status="draft",
            status_transitions=dict.fromkeys(stripe.Invoice.StatusTransitions.__annotations__),
            subtotal=0,
            subtotal_excluding_tax=0,
            total=tax - discount,
            total_discount_amounts=[{"amount": discount, "discount": "di_fake"}] if discount else [],
            total_excluding_tax=-discount,
            total_pretax_credit_amounts=[],
            total_taxes=[_tax(tax)] if tax else [],
        )

    def _add_line(self, invoice: Object, price: Object, quantity: int, amount: int, parent: Object) -> None:
        now = self._state.clock.now()
        line = whole(
            stripe.InvoiceLineItem,
            id=self._state.new_id("il"),
            object="line_item",
            amount=amount,
            currency=invoice["currency"],
            description="A plan",
            discount_amounts=[],
            discountable=True,
            discounts=[],
            invoice=invoice["id"],
            livemode=invoice["livemode"],
            metadata={},
            parent=parent,
            period={"start": now, "end": now + MONTH_SECONDS},
            pretax_credit_amounts=[],
            pricing={
                "type": "price_details",
                "price_details": {"price": price["id"], "product": price["product"]},
                "unit_amount_decimal": str(price["unit_amount"]),
            },
            quantity=quantity,
            subscription=(invoice["parent"] or {}).get("subscription_details", {}).get("subscription"),
            subtotal=amount,
            taxes=[],
        )
        invoice["lines"]["data"].append(line)
        for name in ("amount_due", "amount_remaining", "subtotal", "subtotal_excluding_tax", "total"):
            invoice[name] += amount
        invoice["total_excluding_tax"] += amount

    def _item(self, subscription: Object, price: Object, quantity: int) -> Object:
        now = self._state.clock.now()
        return whole(
            stripe.SubscriptionItem,
            id=self._state.new_id("si"),
            object="subscription_item",
            created=now,
            current_period_start=now,
            current_period_end=now + MONTH_SECONDS,
            discounts=[],
            metadata={},
            plan={"id": price["id"], "object": "plan"},
            price=price,
            quantity=quantity,
            subscription=subscription["id"],
        )

    def _payments_of(self, invoice: Object) -> Object:
        found = [one for one in self._state.all("invoice_payment") if one["invoice"] == invoice["id"]]
        return {"object": "list", "url": "/v1/invoice_payments", "has_more": False, "data": found}

    def _list_lines(self, call: Call) -> Object:
        lines: Object = self._state.get("invoice", call.id, call.live)["lines"]
        return lines

    def _list_payments(self, call: Call) -> Object:
        asked = call.params.get("payment", {})
        found = (
            one
            for one in self._state.all("invoice_payment", call.live)
            if asked.items() <= one["payment"].items() and call.params.get("invoice") in (None, one["invoice"])
        )
        return listed(found, call, "/v1/invoice_payments", filters=("status",))

    def _create_product(self, call: Call) -> Object:
        return self._new_product(call.live, call.params)

    def _new_product(self, live: bool, asked: dict[str, Any]) -> Object:
        return self._state.add(
            stripe.Product,
            "prod",
            live,
            active=True,
            images=[],
            marketing_features=[],
            metadata=merged({}, asked.get("metadata")),
            name=asked["name"],
            type="service",
            updated=self._state.clock.now(),
        )

    def _create_price(self, call: Call) -> Object:
        product = call.params.get("product")
        if (product is None) == ("product_data" not in call.params):
            raise invalid("You must specify either `product` or `product_data`.", stored=False)
        if product is None:
            product = self._new_product(call.live, call.params["product_data"])["id"]
        self._state.get("product", product, call.live, param="product")
        return self._new_price(call.live, product, call.params)

    def _new_price(self, live: bool, product: str, asked: dict[str, Any]) -> Object:
        recurring = asked.get("recurring")
        return self._state.add(
            stripe.Price,
            "price",
            live,
            active=True,
            billing_scheme="per_unit",
            currency=asked["currency"],
            metadata=merged({}, asked.get("metadata")),
            product=product,
            recurring=recurring and {"interval_count": 1, "meter": None, "usage_type": "licensed"} | recurring,
            type="recurring" if recurring else "one_time",
            unit_amount=asked.get("unit_amount"),
            unit_amount_decimal=str(asked.get("unit_amount")),
        )

    def _getter(self, kind: str) -> Any:
        return lambda call: self._state.get(kind, call.id, call.live)

    def _lister(self, kind: str, url: str, *filters: str) -> Any:
        return lambda call: listed(self._state.all(kind, call.live), call, url, filters=filters)


def _tax(amount: int) -> Object:
    return {
        "amount": amount,
        "tax_behavior": "exclusive",
        "tax_rate_details": None,
        "taxability_reason": "standard_rated",
        "taxable_amount": None,
        "type": "tax_rate_details",
    }
