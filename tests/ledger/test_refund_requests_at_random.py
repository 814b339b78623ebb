"""Requests for refunds leave no trace: two accounts of which one is asked to lay credits aside, again and again.

Both have the same orders, spend the same, and the same goes back of their payments, by refunds, failures of those and
disputes that are won and lost. One of them has requests besides, held while all of that happens, which are then
carried out (the other has that refund from the dashboard) or not. Where nothing is held any more, both are to a credit
the same.
"""

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from proxy.ledger.audit import audit, audit_since_last
from proxy.ledger.bookkeeper import seal
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.disputes import DisputeLedger
from proxy.ledger.orders import Order
from proxy.ledger.records import ApiKey, Reserve
from proxy.ledger.refunds import RefundLedger, RequestOutcome
from tests.ledger.bank import Bank
from tests.ledger.test_refund_requests import lots, paid

SEEDS = 6
STEPS = 45
TERMS = (
    {"credits": 997, "price": 1000, "bonus": 101},
    {"credits": 499, "price": 333, "bonus": 0},
    {"credits": 7, "price": 1000, "bonus": 3},
)


@dataclass
class Twin:
    """An account. ``net``: what it must have, less what its orders gave up."""

    key: ApiKey
    orders: list[Order]
    net: int
    holds: list[Reserve] = field(default_factory=list)

    @property
    def id(self) -> UUID:
        return self.key.account_id


@dataclass
class Back:
    """What of an order's payment has gone back, by the name of the refund or dispute; what is under way of refunds."""

    refunds: dict[str, int] = field(default_factory=dict)
    disputes: dict[str, int] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    """All disputes there ever were."""
    request: tuple[UUID, int] | None = None

    def of(self, received: int) -> int:
        return min(received, sum(self.refunds.values()) + sum(self.disputes.values()))


