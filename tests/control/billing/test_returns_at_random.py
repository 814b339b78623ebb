"""Refunds, disputes, our own requests, spending, grants and reversals on one account, all at once and in any order.

At the end each order has given up exactly what its refunds and disputes come to, and no credit is lost.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from proxy.control.billing.errors import StripeError
from proxy.control.billing.refunding import Refunder, RefundTerms
from proxy.core.errors import Refusal
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.orders import Order
from proxy.ledger.records import ReserveOutcome
from tests.control.billing.counter import Counter
from tests.fakes.stripe import ErrorAfter, ErrorBefore, LostReply, LostRequest, RateLimited, Unavailable

STEPS = 60
AT_ONCE = 8
FAULTS = (LostReply(), LostRequest(), Unavailable(), RateLimited(), ErrorAfter(), ErrorBefore())


class Market:
    """Two orders of one account, and what may happen to them."""

    def __init__(self, counter: Counter, orders: list[tuple[Order, str]], chance: random.Random) -> None:
        self.counter, self.orders, self.chance = counter, orders, chance
        self.stripe = counter.desk.stripe
        self.refunder = Refunder(counter.desk.orders, counter.ledger, counter.refunds, livemode=False)
        self.refunds: list[str] = []
        self.disputes: list[str] = []
        self.granted = 0
        self.charged = 0

    async def step(self) -> None:
        act = self.chance.choice(
            [self.dashboard, self.dashboard, self.fail, self.ask, self.dispute, self.decide, self.spend, self.give]
        )
        with suppress(Refusal, StripeError, LedgerUnavailable):
            await act()

    async def told(self) -> None:
        """Some webhooks, of anything that there is, with duplicates."""
        hints: list[Callable[[], Awaitable[object]]] = []
        for refund in self.chance.sample(self.refunds, min(2, len(self.refunds))):
            hints.append(lambda refund=refund: self.counter.refunds.apply(refund))  # type: ignore[misc]
        for dispute in self.disputes:
            hints.append(lambda dispute=dispute: self.counter.disputes.apply(dispute))  # type: ignore[misc]
        for hint in hints:
            with suppress(StripeError, LedgerUnavailable):
                await hint()

    def _status(self, name: str) -> str:
        return str(self.stripe.object(name)["status"])

    async def dashboard(self) -> None:
        _, intent = self.chance.choice(self.orders)
        with suppress(Exception):  # Stripe refuses: too much, or disputed
            beginning = self.chance.choice(("succeeded", "pending"))
            self.stripe.refunds.create(intent, self.chance.randint(1, 400), beginning=beginning)  # type: ignore[arg-type]
        self._look()
        await self.told()

    def _look(self) -> None:
        intents = [intent for _, intent in self.orders]
        with self.stripe.state.lock:
            self.refunds = [one["id"] for one in self.stripe.state.all("refund") if one["payment_intent"] in intents]

    async def fail(self) -> None:
        self._look()
        alive = [refund for refund in self.refunds if self._status(refund) not in ("failed", "canceled")]
        if alive:
            self.stripe.refunds.settle(self.chance.choice(alive), self.chance.choice(("failed", "succeeded")))
        await self.told()

    async def ask(self) -> None:
        order, _ = self.chance.choice(self.orders)
        terms = RefundTerms(actor="ann", amount=self.chance.choice((None, self.chance.randint(1, 300))), all_left=False)
        await self.refunder.refund(order, terms)

    async def dispute(self) -> None:
        if len(self.disputes) < 2:
            _, intent = self.chance.choice(self.orders)
            self.disputes.append(self.stripe.disputes.open(intent, self.chance.choice((None, 333))))
        await self.told()

    async def decide(self) -> None:
        for dispute in self.disputes:
            self.stripe.disputes.move(dispute, self.chance.choice(("under_review", "won", "lost")))
        await self.told()

    async def spend(self) -> None:
        bank, account_id = self.counter.desk.bank, self.orders[0][0].account_id
        await bank.control.unfreeze(account_id, reference=None, actor="ann")
        key = await bank.open_key(account_id)
        row, reserved = await bank.reserve(key, self.chance.randint(1, 300), 1)
        if reserved.outcome is ReserveOutcome.GRANTED:
            await self.told()
            charge = self.chance.randint(0, reserved.granted + 20)
            await bank.finalize(row, charge)
            self.charged += charge
            if charge and self.chance.random() < 0.3:
                await bank.control.reverse(row.hold_id, charge, reference=str(row.hold_id), actor="ann", reason=None)
                self.charged -= charge

    async def give(self) -> None:
        amount, reference = self.chance.randint(1, 200), f"{self.orders[0][0].id}:{self.chance.random()}"
        await self.counter.desk.bank.control.grant(
            self.orders[0][0].account_id, amount, reference=reference, actor="ann"
        )
        self.granted += amount


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_at_once_sums_decide(counter: Counter, seed: int) -> None:
    first, intent = await counter.sold(credits=997, price=1000, bonus=101, tax=seed * 19)
    second, other = await counter.sold(account_id=first.account_id, credits=501, price=499)
    market = Market(counter, [(first, intent), (second, other)], random.Random(seed))
    counter.desk.stripe.faults.seeded(seed, 0.1, FAULTS)
    for _ in range(0, STEPS, AT_ONCE):
        await asyncio.gather(*(market.step() for _ in range(AT_ONCE)))
    counter.desk.stripe.faults.clear()

    # All that there is is heard of in the end, and keys are forgotten.
    counter.desk.stripe.clock.advance(25 * 3600)
    mine = [request for request in await counter.ledger.held(limit=1000) if request.account_id == first.account_id]
    assert not (await counter.refunds.carry_on(mine)).waiting
    market._look()
    for refund in market.refunds:
        await counter.refunds.apply(refund)
    for dispute in market.disputes:
        await counter.disputes.apply(dispute)
    gone = 0
    for order, payment in market.orders:
        expected = oracle(counter, order, payment)
        taken, bonus_taken = await counter.taken(order)
        assert taken == expected[0]
        assert bonus_taken <= expected[1]
        gone += taken + bonus_taken
    balance, held, debt = await counter.money(first)
    assert held == 0
    assert balance - debt == 997 + 101 + 501 + market.granted - market.charged - gone
    await counter.audit()


def oracle(counter: Counter, order: Order, payment: str) -> tuple[int, int]:
    """What the refunds and disputes of the order come to, by what Stripe has of them and nothing else."""
    with counter.desk.stripe.state.lock:
        refunds = [
            one["amount"]
            for one in counter.desk.stripe.state.all("refund")
            if one["payment_intent"] == payment and one["status"] not in ("failed", "canceled")
        ]
        disputes = [
            one["amount"]
            for one in counter.desk.stripe.state.all("dispute")
            if one["payment_intent"] == payment and sum(moved["amount"] for moved in one["balance_transactions"]) < 0
        ]
    assert order.received is not None
    back = min(order.received, sum(refunds) + sum(disputes))
    return order.credits * back // order.received, order.bonus * back // order.received
