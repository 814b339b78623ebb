"""What waits for the ledger: a row with whoever waits for it, an account's lane, and how much of either may be."""

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

from proxy.ledger.errors import LedgerError, LedgerUnavailable
from proxy.ledger.records import Finalize

__all__ = [
    "BatchLimits",
    "Item",
    "Kind",
    "Lane",
    "LedgerBusy",
    "LedgerStopped",
    "LedgerTimeout",
    "Remains",
    "RowRejected",
]


class LedgerBusy(LedgerUnavailable):
    """Too many calls are waiting for the ledger, or for this account: nothing was held."""


class LedgerTimeout(LedgerUnavailable):
    """The ledger didn't answer in time: whatever it does with the call yet, nothing stays held."""


class LedgerStopped(LedgerUnavailable):
    """This process is stopping, or hasn't started: nothing was held."""


class RowRejected(LedgerError):
    """The database will never carry out this row, for what it says. Nothing was done."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much may wait, and how long. Seconds are real time."""

    rows_max: int = 128
    """Reserves, settlements, and extensions, in one call. More would keep the accounts locked for longer and gain
    nothing: it is better that Postgres works on one call while this process hands out the answers of the last."""
    waiting_max: int = 16_384
    """Reserves without an answer, and settlements without one, above which no reserve is taken."""
    account_waiting_max: int = 8_192
    """Reserves waiting for one account that somebody else has locked."""
    reserve_seconds: float = 5.0
    """After this a reserve or an extension that has no answer fails with LedgerTimeout."""
    call_seconds: float = 10.0
    """A call without an answer is cut off with its connection. Keep it above the server's statement_timeout."""
    lock_ms: int = 250
    """How long a side line stands in the queue for a locked account's lock."""
    side_lines: int = 4
    """Connections for locked accounts, opened when they are first needed."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What was not carried out when the ledger was stopped. Empty (false) in all but the worst case."""

    finalizes: tuple[Finalize, ...] = ()
    holds: tuple[UUID, ...] = ()
    """Holds that may still be open, left to the sweeper."""

    def __bool__(self) -> bool:
        return bool(self.finalizes or self.holds)


class Kind(Enum):
    """What a row asks for. Settlements, which are carried out whoever waits, are the first two."""

    FINALIZE = "finalize"
    RELEASE = "release"
    EXTEND = "extend"
    RESERVE = "reserve"


class Item:
    """One row and who waits for it.

    ``done``: it is over, answered or dropped; the future may be done long before.
    ``in_doubt``: a call that carried it broke, so the ledger may have carried it out. ``breaks``: how many did.
    """

    __slots__ = ("breaks", "deadline", "done", "future", "in_doubt", "kind", "row", "tries")

    def __init__(self, kind: Kind, row: Any, future: "asyncio.Future[Any]", deadline: float) -> None:
        self.kind = kind
        self.row = row
        self.future = future
        self.deadline = deadline
        self.in_doubt = False
        self.done = False
        self.tries = 0
        self.breaks = 0

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more. A settlement is carried out all the same."""
        return self.kind in _AWAITED and self.future.done()


_AWAITED = (Kind.RESERVE, Kind.EXTEND)


class Lane:
    """What waits for one account that somebody else has locked."""

    __slots__ = ("account_id", "items")

    def __init__(self, account_id: UUID) -> None:
        self.account_id = account_id
        self.items: deque[Item] = deque()
