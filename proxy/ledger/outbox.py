"""The outbox: messages to the operator's own endpoint, from where they were written to where they are told.

They are written by the functions that move money, in the same transactions. Here they are taken for a while, and what
became of them is written back; whoever took one and died loses it to the next one. One method for each SQL function.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg

from proxy.ledger.connect import Database, translated
from proxy.ledger.errors import Unknown
from proxy.ledger.records import check_amount, check_text

__all__ = ["Message", "MessageState", "Outbox", "Waiting"]

ERROR_CHARS_MAX = 300

MessageState = Literal["waiting", "delivered", "given_up"]

_LIST = """
    SELECT o.* FROM farebox.outbox o
     WHERE ($1::uuid IS NULL
            OR (o.created_at, o.id) < (SELECT b.created_at, b.id FROM farebox.outbox b WHERE b.id = $1))
       AND CASE $2::text
               WHEN 'waiting' THEN o.delivered_at IS NULL AND o.given_up_at IS NULL
               WHEN 'delivered' THEN o.delivered_at IS NOT NULL
               WHEN 'given_up' THEN o.given_up_at IS NOT NULL
               ELSE true
           END
     ORDER BY o.created_at DESC, o.id DESC
     LIMIT $3
"""
_WAITING = """
    SELECT count(*) FILTER (WHERE o.given_up_at IS NULL), count(o.given_up_at),
           coalesce(extract(epoch FROM clock_timestamp() - min(o.created_at) FILTER (WHERE o.given_up_at IS NULL)), 0)
      FROM farebox.outbox o
     WHERE o.delivered_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``payload`` is the body as it is sent, the same at each attempt; ``attempts`` counts those begun."""

    id: UUID
    type: str
    account_id: UUID
    payload: str
    created_at: datetime
    next_at: datetime
    attempts: int
    error: str | None
    delivered_at: datetime | None
    given_up_at: datetime | None

    @property
    def webhook_id(self) -> str:
        """What the receiver knows it by, at every attempt."""
        return f"msg_{self.id.hex}"

    @property
    def state(self) -> MessageState:
        if self.delivered_at is not None:
            return "delivered"
        return "waiting" if self.given_up_at is None else "given_up"


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many messages wait to be delivered, how many were given up, and how old the oldest that waits is."""

    messages: int
    given_up: int
    oldest_seconds: float


class Outbox:
    """Messages out. ``database`` acts as ``Role.CONTROL``. Raises LedgerUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, limit: int, *, lease_seconds: float) -> list[Message]:
        """At most ``limit`` messages whose time has come; nobody else gets them before the lease is over."""
        lease = timedelta(seconds=lease_seconds)
        rows = await self._rows("SELECT * FROM farebox.claim_messages($1, $2)", limit, lease)
        return [_message(row) for row in rows]

    async def delivered(self, message_id: UUID) -> None:
        """It has arrived."""
        await self._rows("SELECT farebox.message_delivered($1)", message_id)

    async def failed(self, message: Message, error: str, *, again_seconds: float | None) -> None:
        """This attempt has failed; the next one is due in ``again_seconds``, None: there will be none."""
        again = None if again_seconds is None else timedelta(seconds=again_seconds)
        text = error.replace("\0", "?").encode(errors="replace").decode()[:ERROR_CHARS_MAX]
        await self._rows("SELECT farebox.message_failed($1, $2, $3, $4)", message.id, message.attempts, text, again)

    async def messages(
        self, *, state: MessageState | None = None, after: UUID | None = None, limit: int = 100
    ) -> list[Message]:
        """At most ``limit`` messages, the newest first; ``after``: those older than that one."""
        return [_message(row) for row in await self._rows(_LIST, after, state, limit)]

    async def resend(self, message_id: UUID) -> None:
        """Send it (again), under its old id. Raises Unknown."""
        if not await self._value("SELECT farebox.resend_messages($1)", message_id):
            raise Unknown(f"no message msg_{message_id.hex}")

    async def resend_given_up(self) -> int:
        """Send all again that were given up; how many."""
        sent: int = await self._value("SELECT farebox.resend_messages(NULL)")
        return sent

    async def forget(self, *, age_seconds: float, stale_seconds: float) -> int:
        """Remove what came to its end so long ago; how many. What was due for ``stale_seconds`` untried is given up."""
        age, stale = timedelta(seconds=age_seconds), timedelta(seconds=stale_seconds)
        gone: int = await self._value("SELECT farebox.forget_messages($1, $2)", age, stale)
        return gone

    async def waiting(self) -> Waiting:
        """How far behind the telling is."""
        [row] = await self._rows(_WAITING)
        return Waiting(row[0], row[1], float(row[2]))

    async def tell_alerts(self, low_balance: int | None, *, limit: int) -> int | None:
        """Write messages for accounts that have run low or come into debt, or note that they are well again.

        How many accounts were written about, at most ``limit``; None: another process is at it. ``low_balance``:
        microcredits, below which an account counts as low that has no mark of its own; None: such accounts never do.
        """
        told: int | None = await self._value("SELECT farebox.tell_alerts($1, $2)", low_balance, limit)
        return told

    async def set_low_balance(self, account_id: UUID, low_balance: int | None) -> None:
        """The account's own mark; None: the installation's. Raises Unknown."""
        if low_balance is not None:
            check_amount("low_balance", low_balance)
        if await self._value("SELECT farebox.set_low_balance($1, $2)", account_id, low_balance) == "unknown":
            raise Unknown(f"no account {account_id}")

    async def _rows(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        for value in arguments:
            if isinstance(value, str):
                check_text("message", value)
        with translated():
            return await self._database.fetch(query, *arguments)

    async def _value(self, query: str, *arguments: Any) -> Any:
        [row] = await self._rows(query, *arguments)
        return row[0]


def _message(row: asyncpg.Record) -> Message:
    return Message(
        id=row["id"],
        type=row["type"],
        account_id=row["account_id"],
        payload=row["payload"],
        created_at=row["created_at"],
        next_at=row["next_at"],
        attempts=row["attempts"],
        error=row["error"],
        delivered_at=row["delivered_at"],
        given_up_at=row["given_up_at"],
    )
