"""Refunds, returns, expiry, calls and the pass at once on the same accounts: no credit is lost or made up by any order.

Every round does all of it to a few accounts over connections of their own, with pauses drawn from the round's seed, and
everything that may be said twice is said twice, at the same time.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from proxy.core.usage import Usage
from proxy.ledger.connect import Pool, Role, create_pool
from proxy.ledger.records import ApiKey, Mark, Reserve
from tests.ledger.bank import Bank
from tests.ledger.lots import broken, draw, give_back, lots, purchase, take

ROUNDS = 6
ACCOUNTS = 5
HOLDS = 6
PAID, GIVEN, PROMO = 1_000, 100, 300
HELD = 150


@dataclass
class Scene:
    """One account in one round. ``charged``: what its calls cost in the end; ``returned``: the refund failed."""

    bank: Bank
    owners: "Pool"
    control: "Pool"
    key: ApiKey
    lot: int
    holds: list[Reserve]
    returned: bool
    chance: random.Random = field(repr=False)
    charged: int = 0

    @property
    def id(self) -> UUID:
        return self.key.account_id

    async def pause(self) -> None:
        await asyncio.sleep(self.chance.choice((0, 0, 0.001, 0.002, 0.004, 0.008)))

    async def finalize(self, number: int) -> None:
        """Charged within its hold or above it; one comes back from the dead, one is given back in part."""
        charge = (40, HELD, 0, 2 * HELD, 90, 60)[number]
        self.charged += charge - (10 if number == 4 else 0)
        await self.pause()
        if number == 0:
            await self.bank.holds.heartbeat(self.holds[0].worker_id, [Mark(self.holds[0].hold_id, Usage(output=70))])
        await asyncio.gather(*(self.bank.finalize(self.holds[number], charge) for _ in range(2)))
        if number == 4:
            await self.pause()
            terms = {"reference": f"{self.id} part", "actor": "test", "reason": "test"}
            await asyncio.gather(*(self.bank.control.reverse(self.holds[4].hold_id, 10, **terms) for _ in range(2)))

    async def refund(self) -> None:
        await self.pause()
        reference = f"re_{self.id}"
        await asyncio.gather(*(self.take(reference) for _ in range(2)))
        if self.returned:
            await self.pause()
            async with self.owners.acquire() as connection:
                assert await give_back(self.bank, self.id, self.lot, PAID, [reference], connection=connection) == "done"

    async def take(self, reference: str) -> None:
        async with self.owners.acquire() as connection:
            taking = await take(self.bank, self.id, self.lot, PAID, reference=reference, connection=connection)
        assert (taking.outcome, taking.taken) == ("done", PAID)

    async def expire(self) -> None:
        for _ in range(4):
            await self.pause()
            await self.control.fetchval("SELECT farebox.expire_lots($1)", self.id)

    async def draw(self) -> None:
        for rows in (1, 2, None, 3, None):
            await self.pause()
            await self.control.fetchval("SELECT farebox.draw_lots($1, NULL, $2)", self.id, rows)

    async def draw_all(self) -> None:
        await self.pause()
        await self.control.fetch("SELECT * FROM farebox.draw_accounts(ARRAY[$1::uuid], 100)", self.id)

    def everything(self) -> list[Awaitable[None]]:
        works: list[Callable[[], Awaitable[None]]] = [
            *(self.refund, self.expire, self.expire, self.draw, self.draw_all),
            *(lambda number=number: self.finalize(number) for number in range(HOLDS)),
        ]
        self.chance.shuffle(works)
        return [work() for work in works]

    async def check(self) -> None:
        """What is left is what came in, less what was charged, refunded and expired; nothing of the promotion is."""
        await self.control.fetchval("SELECT farebox.expire_lots($1)", self.id)
        book = await self.bank.book(self.id)
        expired = -sum(amount for kind, amount in book if kind == "expiry")
        balance, held, debt = await self.bank.money(self.id)
        refunded = 0 if self.returned else PAID
        assert (balance - debt, held) == (PAID + GIVEN + PROMO - self.charged - refunded - expired, 0)
        found = await lots(self.bank, self.id)
        assert sum(lot.remaining for lot in found) == balance
        assert [lot.remaining for lot in found if lot.kind == "promo"] == [0]
        assert all(lot.owed == 0 for lot in found if balance)


async def test_refunds_returns_expiry_calls_and_the_pass_at_once(own_bank: Bank) -> None:
    control = await create_pool(own_bank.database.app, Role.CONTROL, size=12, lock_ms=30_000, statement_seconds=60)
    async with _owners(own_bank) as owners:
        for seed in range(ROUNDS):
            chance = random.Random(seed)
            scenes = [await _scene(own_bank, owners, control, chance, number) for number in range(ACCOUNTS)]
            await own_bank.owner.execute(
                "UPDATE farebox.lots SET expires_at = clock_timestamp() WHERE expires_at > clock_timestamp()"
            )
            await asyncio.gather(*(work for scene in scenes for work in scene.everything()))
            for scene in scenes:
                await scene.check()
    await control.close()
    assert await broken(own_bank.owner) == set()


def _owners(bank: Bank) -> "Pool":
    """Connections that act as the owner, whose functions call what these tests call themselves."""
    return asyncpg.create_pool(bank.database.owner, min_size=0, max_size=8)


async def _scene(bank: Bank, owners: "Pool", control: "Pool", chance: random.Random, number: int) -> Scene:
    account, key = await bank.open_account(GIVEN)
    lot = await purchase(bank, account.id, PAID)
    soon = datetime.now(UTC) + timedelta(days=1)
    await bank.control.grant(account.id, PROMO, kind="promo", reference=f"{account.id}", actor="test", expires_at=soon)
    holds = [(await bank.reserve(key, HELD))[0] for _ in range(HOLDS)]
    await draw(bank, account.id, 2)
    return Scene(bank, owners, control, key, lot, holds, returned=number % 2 == 1, chance=chance)
