"""The ledger's rules once more, as short as they can be said: what the SQL is compared with.

No locks, no clock, no tables: dictionaries, and one method for each thing that moves credits. A lease lapses when a
test says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from proxy.ledger.records import (
    Extend,
    Extended,
    ExtendOutcome,
    Finalize,
    Finalized,
    FinalizeOutcome,
    Release,
    Released,
    Reserve,
    Reserved,
    ReserveOutcome,
)

__all__ = ["Oracle", "OracleAccount", "OracleHold", "OracleKey"]


@dataclass(slots=True)
class OracleAccount:
    """What an account owns, what of it is held, and what it owes. ``book``: every transfer, signed."""

    balance: int = 0
    held: int = 0
    debt: int = 0
    book: list[tuple[str, int]] = field(default_factory=list)

    @property
    def available(self) -> int:
        return self.balance - self.held

    def post(self, kind: str, signed: int) -> None:
        self.balance += signed
        self.book.append((kind, signed))

    def pay_debt(self) -> None:
        """Debt is paid first, from whatever isn't held."""
        payment = min(self.debt, self.available)
        if payment > 0:
            self.debt -= payment
            self.post("debt_payment", -payment)


@dataclass(slots=True)
class OracleKey:
    """A key. ``family``: the key it was first rotated from, which a spend limit belongs to."""

    account_id: UUID
    family: str
    version: int = 1
    revoked: bool = False
    expired: bool = False


@dataclass(slots=True)
class OracleHold:
    """A hold in whatever state; a tombstone's ``amount`` is 0. ``mark``: what its progress would cost."""

    account_id: UUID
    key_id: str | None
    worker_id: UUID
    state: str
    amount: int = 0
    fingerprint: bytes | None = None
    settle_fingerprint: bytes | None = None
    charge: int = 0
    overrun: int = 0
    reversed: int = 0
    mark: int = 0


