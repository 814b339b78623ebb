"""What buyers, banks and operators do, each up to the moment in which a process dies of it, and afterwards.

A *story* has three parts: what comes before, by a process that lives; the part in which the doomed one dies; and what
people do when it has been started again. Whatever is asked of a process is asked again until it has answered or died,
as people and Stripe do.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from tests.fakes.stripe import Behaviour
from tests.fakes.stripe.shapes import Object
from tests.faults.money_in.shop import Buyer, Shop
from tests.faults.nursery import Process
from tests.faults.points import Point

__all__ = ["RECONCILE", "STORIES", "Round", "Story"]

RECONCILE = ("stripe", "reconcile", "--since", "72h", "--json")
REFUNDS = ("refunds_seconds", "refunds_age_seconds")
TOPUPS = ("auto_topup_seconds", "topups_silent_seconds")
TRIES = 25
TRY_AGAIN_SECONDS = 0.1
DEATH_SECONDS_MAX = 45.0
STORMY_SECONDS_MAX = 15.0
"""Where Stripe has troubles of its own, a process may never get to its point."""


@dataclass
class Round:
    """One death. ``lost``: what Stripe tells meanwhile never arrives; only the reconciliation finds it."""

    point: Point
    buyer: Buyer
    random: random.Random
    lost: bool
    word: str = field(default_factory=lambda: str(uuid4()))
    order: str = ""
    session: str = ""
    intent: str = ""
    refund: str = ""
    dispute: str = ""
    terms: list[str] = field(default_factory=list)
    """Of the refund that the operator asks for."""
    heard: set[str] = field(default_factory=set)
    """The events that were delivered before."""
    doomed: Process | None = None

    def unheard(self, shop: Shop) -> list[Object]:
        return [event for event in shop.events_of(self.buyer) if event["id"] not in self.heard]


Part = Callable[[Shop, Round, Process], Awaitable[None]]
"""The process that lives: the one before, or the one after."""
Death = Callable[[Shop, Round], Awaitable[Process]]


async def nothing(shop: Shop, round: Round, process: Process) -> None:
    """Nobody does anything."""


@dataclass(frozen=True)
class Story:
    """``alone``: the doomed process finds by itself what it dies of, so that no other may die at the same time.
    ``unheard``: some of what Stripe told is lost already, before the death."""

    before: Part
    death: Death
    after: Part = nothing
    alone: bool = False
    unheard: bool = False


# What people do.


async def check_out(shop: Shop, round: Round, process: Process) -> bool:
    """The buyer asks for a pack, under one word however often; whether they were given somewhere to pay."""
    body = {"pack": "ten", "save_payment_method": True}
    for _ in range(TRIES):
        if not process.alive:
            break
        answer = await shop.ask(
            process, round.buyer, "POST", "/v1/billing/checkout", body, **{"idempotency-key": round.word}
        )
        if answer is not None and answer.is_success:
            found = answer.json()
            assert not round.order or round.order == found["id"], "another order under the same word"
            round.order = found["id"]
            round.session = found["url"].rpartition("/")[2]
            return True
        if answer is not None:
            assert answer.status_code in (409, 429) or answer.status_code >= 500, answer.text
        await asyncio.sleep(TRY_AGAIN_SECONDS)
    return False


async def hear(shop: Shop, round: Round, process: Process) -> None:
    """All that Stripe has told so far reaches that process."""
    events = round.unheard(shop)
    wrongs = await shop.deliver(process, events, round.random)
    assert not wrongs, f"{wrongs}: {process.errors[-2000:]}"
    round.heard |= {event["id"] for event in events}


async def ordered(shop: Shop, round: Round, process: Process) -> None:
    """Asked for, and not paid yet."""
    assert await check_out(shop, round, process), process.errors[-2000:]


async def paid(shop: Shop, round: Round, process: Process, *, saves: Behaviour = "succeed") -> None:
    """Asked for and paid; nobody here has heard of it. ``saves``: what comes of later payments by the same card."""
    assert await check_out(shop, round, process), process.errors[-2000:]
    intent = shop.fake.checkout.pay(round.session, tax=round.random.choice((0, 190)), saves=saves)
    assert intent is not None
    round.intent = intent


async def bought(shop: Shop, round: Round, process: Process) -> None:
    """Paid, and credited."""
    await paid(shop, round, process)
    await hear(shop, round, process)


async def paid_late(shop: Shop, round: Round, process: Process) -> None:
    """By a method that takes days, which are over: what came first was heard."""
    await ordered(shop, round, process)
    round.intent = shop.fake.checkout.pay_later(round.session)
    await hear(shop, round, process)
    shop.fake.checkout.settle(round.session)


async def failed_late(shop: Shop, round: Round, process: Process) -> None:
    """By a method that took days, and brought nothing."""
    await ordered(shop, round, process)
    round.intent = shop.fake.checkout.pay_later(round.session)
    await hear(shop, round, process)
    shop.fake.checkout.settle(round.session, succeed=False)


async def gave_up(shop: Shop, round: Round, process: Process) -> None:
    """Nobody came to pay in time."""
    await ordered(shop, round, process)
    with shop.fake.state.lock:
        shop.fake.checkout._expired(shop.fake.state.find(round.session))


async def refunded(shop: Shop, round: Round, process: Process) -> None:
    """Bought; then somebody refunds a part of it, or all, at Stripe's dashboard, maybe in two goes."""
    await bought(shop, round, process)
    whole = shop.fake.object(round.intent)["amount"]
    first = round.random.randint(1, whole - 1)
    for amount in round.random.choice(([first], [whole], [first, whole - first])):
        round.refund = shop.fake.refunds.create(round.intent, amount)["id"]


