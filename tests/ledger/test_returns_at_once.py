"""Requests for refunds, refunds, disputes, calls, grants and expiry on one account over many connections: no statement
fails, whoever waits for whom, and in the end each order has given up what its refunds and disputes come to."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from proxy.ledger.audit import audit, audit_since_last
from proxy.ledger.bookkeeper import seal
from proxy.ledger.connect import Pool, Role, connect, create_pool
from proxy.ledger.disputes import DisputeLedger
from proxy.ledger.orders import Order
from proxy.ledger.records import ApiKey
from proxy.ledger.refunds import RefundLedger
from tests.ledger.bank import Bank
from tests.ledger.test_refund_requests import paid

AT_ONCE, STEPS = 8, 25


@dataclass
class Returns:
    """An order, and what Stripe would say of its refunds (amount, rank) and disputes (amount, withdrawn, asked)."""

    order: Order
    refunds: dict[str, tuple[int, int]] = field(default_factory=dict)
    disputes: dict[str, tuple[int, bool, int]] = field(default_factory=dict)

    @property
    def payment(self) -> str:
        assert self.order.payment_intent is not None
        return self.order.payment_intent

    def gone(self) -> int:
        back = sum(amount for amount, rank in self.refunds.values() if rank < 3)
        back += sum(amount for amount, withdrawn, _ in self.disputes.values() if withdrawn)
        return min(self.order.price, back)


class Crowd:
    """All of it at once."""

    def __init__(self, bank: Bank, pool: Pool, key: ApiKey, orders: list[Order], chance: random.Random) -> None:
        self.bank, self.key, self.chance, self.pool = bank, key, chance, pool
        self.refunds, self.disputes = RefundLedger(pool), DisputeLedger(pool)
        self.returns = [Returns(order) for order in orders]
        self.net = sum(order.credits + order.bonus for order in orders)

    async def busy(self) -> None:
        acts: list[Callable[[Returns], Awaitable[None]]] = [
            *(self.ask, self.ask, self.claim, self.carry_out, self.carry_out, self.refund, self.settle),
            *(self.dispute, self.dispute, self.spend, self.spend, self.give, self.expire),
        ]
        for _ in range(STEPS):
            await self.chance.choice(acts)(self.chance.choice(self.returns))

    async def ask(self, about: Returns) -> None:
        amount = self.chance.choice((None, self.chance.randint(1, about.order.price)))
        await self.refunds.open(
            *(uuid4(), about.order.id, amount), owing=amount is None and self.chance.random() < 0.5, step=1,
            actor="ann", reason=None,
        )  # fmt: skip

    async def claim(self, _: Returns) -> None:
        await self.refunds.claim(age_seconds=0, pause_seconds=0, limit=100)

    async def carry_out(self, about: Returns) -> None:
        """What is held for it is refunded, or won't be; or the refund fails, of which is heard at any time."""
        for request in [
            request for request in await self.refunds.held(limit=1000) if request.order_id == about.order.id
        ]:
            if self.chance.random() < 0.3:
                await self.refunds.release(request.id, "refused")
            else:
                await self._heard(about, f"re_{request.id}", request.amount, self.chance.randint(1, 3), request.id)

    async def refund(self, about: Returns) -> None:
        await self._heard(about, f"re_{uuid4().hex}", self.chance.randint(1, 400), self.chance.choice((1, 2)), None)

    async def settle(self, about: Returns) -> None:
        if about.refunds:
            name = self.chance.choice(list(about.refunds))
            await self._heard(about, name, about.refunds[name][0], self.chance.randint(1, 3), None)

    async def _heard(self, about: Returns, name: str, amount: int, rank: int, request: UUID | None) -> None:
        rank = max(rank, about.refunds.get(name, (amount, 0))[1])
        about.refunds[name] = (amount, rank)
        status = ("", "pending", "succeeded", "failed")[rank]
        await self.refunds.apply(
            *(name,), payment_intent=about.payment, amount=amount, currency="usd", status=status, request_id=request,
            problem=None,
        )  # fmt: skip

    async def dispute(self, about: Returns) -> None:
        name = f"dp_{about.order.id}_{self.chance.randint(0, 1)}"
        asked = await self.disputes.ask()
        amount, withdrawn = self.chance.randint(1, about.order.price), self.chance.random() < 0.6
        known = about.disputes.get(name, (amount, withdrawn, 0))
        if known[2] < asked:
            about.disputes[name] = (known[0], withdrawn, asked)
        await self.disputes.apply(
            *(name,), payment_intent=about.payment, amount=known[0], currency="usd",
            status="lost" if withdrawn else "won", withdrawn=withdrawn, asked=asked,
        )  # fmt: skip

    async def spend(self, _: Returns) -> None:
        await self.bank.control.unfreeze(self.key.account_id, reference=None, actor="ann")
        row, reserved = await self.bank.reserve(self.key, self.chance.randint(1, 300), 1)
        if reserved.granted:
            await asyncio.sleep(self.chance.choice((0, 0.01)))
            charge = self.chance.randint(0, reserved.granted + 20)
            await self.bank.finalize(row, charge)
            self.net -= charge

    async def give(self, _: Returns) -> None:
        amount = self.chance.randint(1, 200)
        await self.bank.control.grant(self.key.account_id, amount, reference=uuid4().hex, actor="ann")
        self.net += amount

    async def expire(self, _: Returns) -> None:
        async with self.pool.acquire() as connection:
            expired = await connection.fetchval("SELECT farebox.expire_lots($1)", self.key.account_id)
        self.net -= expired


