"""The bookkeeper: seals the book behind the writers and audits what is new, in every server that serves.

Each process runs one; the ledger sees to it that one at a time works, and that they don't seal more often together than
one would alone. Nothing waits for it: where it falls behind or fails, seals and audit are late, and metrics say so.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import structlog

from proxy.ledger.audit import SINCE_LAST_ROWS, BookState, Check, audit_since_last, book_state
from proxy.ledger.connect import Connection, Role, connect, translated
from proxy.ledger.rounds import Rounds

__all__ = ["Bookkeeper", "seal"]

log = structlog.get_logger("farebox.ledger")

SEAL_SECONDS = 20.0
"""Transfers are sealed within twice this, and some more while a backlog lasts."""
AUDIT_SECONDS = 60.0
SEAL_ROWS = 20_000
"""Transfers, and ended holds, in one sealing call: some hundred milliseconds."""
BREATH_SECONDS = 0.1
"""Between two calls while there is a backlog: an old ledger's, after the upgrade that brought the seals."""
CALL_SECONDS = 30.0


async def seal(connection: Connection, *, rows: int = SEAL_ROWS, pause_seconds: float = 0.0) -> int | None:
    """Seal what is new, ``rows`` transfers and as many holds at most; how many it was. None: another process is at it.

    ``pause_seconds``: nothing is done where everything was sealed less long ago. On a connection that acts as
    ``Role.CONTROL``. Raises LedgerUnavailable.
    """
    with translated():
        sealed: int | None = await connection.fetchval(
            "SELECT farebox.seal($1, $2)", rows, timedelta(seconds=pause_seconds)
        )
    return sealed


class Bookkeeper:
    """Seals and audits in a loop. ``observe`` is told after each round how far both are, and of the checks that the
    audit's last look found broken."""

    def __init__(
        self,
        dsn: str,
        *,
        observe: Callable[[BookState, Sequence[Check]], None] = lambda state, broken: None,
        seal_seconds: float = SEAL_SECONDS,
        audit_seconds: float = AUDIT_SECONDS,
    ) -> None:
        self._dsn = dsn
        self._observe = observe
        self._seal_seconds = seal_seconds
        self._audit_seconds = audit_seconds
        self._broken: Sequence[Check] = ()
        self._rounds = Rounds(self._round, seconds=seal_seconds, complaint="the book was not sealed or audited")

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
            sealed = await seal(connection, pause_seconds=self._seal_seconds / 2)
            while sealed is not None and sealed >= SEAL_ROWS // 2:
                await asyncio.sleep(BREATH_SECONDS)
                sealed = await seal(connection)
            state = await book_state(connection)
            if self._due(state):
                state = await self._audit(connection, state)
            self._observe(state, self._broken)
        finally:
            connection.terminate()

    def _due(self, state: BookState) -> bool:
        """Whether nobody has audited for a while: any worker may have, and where all is right it shows."""
        if state.clean_at is None or self._broken:
            return True
        return datetime.now(UTC) - state.clean_at > timedelta(seconds=self._audit_seconds - self._seal_seconds)

    async def _audit(self, connection: Connection, state: BookState) -> BookState:
        while True:
            before = state.unaudited
            checks = await audit_since_last(connection)
            if not checks:
                return state
            self._broken = [check for check in checks if not check.ok]
            for check in self._broken:
                log.error(
                    "the audit found the book wrong", check=check.name, rows=check.violations, example=check.example
                )
            state = await book_state(connection)
            if state.unaudited < SINCE_LAST_ROWS or state.unaudited >= before:
                return state
            await asyncio.sleep(BREATH_SECONDS)
