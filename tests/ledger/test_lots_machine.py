"""Lots against their oracle: whatever happens to an account, late or in time, they hold what they should.

The SQL draws behind the writers, in stretches of any length; the oracle at once. Time is the order of a few ends: a
lot's end is far away until the machine lets it come, so that what was opened before it and what after is plain.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from proxy.core.usage import Usage
from proxy.ledger.records import ApiKey, Mark, Reserve
from tests.fakes.lots_oracle import DrawnLot, LotsOracle
from tests.ledger.bank import Bank, open_bank
from tests.ledger.lots import broken
from tests.postgres import Database

AMOUNTS = st.sampled_from([1, 2, 5, 10, 20, 50, 100])
CHARGES = st.sampled_from([0, 0, 1, 5, 20, 50, 120])
SLOTS = st.integers(0, 63)
SOON = st.none() | st.integers(1, 3)
FAR = datetime(3000, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)

RUNS = settings(
    max_examples=90,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# What the runs must have come across, or they prove little.
REACHED = {
    *(f"slice {place}" for place in (0, 1, 2, 3, 4)),
    *("owed", "owed paid", "unowed", "lent and paid since", "lent and owed still", "kept"),
    *(f"book {kind}" for kind in ("grant", "promo", "purchase", "charge", "true_up", "overrun", "debt_payment")),
    *(f"book {kind}" for kind in ("reversal", "refund", "refund_return", "dispute", "dispute_return", "expiry")),
}
_LOTS = """
    SELECT version, kind, amount, remaining, reserved, owed, priority
      FROM farebox.lots WHERE account_id = $1 ORDER BY version
"""
_DRAWS = "SELECT version, nth, lot_version, amount, owed FROM farebox.draws WHERE account_id = $1 ORDER BY version, nth"
_TAKE = "SELECT * FROM farebox.take($1, $2, $3, $4, 'test', NULL, $5, $6, $7)"
_GIVE_BACK = "SELECT * FROM farebox.give_back($1, $2, $3, $4, 'test', NULL, $5, $6)"
_HOLD = """
    SELECT farebox.write_down(
        ARRAY[farebox.moved(farebox.open_purse($1), NULL, 0, -$3::bigint)], NULL,
        ARRAY[ROW($2, $1, 'open', $3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, clock_timestamp(), NULL, 0, 0,
                  NULL, NULL, NULL, NULL, NULL, NULL, NULL)::farebox.holds],
        NULL, clock_timestamp())
