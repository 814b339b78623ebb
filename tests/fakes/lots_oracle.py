"""What lots should hold, said once more and in another way: everything is drawn at the moment it happens.

Written from the rules, not from the SQL. One account; money is an integer, time a number that ``pass_time`` raises.
The rules:

- What is due is taken from what is available; the rest is lent, as debt. Debt is paid first of all from what becomes
  available.
- Slices of lots are taken in an order: for a taking, what is free of the lot it is aimed at; for a debt's payment, what
  is owed; then what is free of lots not expired when the hold was opened, by priority, end and age; what is free of
  expired ones, the latest to end first; what is owed; what is reserved.
- What a taking had to lend, and its lot has in the hands of other holds, that lot owes.
- What comes back goes into the lots it was drawn from, the last drawn first. What comes back and was never drawn, since
  it was lent, pays the debt without touching a lot; if the debt isn't there any more, it is a new lot.
"""

import math
from dataclasses import dataclass, field

__all__ = ["DrawnLot", "LotsOracle"]

PRIORITIES = {"promo": 100, "granted": 200, "paid": 300}


@dataclass(slots=True)
class DrawnLot:
    """``end``: when it has expired; None: never. ``taken``: what takings drew, the last at the end."""

    version: int
    kind: str
    amount: int
    priority: int
    end: int | None
    left: int
    reserved: int = 0
    owed: int = 0
    taken: "list[Drawn]" = field(default_factory=list)

    @property
    def free(self) -> int:
        return self.left - self.reserved - self.owed

    @property
    def order(self) -> tuple[int, float, int]:
        return self.priority, math.inf if self.end is None else self.end, self.version


@dataclass(slots=True)
class Drawn:
    lot: DrawnLot
    amount: int


@dataclass(slots=True)
class OpenHold:
    """``drawn``: by its charge and true-up, the last at the end. ``refund``: it has no worker."""

    amount: int
    opened: int
    open: bool = True
    refund: bool = False
    charge: int = 0
    drawn: list[Drawn] = field(default_factory=list)