class Pair:
    """The two accounts, the one with requests first, and what may happen to them."""

    def __init__(self, bank: Bank, chance: random.Random) -> None:
        self.bank, self.chance = bank, chance
        self.refunds = RefundLedger(bank.control._pool)
        self.disputes = DisputeLedger(bank.control._pool)
        self.twins: list[Twin] = []
        self.back: list[Back] = []
        self.done: dict[str, int] = {}

    async def open(self) -> None:
        some = self.chance.sample(TERMS, self.chance.choice((1, 2, 2)))
        for _ in range(2):
            _, key = await self.bank.open_account()
            orders = [await paid(self.bank, key.account_id, **terms) for terms in some]
            self.twins.append(Twin(key, orders, sum(order.credits + order.bonus for order in orders)))
        self.back = [Back() for _ in some]

    @property
    def quiet(self) -> bool:
        """No request is held."""
        return all(back.request is None for back in self.back)

    async def step(self) -> str:
        name, *_ = self.chance.choices(
            ("ask", "carry_out", "release", "refund", "fail", "dispute", "move", "spend", "hold", "end", "give"),
            (5, 2, 2, 4, 3, 3, 5, 3, 2, 2, 1),
        )
        # What goes back of another order takes no bonus that this one's request holds; the twin's it would.
        at = self.chance.choice([n for n, back in enumerate(self.back) if self.quiet or back.request is not None])
        await getattr(self, name)(at)
        self.done[name] = self.done.get(name, 0) + 1
        return f"{name} {at}"

    def _left(self, at: int) -> int:
        received = self.twins[0].orders[at].received
        assert received is not None
        return received - sum(self.back[at].refunds.values())

    async def ask(self, at: int) -> None:
        order, back = self.twins[0].orders[at], self.back[at]
        amount = self.chance.choice((None, None, self.chance.randint(1, order.price), order.price))
        owing = amount is None and self.chance.random() < 0.6
        found = await self.refunds.open(uuid4(), order.id, amount, owing=owing, step=1, actor="ann", reason=None)
        if found.outcome is RequestOutcome.DONE:
            assert back.request is None
            assert found.request_id is not None
            back.request = (found.request_id, found.amount)
            assert not owing or found.amount == order.price - back.of(order.price)
        elif found.outcome is RequestOutcome.UNDER_WAY:
            assert back.request is not None

    async def carry_out(self, at: int) -> None:
        back = self.back[at]
        if back.request is None or back.request[1] > self._left(at):
            await self.release(at)
        else:
            (request, amount), back.request = back.request, None
            await self._refund(at, amount, request)

    async def release(self, at: int) -> None:
        back = self.back[at]
        if back.request is not None:
            (request, amount), back.request = back.request, None
            if self.chance.random() < 0.5:
                assert await self.refunds.release(request, "refused") == "released"
            else:
                # Made, and failed before anybody heard of it.
                await self._apply(self.twins[0], at, f"re_{uuid4().hex}", amount, "failed", request)

    async def refund(self, at: int) -> None:
        if self._left(at):
            await self._refund(at, self.chance.randint(1, self._left(at)), None)

    async def _refund(self, at: int, amount: int, request: UUID | None) -> None:
        name = uuid4().hex
        for twin in self.twins:
            await self._apply(twin, at, f"re_{twin.id}_{name}", amount, "succeeded", request)
        self.back[at].refunds[name] = amount

    async def fail(self, at: int) -> None:
        if self.back[at].refunds:
            name = self.chance.choice(list(self.back[at].refunds))
            amount = self.back[at].refunds.pop(name)
            for twin in self.twins:
                await self._apply(twin, at, f"re_{twin.id}_{name}", amount, "failed", None)

    async def _apply(self, twin: Twin, at: int, name: str, amount: int, status: str, request: UUID | None) -> None:
        payment = twin.orders[at].payment_intent
        assert payment is not None
        if twin is not self.twins[0]:
            request = None
        await self.refunds.apply(
            name, payment_intent=payment, amount=amount, currency="usd", status=status, request_id=request, problem=None
        )

    async def dispute(self, at: int) -> None:
        if len(self.back[at].known) < 3:
            price = self.twins[0].orders[at].price
            await self._dispute(at, uuid4().hex, self.chance.choice((price, self.chance.randint(1, price + 9))), True)

    async def move(self, at: int) -> None:
        """Won after it was lost, lost after it was won, or of another amount."""
        if self.back[at].known:
            name = self.chance.choice(list(self.back[at].known))
            amount = self.back[at].known[name]
            if self.chance.random() < 0.2:
                amount = self.chance.randint(1, self.twins[0].orders[at].price)
            await self._dispute(at, name, amount, name not in self.back[at].disputes)

    async def _dispute(self, at: int, name: str, amount: int, withdrawn: bool) -> None:
        back = self.back[at]
        back.known[name] = amount
        for twin in self.twins:
            payment = twin.orders[at].payment_intent
            assert payment is not None
            await self.disputes.apply(
                f"dp_{twin.id}_{name}",
                payment_intent=payment,
                amount=amount,
                currency="usd",
                status="needs_response" if withdrawn else "won",
                withdrawn=withdrawn,
                asked=await self.disputes.ask(),
            )
            await self.bank.control.unfreeze(twin.id, reference=None, actor="ann")
        if withdrawn:
            back.disputes[name] = amount
        else:
            back.disputes.pop(name, None)

    async def spend(self, _: int) -> None:
        if self.quiet:
            want, over = self.chance.randint(1, 400), self.chance.choice((0, 0, 30))
            for twin in self.twins:
                row, reserved = await self.bank.reserve(twin.key, want, 1)
                if reserved.granted:
                    await self.bank.finalize(row, reserved.granted + over)
                    twin.net -= reserved.granted + over

    async def hold(self, _: int) -> None:
        """A call that runs while requests come and go."""
        if self.quiet:
            want = self.chance.randint(1, 400)
            for twin in self.twins:
                row, reserved = await self.bank.reserve(twin.key, want, 1)
                if reserved.granted:
                    twin.holds.append(row)

    async def end(self, _: int) -> None:
        if self.quiet and self.twins[0].holds:
            charge = self.chance.randint(0, 450)
            for twin in self.twins:
                row = twin.holds.pop(0)
                await self.bank.finalize(row, charge)
                twin.net -= charge

    async def give(self, _: int) -> None:
        amount = self.chance.randint(1, 200)
        for twin in self.twins:
            await self.bank.control.grant(twin.id, amount, reference=uuid4().hex, actor="ann")
            twin.net += amount

    async def judge(self, step: str) -> None:
        told = []
        for twin in self.twins:
            net = twin.net
            takings = []
            for order, back in zip(twin.orders, self.back, strict=True):
                row = await self.bank.owner.fetchrow(
                    "SELECT taken, bonus_taken FROM farebox.orders WHERE id = $1", order.id
                )
                assert row is not None
                gone = back.of(order.price)
                assert row["taken"] == order.credits * gone // order.price, step
                assert row["bonus_taken"] <= order.bonus * gone // order.price, step
                net -= row["taken"] + row["bonus_taken"]
                takings.append(tuple(row))
            balance, held, debt = await self.bank.money(twin.id)
            assert balance - debt == net, step
            told.append((takings, balance, held, debt, await lots(self.bank, twin.id)))
        if self.quiet:
            assert told[0] == told[1], step


@pytest.fixture
async def keeper(bank: Bank) -> AsyncIterator[Connection]:
    """A connection that may seal and audit."""
    connection = await connect(bank.database.app, Role.CONTROL, statement_seconds=60)
    yield connection
    await connection.close()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_requests_leave_no_trace(bank: Bank, keeper: Connection, seed: int) -> None:
    pair = Pair(bank, random.Random(seed))
    await pair.open()
    for number in range(STEPS):
        await pair.judge(await pair.step())
        if number % 9 == 0:
            await seal(keeper)
            assert [check for check in await audit_since_last(keeper) if not check.ok] == []
    for at in range(len(pair.back)):
        await (pair.carry_out if pair.chance.random() < 0.5 else pair.release)(at)
    await pair.judge("at the end")
    assert [check for check in await audit(bank.owner) if not check.ok] == []