@pytest.fixture
async def wide(bank: Bank) -> AsyncIterator[Pool]:
    pool = await create_pool(bank.database.app, Role.CONTROL, size=AT_ONCE, lock_ms=20_000)
    yield pool
    await pool.close()


async def keep(bank: Bank, ended: asyncio.Event) -> None:
    """Seals and audits all the while."""
    keeper = await connect(bank.database.app, Role.CONTROL, statement_seconds=60)
    try:
        while not ended.is_set():
            await seal(keeper)
            assert [check for check in await audit_since_last(keeper) if not check.ok] == []
    finally:
        await keeper.close()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_meets_nothing_fails_and_sums_decide(bank: Bank, wide: Pool, seed: int) -> None:
    _, key = await bank.open_account()
    soon = {"credits_seconds": 3600, "bonus_seconds": 1}
    orders = [
        await paid(bank, key.account_id, credits=997, price=1000, bonus=101, **soon),
        await paid(bank, key.account_id, credits=501, price=499, bonus=0),
    ]
    crowd = Crowd(bank, wide, key, orders, random.Random(seed))
    ended = asyncio.Event()
    keeping = asyncio.ensure_future(keep(bank, ended))
    async with asyncio.timeout(60):
        await asyncio.gather(*(crowd.busy() for _ in range(AT_ONCE)))
        ended.set()
        await keeping

    for about in crowd.returns:
        for request in [one for one in await crowd.refunds.held(limit=1000) if one.order_id == about.order.id]:
            await crowd.refunds.release(request.id, "refused")
        row = await bank.owner.fetchrow("SELECT taken, bonus_taken FROM farebox.orders WHERE id = $1", about.order.id)
        assert row is not None
        assert row["taken"] == about.order.credits * about.gone() // about.order.price
        assert row["bonus_taken"] <= about.order.bonus * about.gone() // about.order.price
        crowd.net -= row["taken"] + row["bonus_taken"]
    balance, held, debt = await bank.money(key.account_id)
    assert (balance - debt, held) == (crowd.net, 0)
    assert (
        await bank.owner.fetchval("SELECT sum(reserved) FROM farebox.lots WHERE account_id = $1", key.account_id) == 0
    )
    assert [check for check in await audit(bank.owner) if not check.ok] == []
