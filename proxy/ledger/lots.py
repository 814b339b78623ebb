"""The pass over lots, and their expiry, in every server that serves.

A call is admitted by its account's row alone; from which lots it was paid is found out here, behind the writers. Each
process runs a ``LotKeeper``; the ledger sees to it that one at a time draws. Nothing waits for it: where it falls
behind or fails, lots are shown as they were, credits expire late, and metrics say so. Refunds draw what they need
themselves.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import asyncpg
import structlog

from proxy.ledger.connect import Connection, Database, Role, connect, translated
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.reports import report
from proxy.ledger.rounds import Rounds

__all__ = ["DRAW_ROWS", "LotKeeper", "LotState", "draw_account", "draw_behind", "expire"]

log = structlog.get_logger("farebox.ledger")

LOTS_SECONDS = 10.0
"""Between two rounds: so late may lots be drawn, and credits expire."""
DRAW_ROWS = 20_000
"""Transfers in one call: some hundred milliseconds, in which a refund of one of its accounts may have to wait."""
ACCOUNTS_MAX = 1_000
"""Looked for at once."""
BATCH_ACCOUNTS = 50
"""In one transaction: PostgreSQL remembers 64 subtransactions of each cheaply."""
EXPIRED_ACCOUNTS_MAX = 100
BREATH_SECONDS = 0.1
"""Between two calls while there is a backlog: an old ledger's, after the upgrade that brought lots."""
CALL_SECONDS = 30.0

_BEHIND = report("accounts_behind")


@dataclass(frozen=True, slots=True)
class LotState:
    """After a round: ``behind``, transfers not yet drawn; ``broken``, accounts whose lots can't be; ``expired``,
    microcredits that this round took."""

    behind: int
    broken: int
    expired: int


async def draw_account(database: Database, account_id: UUID) -> None:
    """Draw all of an account's lots, a stretch at a time. ``database`` acts as ``Role.CONTROL``.

    For whoever is about to lock the account and wants little left to draw. Raises LedgerUnavailable.
    """
    with translated():
        while await database.fetchval("SELECT farebox.draw_lots($1, NULL, $2)", account_id, DRAW_ROWS) >= DRAW_ROWS:
            pass


async def draw_behind(connection: Connection, *, breath_seconds: float = BREATH_SECONDS) -> tuple[int, int] | None:
    """Draw the lots of all accounts that have moved. How many transfers are left to draw, and of how many accounts
    they can't be. None: another process is at it. Raises LedgerUnavailable.
    """
    due: int | None = None
    done = 0
    with translated():
        while True:
            accounts = await connection.fetch(_BEHIND, ACCOUNTS_MAX)
            behind = int(accounts[0]["behind"]) if accounts else 0
            due = behind if due is None else due
            drawn, broken = 0, 0
            for first in range(0, len(accounts), BATCH_ACCOUNTS):
                row = await _draw_batch(connection, [each["id"] for each in accounts[first : first + BATCH_ACCOUNTS]])
                if row is None:
                    return None
                drawn += row["drawn"]
                broken += row["broken"]
                if row["broken"]:
                    log.error("lots can't be drawn", account=str(row["example"]), reason=row["problem"])
            done += drawn
            # On while it gets somewhere, as far as it was behind at the beginning: what others write meanwhile is for
            # the next round, or on a busy ledger there would be none, and nothing would ever expire.
            if drawn == 0 or done >= due or (drawn < DRAW_ROWS and len(accounts) < ACCOUNTS_MAX):
                return max(0, behind - drawn), broken
            await asyncio.sleep(breath_seconds)


async def expire(connection: Connection) -> int:
    """Take what is left of expired lots, of about EXPIRED_ACCOUNTS_MAX accounts; how much it was, in microcredits.

    However many accounts it fails for, they keep no other waiting. Raises LedgerUnavailable.
    """
    total, done, after = 0, 0, None
    with translated():
        while done < EXPIRED_ACCOUNTS_MAX:
            accounts = await connection.fetch(
                "SELECT * FROM farebox.expired_accounts($1, $2)", after, EXPIRED_ACCOUNTS_MAX
            )
            for [account_id] in accounts:
                took = await _expire_account(connection, account_id)
                total += took or 0
                done += took is not None
            if len(accounts) < EXPIRED_ACCOUNTS_MAX:
                break
            after = accounts[-1][0]
    return total


async def _expire_account(connection: Connection, account_id: UUID) -> int | None:
    """What expired of this account; None: it can't be said, and the log says why."""
    try:
        await draw_account(connection, account_id)
        took: int = await connection.fetchval("SELECT farebox.expire_lots($1)", account_id)
    except (asyncpg.PostgresError, LedgerUnavailable) as error:
        if connection.is_closed():
            raise
        log.error("credits did not expire", account=str(account_id), reason=str(error))
        return None
    if took:
        log.info("credits expired", account=str(account_id), microcredits=took)
    return took


async def _draw_batch(connection: Connection, account_ids: list[UUID]) -> asyncpg.Record | None:
    async with connection.transaction():
        # What a crash takes back is drawn again, and comes to the same.
        await connection.execute("SET LOCAL synchronous_commit = off")
        return await connection.fetchrow("SELECT * FROM farebox.draw_accounts($1, $2)", account_ids, DRAW_ROWS)


class LotKeeper:
    """Draws and expires in a loop. ``observe`` is told after each round that this process did."""

    def __init__(
        self,
        dsn: str,
        *,
        observe: Callable[[LotState], None] = lambda state: None,
        lots_seconds: float = LOTS_SECONDS,
    ) -> None:
        self._dsn = dsn
        self._observe = observe
        self._rounds = Rounds(self._round, seconds=lots_seconds, complaint="lots were not drawn or expired")

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. A call in flight is cut off: it is one transaction."""
        await self._rounds.stop()

    async def _round(self) -> None:
        # A connection a round: it is idle most of the time, and nothing is lost with it.
        connection = await connect(self._dsn, Role.CONTROL, statement_seconds=CALL_SECONDS)
        try:
            drawn = await draw_behind(connection)
            if drawn is not None:
                behind, broken = drawn
                self._observe(LotState(behind, broken, await expire(connection)))
        finally:
            connection.terminate()
