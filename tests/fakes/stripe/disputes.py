"""Disputes and inquiries: when money is taken back by the customer's bank, and when it returns.

An inquiry (warning_*) takes nothing. A dispute withdraws its amount at once, and a fee; won, the amount comes back.
What happened to the money is in ``balance_transactions``: none, one or two.
"""

from collections.abc import Sequence
from typing import Literal

import stripe
from stripe.params import DisputeListParams, DisputeRetrieveParams

from tests.fakes.stripe.api import Call, Endpoint, listed
from tests.fakes.stripe.payments import Payments
from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State

__all__ = ["Disputes", "Status"]

Status = Literal[
    "warning_needs_response", "warning_under_review", "warning_closed", "needs_response", "under_review", "won", "lost",
    "appeal_needs_response", "appeal_under_review", "prevented",
]  # fmt: skip

DISPUTE_FEE = 1500
CLOSED = frozenset({"won", "lost", "warning_closed", "prevented"})


class Disputes:
    """``open``, ``withdraw`` and ``move`` are the banks' and the tests'."""

    def __init__(self, state: State, payments: Payments) -> None:
        self._state, self._payments = state, payments

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("GET", "/v1/disputes", DisputeListParams, self._list),
            Endpoint("GET", "/v1/disputes/{id}", DisputeRetrieveParams, self._retrieve),
        )

    def open(
        self, intent: str, amount: int | None = None, *, inquiry: bool = False, withdraw: bool | None = None
    ) -> str:
        """A customer's bank disputes a payment, or asks about it. ``withdraw``: whether it takes the money at once, as
        it does unless it only asks. Gives the dispute's id."""
        with self._state.lock:
            charge = self._state.find(self._state.find(intent)["latest_charge"])
            dispute = self._new(charge, charge["amount"] if amount is None else amount, inquiry=inquiry)
            charge["disputed"] = True
            self._state.tell("charge.dispute.created", dispute)
            if withdraw if withdraw is not None else not inquiry:
                self._withdraw(dispute)
            return str(dispute["id"])

    def withdraw(self, dispute: str) -> None:
        """The bank takes the money, later than it said that it would."""
        with self._state.lock:
            self._withdraw(self._state.find(dispute))

    def move(self, dispute: str, status: Status) -> None:
        """On to another status, with its events and the money that goes with it: an inquiry that becomes a dispute
        withdraws, one that is won reinstates, one that is lost withdraws where it hadn't yet."""
        with self._state.lock:
            found = self._state.find(dispute)
            before = found["status"]
            found["status"] = status
            escalated = before.startswith("warning_") and not status.startswith("warning_") and status not in CLOSED
            if escalated:
                found |= {"is_charge_refundable": False}
            if status not in CLOSED:
                self._state.tell("charge.dispute.updated", found, {"status": before})
            if (escalated or status == "lost") and _outstanding(found) == 0:
                self._withdraw(found)
            if status == "won" and _outstanding(found) > 0:
                self._reinstate(found)
            if status in CLOSED:
                self._state.tell("charge.dispute.closed", found)

    def _new(self, charge: Object, amount: int, *, inquiry: bool) -> Object:
        evidence = dict.fromkeys(stripe.Dispute.Evidence.__annotations__)
        return self._state.add(
            stripe.Dispute,
            "dp",
            self._state.is_live(charge["id"]),
            amount=amount,
            balance_transactions=[],
            charge=charge["id"],
            currency=charge["currency"],
            enhanced_eligibility_types=[],
            evidence=evidence | {"enhanced_evidence": {}},
            evidence_details={
                "due_by": self._state.clock.now() + 7 * 24 * 3600,
                "enhanced_eligibility": {},
                "has_evidence": False,
                "past_due": False,
                "submission_count": 0,
                "submission_method": "not_submitted",
            },
            is_charge_refundable=inquiry,
            metadata={},
            payment_intent=charge["payment_intent"],
            payment_method_details={
                "type": "card",
                "amazon_pay": None,
                "card": {
                    "brand": "visa",
                    "case_type": "inquiry" if inquiry else "chargeback",
                    "network": "visa",
                    "network_reason_code": "10.4",
                },
                "klarna": None,
                "paypal": None,
            },
            reason="fraudulent",
            status="warning_needs_response" if inquiry else "needs_response",
        )

    def _withdraw(self, dispute: Object) -> None:
        assert _outstanding(dispute) == 0, f"{dispute['id']} has its money"
        taken = self._payments.transaction(dispute, "adjustment", -dispute["amount"], fee=DISPUTE_FEE)
        taken["reporting_category"] = "dispute"
        dispute["balance_transactions"].append(taken)
        self._state.tell("charge.dispute.funds_withdrawn", dispute)

    def _reinstate(self, dispute: Object) -> None:
        back = self._payments.transaction(dispute, "adjustment", _outstanding(dispute), fee=0)
        back["reporting_category"] = "dispute_reversal"
        dispute["balance_transactions"].append(back)
        self._state.tell("charge.dispute.funds_reinstated", dispute)

    def _retrieve(self, call: Call) -> Object:
        return self._state.get("dispute", call.id, call.live)

    def _list(self, call: Call) -> Object:
        disputes = self._state.all("dispute", call.live)
        return listed(disputes, call, "/v1/disputes", filters=("charge", "payment_intent"))


def _outstanding(dispute: Object) -> int:
    """What the bank has of it, in minor units."""
    return -int(sum(one["amount"] for one in dispute["balance_transactions"]))
