"""Reconciliation: Stripe's book against ours. What was missed is applied, and what still differs is named.

Nothing here has a way of its own to credit or debit: a payment, an invoice, a refund, a dispute goes through the desk
that its webhook goes through. So it may be run at any time, over any time, beside everything else.

The order matters: what was told and what was begun first, then what came in, then what went back, since a refund of a
payment that isn't credited yet is nobody's.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import structlog

from proxy.control.billing.errors import StripeError, StripeRefused, StripeUnknown
from proxy.control.billing.events import EventDesk
from proxy.control.billing.listing import AtStripe, Listing, events
from proxy.control.billing.resume import resume_events
from proxy.control.billing.stripe_api import StripeApi
from proxy.ledger.orders import Order, OrderLedger
from proxy.ledger.reconciliation import Booked, ReconciliationLedger
from proxy.ledger.stripe_events import EventLedger, Taken

__all__ = ["Difference", "Finished", "Mended", "Reconciler", "Reconciliation", "Side", "Totals"]

log = structlog.get_logger("farebox.reconcile")

Apply = Callable[[str], Awaitable[str]]
"""Fetches the object of this id and applies it; the outcome in a word or two."""

Progress = Callable[[str], None]

EVENTS_SECONDS_MAX = 30 * 86_400 - 3_600
"""Stripe lists events for 30 days."""
UNFINISHED_SECONDS = 25 * 3_600.0
"""An order that is younger may wait for its customer: a Checkout Session lives for a day."""
AT_ONCE = 4
ROUNDS_MAX = 100
PAGE = 100
QUARANTINE_MAX = 1_000
DISMISSED = "dismissed"
NOTHING_DUE = frozenset({"not_ours", "nothing_sold", "open"})
"""Outcomes of the desks by which an object means nothing (yet) for anybody's credits."""


@dataclass(frozen=True, slots=True)
class Side:
    """One kind of object on both sides: how Stripe lists it, what the ledger knows of it, and who applies it."""

    kind: str
    listing: Listing
    booked: Callable[[Sequence[AtStripe]], Awaitable[Mapping[str, Booked]]]
    apply: Apply


@dataclass(frozen=True, slots=True)
class Finished:
    """How many things that were begun came to their end, and of each that didn't, which it is and why."""

    count: int
    waiting: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Mended:
    """Something that had been missed, and what was done about it now."""

    kind: str
    id: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that still differs. Amounts are minor units; None: it isn't there."""

    kind: str
    id: str
    currency: str
    at_stripe: int | None
    here: int | None
    why: str


@dataclass(slots=True)
class Totals:
    """All objects of one kind and currency: how many, and what they come to at Stripe and here, in minor units."""

    count: int = 0
    at_stripe: int = 0
    here: int = 0


@dataclass(slots=True)
class Reconciliation:
    """What came of a comparison. ``failures``: steps that couldn't be done, as sentences."""

    since: datetime
    totals: dict[tuple[str, str], Totals] = field(default_factory=lambda: defaultdict(Totals))
    finished: dict[str, int] = field(default_factory=dict)
    """How many things that were begun were brought to their end, by what they were."""
    mended: list[Mended] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """How many objects were compared."""
        return sum(totals.count for totals in self.totals.values())

    @property
    def clean(self) -> bool:
        """Whether the books agree now, as far as they were looked at, which is all of them."""
        return not self.differences and not self.failures


