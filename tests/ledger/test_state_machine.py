"""The SQL against the oracle: whatever is said to both, in whatever order and however often, they answer the same.

One database for all runs; each run has accounts, keys and workers of its own. Any call may be said twice, as after a
lost reply. Amounts are small, so that credits run out, debts arise and limits bind.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import replace
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
from proxy.ledger.audit import audit
from proxy.ledger.errors import Conflict
from proxy.ledger.records import (
    ApiKey,
    Extend,
    ExtendOutcome,
    Finalize,
    Finalized,
    FinalizeOutcome,
    Mark,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveOutcome,
)
from tests.fakes.oracle import Oracle, OracleAccount, OracleKey
from tests.ledger.bank import VERSION, Bank, open_bank
from tests.postgres import Database

# The same few amounts over and over, so that things come out even, and one too many, often.
AMOUNTS = st.sampled_from([0, 1, 2, 5, 10, 20, 50, 100])
TOTALS = st.sampled_from([0, 5, 20, 50, 100, 150, 300, 700])
BALANCES = st.sampled_from([200, 500, 50, 0])
SLOTS = st.integers(0, 63)
RARELY = st.sampled_from([False] * 7 + [True])
TWICE = st.sampled_from([False, False, True])
SOURCES = st.sampled_from(["reported", "reported", "counted"])

RUNS = settings(
    max_examples=90,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# What the runs must have come across, or they prove little.
REACHED = {
    *(f"reserve {outcome.value}" for outcome in ReserveOutcome if outcome is not ReserveOutcome.BUSY),
    *(f"extend {outcome.value}" for outcome in ExtendOutcome if outcome not in ("busy", "unknown")),
    *(f"finalize {outcome.value}" for outcome in FinalizeOutcome if outcome is not FinalizeOutcome.BUSY),
    *(f"book {kind}" for kind in ("grant", "charge", "true_up", "overrun", "debt_payment", "reversal")),
    *(f"release {state}" for state in ("released", "final", "conflict", "unknown")),
    *("true_up up", "true_up down", "mark charged", "spend_limit binds", "reversed spend"),
}


_ACCOUNTS = "SELECT id, balance, held, debt FROM farebox.accounts WHERE id = ANY ($1)"

_LIMITS = "SELECT family, spend_limit, spent, held FROM farebox.spend_limits WHERE account_id = ANY ($1)"


@pytest.mark.timeout(600)  # a failure is shrunk before it is shown
def test_the_ledger_does_what_the_oracle_says(database: Database) -> None:
    reached: Counter[str] = Counter()
    with asyncio.Runner() as runner:
        opened = open_bank(database)
        bank = runner.run(opened.__aenter__())
        try:
            run_state_machine_as_test(lambda: LedgerMachine(runner, bank, reached), settings=RUNS)  # type: ignore[arg-type]
            assert [check for check in runner.run(audit(bank.owner)) if not check.ok] == []
        finally:
            runner.run(opened.__aexit__(None, None, None))
    assert sorted(REACHED - set(+reached)) == []


class LedgerMachine(RuleBasedStateMachine):
    """Says everything to both. ``rows`` are all reserves ever made; a slot picks one of the last few."""

    def __init__(self, runner: asyncio.Runner, bank: Bank, reached: Counter[str]) -> None:
        super().__init__()
        self.run = runner.run
        self.bank = bank
        self.reached = reached
        self.oracle = Oracle()
        self.oracle.prices.add((VERSION, "m", "standard"))
        self.accounts: list[UUID] = []
        self.keys: list[ApiKey] = []
        self.workers: list[UUID] = []
        self.rows: list[Reserve] = []

    @initialize(first=BALANCES, second=BALANCES, limit=AMOUNTS)
    def open(self, first: int, second: int, limit: int) -> None:
        for balance in (first, second):
            account, key = self.run(self.bank.open_account())
            self.accounts.append(account.id)
            self.oracle.accounts[account.id] = OracleAccount()
            self.add_key(key)
            if balance:
                self.grant(len(self.accounts) - 1, balance, f"opening {len(self.accounts)}")
        self.add_key(self.run(self.bank.open_key(self.accounts[0], spend_limit=limit)))
        self.oracle.limits[self.keys[-1].id] = limit
        past = datetime.now(UTC) - timedelta(seconds=1)
        self.add_key(self.run(self.bank.open_key(self.accounts[0], expires_at=past)))
        self.oracle.keys[self.keys[-1].id].expired = True
        self.start_worker()

    def add_key(self, key: ApiKey, family: str | None = None) -> None:
        self.keys.append(key)
        self.oracle.keys[key.id] = OracleKey(key.account_id, family or key.id, key.version)

    def start_worker(self) -> None:
        worker_id = uuid4()
        assert self.run(self.bank.holds.start_worker(worker_id, "host", "0.1"))
        self.workers.append(worker_id)
        self.oracle.leases[worker_id] = True

    def row(self, slot: int) -> Reserve:
        return self.rows[-1 - slot % min(len(self.rows), 6)]

    def key(self, slot: int) -> ApiKey:
        # The first three do most: an account's plain key, another's, and one with a limit.
        return self.keys[slot % 3] if slot % 5 else self.keys[slot // 5 % len(self.keys)]

    def a_reserve(self, slot: int, want: int, at_least: int, *, stale: bool = False) -> Reserve:
        key = self.key(slot)
        version = self.oracle.keys[key.id].version - stale
        want, at_least = max(want, at_least), min(want, at_least)
        self.rows.append(self.bank.a_reserve(key, want, at_least, key_version=version, worker_id=self.workers[-1]))
        return self.rows[-1]

    # Said to both, and compared

    def say_reserve(self, row: Reserve) -> None:
        said, expected = self.run(self.bank.holds.reserve(row)), self.oracle.reserve(row)
        assert said == expected
        self.reached[f"reserve {said.outcome}"] += 1
        self.reached["spend_limit binds"] += said.spend_limit_left == 0 < said.granted

    def say_finalize(self, row: Finalize) -> None:
        said, expected = self.run(self.bank.holds.finalize(row)), self.oracle.finalize(row)
        assert said == expected
        self.reached[f"finalize {said.outcome}"] += 1

    def say_release(self, row: Release) -> None:
        said = self.run(self.bank.holds.release(row.hold_id, row.account_id, row.worker_id))
        assert said == self.oracle.release(row)
        self.reached[f"release {said.state}"] += 1

    # What a gateway does

    @rule(slot=SLOTS, want=AMOUNTS, at_least=AMOUNTS, stale=RARELY, twice=TWICE)
    def reserve(self, slot: int, want: int, at_least: int, stale: bool, twice: bool) -> None:
        row = self.a_reserve(slot, want, at_least, stale=stale)
        for _ in range(1 + twice):
            self.say_reserve(row)

    @rule(slot=SLOTS, want=AMOUNTS, charge=AMOUNTS, released=st.booleans())
    def reserve_after_its_end(self, slot: int, want: int, charge: int, released: bool) -> None:
        """The end comes first: the reserve finds a tombstone."""
        row = self.a_reserve(slot, want, 0)
        if released:
            self.say_release(_release_of(row))
        else:
            self.say_finalize(self.bank.a_finalize(row, charge))
        self.say_reserve(row)

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, change=st.sampled_from(["nothing", "fingerprint", "model", "account"]))
    def reserve_again(self, slot: int, change: str) -> None:
        changes: dict[str, dict[str, Any]] = {
            "nothing": {},
            "fingerprint": {"fingerprint": b"other"},
            "model": {"hold_id": uuid4(), "model": "unheard of"},
            "account": {"hold_id": uuid4(), "account_id": uuid4()},
        }
        self.say_reserve(replace(self.row(slot), **changes[change]))

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, charge=AMOUNTS, source=SOURCES, twice=TWICE)
    def finalize(self, slot: int, charge: int, source: str, twice: bool) -> None:
        row = self.bank.a_finalize(self.row(slot), charge, usage_source=source)
        for _ in range(1 + twice):
            self.say_finalize(row)

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, twice=TWICE)
    def release(self, slot: int, twice: bool) -> None:
        for _ in range(1 + twice):
            self.say_release(_release_of(self.row(slot)))

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, charge=AMOUNTS, known=st.booleans())
    def end_for_another_account(self, slot: int, charge: int, known: bool) -> None:
        row = self.row(slot)
        if row.hold_id in self.oracle.holds:
            other = next(account_id for account_id in self.accounts if account_id != row.account_id)
            row = replace(row, account_id=other if known else uuid4())
            self.say_release(_release_of(row))
            self.say_finalize(self.bank.a_finalize(row, charge))

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, total=TOTALS, at_least=TOTALS, wrong=RARELY, twice=TWICE)
    def extend(self, slot: int, total: int, at_least: int, wrong: bool, twice: bool) -> None:
        row = self.an_extend(slot, total, at_least)
        for _ in range(1 + twice):
            self.say_extend(replace(row, worker_id=uuid4()) if wrong else row)

    @rule(slot=SLOTS, want=AMOUNTS, beside=TOTALS, all_of_it=st.booleans(), total=TOTALS, lapsed=RARELY)
    def extend_beside_another(
        self, slot: int, want: int, beside: int, all_of_it: bool, total: int, lapsed: bool
    ) -> None:
        """A stream runs, another one takes most of what there is, and the first wants more."""
        self.say_reserve(self.a_reserve(slot, want, 0))
        self.say_reserve(self.a_reserve(slot, beside, beside if all_of_it else 0))
        if lapsed:
            self.worker_dies(stopped=False, swept=False, replaced=False)
        self.say_extend(self.an_extend(1, total, total))

    def say_extend(self, row: Extend) -> None:
        said = self.run(self.bank.holds.extend(row))
        assert said == self.oracle.extend(row)
        self.reached[f"extend {said.outcome}"] += 1

    @precondition(lambda self: self.rows)
    @rule(asked=st.lists(st.tuples(SLOTS, TOTALS, TOTALS), min_size=2, max_size=6), stranger=RARELY)
    def extend_batch(self, asked: list[tuple[int, int, int]], stranger: bool) -> None:
        """Several in one call; the same hold may occur twice, and one that never was."""
        rows = [self.an_extend(*each) for each in asked]
        if stranger:
            rows[0] = replace(rows[0], hold_id=uuid4())
        said = self.run(self.bank.holds.extend_batch(rows))
        assert said == self.oracle.extend_batch(rows)
        for each in said:
            self.reached[f"extend {each.outcome}"] += 1

    def an_extend(self, slot: int, total: int, at_least: int) -> Extend:
        row = self.row(slot)
        return Extend(row.hold_id, row.account_id, row.worker_id, max(total, at_least), min(total, at_least))

    @rule(
        new=st.lists(st.tuples(SLOTS, AMOUNTS, AMOUNTS), max_size=6),
        again=st.lists(SLOTS, max_size=3),
        ends=st.lists(st.tuples(SLOTS, AMOUNTS, SOURCES), max_size=6),
        frees=st.lists(SLOTS, max_size=3),
    )
    def batch(
        self,
        new: list[tuple[int, int, int]],
        again: list[int],
        ends: list[tuple[int, int, str]],
        frees: list[int],
    ) -> None:
        """New reserves, known ones, and ends of either, all in one call; the same hold may occur several times."""
        reserves = [self.a_reserve(*each) for each in new]
        if self.rows:
            # Known ones: said again beside others, what was refused may be refused for another reason.
            reserves += [row for row in map(self.row, again) if row.hold_id in self.oracle.holds]
            finalizes = [
                self.bank.a_finalize(self.row(slot), charge, usage_source=source) for slot, charge, source in ends
            ]
            releases = [_release_of(self.row(slot)) for slot in frees]
            said = self.run(self.bank.holds.batch(finalizes, reserves, releases))
            expected = self.oracle.batch(finalizes, reserves, releases)
            ids = (
                [row.hold_id for row in finalizes]
                + [row.hold_id for row in reserves]
                + [row.hold_id for row in releases]
            )
            if len(set(ids)) == len(ids):
                assert said == expected
            else:
                # What is said twice in one call is answered with the balances as they were after the first time.
                assert _without_balances(said) == _without_balances(expected)

    # Workers and the sweeper

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, tokens=AMOUNTS)
    def beat(self, slot: int, tokens: int) -> None:
        """A lapsed worker is renewed by its heartbeat, a stopped one isn't; a mark counts on its own open hold only."""
        row = self.row(slot)
        worker_id = self.workers[-1] if slot % 8 == 0 else row.worker_id
        renewed = self.run(self.bank.holds.heartbeat(worker_id, [Mark(row.hold_id, Usage(output=tokens))]))
        assert bool(renewed) == (worker_id in self.oracle.leases)
        if renewed:
            self.oracle.leases[worker_id] = True
            self.oracle.mark(row.hold_id, worker_id, tokens)

    @rule(stopped=RARELY, swept=st.booleans(), replaced=st.booleans())
    def worker_dies(self, stopped: bool, swept: bool, replaced: bool) -> None:
        worker_id = self.workers[-1]
        if stopped:
            assert self.run(self.bank.holds.stop_worker(worker_id)) == (worker_id in self.oracle.leases)
            self.oracle.leases.pop(worker_id, None)
        elif worker_id in self.oracle.leases:
            self.run(self.bank.lapse(worker_id))
            self.oracle.leases[worker_id] = False
        if swept:
            self.sweep()
        if replaced or stopped:
            self.start_worker()

    @rule()
    def sweep(self) -> None:
        # Holds of earlier runs may expire along with ours.
        expired = self.run(self.bank.expire(10_000))
        ours = {hold_id: charge for hold_id, charge in expired.items() if hold_id in self.oracle.holds}
        assert ours == self.oracle.expire_holds()
        self.reached["mark charged"] += any(ours.values())

    @rule(slot=SLOTS, want=AMOUNTS, tokens=AMOUNTS, charge=AMOUNTS, source=SOURCES)
    def settle_after_the_sweeper(self, slot: int, want: int, tokens: int, charge: int, source: str) -> None:
        """The worker made progress, was taken for dead, and comes back with the bill."""
        row = self.a_reserve(slot, want, 0)
        self.say_reserve(row)
        self.beat(0, tokens)
        self.beat(0, tokens // 2)
        self.worker_dies(stopped=False, swept=True, replaced=True)
        self.say_finalize(self.bank.a_finalize(row, charge, usage_source=source))

    # What an operator does

    @rule(slot=SLOTS, amount=AMOUNTS.filter(bool), reference=st.sampled_from("abcdefghijkl"))
    def grant(self, slot: int, amount: int, reference: str) -> None:
        account_id = self.accounts[slot % len(self.accounts)]
        reference = f"{self.accounts[0]} {reference}"
        granted = False
        with suppress(Conflict):
            self.run(self.bank.control.grant(account_id, amount, reference=reference, actor="test"))
            granted = True
        assert granted == self.oracle.grant(account_id, amount, reference)

    @precondition(lambda self: self.rows)
    @rule(slot=SLOTS, amount=st.none() | AMOUNTS.filter(bool), reference=st.sampled_from("abcdef"))
    def reverse(self, slot: int, amount: int | None, reference: str) -> None:
        row = self.row(slot)
        if row.hold_id not in self.oracle.holds:
            return
        reference = f"{self.accounts[0]} {reference}"
        done = False
        with suppress(Conflict):
            self.run(self.bank.control.reverse(row.hold_id, amount, reference=reference, actor="test", reason="test"))
            done = True
        assert done == self.oracle.reverse(row.hold_id, amount, reference)
        self.reached["reversed spend"] += done and self.oracle.spend_left(row.key_id) is not None

    @rule(slot=SLOTS, limit=st.none() | AMOUNTS, limited=TWICE)
    def limit_key(self, slot: int, limit: int | None, limited: bool) -> None:
        key = self.run(self.bank.control.find_key(self.keys[2].id if limited else self.key(slot).id))
        known = self.oracle.keys[key.id]
        if known.revoked:
            return
        known.version = self.run(self.bank.control.update_key(replace(key, spend_limit=limit))).version
        self.oracle.limits.pop(known.family, None)
        if limit is not None:
            self.oracle.limits[known.family] = limit

    @rule(slot=SLOTS, rotated=st.booleans())
    def replace_key(self, slot: int, rotated: bool) -> None:
        """Its place is taken by one rotated from it, which shares its limit, or by a new one after it was revoked."""
        number = slot % 3
        old = self.keys[number]
        known = self.oracle.keys[old.id]
        if rotated:
            terms: dict[str, Any] = {"secret_hmac": uuid4().bytes * 2, "pepper_version": 1, "overlap_seconds": 900}
            new = self.run(self.bank.control.rotate_key(old.id, new_id=uuid4().hex[:12], **terms))
            known.version = self.run(self.bank.control.find_key(old.id)).version
            self.add_key(new, known.family)
        else:
            known.version = self.run(self.bank.control.revoke_key(old.id)).version
            known.revoked = True
            self.add_key(self.run(self.bank.open_key(old.account_id)))
        self.keys[number], self.keys[-1] = self.keys[-1], self.keys[number]

    # What always holds

    @invariant()
    def the_accounts_agree(self) -> None:
        rows = self.run(self.bank.owner.fetch(_ACCOUNTS, self.accounts))
        found = {row["id"]: (row["balance"], row["held"], row["debt"]) for row in rows}
        assert found == {id: (a.balance, a.held, a.debt) for id, a in self.oracle.accounts.items()}

    def teardown(self) -> None:
        limits = self.run(self.bank.owner.fetch(_LIMITS, self.accounts))
        spend = {row["family"]: (row["spend_limit"], row["spent"], row["held"]) for row in limits}
        assert spend == {family: (limit, *self.oracle.spend(family)) for family, limit in self.oracle.limits.items()}
        for account_id in self.accounts:
            book = self.oracle.accounts[account_id].book
            assert self.run(self.bank.book(account_id)) == book
            for kind, signed in book:
                self.reached[f"book {kind}"] += 1
                self.reached["true_up up" if signed < 0 else "true_up down"] += kind == "true_up"
        for hold_id, hold in self.oracle.holds.items():
            found = self.run(self.bank.control.ended(hold_id))
            assert found is not None
            assert (found.state, found.amount, found.charge or 0) == (hold.state, hold.amount, hold.charge)
            assert (found.overrun, found.reversed) == (hold.overrun, hold.reversed)


def _release_of(row: Reserve) -> Release:
    return Release(row.hold_id, row.account_id, row.worker_id)


Batch = tuple[list[Finalized], list[Reserved], list[Released]]


def _without_balances(batch: Batch) -> Batch:
    finalized, reserved, released = batch
    return (
        [replace(result, balance=0, held=0, debt=0) for result in finalized],
        [replace(result, balance=0, held=0, debt=0) for result in reserved],
        released,
    )
