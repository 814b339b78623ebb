"""Many workers at one automatic top-up, while Stripe's answers get lost and workers end in the middle: one charge.

The workers are tasks here, each with ``AutoTopups`` of its own on real PostgreSQL, and end by being cancelled wherever
they are; their requests go on without them. Real processes that really die are the rounds' (``rounds.py``).
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
from structlog.testing import capture_logs

from proxy.control.billing.autotopup import AutoTopups
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.till import ACCOUNT_KEY, Till
from proxy.ledger.autotopups import AutoTopupLedger, Offer, Wanted
from proxy.ledger.connect import Pool, Role, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.orders import Order, OrderLedger
from proxy.metrics import Metrics
from tests.fakes.stripe import (
    Delay,
    ErrorAfter,
    ErrorBefore,
    FakeStripe,
    Fault,
    LostReply,
    LostRequest,
    RateLimited,
    Unavailable,
)
from tests.postgres import Database

__all__ = ["WORKERS", "Race", "Raced", "open_race"]

WORKERS = 50
APIS = 5
OFFER = Offer(credits=10_000_007, bonus=3, credits_seconds=None, bonus_seconds=None, currency="usd", price=1_000)
FAULTS: tuple[Fault, ...] = (
    Unavailable(),
    RateLimited(),
    ErrorBefore(),
    ErrorAfter(),
    LostRequest(),
    LostReply(),
    LostReply(),
    Delay(0.05),
    Delay(0.05, after=True),
)
RUN_SECONDS_MAX = 0.3
A_DAY_SECONDS = 25 * 3_600


@dataclass
class Raced:
    """What came of so many rounds."""

    rounds: int = 0
    charged: int = 0
    cut: int = 0
    """Workers that ended in the middle."""
    faults: int = 0
    overnight: int = 0
    """Attempts that nobody could say anything about before the next day."""
    wrongs: list[str] = field(default_factory=list)

    def told(self) -> str:
        """On one line, without the wrongs."""
        return (
            f"{self.rounds} races of {WORKERS} workers, {self.charged} charges, {self.cut} workers cut off, "
            f"{self.faults} faults of Stripe's, {self.overnight} attempts open overnight"
        )


class _NoLink:
    async def checkout_instead(self, failed: Order) -> Order:
        raise AssertionError("nobody's bank wants its customer here")


@dataclass
class Race:
    """A ledger, Stripe, and as many workers as are wanted."""

    fake: FakeStripe
    pool: Pool
    owner: "asyncpg.Connection[asyncpg.Record]"
    apis: list[StripeApi]
    raced: Raced = field(default_factory=Raced)

    def worker(self, number: int) -> AutoTopups:
        """One that goes on with attempts as soon as it sees them, as if a minute had passed."""
        api, orders = self.apis[number % len(self.apis)], OrderLedger(self.pool)
        return AutoTopups(
            api,
            AutoTopupLedger(self.pool),
            orders,
            Till(api, orders),
            _NoLink(),
            lambda pack: OFFER,
            metrics=Metrics(),
            silent_seconds=0.0,
        )

    async def round(self, random_: random.Random) -> None:
        """One account that is due, many that look, and then peace."""
        with capture_logs():
            await self._race(random_)

    async def _race(self, random_: random.Random) -> None:
        account_id = await self._account()
        before = len(self.fake.faults.hit)
        self.fake.faults.seeded(random_.randrange(2**31), random_.choice((0.0, 0.3, 0.6)), FAULTS)
        await asyncio.gather(*(self._work(self.worker(number), random_) for number in range(WORKERS)))
        self.fake.faults.clear()
        self.raced.faults += len(self.fake.faults.hit) - before
        await self._peace()
        await self._judge(account_id)
        self.raced.rounds += 1

    async def _account(self) -> UUID:
        """Without credits, with a card, and wanting one pack a month."""
        account = await ControlLedger(self.pool).create_account("buyer", None, None)
        made = await self.apis[0].create_customer({"metadata": {ACCOUNT_KEY: str(account.id)}}, key=str(account.id))
        await OrderLedger(self.pool).put_customer(account.id, made, livemode=False)
        await self.owner.execute(
            "UPDATE farebox.stripe_customers SET payment_method = $2 WHERE account_id = $1",
            account.id,
            self.fake.customers.save(made),
        )
        wanted = Wanted(
            threshold=1,
            pack="ten",
            credits=OFFER.credits,
            currency="usd",
            price=1_000,
            monthly_max=5_000,
            livemode=False,
        )
        await AutoTopupLedger(self.pool).set(account.id, wanted, actor="test")
        return account.id

    async def _work(self, worker: AutoTopups, random_: random.Random) -> None:
        """Look, and look again; half of them end somewhere in between."""
        seconds = random_.uniform(0.0, RUN_SECONDS_MAX) if random_.random() < 0.5 else None
        try:
            async with asyncio.timeout(seconds):
                for _ in range(random_.randint(1, 3)):
                    await worker.round()
        except TimeoutError:
            self.raced.cut += 1

    async def _peace(self) -> None:
        """Requests that were left behind end; then what is open is gone on with, on the next day if it must be."""
        worker = self.worker(0)
        # None is left behind for a day.
        while any(api._threads._open for api in self.apis):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for night in (False, True):
            if night:
                self.raced.overnight += 1
                self.fake.keys.forget()
                await self.owner.execute(
                    "UPDATE farebox.orders SET created_at = created_at - $1 * interval '1 second',"
                    " changed_at = changed_at - $1 * interval '1 second' WHERE state IN ('created', 'open', 'pending')",
                    A_DAY_SECONDS,
                )
            for _ in range(2):
                await worker.round()
            if not await self.owner.fetchval(
                "SELECT count(*) FROM farebox.orders WHERE state IN ('created', 'open', 'pending')"
            ):
                return

    async def _judge(self, account_id: UUID) -> None:
        wrong = self.raced.wrongs.append
        rows = await self.owner.fetch("SELECT * FROM farebox.orders WHERE account_id = $1", account_id)
        orders = {str(row["id"]): row["state"] for row in rows}
        with self.fake.state.lock:
            intents = [
                one
                for one in self.fake.state.all("payment_intent")
                if one["metadata"].get(ACCOUNT_KEY) == str(account_id) and one["status"] == "succeeded"
            ]
        paid = [one["metadata"]["farebox_order"] for one in intents]
        self.raced.charged += len(paid)
        if len(paid) > 1:
            wrong(f"account {account_id} was charged {len(paid)} times, for {paid} of {orders}")
        if sorted(paid) != sorted(name for name, state in orders.items() if state == "paid"):
            wrong(f"account {account_id} was charged for {paid}, and has {orders}")
        if left := [name for name, state in orders.items() if state not in ("paid", "failed")]:
            wrong(f"account {account_id} has {left} open")
        balance = await self.owner.fetchval("SELECT balance FROM farebox.accounts WHERE id = $1", account_id)
        if balance != len(paid) * (OFFER.credits + OFFER.bonus):
            wrong(f"account {account_id} paid {len(paid)} times, and has {balance}")


@asynccontextmanager
async def open_race(database: Database) -> AsyncIterator[Race]:
    """A race on an empty ledger."""
    async with AsyncExitStack() as stack:
        fake = stack.enter_context(FakeStripe())
        pool = await create_pool(database.app, Role.CONTROL, size=10)
        stack.push_async_callback(pool.close)
        owner = await asyncpg.connect(database.superuser)
        stack.push_async_callback(owner.close)
        apis = [StripeApi(fake.key, url=fake.url, retries=number % 2) for number in range(APIS)]
        for api in apis:
            stack.callback(api.close)
        yield Race(fake, pool, owner, apis)