class Reconciler:
    """Compares and mends. ``finish``: steps before the comparison, by the name of what they bring to an end (what was
    begun here and waits for Stripe, as refund requests).
    """

    def __init__(
        self,
        api: StripeApi,
        ledger: ReconciliationLedger,
        sides: Sequence[Side],
        *,
        event_ledger: EventLedger,
        event_desk: EventDesk,
        orders: OrderLedger,
        apply_order: Callable[[UUID], Awaitable[str]],
        finish: Mapping[str, Callable[[], Awaitable[Finished]]],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._ledger = ledger
        self._sides = {side.kind: side for side in sides}
        self._event_ledger = event_ledger
        self._event_desk = event_desk
        self._orders = orders
        self._apply_order = apply_order
        self._finish = finish
        self._clock = clock

    async def run(self, since: datetime, *, progress: Progress = lambda line: None) -> Reconciliation:
        """Compare all that was made since then. A step that fails is among the failures, and the others go on.

        Raises LedgerError where the ledger is away, and StripeError where Stripe is.
        """
        work = _Run(Reconciliation(since), progress)
        await self._resume_events(work)
        await self._step(work, "events", self._missed_events(work))
        await self._unfinished_orders(work)
        for name, finish in self._finish.items():
            await self._finish_up(work, name, finish)
        for side in self._sides.values():
            await self._step(work, f"{side.kind}s", self._compare(work, side))
        await self._step(work, "older payments", self._known_here_alone(work))
        await self._step(work, "older refunds and disputes", self._unsettled(work))
        await self._undecided(work)
        return work.report

    async def _step(self, work: "_Run", what: str, step: Awaitable[None]) -> None:
        """What Stripe refuses to show us, as to a key that lacks a permission, is no reason to look at nothing else."""
        try:
            await step
        except StripeRefused as refused:
            work.fail(f"{what} could not be looked at: {refused}")

    # What was told, and what was begun

    async def _resume_events(self, work: "_Run") -> None:
        processed = failed = 0
        for _ in range(ROUNDS_MAX):
            done, not_done = await resume_events(
                self._event_ledger, self._event_desk, livemode=self._api.livemode, pause_seconds=60.0
            )
            processed, failed = processed + done, failed + not_done
            if not done:
                break
        work.report.finished["webhooks"] = processed
        work.say(f"webhooks: {processed} resumed")
        if failed:
            work.fail(f"{failed} webhooks could not be processed: `farebox stripe events --unprocessed` says why")

    async def _missed_events(self, work: "_Run") -> None:
        since = max(work.report.since, self._clock() - timedelta(seconds=EVENTS_SECONDS_MAX))
        seen = 0
        async for page in events(self._api, since):
            known = await self._ledger.known_events([event.id for event in page])
            seen += len(page)
            # As they happened: the newest come first.
            for event in reversed(page):
                if event.id in known or event.livemode != self._api.livemode:
                    continue
                try:
                    if await self._event_ledger.take(event) is Taken.TAKEN:
                        outcome = await self._event_desk.process(event)
                        if outcome not in NOTHING_DUE:
                            work.report.mended.append(Mended("webhook", event.id, outcome))
                except Exception as error:  # noqa: BLE001 - the desk has noted why; the others are not to wait for this one
                    work.fail(f"the missed webhook {event.id} ({event.type}) could not be processed: {error}")
            work.say(f"{seen} events looked at")

    async def _unfinished_orders(self, work: "_Run") -> None:
        before = self._clock() - timedelta(seconds=UNFINISHED_SECONDS)
        after = None
        looked = 0
        while True:
            page = await self._orders.unfinished(before=before, after=after, limit=PAGE)
            for order in page:
                await self._unfinished_order(work, order)
            looked += len(page)
            if len(page) < PAGE:
                break
            after = page[-1].id
        work.say(f"{looked} unfinished orders looked at")

    async def _unfinished_order(self, work: "_Run", order: Order) -> None:
        if order.livemode != self._api.livemode:
            return
        if order.kind == "checkout" and order.payment is None:
            # Its customer was never sent to Stripe. Whoever paid all the same is credited: states only rise.
            await self._orders.advance(order.id, "expired")
            return
        try:
            outcome = await self._apply_order(order.id)
        except Exception as error:  # noqa: BLE001 - as in _settle
            work.fail(f"order {order.id}: {error}")
            return
        if outcome == "paid":
            work.report.mended.append(Mended("order", str(order.id), outcome))

    async def _finish_up(self, work: "_Run", name: str, finish: Callable[[], Awaitable[Finished]]) -> None:
        try:
            done = await finish()
        except Exception as error:  # noqa: BLE001 - as in _settle
            work.fail(f"{name}: {error}")
            return
        work.report.finished[name] = done.count
        work.say(f"{name}: {done.count} brought to their end")
        for why in done.waiting:
            work.fail(f"{name}: {why}")

    # Both books, side by side

    async def _compare(self, work: "_Run", side: Side) -> None:
        looked = 0
        async for page in side.listing.pages(self._api, work.report.since):
            booked = await side.booked(page)
            ours = [(at, booked[at.id]) for at in page if at.id in booked]
            gate = asyncio.Semaphore(AT_ONCE)

            async def one(at: AtStripe, known: Booked, gate: asyncio.Semaphore = gate) -> None:
                async with gate:
                    await self._settle(work, side, at, known)

            await asyncio.gather(*(one(at, known) for at, known in ours))
            work.seen[side.kind].update(at.id for at in page)
            looked += len(page)
            work.say(f"{side.kind}s: {looked} looked at")

    async def _settle(self, work: "_Run", side: Side, at: AtStripe, known: Booked) -> None:
        """One object: counted where the books agree, else applied and looked at once more."""
        if known.resolution == DISMISSED:
            return
        at = _as_counted(at, known)
        if _agree(at, known):
            work.count(side.kind, at, known)
            return
        try:
            outcome = await side.apply(at.id)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this one, the others are not to wait for it
            outcome = f"it could not be applied: {error}"
        if outcome in NOTHING_DUE:
            return
        fresh, now = await self._again(side, at)
        work.count(side.kind, fresh, now)
        if _agree(fresh, now):
            work.report.mended.append(Mended(side.kind, at.id, outcome))
            log.warning("reconciled", kind=side.kind, id=at.id, outcome=outcome)
            return
        why = f"in quarantine: {now.reason}" if now.reason else outcome
        work.report.differences.append(Difference(side.kind, at.id, fresh.currency, fresh.amount, now.amount, why))
        log.error("books differ", kind=side.kind, id=at.id, at_stripe=fresh.amount, here=now.amount, reason=why)

    async def _again(self, side: Side, at: AtStripe) -> tuple[AtStripe, Booked]:
        try:
            fresh = await side.listing.one(self._api, at.id)
        except StripeError:
            fresh = at
        known = (await side.booked([fresh]))[at.id]
        return _as_counted(fresh, known), known

    async def _known_here_alone(self, work: "_Run") -> None:
        """Payments that orders were paid by in that time: made earlier, or nothing that Stripe knows of."""
        side = self._sides["payment"]
        paid = await self._ledger.paid_since(work.report.since, livemode=self._api.livemode)
        for payment in paid:
            if payment in work.seen["payment"]:
                continue
            known = (await side.booked([AtStripe(payment, "", 0)]))[payment]
            try:
                at = await side.listing.one(self._api, payment)
            except StripeUnknown:
                pass
            else:
                await self._settle(work, side, at, known)
                continue
            why = "this Stripe account, in this mode, knows no such payment"
            work.report.differences.append(
                Difference(side.kind, payment, known.currency or "", None, known.amount, why)
            )
            log.error("books differ", kind=side.kind, id=payment, here=known.amount, reason=why)

    async def _unsettled(self, work: "_Run") -> None:
        """Refunds and disputes that were made before that time and may have been decided about in it."""
        for kind, id in await self._ledger.unsettled(livemode=self._api.livemode):
            side = self._sides[kind]
            if id in work.seen[kind]:
                continue
            try:
                at = await side.listing.one(self._api, id)
            except StripeUnknown:
                work.fail(f"this Stripe account, in this mode, knows no {kind} {id}, which the ledger has")
                continue
            for known in (await side.booked([at])).values():
                await self._settle(work, side, at, known)

    async def _undecided(self, work: "_Run") -> None:
        """Payments in quarantine that nobody has decided about, however old they are. An invoice is tried again: its
        plan may have been added to pricing.yaml since."""
        named = {difference.id for difference in work.report.differences}
        for held in await self._orders.quarantine(limit=QUARANTINE_MAX):
            if held.payment in named or held.livemode != self._api.livemode:
                continue
            kind = "invoice" if held.payment.startswith("in_") else "payment"
            currency, received = held.currency or "", held.received
            if kind == "invoice":
                at = AtStripe(held.payment, currency, received or 0)
                await self._settle(work, self._sides[kind], at, (await self._sides[kind].booked([at]))[held.payment])
                continue
            why = f"in quarantine: {held.reason}"
            work.report.differences.append(Difference(kind, held.payment, currency, received, None, why))


@dataclass(slots=True)
class _Run:
    """One comparison under way."""

    report: Reconciliation
    say: Progress
    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def fail(self, sentence: str) -> None:
        self.report.failures.append(sentence)

    def count(self, kind: str, at: AtStripe, known: Booked) -> None:
        if not at.amount and not known.amount:
            return
        totals = self.report.totals[kind, at.currency]
        totals.count += 1
        totals.at_stripe += at.amount
        if known.currency in (None, at.currency):
            totals.here += known.amount or 0
        else:
            self.report.totals[kind, known.currency].here += known.amount or 0


def _as_counted(at: AtStripe, known: Booked) -> AtStripe:
    """What an object at Stripe comes to here: a dispute in another currency than the order's is one of the whole
    payment (``farebox.apply_dispute``)."""
    if known.whole is None or known.currency in (None, at.currency):
        return at
    return replace(at, currency=known.currency, amount=known.whole if at.amount else 0)


def _agree(at: AtStripe, known: Booked) -> bool:
    """Whether both books say the same. What isn't known here agrees with a payment that has brought nothing."""
    if known.amount is None:
        return at.amount == 0 and at.state is None and known.reason is None
    return (known.amount, known.currency, known.state) == (at.amount, at.currency, at.state)
