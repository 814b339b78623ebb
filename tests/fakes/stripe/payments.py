"""PaymentIntents and their charges: what was paid, by whom, and how much of it went back.

An intent is made by a request (off-session, confirmed at once) or by a Checkout Session that is being paid.
"""

import re
from collections.abc import Sequence
from typing import Any

import stripe
from stripe.params import (
    BalanceTransactionRetrieveParams,
    ChargeListParams,
    ChargeRetrieveParams,
    PaymentIntentCancelParams,
    PaymentIntentConfirmParams,
    PaymentIntentCreateParams,
    PaymentIntentListParams,
    PaymentIntentRetrieveParams,
    PaymentIntentSearchParams,
    PaymentIntentUpdateParams,
)

from tests.fakes.stripe.api import Call, Endpoint, listed, merged
from tests.fakes.stripe.customers import Behaviour, Customers
from tests.fakes.stripe.errors import Refused, invalid
from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State

__all__ = ["Payments"]

FEE_THOUSANDTHS, FEE_FIXED = 29, 30
CLAUSE = re.compile(
    r"""\s*(metadata\[['"](?P<key>[^'"]+)['"]\]|(?P<field>\w+))\s*:\s*['"]?(?P<value>[^'"]*)['"]?\s*$"""
)
# Cards' refusals: code, decline_code, message.
REFUSALS: dict[Behaviour, tuple[str, str, str]] = {
    "decline": ("card_declined", "generic_decline", "Your card was declined."),
    "insufficient_funds": ("card_declined", "insufficient_funds", "Your card has insufficient funds."),
    "authentication_required": (
        "authentication_required",
        "authentication_required",
        "Your card was declined. This transaction requires authentication.",
    ),
}
CANCELABLE = frozenset({"requires_payment_method", "requires_confirmation", "requires_action", "requires_capture"})


