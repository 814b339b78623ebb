"""Customers, and the ways they saved to pay later."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import stripe
from stripe.params import (
    CustomerCreateParams,
    CustomerDeleteParams,
    CustomerListParams,
    CustomerRetrieveParams,
    CustomerUpdateParams,
    PaymentMethodAttachParams,
    PaymentMethodDetachParams,
    PaymentMethodListParams,
    PaymentMethodRetrieveParams,
)

from tests.fakes.stripe.api import Call, Endpoint, listed, merged
from tests.fakes.stripe.errors import invalid
from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State

__all__ = ["Behaviour", "Customers"]

Behaviour = Literal["succeed", "decline", "insufficient_funds", "authentication_required", "processing"]
"""What comes of a payment with a method."""

# Stripe's own test methods, as far as they are needed: https://docs.stripe.com/testing.
TEST_METHODS: dict[str, Behaviour] = {
    "pm_card_visa": "succeed",
    "pm_card_visa_chargeDeclined": "decline",
    "pm_card_chargeDeclined": "decline",
    "pm_card_chargeCustomerFail": "decline",
    "pm_card_visa_chargeDeclinedInsufficientFunds": "insufficient_funds",
    "pm_card_chargeDeclinedInsufficientFunds": "insufficient_funds",
    "pm_card_authenticationRequired": "authentication_required",
    "pm_sepaDebit": "processing",
}


class Customers:
    """``save`` and ``behave`` are the tests'."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._behaviour: dict[str, Behaviour] = {}
        self._invoice_prefixes = itertools.count(1)

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("POST", "/v1/customers", CustomerCreateParams, self._create),
            Endpoint("GET", "/v1/customers", CustomerListParams, self._list),
            Endpoint("GET", "/v1/customers/{id}", CustomerRetrieveParams, self._retrieve),
            Endpoint("POST", "/v1/customers/{id}", CustomerUpdateParams, self._update),
            Endpoint("DELETE", "/v1/customers/{id}", CustomerDeleteParams, self._delete),
            Endpoint("GET", "/v1/payment_methods", PaymentMethodListParams, self._list_methods),
            Endpoint("GET", "/v1/payment_methods/{id}", PaymentMethodRetrieveParams, self._retrieve_method),
            Endpoint("POST", "/v1/payment_methods/{id}/attach", PaymentMethodAttachParams, self._attach),
            Endpoint("POST", "/v1/payment_methods/{id}/detach", PaymentMethodDetachParams, self._detach),
        )

    def save(self, customer: str, behaviour: Behaviour = "succeed") -> str:
        """A payment method that this customer has saved, and what payments with it come to."""
        with self._state.lock:
            live = self._state.is_live(customer)
            return str(self.new_method(live, self._state.get("customer", customer, live)["id"], behaviour)["id"])

    def behave(self, method: str, behaviour: Behaviour) -> None:
        """From now on payments with it come to this."""
        self._behaviour[method] = behaviour

    def behaviour(self, method: str) -> Behaviour:
        return self._behaviour[method]

    def method(self, name: str, live: bool) -> Object:
        """The method of that name; one of Stripe's test methods makes a new one. Raises Refused (404)."""
        if name in TEST_METHODS and not live:
            return self.new_method(live, None, TEST_METHODS[name])
        return self._state.get("payment_method", name, live, param="payment_method")

    def new_method(self, live: bool, customer: str | None, behaviour: Behaviour) -> Object:
        kind = "sepa_debit" if behaviour == "processing" else "card"
        details: dict[str, Any] = {"sepa_debit": None, "card": None}
        if kind == "card":
            details["card"] = {"brand": "visa", "last4": "4242", "exp_month": 12, "exp_year": 2040, "funding": "credit"}
        else:
            details["sepa_debit"] = {"country": "DE", "last4": "3000"}
        method = self._state.add(
            stripe.PaymentMethod,
            "pm",
            live,
            type=kind,
            customer=customer,
            metadata={},
            billing_details={"address": None, "email": None, "name": None, "phone": None, "tax_id": None},
            **details,
        )
        self._behaviour[method["id"]] = behaviour
        return method

    def _create(self, call: Call) -> Object:
        params = call.params
        if "payment_method" in params:
            raise invalid("The fake makes customers without a payment method.", param="payment_method")
        kept = {name: params[name] for name in ("email", "name", "description", "phone") if name in params}
        customer = self._state.add(
            stripe.Customer, "cus", call.live, metadata=merged({}, params.get("metadata")), balance=0, **kept
        )
        customer["invoice_prefix"] = f"FB{next(self._invoice_prefixes):06d}"
        self._state.tell("customer.created", customer)
        return customer

    def _retrieve(self, call: Call) -> Object:
        return self._state.get("customer", call.id, call.live)

    def _update(self, call: Call) -> Object:
        customer = self._state.get("customer", call.id, call.live)
        for name in ("email", "name", "description", "phone", "invoice_settings"):
            if name in call.params:
                customer[name] = call.params[name]
        customer["metadata"] = merged(customer["metadata"], call.params.get("metadata"))
        self._state.tell("customer.updated", customer)
        return customer

    def _delete(self, call: Call) -> Object:
        customer = self._state.get("customer", call.id, call.live)
        self._state.tell("customer.deleted", customer)
        self._state.remove(customer["id"])
        return {"id": customer["id"], "object": "customer", "deleted": True}

    def _list(self, call: Call) -> Object:
        return listed(self._state.all("customer", call.live), call, "/v1/customers", filters=("email",))

    def _retrieve_method(self, call: Call) -> Object:
        return self._state.get("payment_method", call.id, call.live)

    def _list_methods(self, call: Call) -> Object:
        methods = self._state.all("payment_method", call.live)
        return listed(methods, call, "/v1/payment_methods", filters=("customer", "type"))

    def _attach(self, call: Call) -> Object:
        method = self.method(call.id, call.live)
        method["customer"] = self._state.get("customer", call.params["customer"], call.live, param="customer")["id"]
        self._state.tell("payment_method.attached", method)
        return method

    def _detach(self, call: Call) -> Object:
        method = self._state.get("payment_method", call.id, call.live)
        method["customer"] = None
        self._state.tell("payment_method.detached", method)
        return method