class Oracle:
    """The whole ledger in memory. Fill ``accounts``, ``keys``, ``limits``, ``leases`` and ``prices`` before use."""

    def __init__(self) -> None:
        self.accounts: dict[UUID, OracleAccount] = {}
        self.keys: dict[str, OracleKey] = {}
        self.limits: dict[str, int] = {}
        self.leases: dict[UUID, bool] = {}
        self.prices: set[tuple[str, str, str]] = set()
        self.holds: dict[UUID, OracleHold] = {}
        self.references: dict[tuple[str, str], tuple[UUID, int]] = {}

    # The hot path.

    def batch(
        self, finalizes: Sequence[Finalize], reserves: Sequence[Reserve], releases: Sequence[Release] = ()
    ) -> tuple[list[Finalized], list[Reserved], list[Released]]:
        """As if said one after the other: finalizes, releases, and then reserves."""
        finalized = [self.finalize(row) for row in finalizes]
        released = [self.release(row) for row in releases]
        return finalized, [self.reserve(row) for row in reserves], released

    def reserve(self, row: Reserve) -> Reserved:
        account = self.accounts.get(row.account_id)
        if account is None:
            return Reserved(ReserveOutcome.UNKNOWN)
        known = self.holds.get(row.hold_id)
        granted, left = 0, None
        if known is not None:
            outcome = _repeated(known, row)
            granted = known.amount if outcome is ReserveOutcome.GRANTED else 0
        elif (outcome := self._refusal(row)) is ReserveOutcome.GRANTED:
            left = self.spend_left(row.key_id)
            outcome = _affordable(account, row, left)
            if outcome is ReserveOutcome.GRANTED:
                granted = min(row.want, account.available, row.want if left is None else left)
                account.held += granted
                self.holds[row.hold_id] = OracleHold(
                    row.account_id, row.key_id, row.worker_id, "open", granted, row.fingerprint
                )
                left = None if left is None else left - granted
        return Reserved(outcome, granted, account.balance, account.held, account.debt, left)

    def finalize(self, row: Finalize) -> Finalized:
        account = self.accounts.get(row.account_id)
        if account is None:
            return Finalized(FinalizeOutcome.UNKNOWN)
        hold = self.holds.get(row.hold_id)
        if hold is None:
            hold = self.holds[row.hold_id] = OracleHold(row.account_id, row.key_id, row.worker_id, "unseen")
        if hold.state == "released" and hold.account_id == row.account_id:
            return Finalized(FinalizeOutcome.RELEASED, 0, 0, account.balance, account.held, account.debt)
        final_otherwise = hold.state == "final" and hold.settle_fingerprint != row.fingerprint
        if hold.account_id != row.account_id or final_otherwise:
            return Finalized(FinalizeOutcome.CONFLICT, 0, 0, account.balance, account.held, account.debt)
        if hold.state != "final":
            # What we counted ourselves never costs more than was held; what the upstream reports may.
            counted = row.usage_source == "counted" and hold.state != "unseen"
            self._settle(hold, min(row.charge, hold.amount) if counted else row.charge)
            hold.state = "final"
            hold.settle_fingerprint = row.fingerprint
        return Finalized(FinalizeOutcome.FINAL, hold.charge, hold.overrun, account.balance, account.held, account.debt)

    def release(self, row: Release) -> Released:
        if row.account_id not in self.accounts:
            return Released(0, "unknown")
        hold = self.holds.get(row.hold_id)
        if hold is None:
            self.holds[row.hold_id] = OracleHold(row.account_id, None, row.worker_id, "released")
            return Released(0, "released")
        if hold.account_id != row.account_id:
            return Released(0, "conflict")
        if hold.state not in {"open", "provisional"}:
            return Released(0, hold.state)
        open_before = hold.state == "open"
        released = hold.amount if open_before else hold.charge
        self._settle(hold, 0)
        hold.state = "released" if open_before else "final"
        return Released(released, hold.state)

    def extend(self, row: Extend) -> Extended:
        account, hold = self.accounts.get(row.account_id), self.holds.get(row.hold_id)
        if account is None:
            return Extended(ExtendOutcome.UNKNOWN)
        total, left = 0, None
        if hold is None:
            outcome = ExtendOutcome.UNKNOWN
        elif (hold.account_id, hold.worker_id) != (row.account_id, row.worker_id):
            outcome = ExtendOutcome.CONFLICT
        elif hold.state != "open":
            outcome, total = ExtendOutcome.ENDED, hold.amount
        else:
            left = self.spend_left(hold.key_id)
            room = account.available if left is None else min(account.available, left)
            growth = max(min(row.total - hold.amount, room), 0) if self.leases.get(row.worker_id, False) else 0
            outcome = self._extendable(account, hold, row, hold.amount + growth)
            if outcome is ExtendOutcome.EXTENDED:
                hold.amount += growth
                account.held += growth
                left = None if left is None else left - growth
            total = hold.amount
        return Extended(outcome, total, account.balance, account.held, account.debt, left)

    def extend_batch(self, rows: Sequence[Extend]) -> list[Extended]:
        """As if said one after the other, an account's holds in the order of their ids."""
        said = {n: self.extend(rows[n]) for n in sorted(range(len(rows)), key=lambda n: (rows[n].hold_id, n))}
        return [said[n] for n in range(len(rows))]

    # Workers and the sweeper.

    def mark(self, hold_id: UUID, worker_id: UUID, cost: int) -> None:
        """A heartbeat's progress, as what it would cost; only the worker's own open holds take it."""
        hold = self.holds.get(hold_id)
        if hold is not None and hold.worker_id == worker_id and hold.state == "open":
            hold.mark = cost

    def expire_holds(self) -> dict[UUID, int]:
        """Every open hold of a worker without a lease is charged provisionally, at its mark; in the ids' order."""
        expired = {}
        for hold_id, hold in sorted(self.holds.items()):
            if hold.state == "open" and not self.leases.get(hold.worker_id, False):
                self._settle(hold, min(hold.mark, hold.amount))
                hold.state = "provisional"
                expired[hold_id] = hold.charge
        return expired

    # Credits that an operator moves. False: refused.

    def grant(self, account_id: UUID, amount: int, reference: str) -> bool:
        known = self.references.get(("grant", reference))
        if known is None:
            self.references["grant", reference] = (account_id, amount)
            self.accounts[account_id].post("grant", amount)
            self.accounts[account_id].pay_debt()
        return known in (None, (account_id, amount))

    def reverse(self, hold_id: UUID, amount: int | None, reference: str) -> bool:
        known = self.references.get(("reversal", reference))
        if known is not None:
            return known == (hold_id, known[1] if amount is None else amount)
        hold = self.holds.get(hold_id)
        left = 0 if hold is None else hold.charge - hold.reversed
        back = left if amount is None else amount
        if hold is None or hold.state != "final" or not 0 < back <= left:
            return False
        self.references["reversal", reference] = (hold_id, back)
        hold.reversed += back
        self.accounts[hold.account_id].post("reversal", back)
        self.accounts[hold.account_id].pay_debt()
        return True

    # The rules beneath.

    def spend_left(self, key_id: str | None) -> int | None:
        """What the key's family may still hold or spend; None: it has no limit."""
        family = self.keys[key_id].family if key_id in self.keys else None
        return max(self.limits[family] - sum(self.spend(family)), 0) if family in self.limits else None

    def spend(self, family: str | None) -> tuple[int, int]:
        """What the family's keys have spent, reversals taken off, and what they hold."""
        spent = held = 0
        for hold in self.holds.values():
            if hold.key_id in self.keys and self.keys[hold.key_id].family == family:
                spent += hold.charge - hold.reversed
                held += hold.amount if hold.state == "open" else 0
        return spent, held

    def _settle(self, hold: OracleHold, charge: int) -> None:
        """End the hold with ``charge`` in all: its own hold pays, then what is available; the rest becomes debt."""
        account = self.accounts[hold.account_id]
        if hold.state == "open":
            account.held -= hold.amount
        due = charge - hold.charge
        lent = max(due - account.available, 0) if due > 0 else 0
        if lent:
            account.debt += lent
            hold.overrun += lent
            account.post("overrun", lent)
        if due:
            account.post("true_up" if hold.state == "provisional" else "charge", -due)
        hold.charge = charge
        account.pay_debt()

    def _extendable(self, account: OracleAccount, hold: OracleHold, row: Extend, total: int) -> ExtendOutcome:
        """What becomes of it if the hold can hold so much."""
        family = self.keys[hold.key_id].family if hold.key_id in self.keys else None
        if total >= row.at_least:
            return ExtendOutcome.EXTENDED
        if not self.leases.get(row.worker_id, False):
            return ExtendOutcome.WORKER_LAPSED
        if account.debt or account.balance < row.at_least:
            return ExtendOutcome.INSUFFICIENT
        if family in self.limits and self.limits[family] - self.spend(family)[0] < row.at_least:
            return ExtendOutcome.SPEND_LIMIT
        return ExtendOutcome.CREDITS_HELD

    def _refusal(self, row: Reserve) -> ReserveOutcome:
        """Why it can't be admitted, whatever the balance; GRANTED if nothing is against it."""
        key = self.keys.get(row.key_id)
        if not self.leases.get(row.worker_id, False):
            return ReserveOutcome.WORKER_LAPSED
        if key is None or key.account_id != row.account_id:
            return ReserveOutcome.UNKNOWN
        if (row.price_version, row.model, row.variant) not in self.prices:
            return ReserveOutcome.UNKNOWN
        if key.revoked or key.version != row.key_version:
            return ReserveOutcome.KEY_CHANGED
        return ReserveOutcome.KEY_EXPIRED if key.expired else ReserveOutcome.GRANTED


def _repeated(known: OracleHold, row: Reserve) -> ReserveOutcome:
    if known.account_id != row.account_id or known.fingerprint not in (None, row.fingerprint):
        return ReserveOutcome.CONFLICT
    return ReserveOutcome.GRANTED if known.state == "open" else ReserveOutcome.ENDED


def _affordable(account: OracleAccount, row: Reserve, left: int | None) -> ReserveOutcome:
    if account.debt or account.balance < row.at_least:
        return ReserveOutcome.INSUFFICIENT
    if account.available < row.at_least:
        return ReserveOutcome.CREDITS_HELD
    if left is not None and left < row.at_least:
        return ReserveOutcome.SPEND_LIMIT
    return ReserveOutcome.GRANTED
