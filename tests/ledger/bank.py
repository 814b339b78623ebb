"""A small bank for the ledger's tests: one worker, one price, and short words for what they say to the ledger."""

import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

from proxy.core.usage import Usage
from proxy.ledger.connect import Connection, Pool, Role, connect, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import Account, ApiKey, Extend, Extended, Finalize, Finalized, Released, Reserve, Reserved
from tests.postgres import Database

__all__ = ["BODY", "VERSION", "Bank", "open_bank", "uuid7"]

# One microcredit a token for input and output, two for reasoning; "metered" costs 5 a call besides.
RATES = {"input": 1_000_000, "output": 1_000_000}
BODY = json.dumps(
    {
        "routes": {
            "m": {
                "variants": {
                    "standard": {"rates": [1_000_000] * 5 + [2_000_000] + [1_000_000], "per_request": 0},
                    "metered": {"rates": [333] * 7, "per_request": 5},
                }
            }
        }
    }
)
VERSION = hashlib.sha256(BODY.encode()).hexdigest()


def uuid7() -> UUID:
    """A fresh hold id, as the gateway makes them."""
    random = int.from_bytes(os.urandom(10), "big")
    number = (time.time_ns() // 1_000_000) << 80 | random
    return UUID(int=number & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)


@dataclass(frozen=True, slots=True)
class Bank:
    """Ledgers for each role, one worker with a lease, and makers of rows."""

    database: Database
    pool: Pool
    holds: HoldLedger
    control: ControlLedger
    owner: Connection
    worker_id: UUID

    async def open_account(self, balance: int = 0, **terms: Any) -> tuple[Account, ApiKey]:
        """An account with that balance, and a key of it."""
        account = await self.control.create_account(f"account {uuid4().hex[:8]}")
        if balance:
            await self.control.grant(account.id, balance, reference=uuid4().hex, actor="test")
        key = await self.open_key(account.id, **terms)
        return await self.control.find_account(account.id), key

    async def open_key(self, account_id: UUID, **terms: Any) -> ApiKey:
        """One more key."""
        given = {"name": "key", "scopes": ["inference"]} | terms
        return await self.control.create_key(
            id=uuid4().hex[:12], account_id=account_id, secret_hmac=os.urandom(32), pepper_version=1, **given
        )

    def a_reserve(self, key: ApiKey, want: int, at_least: int | None = None, **changes: Any) -> Reserve:
        """A reserve of ``want``, all of it unless ``at_least`` says less."""
        made = Reserve(
            hold_id=uuid7(),
            account_id=key.account_id,
            key_id=key.id,
            key_version=key.version,
            worker_id=self.worker_id,
            want=want,
            at_least=want if at_least is None else at_least,
            price_version=VERSION,
            model="m",
            variant="standard",
            quote='{"quote": 1}',
            fingerprint=b"r" * 32,
        )
        return replace(made, **changes)

    def a_finalize(self, reserve: Reserve, charge: int, **changes: Any) -> Finalize:
        """The end of that reserve, with output tokens that cost just ``charge``."""
        made = Finalize(
            hold_id=reserve.hold_id,
            account_id=reserve.account_id,
            key_id=reserve.key_id,
            worker_id=reserve.worker_id,
            charge=charge,
            usage=Usage(output=charge),
            usage_source="reported",
            price_version=reserve.price_version,
            model=reserve.model,
            variant=reserve.variant,
            ending="stop",
            receipt='{"usage": {}}',
            fingerprint=charge.to_bytes(32, "big"),
        )
        return replace(made, **changes)

    async def reserve(
        self, key: ApiKey, want: int, at_least: int | None = None, **changes: Any
    ) -> tuple[Reserve, Reserved]:
        """Reserve; the row and its result."""
        row = self.a_reserve(key, want, at_least, **changes)
        return row, await self.holds.reserve(row)

    async def finalize(self, reserve: Reserve, charge: int, **changes: Any) -> Finalized:
        """Finalize that reserve."""
        return await self.holds.finalize(self.a_finalize(reserve, charge, **changes))

    def an_extend(self, reserve: Reserve, total: int, at_least: int | None = None, **changes: Any) -> Extend:
        """That hold's growth to ``total``, all of it unless ``at_least`` says less."""
        least = total if at_least is None else at_least
        made = Extend(reserve.hold_id, reserve.account_id, reserve.worker_id, total, least)
        return replace(made, **changes)

    async def extend(self, reserve: Reserve, total: int, at_least: int | None = None, **changes: Any) -> Extended:
        """Extend that reserve's hold."""
        return await self.holds.extend(self.an_extend(reserve, total, at_least, **changes))

    async def release(self, reserve: Reserve) -> Released:
        """Release that reserve."""
        return await self.holds.release(reserve.hold_id, reserve.account_id, reserve.worker_id)

    async def money(self, account_id: UUID) -> tuple[int, int, int]:
        """Balance, held, debt."""
        account = await self.control.find_account(account_id)
        return account.balance, account.held, account.debt

    async def book(self, account_id: UUID) -> list[tuple[str, int]]:
        """The account's transfers, oldest first: kind and signed amount."""
        transfers = await self.control.transfers(account_id, limit=1000)
        return [(t.kind, t.amount if t.credit == str(account_id) else -t.amount) for t in reversed(transfers)]

    async def lapse(self, worker_id: UUID | None = None) -> None:
        """Let the worker's lease be over."""
        await self.owner.execute(
            "UPDATE farebox.workers SET lease_until = clock_timestamp() - interval '1 second' WHERE id = $1",
            worker_id or self.worker_id,
        )

    async def expire(self, limit: int = 100) -> dict[UUID, int]:
        """Sweep; charges by hold."""
        return {e.hold_id: e.charge for e in await self.holds.expire_holds(limit, restart_grace_seconds=0)}


@asynccontextmanager
async def open_bank(database: Database, *, size: int = 10) -> AsyncIterator[Bank]:
    """A bank on that database."""
    pool = await create_pool(database.app, Role.GATEWAY, size=size, lock_ms=10_000, statement_seconds=30)
    control_pool = await create_pool(database.app, Role.CONTROL, size=4, lock_ms=10_000)
    owner = await connect(database.owner)
    try:
        holds = HoldLedger(pool)
        worker_id = uuid4()
        assert await holds.start_worker(worker_id, "host", "0.1")
        await holds.put_price_version(VERSION, BODY)
        yield Bank(database, pool, holds, ControlLedger(control_pool), owner, worker_id)
    finally:
        await owner.close()
        await control_pool.close()
        await pool.close()
