"""Where a process may die while money comes in, goes back, or is told of: beside the points of a paid call.

``scene`` names a story (``stories.py``). Of each step there is what comes before it, what comes after it, and the time
in which its statement is on the way to PostgreSQL, or its request on the way to Stripe and the answer nowhere.
"""

from collections.abc import Callable
from typing import Any

from tests.faults.points import Moment, Point, Seen

__all__ = ["FAMILIES", "MONEY_IN"]

_B, _A, _F = Moment.BEFORE, Moment.AFTER, Moment.IN_FLIGHT

_ASKED = "urllib3.connection:HTTPConnection.getresponse"
"""What Stripe's client calls when a request has been written."""


def _request(start: str) -> Callable[[Seen], bool]:
    """A request to Stripe that begins so: ``POST /v1/refunds``."""

    def is_it(seen: Seen) -> bool:
        options: Any = seen.args[0]._response_options
        return f"{options.request_method} {options.request_url}".startswith(start)

    return is_it


def _says(word: str) -> Callable[[Seen], bool]:
    """A statement with that word in it."""
    return lambda seen: word in str(seen.args[1])


def _some(seen: Seen) -> bool:
    return bool(seen.result)


_CREATE = "proxy.ledger.orders:OrderLedger.create"
_CUSTOMER = "proxy.control.billing.stripe_api:StripeApi.create_customer"
_PUT_CUSTOMER = "proxy.ledger.orders:OrderLedger.put_customer"
_SESSION = "proxy.control.billing.stripe_api:StripeApi.create_session"
_OPENED = "proxy.ledger.orders:OrderLedger.opened"
_TAKE = "proxy.ledger.stripe_events:EventLedger.take"
_FETCHED = "proxy.control.billing.till:Till.apply_session"
_PAY = "proxy.ledger.orders:OrderLedger.pay"
_ADVANCE = "proxy.ledger.orders:OrderLedger.advance"
_FINISH = "proxy.ledger.stripe_events:EventLedger.finish"
_REQUEST = "proxy.ledger.refunds:RefundLedger.open"
_MAKE_REFUND = "proxy.control.billing.refunds:create_refund"
_RELEASE = "proxy.ledger.refunds:RefundLedger.release"
_CLAIM_REFUNDS = "proxy.ledger.refunds:RefundLedger.claim"
_CLAIM_EVENTS = "proxy.ledger.stripe_events:EventLedger.claim"
_ATTEMPT = "proxy.ledger.autotopups:AutoTopupLedger.open"
_CHARGE = "proxy.control.billing.autotopup:request_payment"
_CANCEL = "proxy.control.billing.autotopup:cancel_payment"
_CLAIM_ATTEMPTS = "proxy.ledger.autotopups:AutoTopupLedger.claim"
_INSTEAD = "proxy.control.billing.checkout:Checkout.checkout_instead"
_LINK = "proxy.ledger.autotopups:AutoTopupLedger.linked"
_NOTE = "proxy.ledger.reconciliation:ReconciliationLedger.note"
_DRAW = "proxy.ledger.lots:_draw_batch"
_FETCHROW = "asyncpg.connection:Connection.fetchrow"
_FETCHVAL = "asyncpg.connection:Connection.fetchval"
_REFUND = "proxy.ledger.refunds:RefundLedger.apply"
_DISPUTE = "proxy.ledger.disputes:DisputeLedger.apply"
_CLAIM = "proxy.ledger.outbox:Outbox.claim"
_SEND = "proxy.control.billing.messages:HttpPost.__call__"
_SENT = "proxy.ledger.outbox:Outbox.delivered"
_REPLY = "proxy.control.billing.webhooks:WebhookEndpoint.handle"

