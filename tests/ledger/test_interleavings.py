"""What may happen to one hold at once, in ten thousand orders: the end is the same, and nobody waits for ever.

A worker extends its holds, reports their progress and settles them, each of it twice, as after lost replies; its lease
ends somewhere in between, and two sweepers come. Every round does that to many holds of a few accounts over several
connections, with pauses drawn from the round's seed.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from proxy.core.usage import Usage
from proxy.ledger.audit import audit
from proxy.ledger.connect import Pool, Role, create_pool
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import ApiKey, Extend, FinalizeOutcome, Mark, Release, Reserve
from tests.ledger.bank import Bank, uuid7

ROUNDS = 250
HOLDS = 40
ACCOUNTS = 8
AMOUNT = 100
LARGE = 10**9


@dataclass
class Round:
    """One worker, its holds, and what each of them is due. Odd holds are released, the others charged."""

    seed: int
    bank: Bank
    holds: HoldLedger
    reserves: list[Reserve]
    seen: Counter[str]
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def due(self, number: int) -> int:
        """Some within the hold, some above it: a reported charge may be."""
        return 0 if number % 2 else 1 + (number * 37 + self.seed) % (2 * AMOUNT)

    async def pause(self) -> None:
        await asyncio.sleep(self.chance.choice((0, 0, 0.0005, 0.001, 0.002, 0.004)))

    def shuffled(self) -> list[int]:
        order = list(range(len(self.reserves)))
        self.chance.shuffle(order)
        return order

    async def extend(self) -> None:
        for part in _parts(self.shuffled()):
            await self.pause()
            rows = [
                Extend(r.hold_id, r.account_id, r.worker_id, AMOUNT * 2, AMOUNT)
                for r in (self.reserves[i] for i in part)
            ]
            results = await self.holds.extend_batch(rows)
            self.seen.update(f"extend {result.outcome}" for result in results)

    async def report(self) -> None:
        for step in range(3):
            await self.pause()
            marks = [Mark(self.reserves[i].hold_id, Usage(output=step * 7 + i)) for i in self.shuffled()]
            await self.holds.heartbeat(self.reserves[0].worker_id, marks)

    async def settle(self) -> None:
        """Settle every hold in batches, and again what was busy."""
        left = self.shuffled()
        while left:
            await self.pause()
            part, left = left[:12], left[12:]
            charged = [i for i in part if i % 2 == 0]
            given_back = [i for i in part if i % 2]
            finalizes = [self.bank.a_finalize(self.reserves[i], self.due(i)) for i in charged]
            releases = [Release(r.hold_id, r.account_id, r.worker_id) for r in (self.reserves[i] for i in given_back)]
            ended, _, released = await self.holds.batch(finalizes, (), releases)
            self.seen.update(f"finalize {result.outcome}" for result in ended)
            self.seen.update(f"release {result.state}" for result in released)
            left += [i for i, result in zip(charged, ended, strict=True) if result.outcome is FinalizeOutcome.BUSY]
            left += [i for i, result in zip(given_back, released, strict=True) if result.state == "busy"]

    async def lapse_and_sweep(self) -> None:
        for _ in range(self.chance.randrange(4)):
            await self.pause()
        await self.holds.stop_worker(self.reserves[0].worker_id)
        for _ in range(3):
            expired = await self.holds.expire_holds(500, restart_grace_seconds=0)
            self.seen["swept"] += len(expired)
            await self.pause()


async def test_ten_thousand_orders_have_one_end(own_bank: Bank) -> None:
    bank, seen = own_bank, Counter[str]()
    customers = [await bank.open_account(LARGE) for _ in range(ACCOUNTS)]
    due = Counter[str]()
    pool = await create_pool(bank.database.app, Role.GATEWAY, size=8)
    try:
        for seed in range(ROUNDS):
            one = await _opened(bank, pool, [key for _, key in customers], seed, seen)
            work: list[Callable[[], Awaitable[None]]] = [
                one.extend, one.extend, one.report, one.settle, one.settle, one.lapse_and_sweep, one.lapse_and_sweep,
            ]  # fmt: skip
            one.chance.shuffle(work)
            async with asyncio.timeout(60):
                await asyncio.gather(*(step() for step in work))
            for number, reserve in enumerate(one.reserves):
                due[str(reserve.account_id)] += one.due(number)
            await _check_ends(bank, one)
    finally:
        await pool.close()
    for account, _ in customers:
        money = await bank.money(account.id)
        assert money == (LARGE - due[str(account.id)], 0, 0)
    assert [check for check in await audit(bank.owner) if not check.ok] == []
    # None of it may be a race that never was.
    for happened in ("swept", "extend extended", "finalize final", "release released", "release final"):
        assert seen[happened] > HOLDS, (happened, seen)


async def _opened(bank: Bank, pool: Pool, keys: Sequence[ApiKey], seed: int, seen: Counter[str]) -> Round:
    holds = HoldLedger(pool)
    worker_id = uuid7()
    await holds.start_worker(worker_id, "host", "test")
    reserves = [bank.a_reserve(keys[i % len(keys)], AMOUNT, worker_id=worker_id) for i in range(HOLDS)]
    _, reserved, _ = await holds.batch((), reserves)
    assert {result.granted for result in reserved} == {AMOUNT}
    return Round(seed, bank, holds, reserves, seen)


async def _check_ends(bank: Bank, one: Round) -> None:
    ids = [reserve.hold_id for reserve in one.reserves]
    rows = await bank.owner.fetch("SELECT id, state, charge, overrun FROM farebox.holds WHERE id = ANY ($1)", ids)
    ends = {row["id"]: row for row in rows}
    for number, hold_id in enumerate(ids):
        end = ends[hold_id]
        wanted = ("final", one.due(number)) if number % 2 == 0 else (end["state"], 0)
        assert (end["state"], end["charge"], end["overrun"]) == (*wanted, 0), f"seed {one.seed}, hold {number}"
        assert end["state"] in ("final", "released"), f"seed {one.seed}, hold {number}"


def _parts(order: list[int]) -> list[list[int]]:
    return [order[at : at + 12] for at in range(0, len(order), 12)]
