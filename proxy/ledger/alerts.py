"""Looking for accounts that have run low or come into debt, in every server whose operator wants to be told.

Each process runs the loop; the ledger sees to it that one at a time looks. A look reads every account's row once, as
the sealer does; what it finds becomes messages in the outbox, and the marks that say who was told, in one transaction.
"""

import asyncio
import random

import asyncpg
import structlog

from proxy.ledger.connect import Role, connect
from proxy.ledger.errors import LedgerError
from proxy.ledger.outbox import Outbox

__all__ = ["Alerts"]

log = structlog.get_logger("farebox.ledger")

LOOK_SECONDS = 30.0
ACCOUNTS_MAX = 500
"""Accounts told of in one transaction."""
CALL_SECONDS = 30.0


class Alerts:
    """The loop. ``low_balance``: microcredits, below which an account is told of; None: only those with a mark of
    their own are."""

    def __init__(self, dsn: str, *, low_balance: int | None, look_seconds: float = LOOK_SECONDS) -> None:
        self._dsn = dsn
        self._low_balance = low_balance
        self._look_seconds = look_seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first look comes soon."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End. A call in flight is cut off: it is one transaction."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def look(self) -> int:
        """Tell of all there are to tell of now, unless another process is at it; how many. Raises LedgerUnavailable."""
        # A connection a look: it is idle most of the time, and nothing is lost with it.
        connection = await connect(self._dsn, Role.CONTROL, statement_seconds=CALL_SECONDS)
        try:
            outbox = Outbox(connection)
            told = 0
            while (found := await outbox.tell_alerts(self._low_balance, limit=ACCOUNTS_MAX)) is not None:
                told += found
                if found < ACCOUNTS_MAX:
                    break
            return told
        finally:
            connection.terminate()

    async def _run(self) -> None:
        while True:
            # Jitter, so that the workers' looks don't fall together.
            await asyncio.sleep(self._look_seconds * random.uniform(0.5, 1.0))  # noqa: S311
            try:
                await self.look()
            except (LedgerError, asyncpg.PostgresError) as error:
                log.warning("accounts that run low were not looked for", reason=str(error))
