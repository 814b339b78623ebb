"""What goes into the ledger and comes out of it: frozen values, one per SQL function's argument row and result row.

Amounts are microcredits. Expected refusals are *outcomes* with a name, not exceptions. What goes in is checked when it
is made: a value that Postgres could not store never gets into a batch, where it would fail its neighbours.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal
from uuid import UUID

from proxy.core.money import AMOUNT_MAX
from proxy.core.usage import Usage
from proxy.ledger.errors import InvalidValue

__all__ = [
    "Account",
    "ApiKey",
    "Ended",
    "Expired",
    "Extend",
    "ExtendOutcome",
    "Extended",
    "Finalize",
    "FinalizeOutcome",
    "Finalized",
    "Freeze",
    "Lot",
    "LotKind",
    "Mark",
    "Release",
    "Released",
    "Renewed",
    "Reserve",
    "ReserveOutcome",
    "Reserved",
    "Transfer",
    "check_amount",
    "check_text",
]

# The largest count in a signed 64-bit column.
_COUNT_MAX = 2**63 - 1


def check_text(field: str, text: str | None) -> None:
    """Raises InvalidValue for text that Postgres can't store: NUL, or half of a surrogate pair."""
    if text is None:
        return
    if "\0" in text:
        raise InvalidValue(f"{field} contains a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidValue(f"{field} contains a lone surrogate at character {error.start}") from error


def check_amount(field: str, amount: int, *, least: int = 0) -> None:
    """Raises InvalidValue for microcredits below ``least`` or above AMOUNT_MAX."""
    if not least <= amount <= AMOUNT_MAX:
        raise InvalidValue(f"{field} is {amount} microcredits; expected {least} to {AMOUNT_MAX}")


def _check_usage(usage: Usage) -> None:
    if max(usage.as_tuple()) > _COUNT_MAX:
        raise InvalidValue(f"a token count is above {_COUNT_MAX}")


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
    frozen_at: datetime | None = None
    """While it is set nothing is reserved; ``Freeze`` says why."""

    @property
    def available(self) -> int:
        return self.balance - self.held


@dataclass(frozen=True, slots=True)
class Freeze:
    """A reason for which an account may reserve nothing, until it is lifted. ``reference``: a dispute's id, mostly."""

    reference: str
    reason: str
    actor: str
    created_at: datetime
    lifted_at: datetime | None
    lifted_by: str | None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A credential of an account. ``version`` rises with every change, so that ``reserve`` can tell a stale copy.

    ``models`` None: all. ``spend_limit`` None: unlimited; else microcredits over the key's life, held ones included.
    ``profile`` None: the server's default limits profile. ``account_frozen``: known where the gateway asked; nothing is
    reserved then, whatever the key.
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
    account_frozen: bool = False


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
    """The key's version is another than the caller's (revoked, edited), or its account is frozen: reload it once."""
    KEY_EXPIRED = "key_expired"
    WORKER_LAPSED = "worker_lapsed"
    """The worker's lease is over: it may not admit until it has renewed."""
    CONFLICT = "conflict"
    """The hold id is known with another fingerprint."""
    ENDED = "ended"
    """The hold id has already ended (a tombstone, too): nothing is held."""
    UNKNOWN = "unknown"
    """Account, key or price (version, model, variant) unknown."""
    BUSY = "busy"
    """Somebody else has the account locked and the call was not to wait (any longer): nothing was done, try again."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hold ``want`` microcredits, or as much as is available down to ``at_least``.

    ``quote`` is JSON text for the receipt (bounds, caps); the ledger stores it and never looks into it.
    Raises InvalidValue unless 0 <= at_least <= want <= AMOUNT_MAX and every text can be stored.
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

    def __post_init__(self) -> None:
        check_amount("want", self.want)
        check_amount("at_least", self.at_least)
        if self.at_least > self.want:
            raise InvalidValue(f"at_least is {self.at_least}, above want, {self.want}")
        for field in ("key_id", "price_version", "model", "variant", "quote"):
            check_text(field, getattr(self, field))


@dataclass(frozen=True, slots=True)
class Reserved:
    """``granted`` is 0 unless GRANTED.

    Balance, held and debt are the account's after the call, spend_limit_left the key's.
    """

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
    BUSY = "busy"
    """Somebody else has the account locked: nothing was done, try again."""


@dataclass(frozen=True, slots=True)
class Finalize:
    """End a hold with its final charge. Self-contained: it settles even where the reserve was never seen.

    ``charge`` is microcredits; where ``usage_source`` is ``counted`` the ledger never charges above the hold (a hold it
    never saw has no amount to go by: there the charge stands).
    ``capped`` says why ``charge`` is less than the usage costs (a reported usage far above its bound); None where it
    isn't: the audit recomputes every charge that has no such reason.
    ``receipt`` is JSON text stored beside it (raw usage, how the answer ended, cap sent). After ``expire``: a true-up.
    Raises InvalidValue as Reserve does.
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
    capped: str | None = None

    def __post_init__(self) -> None:
        check_amount("charge", self.charge)
        _check_usage(self.usage)
        for field in ("key_id", "usage_source", "price_version", "model", "variant", "ending", "receipt", "capped"):
            check_text(field, getattr(self, field))


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
class Release:
    """End a hold with no charge. An unknown id becomes a tombstone: its reserve, arriving late, is told ``ended``."""

    hold_id: UUID
    account_id: UUID
    worker_id: UUID


@dataclass(frozen=True, slots=True)
class Released:
    """``released``: microcredits given back by this call; 0 where the hold had ended or was unknown (now a tombstone).

    ``state``: the hold's after it; or ``conflict`` (another account's hold), ``unknown`` (no such account), ``busy``.
    """

    released: int
    state: str


class ExtendOutcome(StrEnum):
    """What became of an extension."""

    EXTENDED = "extended"
    """The hold holds ``at_least``, by this call or before it."""
    INSUFFICIENT = "insufficient"
    """The account wouldn't carry ``at_least`` if it held nothing else, or debt stands."""
    SPEND_LIMIT = "spend_limit"
    """Nor would the key's own spend limit."""
    CREDITS_HELD = "credits_held"
    """They would, but other holds take it now."""
    WORKER_LAPSED = "worker_lapsed"
    ENDED = "ended"
    """The hold has ended: settled, released, or expired by the sweeper."""
    CONFLICT = "conflict"
    """It is another account's or another worker's."""
    UNKNOWN = "unknown"
    BUSY = "busy"
    """Somebody else has the account locked: nothing was done, try again."""


@dataclass(frozen=True, slots=True)
class Extend:
    """Let an open hold hold ``total`` microcredits in all, or as much as is available, down to ``at_least`` in all.

    Absolute, so that it may be said again. Raises InvalidValue unless 0 <= at_least <= total <= AMOUNT_MAX.
    """

    hold_id: UUID
    account_id: UUID
    worker_id: UUID
    total: int
    at_least: int

    def __post_init__(self) -> None:
        check_amount("total", self.total)
        check_amount("at_least", self.at_least)
        if self.at_least > self.total:
            raise InvalidValue(f"at_least is {self.at_least}, above total, {self.total}")


@dataclass(frozen=True, slots=True)
class Extended:
    """``total``: what the hold holds now, whatever the outcome; 0 where it isn't the caller's.

    Balance, held and debt are the account's after the call, spend_limit_left the key's.
    """

    outcome: ExtendOutcome
    total: int = 0
    balance: int = 0
    held: int = 0
    debt: int = 0
    spend_limit_left: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """Progress of an open hold: absolute totals by class, never increments."""

    hold_id: UUID
    usage: Usage

    def __post_init__(self) -> None:
        _check_usage(self.usage)


@dataclass(frozen=True, slots=True)
class Renewed:
    """What became of a heartbeat: true where the lease was renewed. ``marked``: the holds whose mark was stored."""

    renewed: bool
    marked: frozenset[UUID] = frozenset()

    def __bool__(self) -> bool:
        return self.renewed


@dataclass(frozen=True, slots=True)
class Expired:
    """A hold that the sweeper settled provisionally."""

    hold_id: UUID
    account_id: UUID
    charge: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One append-only row. The customer is ``account_id``; ``debit`` and ``credit`` name both sides."""

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


LotKind = Literal["paid", "granted", "promo"]


@dataclass(frozen=True, slots=True)
class Lot:
    """What a transfer that brought credits in has left; ``version`` is that transfer's.

    Of ``remaining``, ``reserved`` is spoken for by refunds under way, and ``owed`` to refunds that took more than was
    available. Lots of a lower ``priority`` are drawn first.
    """

    account_id: UUID
    version: int
    kind: LotKind
    amount: int
    remaining: int
    reserved: int
    owed: int
    priority: int
    expires_at: datetime | None
    order_id: UUID | None
    created_at: datetime

    @property
    def free(self) -> int:
        """What calls may still draw."""
        return self.remaining - self.reserved - self.owed


@dataclass(frozen=True, slots=True)
class Ended:
    """A hold as the receipt shows it. ``charge`` None while open. JSON texts as they were stored.

    A tombstone (released or settled before its reserve came) knows only what its end said: the rest is None.
    ``rates`` (microcredits per million tokens, in TOKEN_CLASSES order) and ``per_request``: what it was charged at.
    """

    hold_id: UUID
    account_id: UUID
    key_id: str | None
    state: str
    model: str | None
    variant: str | None
    price_version: str | None
    amount: int
    charge: int | None
    overrun: int
    reversed: int
    usage: Usage | None
    usage_source: str | None
    capped: str | None
    ending: str | None
    quote: str | None
    receipt: str | None
    opened_at: datetime
    ended_at: datetime | None
    rates: tuple[int, ...] | None = None
    per_request: int = 0
