"""Refunds: of a part or of all that is left, at once or pending, and those that fail later."""

from collections.abc import Sequence
from typing import Literal

import stripe
from stripe.params import (
    RefundCancelParams,
    RefundCreateParams,
    RefundListParams,
    RefundRetrieveParams,
    RefundUpdateParams,
)

from tests.fakes.stripe.api import Call, Endpoint, listed, merged
from tests.fakes.stripe.errors import invalid
from tests.fakes.stripe.payments import Payments
from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State

__all__ = ["Refunds"]

Beginning = Literal["succeeded", "pending", "requires_action"]


class Refunds:
    """``beginning``: the status that new refunds have. ``create`` (as an operator does in Stripe's dashboard) and
    ``settle`` are the tests'."""

    def __init__(self, state: State, payments: Payments) -> None:
        self._state, self._payments = state, payments
        self.beginning: Beginning = "succeeded"
        state.includable["charge", "refunds"] = self._of_charge

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("POST", "/v1/refunds", RefundCreateParams, self._create),
            Endpoint("GET", "/v1/refunds", RefundListParams, self._list),
            Endpoint("GET", "/v1/refunds/{id}", RefundRetrieveParams, self._retrieve),
            Endpoint("POST", "/v1/refunds/{id}", RefundUpdateParams, self._update),
            Endpoint("POST", "/v1/refunds/{id}/cancel", RefundCancelParams, self._cancel),
        )

    def create(self, intent: str, amount: int | None = None, *, beginning: Beginning | None = None) -> Object:
        """As somebody does in the dashboard: with no metadata of ours. Gives the refund."""
        with self._state.lock:
            charge = self._state.find(self._state.find(intent)["latest_charge"])
            return dict(self._new(charge, amount, beginning or self.beginning, {}, None))

    def settle(self, refund: str, status: Literal["succeeded", "failed", "canceled"]) -> None:
        """It comes to its end, or fails after it had succeeded, as a bank may send it back."""
        with self._state.lock:
            self._settle(self._state.find(refund), status)

    def _settle(self, refund: Object, status: str) -> None:
        assert refund["status"] not in ("failed", "canceled"), f"{refund['id']} is {refund['status']}"
        refund |= {"status": status, "pending_reason": None, "next_action": None}
        charge = self._state.find(refund["charge"])
        if status in ("failed", "canceled"):
            charge["amount_refunded"] -= refund["amount"]
            charge["refunded"] = False
            back = self._payments.transaction(refund, "refund_failure", refund["amount"], fee=0)
            refund["failure_balance_transaction"] = back["id"]
            refund["failure_reason"] = "expired_or_canceled_card" if status == "failed" else "merchant_request"
        if status == "failed":
            self._state.tell("refund.failed", refund)
        self._state.tell("refund.updated", refund)
        self._state.tell("charge.refund.updated", refund)

    def _create(self, call: Call) -> Object:
        params = call.params
        if ("charge" in params) == ("payment_intent" in params):
            raise invalid("One of charge and payment_intent must be given.", stored=False)
        if "charge" in params:
            charge = self._state.get("charge", params["charge"], call.live, param="charge")
        else:
            intent = self._state.get("payment_intent", params["payment_intent"], call.live, param="payment_intent")
            found = self._state.known(intent["latest_charge"])
            if found is None:
                raise invalid(
                    f"This PaymentIntent ({intent['id']}) does not have a successful charge to refund.",
                    code="resource_missing",
                    param="payment_intent",
                )
            charge = found
        return self._new(charge, params.get("amount"), self.beginning, params.get("metadata"), params.get("reason"))

    def _new(
        self, charge: Object, amount: int | None, beginning: Beginning, metadata: Object | None, reason: str | None
    ) -> Object:
        if charge["status"] != "succeeded":
            raise invalid(f"Charge {charge['id']} has no money to give back.", code="charge_not_refundable")
        if charge["disputed"] and not self._refundable(charge):
            raise invalid(
                f"Charge {charge['id']} has been charged back; cannot issue a refund.", code="charge_disputed"
            )
        left = charge["amount"] - charge["amount_refunded"]
        if left == 0:
            raise invalid(f"Charge {charge['id']} has already been refunded.", code="charge_already_refunded")
        amount = left if amount is None else amount
        if amount < 1:
            raise invalid("Invalid positive integer", code="parameter_invalid_integer", param="amount")
        if amount > left:
            raise invalid(
                f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left})", param="amount"
            )
        refund = self._state.add(
            stripe.Refund,
            "re",
            self._state.is_live(charge["id"]),
            amount=amount,
            charge=charge["id"],
            currency=charge["currency"],
            customer=charge["customer"],
            payment_intent=charge["payment_intent"],
            metadata=merged({}, metadata),
            reason=reason,
            status=beginning,
            pending_reason="processing" if beginning == "pending" else None,
            destination_details={"type": "card"},
        )
        refund["balance_transaction"] = self._payments.transaction(refund, "refund", -amount, fee=0)["id"]
        charge["amount_refunded"] += amount
        charge["refunded"] = charge["amount_refunded"] == charge["amount"]
        self._state.tell("refund.created", refund)
        self._state.tell("charge.refunded", charge)
        return refund

    def _refundable(self, charge: Object) -> bool:
        return all(one["is_charge_refundable"] for one in self._state.all("dispute") if one["charge"] == charge["id"])

    def _of_charge(self, charge: Object) -> Object:
        found = [one for one in self._state.all("refund") if one["charge"] == charge["id"]]
        return {
            "object": "list",
            "url": f"/v1/charges/{charge['id']}/refunds",
            "has_more": len(found) > 10,
            "data": found[:10],
        }

    def _retrieve(self, call: Call) -> Object:
        return self._state.get("refund", call.id, call.live)

    def _update(self, call: Call) -> Object:
        refund = self._state.get("refund", call.id, call.live)
        refund["metadata"] = merged(refund["metadata"], call.params.get("metadata"))
        self._state.tell("refund.updated", refund)
        return refund

    def _cancel(self, call: Call) -> Object:
        refund = self._state.get("refund", call.id, call.live)
        if refund["status"] != "requires_action":
            raise invalid(f"You cannot cancel a refund whose status is {refund['status']}.")
        self._settle(refund, "canceled")
        return refund

    def _list(self, call: Call) -> Object:
        refunds = self._state.all("refund", call.live)
        return listed(refunds, call, "/v1/refunds", filters=("charge", "payment_intent"))
