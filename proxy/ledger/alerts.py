"""Looking for accounts that have run low or come into debt, in every server whose operator wants to be told.

Each process runs the loop; the ledger sees to it that one at a time looks. A look reads every account's row once, as
the sealer does; what it finds becomes messages in the outbox, and the marks that say who was told, in one transaction.
"""

import structlog

from proxy.ledger.connect import Role, connect
from proxy.ledger.outbox import Outbox
from proxy.ledger.rounds import Rounds

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
        self._rounds = Rounds(self.look, seconds=look_seconds, complaint="accounts that run low were not looked for")

    def start(self) -> None:
        """Begin; the first look comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. A call in flight is cut off: it is one transaction."""
        await self._rounds.stop()

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
