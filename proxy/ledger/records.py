"""What goes into the ledger and comes out of it: frozen values, one per SQL function's argument row and result row.

Amounts are microcredits. Expected refusals are *outcomes* with a name, not exceptions.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from proxy.core.usage import Usage

__all__ = [
    "Account",
    "ApiKey",
    "Ended",
    "Expired",
    "Extended",
    "Finalize",
    "FinalizeOutcome",
    "Finalized",
    "Mark",
    "Released",
    "Reserve",
    "ReserveOutcome",
    "Reserved",
    "Transfer",
]


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays. ``available = balance - held``; while ``debt`` stands, available is 0."""

    id: UUID
    name: str
    external_id: str | None
    email: str | None
    balance: int
    held: int
    debt: int
    version: int
    created_at: datetime

    @property
    def available(self) -> int:
        return self.balance - self.held


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A credential of an account. ``version`` rises with every change, so that ``reserve`` can tell a stale copy.

    ``models`` None: all. ``spend_limit`` None: unlimited; else microcredits over the key's life, held ones included.
    ``profile`` None: the server's default limits profile.
    """

    id: str
    account_id: UUID
    name: str
    secret_hmac: bytes
    pepper_version: int
    scopes: frozenset[str]
    models: frozenset[str] | None
    profile: str | None
    affordable_cap: bool
    spend_limit: int | None
    spent: int
    version: int
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    rotated_from: str | None


class ReserveOutcome(StrEnum):
    """What became of a reserve: granted, or why not."""

    GRANTED = "granted"
    INSUFFICIENT = "insufficient"
    """The balance itself is below ``at_least``, or debt stands."""
    CREDITS_HELD = "credits_held"
    """The balance would carry ``at_least`` but other holds take it now."""
    SPEND_LIMIT = "spend_limit"
    """The key's own spend limit doesn't carry ``at_least``."""
    KEY_CHANGED = "key_changed"
    """The key's version is another than the caller's (revoked, edited): reload it once."""
    KEY_EXPIRED = "key_expired"
    WORKER_LAPSED = "worker_lapsed"
    """The worker's lease is over: it may not admit until it has renewed."""
    CONFLICT = "conflict"
    """The hold id is known with another fingerprint."""
    ENDED = "ended"
    """The hold id has already ended (a tombstone, too): nothing is held."""
    UNKNOWN = "unknown"
    """Account, key or price version unknown."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hold ``want`` microcredits, or as much as is available down to ``at_least``.

    ``quote`` is JSON text for the receipt (bounds, caps); the ledger stores it and never looks into it.
    """

    hold_id: UUID
    account_id: UUID
    key_id: str
    key_version: int
    worker_id: UUID
    want: int
    at_least: int
    price_version: str
    model: str
    variant: str
    quote: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Reserved:
    """``granted`` is 0 unless GRANTED. Balance, held and debt are the account's after the call (spend_limit_left: the key's)."""

    outcome: ReserveOutcome
    granted: int = 0
    balance: int = 0
    held: int = 0
    debt: int = 0
    spend_limit_left: int | None = None


class FinalizeOutcome(StrEnum):
    """What became of a finalize."""

    FINAL = "final"
    """Settled by this call, or by an earlier one with the same fingerprint."""
    CONFLICT = "conflict"
    """Already final with another charge: nothing was changed."""
    RELEASED = "released"
    """The hold was released before: nothing is charged."""
    UNKNOWN = "unknown"
    """The account is unknown."""


@dataclass(frozen=True, slots=True)
class Finalize:
    """End a hold with its final charge. Self-contained: it settles even where the reserve was never seen.

    ``charge`` is microcredits; where ``usage_source`` is ``counted`` the ledger never charges above the hold.
    ``receipt`` is JSON text stored beside it (raw usage, how the answer ended, cap sent). After ``expire`` it is a true-up.
    """

    hold_id: UUID
    account_id: UUID
    key_id: str
    worker_id: UUID
    charge: int
    usage: Usage
    usage_source: str
    price_version: str
    model: str
    variant: str
    ending: str
    receipt: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Finalized:
    """``charge``: what the account was charged in all for this hold. ``overrun``: the part that became debt."""

    outcome: FinalizeOutcome
    charge: int = 0
    overrun: int = 0
    balance: int = 0
    held: int = 0
    debt: int = 0


@dataclass(frozen=True, slots=True)
class Released:
    """``released``: microcredits given back by this call; 0 where the hold had ended before or was unknown (now a tombstone)."""

    released: int
    state: str


@dataclass(frozen=True, slots=True)
class Extended:
    """``granted``: microcredits added to the hold by this call; 0 if refused. ``total``: what it holds now."""

    granted: int
    total: int
    state: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Progress of an open hold: absolute totals by class, never increments."""

    hold_id: UUID
    usage: Usage


@dataclass(frozen=True, slots=True)
class Expired:
    """A hold that the sweeper settled provisionally."""

    hold_id: UUID
    account_id: UUID
    charge: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One append-only row. The customer is ``account_id``; ``debit``/``credit`` name both sides (a system side by its name)."""

    account_id: UUID
    version: int
    kind: str
    debit: str
    credit: str
    amount: int
    balance_after: int
    debt_after: int
    hold_id: UUID | None
    reference: str | None
    actor: str | None
    reason: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Ended:
    """A hold as the receipt shows it. ``charge`` None while open. JSON texts as they were stored."""

    hold_id: UUID
    account_id: UUID
    key_id: str
    state: str
    model: str
    variant: str
    price_version: str
    amount: int
    charge: int | None
    overrun: int
    reversed: int
    usage: Usage | None
    usage_source: str | None
    ending: str | None
    quote: str
    receipt: str | None
    opened_at: datetime
    ended_at: datetime | None
