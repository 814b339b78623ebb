"""To give a part of a payment back: hold its credits, have Stripe refund the money, and only then take the credits.

Where Stripe refuses, they are available again. Where it doesn't answer, they stay held, and ``RefundDesk.resume`` finds
out what became of it.
"""

from dataclasses import dataclass, replace
from uuid import UUID, uuid4, uuid5

from proxy.control.billing.errors import StripeError
from proxy.control.billing.refunds import RefundDesk
from proxy.control.fields import check_plain
from proxy.control.views import View, time_text
from proxy.core.currencies import CurrencyError, format_amount, format_money, parse_money, step_of
from proxy.core.errors import Conflict, InvalidRequest, NotFound, Refusal, Unavailable
from proxy.core.money import format_credits
from proxy.ledger.orders import Order, OrderLedger
from proxy.ledger.refunds import RefundLedger, RefundOpened, RefundRequest, RequestOutcome

__all__ = ["RefundTerms", "Refunder", "refund_view"]

# Ids of requests that the operator has named: the same name for the same order is the same request.
_NAMES = UUID("5b1d8f0e-6a0c-4c27-9f57-8f7b4f1c9d02")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundTerms:
    """What is to be refunded of an order. ``amount``: minor units; None: for what of the purchase isn't spent.

    ``all_left``: all that is left of the payment, spent or not: the account owes what is missing. ``reference``: the
    operator's name for it; the same again is the same refund. None: another one each time.
    """

    amount: int | None = None
    all_left: bool = False
    reference: str | None = None
    actor: str
    reason: str | None = None


class Refunder:
    """Refunds parts of orders, in one of Stripe's modes. Raises LedgerError and refusals."""

    def __init__(self, orders: OrderLedger, ledger: RefundLedger, desk: RefundDesk, *, livemode: bool) -> None:
        self._orders = orders
        self._ledger = ledger
        self._desk = desk
        self._livemode = livemode

    async def refund_named(self, ref: str, amount: str | None, terms: RefundTerms) -> RefundRequest:
        """``refund``, of the order of that id or of its PaymentIntent's, session's or invoice's; ``amount``: decimal
        money in its currency. Raises NotFound besides."""
        order = await self._orders.search(ref)
        if order is None:
            raise NotFound("There is no such order.", code="not_found")
        if amount is None:
            return await self.refund(order, terms)
        try:
            money = parse_money(amount, order.currency)
        except CurrencyError as error:
            raise InvalidRequest(f"{error}.", code="invalid_value", param="amount") from None
        return await self.refund(order, replace(terms, amount=money))

    async def refund(self, order: Order, terms: RefundTerms) -> RefundRequest:
        """Hold the credits, have Stripe refund the money, and take the credits: the request as it then is.

        Raises InvalidRequest and Conflict where it can't be; Unavailable where Stripe gave no answer: the request stays
        held, and is resumed. Where Stripe refuses, the request is released, with the reason, and returned.
        """
        if order.livemode != self._livemode:
            theirs, ours = ("live", "test") if order.livemode else ("test", "live")
            raise Conflict(
                f"The order is of {theirs} mode, and FAREBOX_STRIPE_KEY of {ours} mode.", code="livemode_mismatch"
            )
        if terms.amount is not None and (terms.all_left or terms.amount <= 0 or terms.amount % step_of(order.currency)):
            raise InvalidRequest(
                f"An amount of {order.currency.upper()} above 0 that can be paid, or all that is left: one of the two.",
                code="invalid_value",
                param="amount",
            )
        check_plain("reference", terms.reference)
        check_plain("reason", terms.reason, chars_max=1_000)
        request_id = uuid4() if terms.reference is None else uuid5(_NAMES, f"{order.id}:{terms.reference}")
        opened = await self._ledger.open(
            request_id,
            order.id,
            terms.amount,
            owing=terms.all_left,
            step=step_of(order.currency),
            actor=terms.actor,
            reason=terms.reason,
        )
        if opened.outcome is not RequestOutcome.DONE:
            raise _refusal(opened, order)
        request = await self._ledger.request(request_id)
        if terms.amount not in (None, request.amount):
            raise Conflict("That reference stands for a refund of another amount.", code="conflict")
        if request.state != "held":
            return request
        try:
            return await self._desk.carry_out(request)
        except StripeError as error:
            raise Unavailable(
                f"Stripe has not answered whether refund request {request.id} was carried out: {error}. Its credits "
                "stay held; the server asks again by itself, or `farebox refund --resume` does now.",
                code="refund_unresolved",
                headers={"retry-after": "60"},
            ) from error


def refund_view(request: RefundRequest) -> View:
    """A refund that we asked for, as its operator sees it. ``credits`` and ``bonus`` are what was held for it."""
    return {
        "object": "refund_request",
        "id": str(request.id),
        "order": str(request.order_id),
        "account": str(request.account_id),
        "state": request.state,
        "refund": request.refund,
        "amount": format_amount(request.amount, request.currency),
        "currency": request.currency.upper(),
        "credits": format_credits(request.credits),
        "bonus": format_credits(request.bonus),
        "actor": request.actor,
        "reason": request.reason,
        "problem": request.problem,
        "created_at": time_text(request.created_at),
    }


def _refusal(opened: RefundOpened, order: Order) -> Refusal:
    amount = format_money(opened.amount, order.currency)
    if opened.outcome is RequestOutcome.UNKNOWN:
        return NotFound("There is no such order.", code="not_found")
    messages = {
        RequestOutcome.NO_PAYMENT: "Nothing was paid for this order.",
        RequestOutcome.UNDER_WAY: f"Another refund of this order, {opened.request_id} of {amount}, is under way: "
        "`farebox refund --resume` carries on with it.",
        RequestOutcome.REFUNDED: "All of this order's payment has gone back.",
        RequestOutcome.SPENT: "Nothing of this purchase is left to refund: it is spent, or held by calls that run. "
        f"{amount} of the payment can still be refunded by amount, where the account has other credits, or with all "
        "that is left (--all-left), and is then owed.",
        RequestOutcome.ABOVE_PAYMENT: f"Of this order's payment {amount} is left to refund.",
        RequestOutcome.INSUFFICIENT: "The credits that go with this amount are spent, or held by calls that run. There "
        f"are enough for {amount}. All that is left of the payment (--all-left) can be refunded, and is then owed.",
    }
    return Conflict(messages[opened.outcome], code=f"refund_{opened.outcome.value}")