"""
_UNHOLD = "UPDATE farebox.holds SET state = 'released', charge = 0, ended_at = clock_timestamp() WHERE id = $1"


@pytest.mark.timeout(600)  # a failure is shrunk before it is shown
def test_lots_hold_what_the_oracle_says(database: Database) -> None:
    reached: Counter[str] = Counter()
    with asyncio.Runner() as runner:
        opened = open_bank(database)
        bank = runner.run(opened.__aenter__())
        try:
            run_state_machine_as_test(lambda: LotsMachine(runner, bank, reached), settings=RUNS)  # type: ignore[arg-type]
            assert runner.run(broken(bank.owner)) == set()
        finally:
            runner.run(opened.__aexit__(None, None, None))
    assert sorted(REACHED - set(+reached)) == []


@dataclass(slots=True)
class Purchase:
    """A paid lot, and what refunds and disputes did to it. ``takings``: reference -> (kind, amount)."""

    lot: DrawnLot
    takings: dict[str, tuple[str, int]]
    returned: set[str]

    @property
    def net(self) -> int:
        return sum(amount for reference, (_, amount) in self.takings.items() if reference not in self.returned)


class LotsMachine(RuleBasedStateMachine):
    """One account. ``rows`` are all its reserves; a slot picks one of the last few."""

    def __init__(self, runner: asyncio.Runner, bank: Bank, reached: Counter[str]) -> None:
        super().__init__()
        self.run = runner.run
        self.bank = bank
        self.reached = reached
        self.oracle = LotsOracle()
        self.rows: list[Reserve] = []
        self.purchases: list[Purchase] = []
        self.requests: dict[UUID, tuple[Purchase, int]] = {}
        self.reversed: dict[UUID, int] = {}
        self.worker_id = uuid4()

    @initialize(paid=AMOUNTS, promo=AMOUNTS, soon=SOON, begins=st.integers(0, 4))
    def open(self, paid: int, promo: int, soon: int | None, begins: int) -> None:
        account, key = self.run(self.bank.open_account())
        self.id: UUID = account.id
        self.key: ApiKey = key
        self.start_worker()
        self.purchase(paid, None)
        self.grant(True, promo, soon, None)
        # What chance leads to too seldom.
        if begins == 1:
            self.take_under_a_hold(0, paid, True, None, False, False)
        elif begins == 2:
            self.take_under_a_hold(0, paid, False, 5, False, True)
        elif begins > 2:
            self.outlive(20, 2, 50, begins == 3)

    def start_worker(self) -> None:
        self.worker_id = uuid4()
        assert self.run(self.bank.holds.start_worker(self.worker_id, "host", "0.1"))

    def sql(self, query: str, *arguments: Any, reference: tuple[str, str] | None = None) -> Any:
        """Under the account's lock, as the functions are called that these are parts of."""

        async def work() -> Any:
            async with self.bank.owner.transaction():
                if reference is not None:
                    await self.bank.owner.execute("SELECT farebox.lock_reference($1, $2)", *reference)
                await self.bank.owner.execute("SELECT farebox.lock_accounts(ARRAY[$1::uuid], NULL)", self.id)
                return await self.bank.owner.fetchrow(query, *arguments)

        return self.run(work())

    def row(self, slot: int) -> Reserve:
        return self.rows[-1 - slot % min(len(self.rows), 5)]

    # Credits in

    @rule(promo=st.booleans(), amount=AMOUNTS, soon=SOON, priority=st.sampled_from([None, None, 100, 250]))
    def grant(self, promo: bool, amount: int, soon: int | None, priority: int | None) -> None:
        end, at = self.end(soon)
        row = self.run(
            self.bank.owner.fetchrow(
                "SELECT * FROM farebox.grant_lot($1, $2, $3, $4, 'test', NULL, $5, $6)",
                *(self.id, "promo" if promo else "grant", amount, uuid4().hex, at, priority),
            )
        )
        assert row is not None
        assert row["outcome"] == "done"
        lot = self.oracle.grant("promo" if promo else "granted", amount, end=end, priority=priority)
        assert row["transfer_version"] == lot.version

    @rule(amount=AMOUNTS, soon=SOON)
    def purchase(self, amount: int, soon: int | None) -> None:
        end, at = self.end(soon)
        reference = uuid4().hex
        self.sql(
            "SELECT farebox.credited($1, 'purchase', $2, $3, 'test', NULL, 'paid', $4, NULL, NULL)",
            *(self.id, amount, reference, at),
            reference=("purchase", reference),
        )
        self.purchases.append(Purchase(self.oracle.grant("paid", amount, end=end), {}, set()))

    def end(self, soon: int | None) -> tuple[int | None, datetime | None]:
        if soon is None:
            return None, None
        return self.oracle.now + soon, FAR + (self.oracle.now + soon) * DAY

    @rule()
    def time_passes(self) -> None:
        self.oracle.pass_time()
        self.run(
            self.bank.owner.execute(
                "UPDATE farebox.lots SET expires_at = statement_timestamp() WHERE account_id = $1 AND expires_at = $2",
                *(self.id, FAR + self.oracle.now * DAY),
            )
        )

    @rule()
    def expire(self) -> None:
        due = self.run(self.bank.owner.fetch("SELECT * FROM farebox.expired_accounts(NULL, 10000)"))
        took = self.run(self.bank.owner.fetchval("SELECT farebox.expire_lots($1)", self.id))
        assert took == self.oracle.expire()
        # It looks at what was drawn by then.
        if took and self.drawn_to_the_end:
            assert self.id in [row[0] for row in due]

    # Calls

    @rule(amount=AMOUNTS, charge=st.none() | CHARGES)
    def reserve(self, amount: int, charge: int | None) -> None:
        row = self.bank.a_reserve(self.key, amount, worker_id=self.worker_id)
        if self.run(self.bank.holds.reserve(row)).granted:
            self.oracle.reserve(row.hold_id, amount)
            self.rows.append(row)
            if charge is not None:
                self.finalize(0, charge)

    @rule(charge=CHARGES, back=st.none() | AMOUNTS)
    def call(self, charge: int, back: int | None) -> None:
        """A whole one, of a part of what there is or of more; and what it cost may be given back."""
        if self.oracle.available:
            self.reserve(max(1, self.oracle.available // 2), charge)
            if back is not None:
                self.reverse(0, back)

    @precondition(lambda self: self.purchases)
    @rule(
        slot=SLOTS,
        amount=AMOUNTS,
        dispute=st.booleans(),
        charge=st.none() | CHARGES,
        early=st.booleans(),
        undone=st.booleans(),
    )
    def take_under_a_hold(
        self, slot: int, amount: int, dispute: bool, charge: int | None, early: bool, undone: bool
    ) -> None:
        """Somebody has what is to be taken, and ends before or after it is given back again, if it is."""
        if self.oracle.available == 0:
            return
        everything = self.oracle.available
        self.reserve(everything, None)
        charge = everything if charge is None else charge
        self.take(slot, amount, dispute, False)
        if early:
            self.finalize(0, charge)
        purchase = self.purchases[slot % len(self.purchases)]
        if undone and purchase.net:
            self.say_give_back(purchase, -1)
        self.finalize(0, charge)

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, by=AMOUNTS)
    def extend(self, slot: int, by: int) -> None:
        row = self.row(slot)
        hold = self.oracle.holds[row.hold_id]
        if hold.open and self.run(self.bank.extend(row, hold.amount + by)).outcome == "extended":
            self.oracle.extend(row.hold_id, by)

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, charge=CHARGES)
    def finalize(self, slot: int, charge: int) -> None:
        row = self.row(slot)
        if self.oracle.holds[row.hold_id].open:
            self.run(self.bank.finalize(row, charge))
            self.oracle.settle(row.hold_id, charge)

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS)
    def release(self, slot: int) -> None:
        row = self.row(slot)
        if self.oracle.holds[row.hold_id].open:
            self.run(self.bank.release(row))
            self.oracle.settle(row.hold_id, 0)

    @rule(want=AMOUNTS, tokens=CHARGES, beside=CHARGES, charge=CHARGES)
    def sweep(self, want: int, tokens: int, beside: int, charge: int) -> None:
        """A worker is taken for dead, something else is charged meanwhile, and it comes back with the bill."""
        self.reserve(min(want, self.oracle.available) or 1, None)
        if not self.rows or not self.oracle.holds[self.rows[-1].hold_id].open:
            return
        row = self.rows[-1]
        self.run(self.bank.holds.heartbeat(row.worker_id, [Mark(row.hold_id, Usage(output=tokens))]))
        self.run(self.bank.lapse(row.worker_id))
        expired = self.run(self.bank.expire(10_000))
        assert expired[row.hold_id] == min(tokens, self.oracle.holds[row.hold_id].amount)
        for hold_id in sorted(set(expired) & set(self.oracle.holds), key=str):
            self.oracle.settle(hold_id, expired[hold_id])
        self.start_worker()
        self.reserve(beside or 1, beside)
        self.run(self.bank.finalize(row, charge))
        self.oracle.settle(row.hold_id, charge)

    @rule(amount=AMOUNTS, wanted=st.integers(0, 3), charge=CHARGES, in_time=st.booleans())
    def outlive(self, amount: int, wanted: int, charge: int, in_time: bool) -> None:
        """A lot ends under a hold; who comes later finds what the expiry has left, or is early for it."""
        self.grant(True, amount, 1, None)
        if wanted and self.oracle.available:
            self.reserve(max(1, self.oracle.available * wanted // 3), None)
        self.time_passes()
        if in_time:
            self.expire()
        self.call(charge, None)
        if self.rows:
            self.finalize(0, charge)
        self.expire()

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, amount=AMOUNTS)
    def reverse(self, slot: int, amount: int) -> None:
        row = self.row(slot)
        hold = self.oracle.holds[row.hold_id]
        left = hold.charge - self.reversed.get(row.hold_id, 0)
        found = self.run(self.bank.control.ended(row.hold_id))
        if hold.open or left == 0 or found is None or found.state != "final":
            return
        amount = min(amount, left)
        terms = {"reference": uuid4().hex, "actor": "test", "reason": "test"}
        self.run(self.bank.control.reverse(row.hold_id, amount, **terms))
        self.oracle.reverse(row.hold_id, amount)
        self.reversed[row.hold_id] = self.reversed.get(row.hold_id, 0) + amount

    # Refunds and disputes

    @precondition(lambda self: self.purchases)
    @rule(slot=SLOTS, amount=AMOUNTS, dispute=st.booleans(), at_most_lot=st.sampled_from([False, False, True]))
    def take(self, slot: int, amount: int, dispute: bool, at_most_lot: bool) -> None:
        purchase = self.purchases[slot % len(self.purchases)]
        amount = min(amount, purchase.lot.amount - purchase.net)
        if amount:
            self.say_take(purchase, amount, "dispute" if dispute else "refund", at_most_lot=at_most_lot, freed=0)

    def say_take(self, purchase: Purchase, amount: int, kind: str, *, at_most_lot: bool, freed: int) -> None:
        reference = f"re_{uuid4().hex}"
        arguments = (self.id, kind, amount, reference, purchase.lot.version, at_most_lot)
        debt = self.oracle.debt
        taken = self.oracle.take(purchase.lot, amount, at_most_lot=at_most_lot, freed=freed)
        said = self.sql(_TAKE, *arguments, freed, reference=(kind, reference))
        assert (said["outcome"], said["taken"]) == ("done" if taken else "nothing", taken)
        assert said["lent"] <= taken
        assert freed or said["lent"] == self.oracle.debt - debt
        if taken:
            purchase.takings[reference] = kind, taken
            # Said again it changes nothing.
            again = self.sql(_TAKE, *arguments, 0, reference=(kind, reference))
            assert tuple(again) == tuple(said)

    @precondition(lambda self: any(purchase.net for purchase in self.purchases))
    @rule(slot=SLOTS)
    def give_back(self, slot: int) -> None:
        taken = [purchase for purchase in self.purchases if purchase.net]
        self.say_give_back(taken[slot % len(taken)], slot // 7)

    def say_give_back(self, purchase: Purchase, nth: int) -> None:
        open_ones = sorted(set(purchase.takings) - purchase.returned, key=list(purchase.takings).index)
        reference = open_ones[nth % len(open_ones)]
        kind, amount = purchase.takings[reference]
        arguments = (f"{kind}_return", amount, reference, purchase.lot.version, [*purchase.takings])
        for _ in range(2):
            said = self.sql(_GIVE_BACK, self.id, *arguments, reference=(f"{kind}_return", reference))
            assert said["outcome"] == "done"
        self.oracle.give_back(purchase.lot, amount)
        purchase.returned.add(reference)

    @precondition(lambda self: self.purchases)
    @rule(slot=SLOTS, amount=AMOUNTS)
    def ask_for_a_refund(self, slot: int, amount: int) -> None:
        purchase = self.purchases[slot % len(self.purchases)]
        amount = min(amount, self.oracle.available)
        if amount == 0 or purchase.net:
            return
        part = self.oracle.speak_for(purchase.lot, amount)
        assert self.sql("SELECT farebox.reserve_lot($1, $2, $3)", self.id, purchase.lot.version, amount)[0] == part
        if part:
            request = uuid4()
            self.sql(_HOLD, self.id, request, part)
            self.oracle.reserve(request, part, refund=True)
            self.requests[request] = purchase, part

    @precondition(lambda self: self.requests)
    @rule(slot=SLOTS, accepted=st.booleans())
    def end_a_refund(self, slot: int, accepted: bool) -> None:
        request = list(self.requests)[slot % len(self.requests)]
        purchase, part = self.requests.pop(request)
        self.sql("SELECT farebox.unreserve_lot($1, $2, $3)", self.id, purchase.lot.version, part)
        self.oracle.unspeak(purchase.lot, part)
        self.run(self.bank.owner.execute(_UNHOLD, request))
        self.oracle.holds[request].open = False
        amount = min(part, purchase.lot.amount - purchase.net) if accepted else 0
        self.say_take(purchase, amount, "refund", at_most_lot=False, freed=part)

    # The pass

    @rule(rows=st.sampled_from([1, 2, 3, None]))
    def draw(self, rows: int | None) -> None:
        self.run(self.bank.owner.fetchval("SELECT farebox.draw_lots($1, NULL, $2)", self.id, rows))

    @rule()
    def look(self) -> None:
        self.draw(None)
        self.the_lots_agree()

    @property
    def drawn_to_the_end(self) -> bool:
        mark = self.run(
            self.bank.owner.fetchval("SELECT version FROM farebox.lot_marks WHERE account_id = $1", self.id)
        )
        return bool(mark == self.oracle.version)

    def the_lots_agree(self) -> None:
        found = [tuple(row) for row in self.run(self.bank.owner.fetch(_LOTS, self.id))]
        assert found == [
            (lot.version, lot.kind, lot.amount, lot.left, lot.reserved, lot.owed, lot.priority)
            for lot in sorted(self.oracle.lots.values(), key=lambda lot: lot.version)
        ]
        assert sum(row[3] for row in found) == self.oracle.balance
        assert sum(row[5] for row in found) <= self.oracle.debt

    @invariant()
    def the_account_agrees(self) -> None:
        if hasattr(self, "id"):
            query = "SELECT balance, held, debt, version FROM farebox.accounts WHERE id = $1"
            found = self.run(self.bank.owner.fetchrow(query, self.id))
            expected = (self.oracle.balance, self.oracle.held, self.oracle.debt, self.oracle.version)
            assert tuple(found or ()) == expected

    def teardown(self) -> None:
        if not hasattr(self, "id"):
            return
        while self.requests:
            self.end_a_refund(0, False)
        self.draw(None)
        self.the_lots_agree()
        assert [tuple(row) for row in self.run(self.bank.owner.fetch(_DRAWS, self.id))] == self.oracle.draws
        for kind, _ in self.run(self.bank.book(self.id)):
            self.reached[f"book {kind}"] += 1
        self.reached.update(self.oracle.seen)