class LotsOracle:
    """One account. ``draws`` are (version, nth, lot's version, amount, owed) in the order of their writing."""

    def __init__(self) -> None:
        self.balance = self.held = self.debt = self.version = self.now = 0
        self.lots: dict[int, DrawnLot] = {}
        self.holds: dict[object, OpenHold] = {}
        self.draws: list[tuple[int, int, int, int, bool]] = []
        self.seen: set[str] = set()

    @property
    def available(self) -> int:
        return self.balance - self.held

    def pass_time(self) -> None:
        self.now += 1

    # Credits in

    def grant(self, kind: str, amount: int, *, end: int | None = None, priority: int | None = None) -> DrawnLot:
        self.version += 1
        lot = self._new_lot(kind, amount, end, PRIORITIES[kind] if priority is None else priority)
        self.balance += amount
        self._pay(self.now, 0)
        return lot

    # Holds

    def reserve(self, hold_id: object, amount: int, *, refund: bool = False) -> None:
        assert amount <= self.available
        self.holds[hold_id] = OpenHold(amount, self.now, refund=refund)
        self.held += amount

    def extend(self, hold_id: object, by: int) -> None:
        self.holds[hold_id].amount += by
        self.held += by

    def settle(self, hold_id: object, charge: int) -> None:
        """Its first end, or a later one: what was charged then is trued up."""
        hold = self.holds[hold_id]
        freed = hold.amount if hold.open else 0
        due, hold.open, hold.charge = charge - hold.charge, False, charge
        self.held -= freed
        if due > 0:
            lent = self._lend(due)
            self.version += 1
            hold.drawn += self._draw(due - lent, hold.opened)
            self._pay(hold.opened, 0)
        elif due < 0:
            self._come_back(-due, hold.drawn, hold.opened)
        else:
            self._pay(hold.opened, 0)

    def reverse(self, hold_id: object, amount: int) -> None:
        hold = self.holds[hold_id]
        self._come_back(amount, hold.drawn, hold.opened)

    # Takings

    def take(self, lot: DrawnLot, amount: int, *, at_most_lot: bool = False, freed: int = 0) -> int:
        if at_most_lot:
            amount = max(0, min(amount, lot.free, self.available + freed))
        self.held -= freed
        if amount:
            lent = self._lend(amount)
            self.version += 1
            lot.taken += self._draw(amount - lent, self.now, aimed=lot)
            owed = min(lent, lot.free)
            lot.owed += owed
            self.seen |= {"owed"} if owed else set()
        self._pay(self.now, 0)
        return amount

    def give_back(self, lot: DrawnLot, amount: int) -> None:
        self._come_back(amount, lot.taken, self.now, aimed=lot)

    def speak_for(self, lot: DrawnLot, amount: int) -> int:
        part = max(0, min(amount, lot.free))
        lot.reserved += part
        return part

    def unspeak(self, lot: DrawnLot, amount: int) -> None:
        lot.reserved -= amount

    def expire(self) -> int:
        total = 0
        expired = [lot for lot in self.lots.values() if lot.end is not None and lot.end <= self.now]
        for lot in sorted(expired, key=lambda lot: (lot.end, lot.version)):
            assert lot.end is not None
            holds = [hold for hold in self.holds.values() if hold.open and not hold.refund and hold.opened < lot.end]
            kept = sum(hold.amount for hold in holds)
            self.seen |= {"kept"} if min(kept, lot.free) else set()
            part = min(lot.free - kept, self.available)
            if part > 0:
                total += part
                self.balance -= part
                self.version += 1
                self._draw(part, self.now, aimed=lot)
        return total

    # The rules

    def _new_lot(self, kind: str, amount: int, end: int | None, priority: int) -> DrawnLot:
        lot = self.lots[self.version] = DrawnLot(self.version, kind, amount, priority, end, amount)
        return lot

    def _lend(self, due: int) -> int:
        lent = max(0, due - self.available)
        self.balance += lent - due
        self.debt += lent
        self.version += lent > 0
        return lent

    def _pay(self, opened: int, without_lots: int) -> None:
        paid = min(self.debt, self.available)
        if not paid:
            return
        self.version += 1
        self.balance -= paid
        self.debt -= paid
        for drawn, owed in self._slices(paid - without_lots, opened, pays_debt=True):
            if owed:
                drawn.lot.taken.append(drawn)
                self.seen.add("owed paid")

    def _draw(self, due: int, opened: int, *, aimed: DrawnLot | None = None) -> list[Drawn]:
        return [drawn for drawn, _ in self._slices(due, opened, aimed=aimed)]

    def _slices(
        self, due: int, opened: int, *, aimed: DrawnLot | None = None, pays_debt: bool = False
    ) -> list[tuple[Drawn, bool]]:
        """Takes ``due``; for each slice what it was, and whether a debt's payment took what was owed."""
        offered: list[tuple[tuple[float, ...], str, DrawnLot, int]] = []
        for lot in self.lots.values():
            over = lot.end is not None and lot.end <= opened
            place: tuple[float, ...] = (3, -(lot.end or 0), *lot.order) if over else (2, *lot.order)
            offered.append(((0,) if lot is aimed else place, "free", lot, lot.free))
            offered.append(((1 if pays_debt else 4, *lot.order), "owed", lot, lot.owed))
            offered.append(((5, *lot.order), "reserved", lot, lot.reserved))
        taken: list[tuple[Drawn, bool]] = []
        for place, name, lot, amount in sorted(offered, key=lambda each: each[0]):
            part = min(due, amount)
            if part == 0:
                continue
            due -= part
            lot.left -= part
            if name != "free":
                setattr(lot, name, getattr(lot, name) - part)
            self.seen.add(f"slice {place[0]}")
            self.draws.append((self.version, len(taken) + 1, lot.version, part, place[0] == 1))
            taken.append((Drawn(lot, part), place[0] == 1))
        assert due == 0, "lots carry the balance"
        return taken

    def _come_back(self, amount: int, drawn: list[Drawn], opened: int, *, aimed: DrawnLot | None = None) -> None:
        self.version += 1
        self.balance += amount
        version, nth, rest = self.version, 0, amount
        paid = min(self.debt, self.available)
        unowed = 0 if aimed is None else min(rest, paid, aimed.owed)
        if aimed is not None:
            aimed.owed -= unowed
        rest -= unowed
        while rest and drawn:
            last = drawn[-1]
            part = min(rest, last.amount)
            rest -= part
            last.amount -= part
            last.lot.left += part
            nth += 1
            self.draws.append((version, nth, last.lot.version, -part, False))
            if last.amount == 0:
                drawn.pop()
        owed = sum(lot.owed for lot in self.lots.values())
        lent = min(rest, max(0, paid - unowed - owed))
        if rest > lent:
            self._new_lot("granted", rest - lent, None, PRIORITIES["granted"])
            self.seen.add("lent and paid since")
        self.seen |= {"unowed"} if unowed else set()
        self.seen |= {"lent and owed still"} if lent else set()
        self._pay(opened, unowed + lent)
