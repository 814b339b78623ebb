"""Self-service: what an account may read of its own rows, under row-level security.

Every read is a transaction that first says whose it is; the database shows that account's rows and no others, whatever
the query says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from proxy.core.usage import Usage
from proxy.ledger.connect import Pool, translated
from proxy.ledger.orders import Order, order
from proxy.ledger.records import Account, Ended, Lot, Transfer
from proxy.ledger.reports import report
from proxy.ledger.rows import account, ended, lot, transfer

__all__ = ["AccountReader", "DayUsage"]

_ACCOUNT = report("account")
_EXPIRING = report("expiring")
_LOTS = report("lots")
_FIND_ORDER = report("find_order")
_ORDERS = report("orders")
_RECEIPT = report("receipt")
_TRANSFERS = report("transfers")
_USAGE = report("usage")

# Hold ids are made on machines whose clocks may be off against the database's.
_CLOCK_ERROR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class DayUsage:
    """A UTC day's settled calls of one model. ``charge``: microcredits, less what was reversed."""

    day: date
    model: str
    requests: int
    usage: Usage
    charge: int


class AccountReader:
    """An account's own rows. ``pool`` acts as ``Role.READER``. All raise LedgerUnavailable."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def account(self, account_id: UUID) -> Account | None:
        """The account; None if there is none."""
        for row in await self._rows(account_id, _ACCOUNT, account_id):
            return account(row)
        return None

    async def transfers(self, account_id: UUID, *, before: int | None = None, limit: int = 100) -> list[Transfer]:
        """Its transfers, newest first: at most ``limit``, of versions below ``before``."""
        return [transfer(row) for row in await self._rows(account_id, _TRANSFERS, account_id, before, limit)]

    async def lots(self, account_id: UUID, *, limit: int = 100) -> list[Lot]:
        """Its lots that have anything left, in the order in which they are drawn: at most ``limit``.

        As they were at the last pass, some seconds ago.
        """
        return [lot(row) for row in await self._rows(account_id, _LOTS, account_id, False, limit)]

    async def expiring(self, account_id: UUID, before: datetime) -> list[Lot]:
        """Its lots that expire before that moment, the soonest first, with something left that calls may draw."""
        return [lot(row) for row in await self._rows(account_id, _EXPIRING, account_id, before)]

    async def usage(self, account_id: UUID, since: datetime, until: datetime) -> list[DayUsage]:
        """Its settled calls opened from ``since`` on and before ``until``, by UTC day and model, newest day first."""
        first, last = _id_at(since - _CLOCK_ERROR), _id_at(until + _CLOCK_ERROR)
        rows = await self._rows(account_id, _USAGE, account_id, since, until, first, last)
        return [
            DayUsage(row["day"], row["model"], row["requests"], Usage(*row["usage"]), row["charge"]) for row in rows
        ]

    async def receipt(self, account_id: UUID, hold_id: UUID) -> Ended | None:
        """One of its calls; None where there is none, or it is another account's."""
        for row in await self._rows(account_id, _RECEIPT, hold_id):
            return ended(row)
        return None

    async def orders(self, account_id: UUID, *, after: UUID | None = None, limit: int = 100) -> list[Order]:
        """Its orders, newest first: at most ``limit``, behind the order ``after``."""
        return [order(row) for row in await self._rows(account_id, _ORDERS, account_id, None, after, limit)]

    async def order(self, account_id: UUID, order_id: UUID) -> Order | None:
        """One of its orders; None where there is none, or it is another account's."""
        for row in await self._rows(account_id, _FIND_ORDER, order_id, None):
            return order(row)
        return None

    async def _rows(self, account_id: UUID, query: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        with translated():
            async with self._pool.acquire() as connection, connection.transaction(readonly=True):
                await connection.execute("SELECT set_config('farebox.account', $1, true)", str(account_id))
                return await connection.fetch(query, *arguments)


def _id_at(moment: datetime) -> UUID:
    """The least UUIDv7 of that moment."""
    milliseconds = max(0, int(moment.timestamp() * 1000))
    return UUID(int=min(milliseconds, 2**48 - 1) << 80)
