"""Automatic top-ups: accounts whose balance has come below their threshold buy their pack, without their customer.

Each step is written down before it is taken, so that whoever comes next can go on where somebody stopped:

    due ──► order (created) ──► PaymentIntent under the order's id ──► the till: paid, pending, failed
                                        │ no answer: the same again, for 23 hours; then only looked for
                                        ▼
    failed ──► wait an hour, six, ... and tell         (SQL: auto_order_ended, whoever learns of it)
    the bank wants its customer ──► cancel the payment ──► a checkout for the same pack ──► tell with its link

One attempt of an account at a time (a unique index), however many processes look; one PaymentIntent of an attempt (its
key), however often it is asked for; credited by the till as every payment, once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar
from uuid import UUID, uuid4

import structlog

from proxy.control.billing.errors import StripeAway, StripeError, StripeRefused, StripeUnknown
from proxy.control.billing.off_session import cancel_payment, find_payment, request_payment
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import PaymentIntent
from proxy.control.billing.till import Applied, Till
from proxy.ledger.autotopups import AutoTopupLedger, Offer, Opened
from proxy.ledger.orders import Order, OrderLedger
from proxy.ledger.rounds import EXPECTED, Rounds

__all__ = ["AutoTopups", "Counter", "Instead"]

Item = TypeVar("Item")

log = structlog.get_logger("farebox.auto_topup")

LOOK_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""Longer than whoever opened an attempt takes to hear of it."""
KEY_SECONDS = 23 * 3_600.0
"""For so long after an attempt was opened it is asked for under its key: Stripe keeps one for a day at least."""
ON_ITS_WAY_SECONDS = 30 * 86_400.0
"""Longer than any payment takes to succeed or fail: a bank's debit takes two weeks at most."""
DAY_MAX = 10
"""Attempts of one account in 24 hours, whatever became of them: a threshold above the pack must not empty a card."""
ACCOUNTS_MAX = 50
AT_ONCE = 3
"""Calls to Stripe: customers who wait for their checkout want some of its threads, too."""
AUTHENTICATION = "authentication_required"

# Nothing that the customer or the attempt could be blamed for: the operator's key, or a setting that has changed.
_OPERATOR_STATUSES = frozenset({401, 403})


class Instead(Protocol):
    """What opens a checkout where an attempt was refused."""

    async def checkout_instead(self, failed: Order) -> Order:
        """A checkout of the same goods, the same one at each call, with its URL. Raises StripeError, LedgerError."""


class Counter(Protocol):
    """Is told what became of attempts: ``proxy.metrics.Metrics`` is one."""

    def auto_topup(self, outcome: str) -> None: ...


