"""The till: what Stripe says of a payment is held against our order, and credited once.

One way for all that hear of a payment (webhook, reconciliation, automatic top-up, command): fetch the object, tell the
ledger its facts. The ledger decides under its locks; nothing here is trusted but what was fetched with our own key, and
nothing is fetched inside a transaction. Called twice, late or by eight at once, it does the same.

Which order a payment is for stands in the metadata that we gave its PaymentIntent (or, where a discount left nothing
to pay, its session): only holders of a secret key can write these. ``client_reference_id`` proves nothing, since the
URL of a payment link sets it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID

import structlog

from proxy.control.billing.errors import StripeUnknown
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import PaymentIntent, Session
from proxy.control.fields import parse_uuid
from proxy.ledger.orders import Order, OrderLedger, Payment, PayOutcome

__all__ = ["ACCOUNT_KEY", "ORDER_KEY", "Applied", "Till", "TillMetrics"]

ORDER_KEY = "farebox_order"
ACCOUNT_KEY = "farebox_account"
"""Under which names the metadata of our objects at Stripe hold the order's and the account's id."""

CLOCK_ERROR = timedelta(minutes=5)
UNHEARD_OF = timedelta(hours=24)
"""How long an order may be without a session: so long Stripe keeps the idempotency key under which one may be made."""

log = structlog.get_logger("farebox.till")


class TillMetrics(Protocol):
    """What the till tells ``metrics.Metrics``."""

    def payment_applied(self, outcome: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a payment, in one word, for events and people.

    paid        credited now            known       had been before          open      nothing to do yet
    pending     waits for the bank      failed      no money will come       expired   nobody paid in time
    canceled    called off              quarantined it doesn't match: no credit, and an alarm
    credited, dismissed                 what an operator decided about it
    not_ours    another business of the same Stripe account
    """

    outcome: str
    order_id: UUID | None = None
    reason: str | None = None
    """Why it is in quarantine."""


_NOT_OURS = Applied("not_ours")


class Till:
    """Applies payments. All methods raise StripeAway, StripeRefused and LedgerUnavailable: call again later."""

    def __init__(self, api: StripeApi, orders: OrderLedger, *, metrics: TillMetrics | None = None) -> None:
        self._api = api
        self._orders = orders
        self._metrics = metrics

    async def apply_payment(
        self,
        order_id: UUID | None = None,
        *,
        payment_intent: str | None = None,
        session_id: str | None = None,
    ) -> Applied:
        """Fetch what is named (an order: what it is called at Stripe) and do what it says.

        An order of another mode, or another Stripe account, than our key's is ``not_ours``. Raises StripeUnknown for a
        PaymentIntent or session that our key doesn't know, and Unknown for an order that isn't there.
        """
        if order_id is not None:
            try:
                return await self._apply_order(await self._orders.find(order_id))
            except StripeUnknown:
                return _NOT_OURS
        if session_id is not None:
            return await self.apply_session(await self._api.session(session_id))
        assert payment_intent is not None, "a payment is named by its order, its PaymentIntent or its session"
        return await self.apply_intent(await self._api.payment_intent(payment_intent))

    async def apply_session(self, session: Session) -> Applied:
        """A fetched Checkout Session, its PaymentIntent with it."""
        if session.payment_intent is None and session.payment_intent_id is not None:
            session = await self._api.session(session.id)
        named = _named(session.metadata, ORDER_KEY)
        if named is None and not await self._claimed(session):
            return _NOT_OURS
        if session.payment_status in {"paid", "no_payment_required"} and session.status == "complete":
            if session.payment_intent is not None and session.payment_intent.status != "succeeded":
                return Applied("pending", named)
            return await self._pay(_payment(session))
        order = await self._order(named)
        if order is None:
            return Applied("open", named)
        return await self._not_paid(order, session)

    async def apply_intent(self, intent: PaymentIntent) -> Applied:
        """A fetched PaymentIntent."""
        if ORDER_KEY not in intent.metadata:
            return _NOT_OURS
        named = _named(intent.metadata, ORDER_KEY)
        order = await self._order(named)
        if order is None or order.kind == "checkout":
            session = await self._api.session_of(intent.id)
            if session is not None:
                return await self.apply_session(session)
        if intent.status == "succeeded":
            # Without a session nothing was discounted or taxed: what an automatic order asked for is what came in.
            lost = order is not None and order.kind == "checkout"
            return await self._pay(_bare_payment(intent, "no_session" if lost else None))
        if order is None or order.kind == "checkout":
            return Applied("open", named)
        return await self._advance(order, _state_of(intent), intent)

    async def _apply_order(self, order: Order) -> Applied:
        if order.livemode != self._api.livemode or order.kind == "plan":
            return _NOT_OURS
        if order.session_id is not None:
            return await self.apply_payment(session_id=order.session_id)
        if order.payment_intent is not None:
            return await self.apply_payment(payment_intent=order.payment_intent)
        if order.kind == "checkout" and order.state == "created":
            return await self._look_for(order)
        return Applied("open" if order.state == "created" else order.state, order.id)

    async def _look_for(self, order: Order) -> Applied:
        """An order whose session, if it has one, we never heard of: nobody was sent there, and nobody will be."""
        customer = await self._orders.customer(order.account_id, livemode=order.livemode)
        if customer is not None:
            for session in await self._api.sessions_of(customer[0], since=order.created_at - CLOCK_ERROR):
                if _named(session.metadata, ORDER_KEY) == order.id:
                    await self._orders.opened(order.id, session.id, session.url, customer=session.customer)
                    return await self.apply_session(session)
        if datetime.now(UTC) - order.created_at < UNHEARD_OF:
            return Applied("open", order.id)
        return await self._advance(order, "expired", None)

    async def _not_paid(self, order: Order, session: Session) -> Applied:
        """A session of ours that has brought nothing (yet)."""
        if session.status == "expired":
            return await self._advance(order, "expired", session.payment_intent)
        if session.status != "complete":
            return Applied("open", order.id)
        failed = session.payment_intent is not None and session.payment_intent.failed
        return await self._advance(order, "failed" if failed else "pending", session.payment_intent)

    async def _advance(self, order: Order, state: str | None, intent: PaymentIntent | None) -> Applied:
        if state is None:
            return Applied("open", order.id)
        problem = None if intent is None else (intent.decline_code or intent.error_code)
        now = await self._orders.advance(
            order.id,
            state,
            payment_intent=None if intent is None else intent.id,
            problem=problem if state == "failed" else None,
        )
        return Applied("known" if now == "paid" else state, order.id)

    async def _pay(self, payment: Payment) -> Applied:
        paid = await self._orders.pay(payment)
        if paid.fresh and paid.outcome is PayOutcome.QUARANTINED:
            log.error(
                "payment_quarantined",
                payment=payment.payment,
                order_id=str(payment.order_id),
                reason=paid.reason,
                currency=payment.currency,
                received=payment.received,
            )
        elif paid.fresh:
            log.info("payment_credited", payment=payment.payment, order_id=str(payment.order_id))
        if paid.fresh and self._metrics is not None:
            self._metrics.payment_applied(paid.outcome.value)
        return Applied(paid.outcome.value, payment.order_id, paid.reason)

    async def _order(self, order_id: UUID | None) -> Order | None:
        return None if order_id is None else await self._orders.search(str(order_id))

    async def _claimed(self, session: Session) -> bool:
        """Whether a session that isn't ours points at an order of ours: somebody paid, and should be looked at."""
        if ORDER_KEY in session.metadata:
            return True
        if session.payment_intent is not None and ORDER_KEY in session.payment_intent.metadata:
            return True
        return await self._order(parse_uuid(session.client_reference_id)) is not None


