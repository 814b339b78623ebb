"""Lives of purchases: what happens at Stripe, and the webhooks of it in whatever order, number and haste.

A life has steps, each after those that it needs: paid by a bank in days, two refunds of parts, one of them failing
later, a dispute with its phases. Its webhooks are delivered in an order of the plan's; the steps that one needs are
taken just before, so that what Farebox fetches is Stripe's state of that moment, and not of the end. After each
delivery (``one_by_one``), or at the end (``at_once``, ``held_up``), the ledger is held against
``tests/fakes/till_oracle.py``.
"""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import factorial
from typing import Any

from proxy.control.billing.event_types import EVENT_TYPES
from proxy.ledger.orders import Order
from proxy.ledger.records import ApiKey, Reserve, ReserveOutcome
from tests.control.billing.lives_scene import Scene
from tests.fakes.stripe import Delay, FakeStripe, Hold, LostReply, LostRequest, Object, RateLimited, Unavailable
from tests.fakes.till_oracle import Known, Sold, books

__all__ = [
    "KINDS",
    "MANNERS",
    "ORDERS",
    "Manner",
    "Plan",
    "at_once",
    "held_up",
    "lived",
    "one_by_one",
    "order_of",
    "plan_of",
    "troubled",
]

SLOTS = ("completed", "async", "intent", "refund 1", "refund 2", "refund failed", "disputed")
"""What may come in any order: each of its orders is a number below ORDERS."""
LATER = ("withdrawn", "closed")
"""The dispute's further phases, anywhere among them."""
ORDERS = factorial(len(SLOTS))
KINDS = ("card", "bank_failed", "expired", "free", "declined", "auto")
"""Lives beside the one of a payment by bank."""
DISPUTES = ("won", "lost", "at_once_won", "inquiry", "inquiry_lost", "inquiry_won")
TRIES_MAX = 40
LIVES_AT_ONCE = 6
TROUBLES = (Delay(0.02, after=True), Delay(0.01), Unavailable(), LostReply(), LostRequest(), RateLimited())
"""What may happen to a fetch. An answer that comes late says what was, and not what is."""
TROUBLE = 0.15


@dataclass(frozen=True)
class Plan:
    """One life, and what its webhooks are to go through."""

    number: int
    kind: str
    order: tuple[str, ...]
    dispute: str
    credits: int
    bonus: int
    price: int
    discount: int
    tax: int
    refunds: tuple[int, int]
    failing: int
    disputed: int | None
    """What of it is disputed; None: all."""
    spend: tuple[int, int, int]
    """From which delivery to which a call runs, and what it costs."""
    random: random.Random


def order_of(number: int, slots: Sequence[str] = SLOTS) -> list[str]:
    """The number-th of all orders of the slots."""
    left, found = list(slots), []
    for remaining in range(len(left), 0, -1):
        index, number = divmod(number, factorial(remaining - 1))
        found.append(left.pop(index))
    return found