class AutoTopups:
    """The loop, and its steps. ``offer``: what is sold under a pack's id now, None: nothing. ``opens`` False: what is
    under way is gone on with, and nothing new is bought."""

    def __init__(
        self,
        api: StripeApi,
        ledger: AutoTopupLedger,
        orders: OrderLedger,
        till: Till,
        instead: Instead,
        offer: Callable[[str], Offer | None],
        *,
        metrics: Counter,
        opens: bool = True,
        look_seconds: float = LOOK_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._orders = orders
        self._till = till
        self._instead = instead
        self._offer = offer
        self._metrics = metrics
        self._opens = opens
        self._silent_seconds = silent_seconds
        self._rounds = Rounds(
            self.round,
            seconds=look_seconds,
            complaint="automatic top-ups were not looked for",
            expected=(*EXPECTED, StripeError),
        )

    def start(self) -> None:
        """Begin; the first look comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. An attempt that is under way is gone on with by another process, or by this one's successor."""
        await self._rounds.stop()

    async def round(self) -> None:
        """Open what is due, go on with what is open, and send links. Raises LedgerError."""
        if self._opens:
            due = await self._ledger.due(livemode=self._api.livemode, limit=ACCOUNTS_MAX)
            await self._each(self._attempt_for, due)
        silent = await self._ledger.claim(
            livemode=self._api.livemode, after_seconds=self._silent_seconds, limit=ACCOUNTS_MAX
        )
        await self._each(self.go_on, silent)
        refused = await self._ledger.to_link(livemode=self._api.livemode, limit=ACCOUNTS_MAX)
        await self._each(self.send_link, refused)

    async def attempt(self, account_id: UUID, pack: str) -> Applied | None:
        """Buy the account its pack, if it still is due; None: it isn't, or something stands in the way.

        Raises StripeAway where nobody knows what became of it; ``go_on`` will.
        """
        order_id = uuid4()
        opened = await self._ledger.open(
            order_id, account_id, self._offer(pack), livemode=self._api.livemode, day_max=DAY_MAX
        )
        if opened in {Opened.PACK_GONE, Opened.PACK_CHANGED, Opened.MONTHLY_MAX, Opened.TOO_OFTEN}:
            log.warning("an automatic top-up is blocked", account=str(account_id), pack=pack, reason=opened.value)
            self._metrics.auto_topup("blocked")
        if opened is not Opened.DONE:
            return None
        return await self._request(await self._orders.find(order_id))

    async def go_on(self, order: Order) -> Applied:
        """Learn what became of an attempt, and ask for its payment again where Stripe never heard of it.

        Raises StripeAway and StripeRefused where that can't be said; it stays open, and counts as spent.
        """
        age_seconds = await self._ledger.age_seconds(order.id)
        try:
            found = await self._existing(order)
        except StripeUnknown:
            # Its payment was made, and our key is of another Stripe account now: there it may still succeed.
            if age_seconds < ON_ITS_WAY_SECONDS:
                raise
            return await self._never_heard_of(order)
        if found is not None:
            return await self._took(order, found)
        # Once its time is over nobody asks for it any more, and it was never made.
        return await (self._request(order) if age_seconds < KEY_SECONDS else self._never_heard_of(order))

    async def send_link(self, failed: Order) -> None:
        """The bank wants its customer: they are sent to a checkout, in place of a payment that can't be made then."""
        if failed.payment_intent is not None:
            intent = await cancel_payment(self._api, failed.payment_intent)
            if intent.status != "canceled":
                # Paid by some other way, or about to be: then there is nothing to pay.
                await self._till.apply_intent(intent)
                return
        try:
            link = await self._instead.checkout_instead(failed)
        except StripeRefused as refused:
            log.error("no checkout for a refused automatic top-up", order_id=str(failed.id), reason=str(refused))
            await self._ledger.linked(failed, None)
            return
        await self._ledger.linked(failed, link.id)

    async def _existing(self, order: Order) -> PaymentIntent | None:
        """What was made of the attempt; None where nothing is found. Raises StripeUnknown where something was."""
        if order.payment_intent is not None:
            return await self._api.payment_intent(order.payment_intent)
        try:
            return await find_payment(self._api, order)
        except StripeUnknown as unknown:
            # A customer who was deleted has nothing to charge; of one who has paid before, the same key brings the same
            # payment again, and otherwise the till finds it by its metadata.
            log.warning("the customer of an automatic top-up is gone", order_id=str(order.id), reason=str(unknown))
            return None

    async def _never_heard_of(self, order: Order) -> Applied:
        log.error("an automatic top-up was never heard of", order_id=str(order.id), account=str(order.account_id))
        return await self._failed(order, "no_answer", None)

    async def _request(self, order: Order) -> Applied:
        try:
            intent = await request_payment(self._api, order)
        except StripeRefused as refused:
            return await self._refused(order, refused)
        return await self._took(order, intent)

    async def _refused(self, order: Order, refused: StripeRefused) -> Applied:
        if refused.payment_intent is not None:
            return await self._took(order, await self._api.payment_intent(refused.payment_intent))
        if refused.status in _OPERATOR_STATUSES or refused.code == "idempotency_error":
            raise refused
        gone = refused.code == "resource_missing" and refused.param in {"payment_method", "customer"}
        problem = "payment_method_gone" if gone else (refused.decline_code or refused.code or "refused")
        log.warning("an automatic top-up was refused", order_id=str(order.id), reason=str(refused))
        return await self._failed(order, problem, None)

    async def _took(self, order: Order, intent: PaymentIntent) -> Applied:
        """Do what the attempt's PaymentIntent says."""
        if intent.status in {"requires_action", "requires_confirmation"}:
            return await self._failed(order, AUTHENTICATION, intent.id)
        applied = await self._till.apply_intent(intent)
        if applied.outcome == "dismissed":
            # An operator has looked at what came in, and decided that it buys nothing.
            await self._orders.advance(order.id, "canceled", payment_intent=intent.id, problem="dismissed")
        if applied.outcome == "failed" and intent.status == "requires_payment_method":
            await self._called_off(intent)
        self._metrics.auto_topup(_COUNTED.get(applied.outcome, "unresolved"))
        return applied

    async def _failed(self, order: Order, problem: str, payment_intent: str | None) -> Applied:
        state = await self._orders.advance(order.id, "failed", payment_intent=payment_intent, problem=problem)
        self._metrics.auto_topup("failed")
        return Applied(state or "failed", order.id, problem)

    async def _called_off(self, intent: PaymentIntent) -> None:
        """A declined payment is of no use to anybody; whether this succeeds matters to nobody."""
        try:
            await cancel_payment(self._api, intent.id)
        except StripeError as error:
            log.info("a declined payment was not canceled", payment=intent.id, reason=str(error))

    async def _attempt_for(self, due: tuple[UUID, str]) -> None:
        await self.attempt(*due)

    async def _each(self, step: Callable[[Item], Awaitable[object]], items: Sequence[Item]) -> None:
        """The step for each of them, a few at once; one account's trouble with Stripe is not another's."""
        places = asyncio.Semaphore(AT_ONCE)

        async def in_turn(item: Item) -> None:
            async with places:
                try:
                    await step(item)
                except StripeAway as away:
                    self._metrics.auto_topup("unresolved")
                    log.warning("Stripe gave no answer to an automatic top-up", reason=str(away))
                except StripeRefused as refused:
                    self._metrics.auto_topup("unresolved")
                    log.error("Stripe refuses automatic top-ups", reason=str(refused))

        ended = await asyncio.gather(*map(in_turn, items), return_exceptions=True)
        for failure in ended:
            if isinstance(failure, BaseException):
                raise failure


_COUNTED = {"paid": "paid", "known": "paid", "credited": "paid", "pending": "pending", "failed": "failed"}
_COUNTED |= {"canceled": "failed", "dismissed": "failed"}
