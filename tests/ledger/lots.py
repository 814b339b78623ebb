"""Short words for what tests do to lots: purchases, takings and returns, under the locks that their callers take."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from asyncpg import Record
from asyncpg.pool import PoolConnectionProxy

from proxy.ledger.audit import audit
from proxy.ledger.connect import Connection
from tests.ledger.bank import Bank

__all__ = ["UNSOLD", "Lot", "Taking", "broken", "draw", "give_back", "locked", "lots", "purchase", "take"]

UNSOLD = frozenset({"the_book_has_what_orders_gave_up", "purchases_have_their_order"})
"""Purchases here have no order, nor have takings of them: all of the audit holds but this."""

_TAKE = "SELECT * FROM farebox.take($1, $2, $3, $4, 'test', NULL, $5, $6)"
_GIVE_BACK = "SELECT * FROM farebox.give_back($1, $2, $3, $4, 'test', NULL, $5, $6)"
_CREDIT = "SELECT * FROM farebox.credited($1, 'purchase', $2, $3, 'test', NULL, 'paid', $4, NULL, NULL)"


@dataclass(frozen=True, slots=True)
class Taking:
    reference: str
    outcome: str
    taken: int
    lent: int


@dataclass(frozen=True, slots=True)
class Lot:
    version: int
    kind: str
    remaining: int
    reserved: int
    owed: int


async def broken(connection: Connection) -> set[str]:
    """What a full audit finds wrong, beside UNSOLD."""
    return {check.name for check in await audit(connection) if not check.ok} - UNSOLD


async def locked(
    connection: "Connection | PoolConnectionProxy[Record]",
    account_id: UUID,
    kind: str,
    reference: str,
    query: str,
    *arguments: Any,
) -> Any:
    """The query's row, in one transaction with the locks before it."""
    async with connection.transaction():
        await connection.execute("SELECT farebox.lock_reference($1, $2)", kind, reference)
        await connection.execute("SELECT farebox.lock_accounts(ARRAY[$1::uuid], NULL)", account_id)
        return await connection.fetchrow(query, *arguments)


async def purchase(bank: Bank, account_id: UUID, amount: int, *, expires_at: datetime | None = None) -> int:
    """Credits that were paid for; their lot's version."""
    reference = f"pi_{uuid4().hex}"
    row = await locked(
        bank.owner, account_id, "purchase", reference, _CREDIT, account_id, amount, reference, expires_at
    )
    version: int = row["transfer_version"]
    return version


async def take(
    bank: Bank,
    account_id: UUID,
    lot: int,
    amount: int,
    *,
    kind: str = "refund",
    at_most_lot: bool = False,
    reference: str | None = None,
    connection: "Connection | PoolConnectionProxy[Record] | None" = None,
) -> Taking:
    """A refund's or a dispute's taking, aimed at that lot."""
    reference = reference or f"re_{uuid4().hex}"
    arguments = (account_id, kind, amount, reference, lot, at_most_lot)
    row = await locked(connection or bank.owner, account_id, kind, reference, _TAKE, *arguments)
    return Taking(reference, row["outcome"], row["taken"], row["lent"])


async def give_back(
    bank: Bank,
    account_id: UUID,
    lot: int,
    amount: int,
    references: list[str],
    *,
    kind: str = "refund_return",
    connection: "Connection | PoolConnectionProxy[Record] | None" = None,
) -> str:
    """The return of a taking, of the first of the references; its outcome."""
    arguments = (account_id, kind, amount, references[0], lot, references)
    row = await locked(connection or bank.owner, account_id, kind, references[0], _GIVE_BACK, *arguments)
    outcome: str = row["outcome"]
    return outcome


async def draw(bank: Bank, account_id: UUID, rows: int | None = None) -> int:
    """The pass over one account; how many transfers it drew."""
    drawn: int = await bank.owner.fetchval("SELECT farebox.draw_lots($1, NULL, $2)", account_id, rows)
    return drawn


async def lots(bank: Bank, account_id: UUID) -> list[Lot]:
    """Its lots in the order of their making, drawn to the end."""
    await draw(bank, account_id)
    rows = await bank.owner.fetch(
        "SELECT version, kind, remaining, reserved, owed FROM farebox.lots WHERE account_id = $1 ORDER BY version",
        account_id,
    )
    return [Lot(*row) for row in rows]