_ALL = (
    # A buyer asks for a pack: the order, the customer, the session, and what it is called.
    Point("checkout.unwritten", "checkout", _CREATE, _B),
    Point("checkout.order_in_flight", "checkout", _CREATE, _F),
    Point("checkout.order_written", "checkout", _CREATE, _A),
    Point("checkout.customer_unasked", "checkout", _CUSTOMER, _B),
    Point("checkout.customer_asked", "checkout", _ASKED, _B, when=_request("POST /v1/customers")),
    Point("checkout.customer_made", "checkout", _CUSTOMER, _A),
    Point("checkout.customer_in_flight", "checkout", _PUT_CUSTOMER, _F),
    Point("checkout.customer_written", "checkout", _PUT_CUSTOMER, _A),
    Point("checkout.session_unasked", "checkout", _SESSION, _B),
    Point("checkout.session_asked", "checkout", _ASKED, _B, when=_request("POST /v1/checkout/sessions")),
    Point("checkout.session_made", "checkout", _SESSION, _A),
    Point("checkout.opening", "checkout", _OPENED, _F),
    Point("checkout.opened", "checkout", _OPENED, _A),
    # Stripe tells of a payment.
    Point("webhook.unwritten", "paid", _TAKE, _B),
    Point("webhook.event_in_flight", "paid", _TAKE, _F),
    Point("webhook.event_written", "paid", _TAKE, _A),
    Point("webhook.fetching", "paid", _ASKED, _B, when=_request("GET /v1/checkout/sessions")),
    Point("webhook.fetched", "paid", _FETCHED, _B),
    Point("webhook.payment_in_flight", "paid", _PAY, _F),
    Point("webhook.paid", "paid", _PAY, _A),
    Point("webhook.unmarked", "paid", _FINISH, _B),
    Point("webhook.mark_in_flight", "paid", _FINISH, _F),
    Point("webhook.marked", "paid", _FINISH, _A),
    Point("webhook.answered", "paid", _REPLY, _A),
    # Of one that came days later, of one that never came, and of a session that nobody used.
    Point("webhook.late_in_flight", "paid_late", _PAY, _F),
    Point("webhook.late_paid", "paid_late", _PAY, _A),
    Point("webhook.failure_in_flight", "failed_late", _ADVANCE, _F),
    Point("webhook.failed", "failed_late", _ADVANCE, _A),
    Point("webhook.expiry_in_flight", "gave_up", _ADVANCE, _F),
    Point("webhook.expired", "gave_up", _ADVANCE, _A),
    # Money goes back, as somebody decided at Stripe's dashboard.
    Point("returned.fetched", "refunded", _REFUND, _B),
    Point("returned.in_flight", "refunded", _REFUND, _F),
    Point("returned.taken", "refunded", _REFUND, _A),
    Point("returned.unmarked", "refunded", _FINISH, _B),
    Point("returned.failure_in_flight", "refund_failed", _REFUND, _F),
    Point("returned.given_back", "refund_failed", _REFUND, _A),
    # Or a bank.
    Point("dispute.fetched", "disputed", _DISPUTE, _B),
    Point("dispute.in_flight", "disputed", _DISPUTE, _F),
    Point("dispute.taken", "disputed", _DISPUTE, _A),
    Point("dispute.unmarked", "disputed", _FINISH, _B),
    Point("dispute.return_in_flight", "dispute_won", _DISPUTE, _F),
    Point("dispute.given_back", "dispute_won", _DISPUTE, _A),
    Point("dispute.loss_in_flight", "inquiry_lost", _DISPUTE, _F),
    Point("dispute.lost", "inquiry_lost", _DISPUTE, _A),
    # Or by `farebox refund`: its request with its hold, the refund at Stripe, and what it takes or gives free again.
    Point("refund.unwritten", "refund", _REQUEST, _B),
    Point("refund.request_in_flight", "refund", _REQUEST, _F),
    Point("refund.written", "refund", _REQUEST, _A),
    Point("refund.unasked", "refund", _MAKE_REFUND, _B),
    Point("refund.asked", "refund", _ASKED, _B, when=_request("POST /v1/refunds")),
    Point("refund.made", "refund", _MAKE_REFUND, _A),
    Point("refund.in_flight", "refund", _REFUND, _F),
    Point("refund.taken", "refund", _REFUND, _A),
    Point("refund.unreleased", "refund_refused", _RELEASE, _B),
    Point("refund.release_in_flight", "refund_refused", _RELEASE, _F),
    Point("refund.released", "refund_refused", _RELEASE, _A),
    # What others have left is gone on with.
    Point("resume.refund_claimed", "refund_left", _CLAIM_REFUNDS, _A, when=_some),
    Point("resume.refund_in_flight", "refund_left", _REFUND, _F),
    Point("resume.refund_taken", "refund_left", _REFUND, _A),
    Point("resume.event_claimed", "unprocessed", _CLAIM_EVENTS, _A, when=_some),
    Point("resume.payment_in_flight", "unprocessed", _PAY, _F),
    Point("resume.paid", "unprocessed", _PAY, _A),
    Point("resume.marked", "unprocessed", _FINISH, _A),
    # An account buys by itself.
    Point("topup.unwritten", "topup", _ATTEMPT, _B),
    Point("topup.attempt_in_flight", "topup", _ATTEMPT, _F),
    Point("topup.attempt_written", "topup", _ATTEMPT, _A),
    Point("topup.unasked", "topup", _CHARGE, _B),
    Point("topup.asked", "topup", _ASKED, _B, when=_request("POST /v1/payment_intents")),
    Point("topup.charged", "topup", _CHARGE, _A),
    Point("topup.in_flight", "topup", _PAY, _F),
    Point("topup.paid", "topup", _PAY, _A),
    Point("topup.claim_in_flight", "topup_left", _CLAIM_ATTEMPTS, _F),
    Point("topup.claimed", "topup_left", _CLAIM_ATTEMPTS, _A, when=_some),
    Point("topup.found", "topup_left", "proxy.control.billing.autotopup:find_payment", _A),
    Point("topup.found_in_flight", "topup_left", _PAY, _F),
    # Its card is declined, or its bank wants to see its customer.
    Point("refusal.in_flight", "topup_declined", _ADVANCE, _F),
    Point("refusal.written", "topup_declined", _ADVANCE, _A),
    Point("refusal.canceled", "topup_declined", _CANCEL, _A),
    Point("refusal.of_the_bank_in_flight", "topup_unauthenticated", _ADVANCE, _F),
    Point("refusal.of_the_bank", "topup_unauthenticated", _ADVANCE, _A),
    Point("refusal.called_off", "topup_unauthenticated", _CANCEL, _A),
    Point("refusal.linked", "topup_unauthenticated", _INSTEAD, _A),
    Point("refusal.link_in_flight", "topup_unauthenticated", _LINK, _F),
    Point("refusal.link_told", "topup_unauthenticated", _LINK, _A),
    # The reconciliation finds what nobody has told.
    Point("reconcile.listed", "missed_payment", "proxy.control.billing.reconcile:Reconciler._settle", _B),
    Point("reconcile.payment_in_flight", "missed_payment", _PAY, _F),
    Point("reconcile.paid", "missed_payment", _PAY, _A),
    Point("reconcile.refund_in_flight", "missed_returns", _REFUND, _F),
    Point("reconcile.refunded", "missed_returns", _REFUND, _A),
    Point("reconcile.dispute_in_flight", "missed_returns", _DISPUTE, _F),
    Point("reconcile.disputed", "missed_returns", _DISPUTE, _A),
    Point("reconcile.note_in_flight", "missed_returns", _NOTE, _F),
    Point("reconcile.noted", "missed_returns", _NOTE, _A),
    # Lots are drawn behind all this, and what is left of them expires.
    Point("lots.undrawn", "expiring", _DRAW, _B),
    Point("lots.drawing", "expiring", _FETCHROW, _F, when=_says("draw_accounts")),
    Point("lots.uncommitted", "expiring", _FETCHROW, _A, when=_says("draw_accounts")),
    Point("lots.drawn", "expiring", _DRAW, _A),
    Point("lots.expiring", "expiring", _FETCHVAL, _F, when=_says("expire_lots")),
    Point("lots.expired", "expiring", _FETCHVAL, _A, when=_says("expire_lots")),
    # The operator is told.
    Point("message.claim_in_flight", "told", _CLAIM, _F),
    Point("message.claimed", "told", _CLAIM, _A, when=_some),
    Point("message.unsent", "told", _SEND, _B),
    Point("message.sent", "told", _SEND, _A),
    Point("message.mark_in_flight", "told", _SENT, _F),
    Point("message.marked", "told", _SENT, _A),
)

MONEY_IN = {point.label: point for point in _ALL}
FAMILIES = tuple(dict.fromkeys(point.label.partition(".")[0] for point in _ALL))
"""The first words of the labels."""
