"""Idempotency-Key in the ledger: which hold an account's word for a call stands for.

A claim is made before its hold is reserved, and what it stands for later follows from that hold alone: given back, the
word is free again; charged, it is used up. So a crash, wherever it comes, leaves nothing to clean up.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

from proxy.ledger.connect import Database, translated
from proxy.ledger.records import check_text

__all__ = ["Claim", "ClaimOutcome", "Claimed", "IdempotencyLedger"]


class ClaimOutcome(StrEnum):
    """What became of a claim."""

    CLAIMED = "claimed"
    """The word is this hold's: go on."""
    RUNNING = "running"
    """The word is another hold's, which is open or just being reserved."""
    FINISHED = "finished"
    """The word is another hold's, which was charged."""
    MISMATCH = "mismatch"
    """The word is another hold's, and what it was asked for was something else."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An account's word for the call of ``hold_id``. ``key_hash``: its SHA-256; ``fingerprint``: what is asked."""

    account_id: UUID
    key_hash: bytes
    fingerprint: bytes
    hold_id: UUID
    worker_id: UUID


@dataclass(frozen=True, slots=True)
class Claimed:
    """``hold_id``: whose the word is. ``head`` and ``body``: the answer that was kept for it, if one was."""

    outcome: ClaimOutcome
    hold_id: UUID
    head: str | None = None
    body: bytes | None = None


class IdempotencyLedger:
    """One method a SQL function. ``database`` acts as ``Role.GATEWAY``. All raise LedgerUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, claim: Claim) -> Claimed:
        """Claim the word, or learn whose it is. To say it again changes nothing."""
        with translated():
            row = await self._database.fetchrow(
                "SELECT * FROM farebox.claim_key($1, $2, $3, $4, $5)",
                *(claim.account_id, claim.key_hash, claim.fingerprint, claim.hold_id, claim.worker_id),
            )
        assert row is not None
        return Claimed(ClaimOutcome(row["outcome"]), row["hold_id"], row["head"], row["body"])

    async def free(self, claim: Claim) -> bool:
        """Give up a claim whose hold was refused. False: it is another's by now, or its hold is there after all."""
        query = "SELECT farebox.free_key($1, $2, $3)"
        with translated():
            return bool(await self._database.fetchval(query, claim.account_id, claim.key_hash, claim.hold_id))

    async def keep_answer(self, hold_id: UUID, head: str, body: bytes, *, seconds: float) -> bool:
        """Keep the hold's whole answer for so long. False: one is kept already."""
        check_text("head", head)
        query = "SELECT farebox.keep_answer($1, $2, $3, $4)"
        with translated():
            return bool(await self._database.fetchval(query, hold_id, head, body, timedelta(seconds=seconds)))

    async def forget(self, limit: int, *, keep_seconds: float) -> int:
        """Remove answers whose time is over and claims older than ``keep_seconds``, at most ``limit`` of each."""
        query = "SELECT farebox.forget_keys($1, $2)"
        with translated():
            return int(await self._database.fetchval(query, limit, timedelta(seconds=keep_seconds)))