def plan_of(number: int, seed: str) -> Plan:
    """Below ORDERS: the life of a payment by bank, in the number-th order. From there on: the others, by turns. All
    else follows from the number and the seed."""
    chance = random.Random(f"{seed}:{number}")
    kind = "bank" if number < ORDERS else KINDS[number % len(KINDS)]
    order = order_of(number) if kind == "bank" else order_of(chance.randrange(ORDERS))
    for slot in LATER:
        order.insert(chance.randint(0, len(order)), slot)
    price = chance.choice([500, 999, 1_000, 10_007])
    discount = price if kind == "free" else chance.choice([0, 0, price // 7])
    begin = chance.randrange(len(order))
    return Plan(
        number=number,
        kind=kind,
        order=tuple(order),
        dispute=DISPUTES[number % len(DISPUTES)],
        credits=chance.choice([1_000, 1_003, 7, 1_000_000_007]),
        bonus=chance.choice([0, 0, 101]),
        price=price,
        discount=discount,
        tax=0 if kind in ("free", "auto") else chance.choice([0, 19, price // 5]),
        refunds=(chance.randint(1, price // 3), chance.randint(1, price // 3)),
        failing=chance.randrange(2),
        disputed=chance.choice([None, None, price // 2]),
        spend=(begin, chance.randint(begin, len(order)), chance.choice([0, 3, 900, 500_000_000])),
        random=chance,
    )


@dataclass
class Life:
    """A plan under way. ``known``: what Farebox has fetched by now, as far as the deliveries tell."""

    plan: Plan
    scene: Scene
    order: Order
    key: ApiKey
    session: str = ""
    intent: str = ""
    refunds: list[str] = field(default_factory=list)
    dispute: str = ""
    done: dict[str, list[Object]] = field(default_factory=dict)
    """Steps that were taken, and the events of each."""
    delivered: set[str] = field(default_factory=set)
    known: Known = field(default_factory=Known)
    spent: int = 0
    taking: bool = False
    """Whether a refund or a dispute may have been heard of, though nobody has learned yet that it was."""
    hold: Reserve | None = None

    def step(self, slot: str) -> list[Object]:
        """Take the step that this slot's webhook tells of, and those that it needs; what of its events are told."""
        name, types = _told_of(self.plan.kind)[slot]
        self._take(name)
        return [event for event in self.done[name] if event["type"] in types]

    def finish(self) -> list[Object]:
        """Take all steps; all events, whether they were delivered or not."""
        for slot in self.plan.order:
            if slot in _told_of(self.plan.kind):
                self.step(slot)
        return [event for events in self.done.values() for event in events]

    def _take(self, name: str) -> None:
        if name in self.done:
            return
        for needed in _needs(self.plan)[name]:
            self._take(needed)
        stripe = self.scene.stripe
        before = len(stripe.events)
        _STEPS[name](self)
        mine = {self.session, self.intent, self.dispute, *self.refunds}
        self.done[name] = [
            event
            for event in stripe.events[before:]
            if event["type"] in EVENT_TYPES and event["data"]["object"]["id"] in mine
        ]

    def learn(self, event: Object) -> None:
        """Farebox has fetched what this event is about, as it is now."""
        about: Object = event["data"]["object"]
        if about["object"] == "refund":
            self._learn_payment()
            self.known = self.known.with_refund(self.scene.stripe.object(about["id"]))
        elif about["object"] == "dispute":
            self._learn_payment()
            self.known = self.known.with_dispute(self.scene.stripe.object(about["id"]))
        else:
            self._learn_payment()

    def learn_all(self) -> None:
        """Farebox knows all that there is."""
        for events in self.done.values():
            for event in events:
                self.learn(event)

    def _learn_payment(self) -> None:
        stripe = self.scene.stripe
        if self.session:
            session = stripe.object(self.session)
            none: Object = {"status": "", "amount_received": 0}
            intent = stripe.object(self.intent) if self.intent else none
            state = _state(session["status"], session["payment_status"], intent["status"])
            self.known = self.known.with_payment(state, intent["amount_received"])
        elif self.intent:
            intent = stripe.object(self.intent)
            state = {"succeeded": "paid", "processing": "pending"}.get(intent["status"], "failed")
            self.known = self.known.with_payment(state, intent["amount_received"])

    async def spend(self, place: int) -> None:
        """A call begins, or ends, before the place-th delivery."""
        begin, end, cost = self.plan.spend
        bank = self.scene.bank
        # A refund takes what is left of the bonus: how much depends on what came first, and that isn't this test's.
        heard = self.taking or self.known.refunds or self.known.disputes
        late = self.plan.bonus and (heard or begin != end)
        if place == begin and cost and not late:
            row, found = await bank.reserve(self.key, cost)
            self.hold = row if found.outcome is ReserveOutcome.GRANTED else None
        if place >= end and self.hold is not None:
            await bank.finalize(self.hold, cost)
            self.hold, self.spent = None, self.spent + cost

    async def wrongs(self) -> list[str]:
        """What the ledger says otherwise than the oracle."""
        sold = Sold(self.plan.credits, self.plan.bonus, self.spent)
        expected, found = books(sold, self.known), await self.scene.books(self.order.id)
        if found == expected:
            return []
        return [f"life {self.plan.number} ({self.plan.kind}, {self.plan.dispute}): {found}, expected {expected}"]


Manner = Callable[[Scene, Plan], Awaitable[list[str]]]


async def lived(scene: Scene, manner: Manner, numbers: Iterable[int], *, seed: int = 0) -> list[str]:
    """Live these lives, some of them beside one another. What is wrong with them."""
    places = asyncio.Semaphore(LIVES_AT_ONCE)

    async def one(number: int) -> list[str]:
        async with places:
            return await manner(scene, plan_of(number, f"{manner.__name__}:{seed}"))

    return [wrong for wrongs in await asyncio.gather(*map(one, numbers)) for wrong in wrongs]


def troubled(stripe: FakeStripe, seed: int) -> None:
    """From now on fetches take long, or come to nothing, now and then."""
    stripe.faults.seeded(seed, TROUBLE, TROUBLES, pattern="GET *")


async def one_by_one(scene: Scene, plan: Plan) -> list[str]:
    """A webhook after the other, now and then two copies at once or an old one again, and the oracle asked after each.
    What is wrong."""
    life = await _begun(scene, plan)
    told = _told_of(plan.kind)
    for place, slot in enumerate(slot for slot in plan.order if slot in told):
        await life.spend(place)
        for event in life.step(slot):
            wrongs = await _deliver(life, event, copies=plan.random.choice([1, 1, 2]))
            if plan.random.random() < 0.2:
                again = plan.random.choice([one for events in life.done.values() for one in events])
                wrongs += await _deliver(life, again)
            if wrongs := wrongs + await life.wrongs():
                return wrongs
    await life.spend(len(plan.order))
    for event in life.finish():
        if event["id"] not in life.delivered and (wrongs := await _deliver(life, event)):
            return wrongs
    life.learn_all()
    return await life.wrongs()


async def at_once(scene: Scene, plan: Plan) -> list[str]:
    """Some webhooks one by one, then all others in two copies, eight at a time, while Stripe goes on; those that aren't
    taken come again. What is wrong at the end."""
    life = await _begun(scene, plan)
    told = _told_of(plan.kind)
    order = [slot for slot in plan.order if slot in told]
    split = plan.random.randint(0, 4)
    places = asyncio.Semaphore(8)

    async def send(event: Object) -> None:
        for attempt in range(TRIES_MAX):
            async with places:
                if all(one.ok for one in await scene.stripe.deliver(event)):
                    return
            await asyncio.sleep(0.005 * attempt)
        raise AssertionError(f"{event['type']} was not taken in {TRIES_MAX} attempts")

    async with asyncio.TaskGroup() as group:
        for place, slot in enumerate(order):
            await life.spend(place)
            for event in life.step(slot):
                if place < split:
                    await send(event)
                    life.learn(event)
                else:
                    life.taking = life.taking or event["type"].startswith(("refund.", "charge.dispute."))
                    group.create_task(send(event))
                    group.create_task(send(event))
            await asyncio.sleep(plan.random.choice([0, 0, 0.002, 0.01]))
        await life.spend(len(plan.order))
        for event in life.finish():
            group.create_task(send(event))
    life.learn_all()
    return await life.wrongs()


async def held_up(scene: Scene, plan: Plan) -> list[str]:
    """One webhook after the other; but what one of them fetched arrives only when all others are done: by then it is
    an old story. What is wrong at the end."""
    life = await _begun(scene, plan)
    told = _told_of(plan.kind)
    order = [slot for slot in plan.order if slot in told]
    if plan.kind == "bank_failed":
        # Here the one thing that can be overtaken is that the money may still come.
        order.sort(key=lambda slot: slot != "completed")
    late = order.index(plan.random.choice(_soon_old(plan, order) or order))
    hold, on_its_way = Hold(threading.Event(), after=True), None
    for place, slot in enumerate(order):
        for event in life.step(slot):
            if place != late or on_its_way is not None:
                if wrongs := await _deliver(life, event):
                    return wrongs
                continue
            scene.stripe.faults.on(_fetch_of(event), hold)
            on_its_way = asyncio.ensure_future(_deliver(life, event))
            assert await asyncio.to_thread(hold.reached.wait, 60), f"{event['type']} was not fetched"
    for event in life.finish():
        if event["id"] not in life.delivered:
            life.delivered.add(event["id"])
            await scene.stripe.deliver(event)
    hold.until.set()
    assert on_its_way is not None
    wrongs = await on_its_way
    life.learn_all()
    return wrongs + await life.wrongs()


MANNERS: Sequence[Manner] = (one_by_one, at_once, held_up)


def _soon_old(plan: Plan, order: list[str]) -> list[str]:
    """Slots whose objects change after their webhook."""
    failing = f"refund {plan.failing + 1}"
    changes = [("disputed", "withdrawn"), ("disputed", "closed"), ("withdrawn", "closed"), (failing, "refund failed")]
    found = [
        slot for slot, later in changes if slot in order and later in order and order.index(slot) < order.index(later)
    ]
    # Everything else needs the payment, and so it is done before.
    return found + ["completed"] * (order[0] == "completed" and len(order) > 1)


def _fetch_of(event: Object) -> str:
    about: Object = event["data"]["object"]
    paths = {
        "checkout.session": "checkout/sessions",
        "payment_intent": "payment_intents",
        "refund": "refunds",
        "dispute": "disputes",
    }
    return f"GET /v1/{paths[about['object']]}/{about['id']}"


async def _deliver(life: Life, event: Object, copies: int = 1) -> list[str]:
    results = await asyncio.gather(*(life.scene.stripe.deliver(event) for _ in range(copies)))
    # What was processed before isn't fetched again.
    if event["id"] not in life.delivered:
        life.learn(event)
    life.delivered.add(event["id"])
    return [f"{event['type']}: {one.status} {one.text}" for many in results for one in many if not one.ok]


async def _begun(scene: Scene, plan: Plan) -> Life:
    account, key = await scene.bank.open_account()
    order = await scene.desk.order(
        account.id,
        kind="auto" if plan.kind == "auto" else "checkout",
        credits=plan.credits,
        bonus=plan.bonus,
        price=plan.price,
        discount_max=plan.discount,
    )
    life = Life(plan, scene, order, key)
    if plan.kind != "auto":
        life.session = await scene.desk.session(order)
        await scene.desk.orders.opened(order.id, life.session, "https://checkout.stripe.com/x")
    else:
        life.intent = await scene.off_session(order)
    return life


def _state(status: str, payment_status: str, intent_status: str) -> str:
    if status == "expired":
        return "expired"
    if status == "open":
        return "open"
    if payment_status in ("paid", "no_payment_required"):
        return "paid"
    return "failed" if intent_status == "requires_payment_method" else "pending"


# What happens at Stripe.


def _pay_later(life: Life) -> None:
    checkout = life.scene.stripe.checkout
    life.intent = checkout.pay_later(life.session, tax=life.plan.tax, discount=life.plan.discount)


def _pay(life: Life) -> None:
    if life.plan.kind == "declined":
        life.scene.stripe.checkout.decline(life.session)
    found = life.scene.stripe.checkout.pay(life.session, tax=life.plan.tax, discount=life.plan.discount)
    life.intent = found or ""


def _settle(life: Life) -> None:
    if life.session:
        life.scene.stripe.checkout.settle(life.session, succeed=life.plan.kind != "bank_failed")
    else:
        life.scene.stripe.payments.settle(life.intent)


def _expire(life: Life) -> None:
    life.scene.stripe.checkout.expire(life.session)


def _refund(number: int) -> Callable[[Life], None]:
    def act(life: Life) -> None:
        made = life.scene.stripe.refunds.create(life.intent, life.plan.refunds[number], beginning="pending")
        life.refunds.append(made["id"])

    return act


def _fail_refund(life: Life) -> None:
    life.scene.stripe.refunds.settle(life.refunds[life.plan.failing], "failed")


def _dispute(life: Life) -> None:
    kind = life.plan.dispute
    life.dispute = life.scene.stripe.disputes.open(
        life.intent, life.plan.disputed, inquiry=kind.startswith("inquiry"), withdraw=kind == "at_once_won"
    )


def _withdraw(life: Life) -> None:
    disputes = life.scene.stripe.disputes
    if life.plan.dispute in ("won", "lost"):
        disputes.withdraw(life.dispute)
    elif life.plan.dispute == "at_once_won":
        disputes.move(life.dispute, "under_review")
    else:
        disputes.move(life.dispute, "warning_under_review" if life.plan.dispute == "inquiry" else "needs_response")


def _close(life: Life) -> None:
    endings: Mapping[str, Any] = {"inquiry": "warning_closed", "lost": "lost", "inquiry_lost": "lost"}
    life.scene.stripe.disputes.move(life.dispute, endings.get(life.plan.dispute, "won"))


_STEPS: Mapping[str, Callable[[Life], None]] = {
    "begun": _pay_later,
    "paid": _pay,
    "settled": _settle,
    "expired": _expire,
    "refund 1": _refund(0),
    "refund 2": _refund(1),
    "refund failed": _fail_refund,
    "disputed": _dispute,
    "withdrawn": _withdraw,
    "closed": _close,
}


def _needs(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    """Which steps come before a step. What is disputed can't be refunded any more; what is asked about can."""
    money = "paid" if plan.kind in ("card", "declined") else "settled"
    refunds = ("refund 1", "refund 2")
    return {
        "begun": (),
        "paid": (),
        "expired": (),
        "settled": () if plan.kind == "auto" else ("begun",),
        # The second after the first: what fails is one of the two by its number.
        "refund 1": (money,),
        "refund 2": ("refund 1",),
        "refund failed": (refunds[plan.failing],),
        "disputed": (money,) if plan.dispute.startswith("inquiry") else (money, *refunds),
        "withdrawn": ("disputed", *refunds),
        "closed": ("withdrawn",),
    }


_SESSION = "checkout.session."
_AFTER: Mapping[str, tuple[str, frozenset[str]]] = {
    "refund 1": ("refund 1", frozenset({"refund.created"})),
    "refund 2": ("refund 2", frozenset({"refund.created"})),
    "refund failed": ("refund failed", frozenset({"refund.failed"})),
    "disputed": ("disputed", frozenset({"charge.dispute.created"})),
    "withdrawn": ("withdrawn", frozenset({"charge.dispute.funds_withdrawn", "charge.dispute.updated"})),
    "closed": ("closed", frozenset({"charge.dispute.closed"})),
}
_TOLD: Mapping[str, Mapping[str, tuple[str, frozenset[str]]]] = {
    "bank": {
        "completed": ("begun", frozenset({f"{_SESSION}completed"})),
        "async": ("settled", frozenset({f"{_SESSION}async_payment_succeeded"})),
        "intent": ("settled", frozenset({"payment_intent.succeeded"})),
        **_AFTER,
    },
    "card": {
        "completed": ("paid", frozenset({f"{_SESSION}completed"})),
        "intent": ("paid", frozenset({"payment_intent.succeeded"})),
        **_AFTER,
    },
    "declined": {
        "completed": ("paid", frozenset({f"{_SESSION}completed"})),
        "async": ("paid", frozenset({"payment_intent.payment_failed"})),
        "intent": ("paid", frozenset({"payment_intent.succeeded"})),
        **_AFTER,
    },
    "auto": {"intent": ("settled", frozenset({"payment_intent.succeeded"})), **_AFTER},
    "bank_failed": {
        "completed": ("begun", frozenset({f"{_SESSION}completed"})),
        "async": ("settled", frozenset({f"{_SESSION}async_payment_failed"})),
        "intent": ("settled", frozenset({"payment_intent.payment_failed"})),
    },
    "expired": {"completed": ("expired", frozenset({f"{_SESSION}expired"}))},
    "free": {"completed": ("paid", frozenset({f"{_SESSION}completed"}))},
}
"""By the kind of a life: which step a slot's webhook tells of, and its types."""


def _told_of(kind: str) -> Mapping[str, tuple[str, frozenset[str]]]:
    return _TOLD[kind]
