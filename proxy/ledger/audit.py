"""The audit: proves from the rows that the ledger is right, in one snapshot. What is checked is written in SQL."""

from dataclasses import dataclass

from proxy.ledger.connect import Connection, translated

__all__ = ["Check", "audit"]


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: on how many ``rows`` it was checked, and how many break it. ``example``: the id of one of them."""

    name: str
    rows: int
    violations: int
    example: str | None

    @property
    def ok(self) -> bool:
        return self.violations == 0


async def audit(connection: Connection) -> list[Check]:
    """Every check, in one snapshot, on a connection that acts as ``Role.CONTROL`` or as the owner.

    Takes seconds on millions of rows, and locks nothing that others need. Raises LedgerUnavailable.
    """
    with translated():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL statement_timeout = 0")
            rows = await connection.fetch("SELECT * FROM farebox.audit()")
    return [Check(row["name"], row["checked"], row["violations"], row["example"]) for row in rows]