class Payments:
    """``search_lag_seconds``: how far Stripe's search is behind what it searches; it says "up to a minute", so that
    nobody looks up there what was just made. ``settle`` and ``charges`` are the tests'."""

    def __init__(self, state: State, customers: Customers) -> None:
        self._state, self._customers = state, customers
        self.search_lag_seconds = 60

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("POST", "/v1/payment_intents", PaymentIntentCreateParams, self._create),
            Endpoint("GET", "/v1/payment_intents", PaymentIntentListParams, self._list),
            Endpoint("GET", "/v1/payment_intents/search", PaymentIntentSearchParams, self._search),
            Endpoint("GET", "/v1/payment_intents/{id}", PaymentIntentRetrieveParams, self._retrieve),
            Endpoint("POST", "/v1/payment_intents/{id}", PaymentIntentUpdateParams, self._update),
            Endpoint("POST", "/v1/payment_intents/{id}/confirm", PaymentIntentConfirmParams, self._confirm),
            Endpoint("POST", "/v1/payment_intents/{id}/cancel", PaymentIntentCancelParams, self._cancel),
            Endpoint("GET", "/v1/charges", ChargeListParams, self._list_charges),
            Endpoint("GET", "/v1/charges/{id}", ChargeRetrieveParams, self._retrieve_charge),
            Endpoint(
                "GET", "/v1/balance_transactions/{id}", BalanceTransactionRetrieveParams, self._retrieve_transaction
            ),
        )

    def settle(self, intent: str, *, succeed: bool = True) -> None:
        """A payment that was processing comes to its end: ``payment_intent.succeeded`` or ``.payment_failed``."""
        with self._state.lock:
            found = self._state.find(intent)
            assert found["status"] == "processing", f"{intent} is {found['status']}"
            if succeed:
                self.succeed(found)
            else:
                self.fail(found, "decline")

    def charges(self, customer: str | None = None) -> list[Object]:
        """Those that took money, newest first: what was really paid, whoever knows of it."""
        with self._state.lock:
            return [
                one
                for one in self._state.all("charge")
                if one["status"] == "succeeded" and customer in (None, one["customer"])
            ]

    def new_intent(self, live: bool, amount: int, currency: str, /, **fields: Any) -> Object:
        """One that wants a payment method."""
        intent = self._state.add(
            stripe.PaymentIntent,
            "pi",
            live,
            amount=amount,
            amount_capturable=0,
            amount_received=0,
            amount_details={"tip": {}},
            automatic_payment_methods=None,
            capture_method="automatic",
            confirmation_method="automatic",
            currency=currency,
            payment_method_types=fields.pop("payment_method_types", ["card"]),
            status=fields.pop("status", "requires_payment_method"),
            metadata=merged({}, fields.pop("metadata", None)),
            **fields,
        )
        intent["client_secret"] = f"{intent['id']}_secret_{self._state.new_id('x')[2:]}"
        self._state.tell("payment_intent.created", intent)
        return intent

    def succeed(self, intent: Object) -> Object:
        """The money is there: its charge."""
        charge = self._charge(intent, "succeeded")
        intent |= {
            "status": "succeeded",
            "amount_received": intent["amount"],
            "latest_charge": charge["id"],
            "last_payment_error": None,
            "next_action": None,
            "processing": None,
        }
        charge["balance_transaction"] = self.transaction(charge, "charge", charge["amount"])["id"]
        self._state.tell("charge.succeeded", charge)
        self._state.tell("payment_intent.succeeded", intent)
        return charge

    def process(self, intent: Object) -> None:
        """The money may come in days."""
        intent |= {"status": "processing", "processing": {"type": "card", "card": None}}
        charge = self._charge(intent, "pending")
        intent["latest_charge"] = charge["id"]
        self._state.tell("charge.pending", charge)
        self._state.tell("payment_intent.processing", intent)

    def fail(self, intent: Object, why: Behaviour) -> Refused:
        """The payment was refused; the intent wants another method."""
        code, decline_code, message = REFUSALS[why]
        charge = self._charge(intent, "failed")
        charge |= {"failure_code": code, "failure_message": message}
        method = self._state.known(intent["payment_method"])
        error = {
            "charge": charge["id"],
            "code": code,
            "decline_code": decline_code,
            "doc_url": f"https://stripe.com/docs/error-codes/{code.replace('_', '-')}",
            "message": message,
            "payment_method": method,
        }
        intent |= {
            "status": "requires_payment_method",
            "payment_method": None,
            "latest_charge": charge["id"],
            "processing": None,
            "last_payment_error": {"type": "card_error", **error},
        }
        self._state.tell("charge.failed", charge)
        self._state.tell("payment_intent.payment_failed", intent)
        return Refused(402, "card_error", error.pop("message"), **error, payment_intent=dict(intent))

    def transaction(self, source: Object, kind: str, amount: int, fee: int | None = None) -> Object:
        """Money of ours that moved at Stripe, in minor units: what came in is positive."""
        if fee is None:
            fee = amount * FEE_THOUSANDTHS // 1000 + FEE_FIXED if amount > 0 else 0
        live = self._state.is_live(source["id"])
        return self._state.add(
            stripe.BalanceTransaction,
            "txn",
            live,
            amount=amount,
            currency=source["currency"],
            fee=fee,
            fee_details=[],
            net=amount - fee,
            type=kind,
            reporting_category=kind,
            source=source["id"],
            status="pending",
            balance_type="payments",
            available_on=self._state.clock.now() + 2 * 24 * 3600,
        )

    def _charge(self, intent: Object, status: str) -> Object:
        before = self._state.known(intent["latest_charge"])
        if before is not None and before["status"] == "pending":
            before |= {"status": status, "paid": status == "succeeded", "captured": status == "succeeded"}
            before["amount_captured"] = before["amount"] if status == "succeeded" else 0
            return before
        method = self._state.known(intent["payment_method"])
        return self._state.add(
            stripe.Charge,
            "ch",
            self._state.is_live(intent["id"]),
            amount=intent["amount"],
            amount_captured=intent["amount"] if status == "succeeded" else 0,
            amount_refunded=0,
            billing_details={"address": None, "email": None, "name": None, "phone": None, "tax_id": None},
            captured=status == "succeeded",
            currency=intent["currency"],
            customer=intent["customer"],
            description=intent["description"],
            disputed=False,
            metadata=dict(intent["metadata"]),
            paid=status == "succeeded",
            payment_intent=intent["id"],
            payment_method=intent["payment_method"],
            payment_method_details=None if method is None else {"type": method["type"]},
            presentment_details=intent["presentment_details"],
            refunded=False,
            status=status,
        )

    def _create(self, call: Call) -> Object:
        params = call.params
        if params["amount"] < 1:
            raise invalid("This value must be greater than or equal to 1.", param="amount", stored=False)
        if params.get("off_session") and not params.get("confirm"):
            raise invalid("You cannot set `off_session` if `confirm` isn't true.", param="off_session", stored=False)
        customer = params.get("customer")
        if customer is not None:
            self._state.get("customer", customer, call.live, param="customer")
        method = self._method(call, customer)
        intent = self.new_intent(
            call.live,
            params["amount"],
            params["currency"].lower(),
            customer=customer,
            metadata=params.get("metadata"),
            description=params.get("description"),
            receipt_email=params.get("receipt_email"),
            setup_future_usage=params.get("setup_future_usage"),
            payment_method_types=params.get("payment_method_types", ["card"]),
            payment_method=None if method is None else method["id"],
            status="requires_payment_method" if method is None else "requires_confirmation",
        )
        if not params.get("confirm"):
            return intent
        if method is None:
            raise invalid("You cannot confirm this PaymentIntent because it's missing a payment method.")
        return self._confirmed(intent, method, params)

    def _method(self, call: Call, customer: str | None) -> Object | None:
        name = call.params.get("payment_method")
        if name is None:
            return None
        method = self._customers.method(name, call.live)
        if method["customer"] is not None and method["customer"] != customer:
            raise invalid(
                f"The provided PaymentMethod {name} does not belong to the customer of this PaymentIntent.",
                param="payment_method",
            )
        return method

    def _confirmed(self, intent: Object, method: Object, params: dict[str, Any]) -> Object:
        behaviour = self._customers.behaviour(method["id"])
        intent["payment_method"] = method["id"]
        if behaviour == "succeed":
            self.succeed(intent)
        elif behaviour == "processing":
            self.process(intent)
        elif behaviour == "authentication_required" and not (
            params.get("off_session") or params.get("error_on_requires_action")
        ):
            intent |= {"status": "requires_action", "next_action": {"type": "use_stripe_sdk", "use_stripe_sdk": {}}}
            self._state.tell("payment_intent.requires_action", intent)
        else:
            raise self.fail(intent, behaviour)
        return intent

    def _confirm(self, call: Call) -> Object:
        intent = self._state.get("payment_intent", call.id, call.live)
        if intent["status"] not in CANCELABLE:
            raise self._unexpected(intent, "confirm")
        method = self._method(call, intent["customer"]) or self._state.known(intent["payment_method"])
        if method is None:
            raise invalid("You cannot confirm this PaymentIntent because it's missing a payment method.")
        return self._confirmed(intent, method, call.params)

    def _cancel(self, call: Call) -> Object:
        intent = self._state.get("payment_intent", call.id, call.live)
        if intent["status"] not in CANCELABLE:
            raise self._unexpected(intent, "cancel")
        self.cancel(intent, call.params.get("cancellation_reason"))
        return intent

    def cancel(self, intent: Object, reason: str | None = None) -> None:
        intent |= {
            "status": "canceled",
            "canceled_at": self._state.clock.now(),
            "cancellation_reason": reason,
            "next_action": None,
        }
        self._state.tell("payment_intent.canceled", intent)

    def _unexpected(self, intent: Object, verb: str) -> Refused:
        return invalid(
            f"You cannot {verb} this PaymentIntent because it has a status of {intent['status']}.",
            code="payment_intent_unexpected_state",
            payment_intent=dict(intent),
        )

    def _retrieve(self, call: Call) -> Object:
        return self._state.get("payment_intent", call.id, call.live)

    def _update(self, call: Call) -> Object:
        intent = self._state.get("payment_intent", call.id, call.live)
        extra = call.params.keys() - {"metadata", "description"}
        if extra and intent["status"] not in CANCELABLE:
            raise self._unexpected(intent, "update")
        intent["metadata"] = merged(intent["metadata"], call.params.get("metadata"))
        intent |= {name: value for name, value in call.params.items() if name != "metadata"}
        return intent

    def _list(self, call: Call) -> Object:
        if "customer" in call.params:
            self._state.get("customer", call.params["customer"], call.live, param="customer")
        intents = self._state.all("payment_intent", call.live)
        return listed(intents, call, "/v1/payment_intents", filters=("customer",))

    def _search(self, call: Call) -> Object:
        clauses = [CLAUSE.match(one) for one in re.split(r"\s+AND\s+", call.params["query"])]
        known = self._state.clock.now() - self.search_lag_seconds
        found = []
        for intent in self._state.all("payment_intent", call.live):
            for clause in clauses:
                if clause is None or (clause["field"] is not None and clause["field"] not in intent):
                    raise invalid(f"We were unable to parse your search query: {call.params['query']}", param="query")
                value = intent["metadata"].get(clause["key"]) if clause["key"] else str(intent[clause["field"] or ""])
                if value != clause["value"] or intent["created"] > known:
                    break
            else:
                found.append(intent)
        limit = call.params.get("limit", 10)
        start = int(call.params.get("page", 0))
        more = len(found) > start + limit
        return {
            "object": "search_result",
            "url": "/v1/payment_intents/search",
            "has_more": more,
            "next_page": str(start + limit) if more else None,
            "data": found[start : start + limit],
        }

    def _list_charges(self, call: Call) -> Object:
        charges = self._state.all("charge", call.live)
        return listed(charges, call, "/v1/charges", filters=("customer", "payment_intent"))

    def _retrieve_charge(self, call: Call) -> Object:
        return self._state.get("charge", call.id, call.live)

    def _retrieve_transaction(self, call: Call) -> Object:
        return self._state.get("balance_transaction", call.id, call.live)