async def refund_failed(shop: Shop, round: Round, process: Process) -> None:
    """Refunded, and heard of; then the bank sends it back."""
    await bought(shop, round, process)
    round.refund = shop.fake.refunds.create(round.intent, round.random.choice((None, 333)), beginning="pending")["id"]
    await hear(shop, round, process)
    shop.fake.refunds.settle(round.refund, "failed")


async def disputed(shop: Shop, round: Round, process: Process) -> None:
    """Bought; then the buyer's bank takes the money back."""
    await bought(shop, round, process)
    round.dispute = shop.fake.disputes.open(round.intent)


async def dispute_won(shop: Shop, round: Round, process: Process) -> None:
    """Disputed, and heard of; then the money comes back."""
    await disputed(shop, round, process)
    await hear(shop, round, process)
    shop.fake.disputes.move(round.dispute, "under_review")
    shop.fake.disputes.move(round.dispute, "won")


async def inquiry_lost(shop: Shop, round: Round, process: Process) -> None:
    """A bank asks, which takes nothing; then it takes the money, and keeps it."""
    await bought(shop, round, process)
    round.dispute = shop.fake.disputes.open(round.intent, inquiry=True)
    await hear(shop, round, process)
    shop.fake.disputes.move(round.dispute, "needs_response")
    shop.fake.disputes.move(round.dispute, "lost")


async def frozen_for_once(shop: Shop, round: Round, process: Process) -> None:
    """The operator freezes the account, which is told, and thinks better of it."""
    await shop.operations.freeze(round.buyer.id, reason="test", actor="test")
    await shop.operations.unfreeze(round.buyer.id, actor="test")


async def granted_for_a_while(shop: Shop, round: Round, process: Process) -> None:
    """Bought, and given more than that, which ends in a moment."""
    await bought(shop, round, process)
    for number, seconds in enumerate((0.5, 3_600.0)):
        await shop.operations.grant(
            round.buyer.id,
            1_000_003,
            reference=f"{round.word}-{number}",
            actor="test",
            kind="promo",
            expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
        )
    await asyncio.sleep(0.5)


def refunded_by_command(left_at: str | None = None) -> Part:
    """Bought; then the operator asks for a refund by a command, which died at that point."""

    async def part(shop: Shop, round: Round, process: Process) -> None:
        await bought(shop, round, process)
        round.terms = round.random.choice(([], ["--amount", "3.33"], ["--all-left"]))
        if left_at is not None:
            await dead(await shop.run(f"{round.point.label}.victim", refund_of(round), at=left_at))

    return part


def refund_of(round: Round) -> list[str]:
    """The operator's command, under a name of theirs, so that it may be said again."""
    return ["refund", round.order, *round.terms, "--ref", round.word, "--json"]


async def not_to_be_refunded(shop: Shop, round: Round, process: Process) -> None:
    """Bought, and disputed, which nobody has heard of: Stripe will refuse a refund."""
    await bought(shop, round, process)
    round.dispute = shop.fake.disputes.open(round.intent)


def wants_more(behaviour: Behaviour = "succeed", left_at: str | None = None) -> Part:
    """Bought; then the account is to buy by itself what it needs, by a card of which that comes. Whoever was at it
    first has died at that point."""

    async def part(shop: Shop, round: Round, process: Process) -> None:
        await paid(shop, round, process, saves=behaviour)
        await hear(shop, round, process)
        wish = {"pack": "ten", "threshold": "15", "monthly_max": "100"}
        answer = await shop.ask(process, round.buyer, "PUT", "/v1/billing/auto_topup", wish)
        assert answer is not None, process.errors[-2000:]
        assert answer.is_success, answer.text
        if left_at is not None:
            await dead(await shop.serve(f"{round.point.label}.victim", at=left_at, swift=TOPUPS))

    return part