def _named(metadata: Mapping[str, str], key: str) -> UUID | None:
    return parse_uuid(metadata.get(key))


def _state_of(intent: PaymentIntent) -> str | None:
    """The state of an order that has no session, by its PaymentIntent; None while it is open."""
    if intent.status == "processing":
        return "pending"
    if intent.status == "canceled":
        return "canceled"
    return "failed" if intent.failed else None


def _payment(session: Session) -> Payment:
    """The facts of a session that is paid. What names the order is the PaymentIntent's metadata, where there is one."""
    intent = session.payment_intent
    metadata = session.metadata if intent is None else intent.metadata
    order_id = _named(metadata, ORDER_KEY)
    return Payment(
        order_id=order_id or parse_uuid(session.client_reference_id),
        account_id=_named(metadata, ACCOUNT_KEY),
        payment=session.id if intent is None else intent.id,
        payment_intent=None if intent is None else intent.id,
        session_id=session.id,
        customer=session.customer,
        payment_method=None if intent is None else intent.payment_method,
        livemode=session.livemode,
        currency=session.currency,
        subtotal=session.subtotal,
        discount=session.discount,
        tax=session.tax,
        total=session.total,
        received=0 if intent is None else intent.amount_received,
        problem=_problem(session, order_id),
    )


def _problem(session: Session, order_id: UUID | None) -> str | None:
    """What is wrong with a paid session whatever the order says."""
    intent = session.payment_intent
    if order_id is None or _named(session.metadata, ORDER_KEY) != order_id:
        return "not_named"
    if parse_uuid(session.client_reference_id) != order_id:
        return "not_named"
    if session.shipping != 0:
        return "other_amount"
    if intent is not None:
        if intent.currency != session.currency:
            return "other_currency"
        if intent.livemode != session.livemode:
            return "other_mode"
    return None


def _bare_payment(intent: PaymentIntent, problem: str | None) -> Payment:
    """The facts of a PaymentIntent that no session made."""
    return Payment(
        order_id=_named(intent.metadata, ORDER_KEY),
        account_id=_named(intent.metadata, ACCOUNT_KEY),
        payment=intent.id,
        payment_intent=intent.id,
        session_id=None,
        customer=intent.customer,
        payment_method=intent.payment_method,
        livemode=intent.livemode,
        currency=intent.currency,
        subtotal=intent.amount,
        discount=0,
        tax=0,
        total=intent.amount,
        received=intent.amount_received,
        problem=problem,
    )