async def left_unprocessed(shop: Shop, round: Round, process: Process) -> None:
    """Paid, and told to a process that died before it had done anything about it."""
    await paid(shop, round, process)
    victim = await shop.serve(f"{round.point.label}.victim", at="webhook.event_written")
    await shop.deliver(victim, round.unheard(shop), round.random)
    await dead(victim)
    await shop.time_passes()


async def paid_unheard(shop: Shop, round: Round, process: Process) -> None:
    """Paid; and whatever Stripe told of it, it tells no more."""
    await paid(shop, round, process)
    shop.lose(round.unheard(shop))


async def returned_unheard(shop: Shop, round: Round, process: Process) -> None:
    """Bought, refunded in part and disputed; and whatever Stripe told of that, it tells no more."""
    await bought(shop, round, process)
    shop.fake.refunds.create(round.intent, 100)
    round.dispute = shop.fake.disputes.open(round.intent, 200)
    shop.lose(round.unheard(shop))


# The ways to die.


async def dead(process: Process, seconds: float = DEATH_SECONDS_MAX) -> Process:
    """Once it is; it may also live on, which is for the round to find wrong."""
    try:
        await process.ended(seconds)
    except TimeoutError:
        await process.kill()
    return process


async def by_checking_out(shop: Shop, round: Round) -> Process:
    doomed = round.doomed = await shop.serve(round.point.label, at=round.point.label)
    await doomed.url()
    await check_out(shop, round, doomed)
    return await dead(doomed)


async def by_hearing(shop: Shop, round: Round) -> Process:
    """Of an event that is posted to it."""
    doomed = round.doomed = await shop.serve(round.point.label, at=round.point.label)
    await doomed.url()
    await shop.deliver(doomed, round.unheard(shop), round.random, at_once=round.random.choice((1, 3)))
    return await dead(doomed)


def by_itself(*loops: str) -> Death:
    """Of what its loops find."""

    async def death(shop: Shop, round: Round) -> Process:
        doomed = round.doomed = await shop.serve(round.point.label, at=round.point.label, swift=loops)
        return await dead(doomed, STORMY_SECONDS_MAX if shop.fake.faults.hit else DEATH_SECONDS_MAX)

    return death


async def by_refunding(shop: Shop, round: Round) -> Process:
    """The operator's command dies."""
    round.doomed = await shop.run(round.point.label, refund_of(round), at=round.point.label)
    return await dead(round.doomed)


async def by_reconciling(shop: Shop, round: Round) -> Process:
    """The reconciliation dies midway."""
    round.doomed = await shop.run(round.point.label, RECONCILE, at=round.point.label)
    return await dead(round.doomed)


# What happens afterwards.


async def refunds_again(shop: Shop, round: Round, process: Process) -> None:
    """The operator says the same again, or leaves it to whoever finds what is under way."""
    if round.random.random() < 0.5:
        again = await shop.run(f"{round.point.label}.again", refund_of(round))
        await again.ended()


async def asks_again(shop: Shop, round: Round, process: Process) -> None:
    """The buyer, whose browser had no answer, asks again under the same word, and pays; one in four goes away."""
    if round.random.random() < 0.75:
        await paid(shop, round, process)


STORIES: Mapping[str, Story] = {
    "checkout": Story(nothing, by_checking_out, asks_again),
    "paid": Story(paid, by_hearing),
    "paid_late": Story(paid_late, by_hearing),
    "failed_late": Story(failed_late, by_hearing),
    "gave_up": Story(gave_up, by_hearing),
    "refunded": Story(refunded, by_hearing),
    "refund_failed": Story(refund_failed, by_hearing),
    "disputed": Story(disputed, by_hearing),
    "dispute_won": Story(dispute_won, by_hearing),
    "inquiry_lost": Story(inquiry_lost, by_hearing),
    "refund": Story(refunded_by_command(), by_refunding, refunds_again),
    "refund_refused": Story(not_to_be_refunded, by_refunding, refunds_again),
    "refund_left": Story(refunded_by_command("refund.asked"), by_itself(*REFUNDS), alone=True),
    "topup": Story(wants_more(), by_itself(*TOPUPS), alone=True),
    "topup_left": Story(wants_more(left_at="topup.asked"), by_itself(*TOPUPS), alone=True),
    "topup_declined": Story(wants_more("decline"), by_itself(*TOPUPS), alone=True),
    "topup_unauthenticated": Story(wants_more("authentication_required"), by_itself(*TOPUPS), alone=True),
    "unprocessed": Story(left_unprocessed, by_itself("events_seconds"), alone=True),
    "missed_payment": Story(paid_unheard, by_reconciling, alone=True, unheard=True),
    "missed_returns": Story(returned_unheard, by_reconciling, alone=True, unheard=True),
    "expiring": Story(granted_for_a_while, by_itself("lots_seconds"), alone=True),
    "told": Story(frozen_for_once, by_itself("messages_seconds"), alone=True),
}
