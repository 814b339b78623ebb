"""A shop to crash in: real `farebox serve` processes, a Stripe that remembers, buyers, and the operator's own endpoint.

Everything is real but Stripe: processes, sockets, PostgreSQL, signatures. Events are posted by hand (``deliver``): it
is the test's to say which process hears of what, how often, and whether at all.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx2

from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.operations import SCOPES, KeyTerms, Operations
from proxy.core.keys import Peppers
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.control import ControlLedger
from tests.e2e.proxy import PEPPER
from tests.fakes.stripe import FakeStripe
from tests.fakes.stripe.shapes import Object
from tests.faults.money_in.inbox import Inbox, running_inbox
from tests.faults.nursery import Nursery, Process
from tests.postgres import Database

__all__ = ["PACKS", "Buyer", "Shop", "open_shop"]

PRICING = """per: 1000
models:
  m: {upstream: up, upstream_model: gpt-4o-up, input: 1, output: 3, max_output_tokens: 1000}
"""
UPSTREAMS = "upstreams:\n  up: {dialect: openai, base_url: 'http://127.0.0.1:1/v1', api_key: none}\n"
PACKS = "packs:\n  ten: {credits: 10.000007, price: 10, currency: USD, bonus: 1.000003}\n"

IDLE_SECONDS = 3_600.0
SWIFT_SECONDS = 0.1
LOOPS = (
    "alerts_seconds",
    "messages_seconds",
    "events_seconds",
    "lots_seconds",
    "refunds_seconds",
    "refunds_age_seconds",
    "auto_topup_seconds",
    "topups_silent_seconds",
)
"""What says how often a loop of money in comes round: see ``dying.hurry``. The reconciliation's is the command's."""
ANSWER_SECONDS_MAX = 30.0
SETTLED_SECONDS_MAX = 45.0
A_DAY_SECONDS = 25 * 3_600

_WAITING = """
    SELECT 'message ' || type || ' ' || id FROM farebox.outbox WHERE delivered_at IS NULL
    UNION ALL
    SELECT 'event ' || type || ' ' || id FROM farebox.stripe_events WHERE processed_at IS NULL
    UNION ALL
    SELECT 'refund request ' || id FROM farebox.refund_requests WHERE state = 'held'
    UNION ALL
    SELECT 'attempt ' || id FROM farebox.orders WHERE kind = 'auto' AND state IN ('created', 'open', 'pending')
    UNION ALL
    SELECT 'account to be topped up ' || a.id
      FROM farebox.auto_topups t JOIN farebox.accounts a ON a.id = t.account_id
     WHERE t.enabled AND t.blocked_until IS NULL AND a.balance < t.threshold AND a.frozen_at IS NULL
    UNION ALL
    SELECT 'expired lot of ' || account_id FROM farebox.lots WHERE remaining > 0 AND expires_at < clock_timestamp()
"""


@dataclass(slots=True)
class Buyer:
    """An account, and a key that may do everything."""

    id: UUID
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


@dataclass
class Shop:
    """What there is. ``runs`` are all processes so far."""

    database: Database
    fake: FakeStripe
    inbox: Inbox
    nursery: Nursery
    directory: Path
    operations: Operations
    http: httpx2.AsyncClient
    sql: "asyncpg.Pool[asyncpg.Record]"
    runs: list[Process] = field(default_factory=list)
    named: Counter[str] = field(default_factory=Counter)
    buyers: list[Buyer] = field(default_factory=list)

    async def buyer(self) -> Buyer:
        """A new account."""
        account = await self.operations.create_account("buyer")
        _, text = await self.operations.create_key(account.id, KeyTerms(name="test", scopes=SCOPES))
        buyer = Buyer(account.id, text)
        self.buyers.append(buyer)
        return buyer

    async def serve(self, name: str, *, at: str | None = None, swift: Collection[str] = ()) -> Process:
        """``farebox serve``, which may die at a point. Its loops stand still, but for those that are ``swift``."""
        arguments = ["serve", "--port", "0", "--json", "--pricing", "pricing.yaml", "--upstreams", "upstreams.yaml"]
        timing = {loop: SWIFT_SECONDS if loop in swift else IDLE_SECONDS for loop in (*LOOPS, "reconcile_seconds")}
        return await self.run(name, arguments, at=at, timing=timing)

    async def run(
        self, name: str, arguments: Sequence[str], *, at: str | None = None, timing: Mapping[str, float] | None = None
    ) -> Process:
        """Any command, with the settings of this shop."""
        values = {
            "METRICS_PORT": "0",
            "KEY_PEPPER": PEPPER,
            "DATABASE_URL": self.database.app,
            "SHUTDOWN_SECONDS": "0.5",
            "STATE_DIR": str(self.directory / name),
            "PRICING": "pricing.yaml",
            "UPSTREAMS": "upstreams.yaml",
            "STRIPE_KEY": self.fake.key,
            "STRIPE_URL": self.fake.url,
            "STRIPE_WEBHOOK_SECRETS": self.fake.secret,
            "BILLING_URL": "https://farebox.example",
            "WEBHOOK_URL": self.inbox.url,
            "WEBHOOK_SECRET": self.inbox.secret,
        }
        environment = {"PATH": os.environ["PATH"]} | {f"FAREBOX_{key}": value for key, value in values.items()}
        # Before anything is waited for: others of that name may be started meanwhile, and each writes files of its own.
        run = f"{name}-{self.named[name]}"
        self.named[name] += 1
        process = await self.nursery.spawn(
            run, list(arguments), directory=self.directory, environment=environment, timing=timing, at=at
        )
        self.runs.append(process)
        return process

    async def ask(
        self, process: Process, buyer: Buyer, method: str, path: str, body: Any = None, **headers: str
    ) -> httpx2.Response | None:
        """A request of the buyer's. None: there was no answer, since the process is dead or died of it."""
        try:
            url = await process.url()
            return await self.http.request(
                method, f"{url.removesuffix('/v1')}{path}", json=body, headers=buyer.headers | headers
            )
        except (httpx2.HTTPError, AssertionError):
            if process.alive:
                # It may be dying: the socket ends before the process has been buried.
                with contextlib.suppress(TimeoutError):
                    await process.ended(ANSWER_SECONDS_MAX)
            if process.alive:
                raise
            return None

    async def time_passes(self) -> None:
        """So much that whatever is tried again after a while is tried now."""
        await self.sql.execute("UPDATE farebox.outbox SET next_at = clock_timestamp()")
        await self.sql.execute("UPDATE farebox.stripe_events SET tried_at = tried_at - interval '2 hours'")
        await self.sql.execute("UPDATE farebox.refund_requests SET changed_at = changed_at - interval '2 hours'")

    async def a_day_passes(self) -> None:
        """Here and at Stripe, whose keys remember nothing after it."""
        self.fake.keys.forget()
        day = f"- interval '{A_DAY_SECONDS} seconds'"
        await self.sql.execute(
            f"UPDATE farebox.orders SET created_at = created_at {day}, changed_at = changed_at {day}"
            " WHERE kind = 'auto' AND state IN ('created', 'open', 'pending')"
        )
        await self.sql.execute(
            f"UPDATE farebox.refund_requests SET created_at = created_at {day}, changed_at = changed_at {day}"
            " WHERE state = 'held'"
        )

    async def settled(self, seconds: float = SETTLED_SECONDS_MAX) -> list[str]:
        """Wait until whatever does something by itself has done it; what still waits when the time is over."""
        deadline = time.monotonic() + seconds
        while waiting := [row[0] for row in await self.sql.fetch(_WAITING)]:
            if time.monotonic() > deadline:
                return [f"these wait: {waiting}"]
            await self.time_passes()
            await asyncio.sleep(0.2)
        return []

    def events_of(self, buyer: Buyer) -> list[Object]:
        """What Stripe has told of the account, oldest first, of the types that an endpoint of ours subscribes to."""
        told = [event for event in list(self.fake.events) if event["type"] in EVENT_TYPES]
        return [event for event in told if self._account_of(event["data"]["object"]) == str(buyer.id)]

    def _account_of(self, thing: Object) -> str | None:
        """Whose object it is: by its own metadata, or by its payment's."""
        with self.fake.state.lock:
            named = (thing.get("metadata") or {}).get("farebox_account")
            payment = self.fake.state.known(thing.get("payment_intent"))
            customer = self.fake.state.known(thing.get("customer"))
        for other in (payment, customer):
            named = named or (None if other is None else other["metadata"].get("farebox_account"))
        return None if named is None else str(named)

    def lose(self, events: Sequence[Object]) -> None:
        """Stripe remembers them no more: as after the thirty days for which it lists them."""
        with self.fake.state.lock:
            for event in events:
                self.fake.state.remove(event["id"])
                self.fake.state.events.remove(event)

    async def post(self, process: Process, event: Object) -> int:
        """One delivery of an event, signed now: the status. 0: there was no answer."""
        signed = self.fake.signed(event)
        try:
            url = await process.url()
            answer = await self.http.post(
                f"{url.removesuffix('/v1')}/webhooks/stripe", content=signed.body, headers=signed.headers
            )
        except (httpx2.HTTPError, AssertionError):
            return 0
        return answer.status_code

    async def deliver(
        self, process: Process, events: Sequence[Object], random_: random.Random, *, copies: int = 1, at_once: int = 4
    ) -> list[str]:
        """Each event so often, in any order, until it was taken or the process is dead; which ones weren't."""
        whole = [event for event in events for _ in range(copies)]
        random_.shuffle(whole)
        limit = asyncio.Semaphore(at_once)

        async def one(event: Object) -> str | None:
            async with limit:
                status = 0
                for attempt in range(8):
                    if not process.alive or 200 <= (status := await self.post(process, event)) < 300:
                        break
                    await asyncio.sleep(0.05 * 2**attempt)
                taken = 200 <= status < 300
                return None if taken else f"{event['type']} {event['id']} was answered {status}"

        return [wrong for wrong in await asyncio.gather(*map(one, whole)) if wrong is not None]


@contextlib.asynccontextmanager
async def open_shop(database: Database, nursery: Nursery, directory: Path) -> AsyncIterator[Shop]:
    """A shop on an empty ledger. Its processes are gone at the end."""
    _configure(directory)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with contextlib.AsyncExitStack() as stack:
        fake = stack.enter_context(FakeStripe())
        inbox = await stack.enter_async_context(running_inbox())
        pool = await create_pool(database.superuser, Role.CONTROL, size=2)
        stack.push_async_callback(pool.close)
        sql = await asyncpg.create_pool(database.superuser, min_size=0, max_size=4)
        stack.push_async_callback(sql.close)
        http = await stack.enter_async_context(httpx2.AsyncClient(timeout=ANSWER_SECONDS_MAX, limits=limits))
        operations = Operations(ControlLedger(pool), Peppers.parse(PEPPER))
        shop = Shop(database, fake, inbox, nursery, directory, operations, http, sql)
        try:
            yield shop
        finally:
            for process in shop.runs:
                await process.kill()


def _configure(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pricing.yaml").write_text(PRICING + PACKS)
    (directory / "upstreams.yaml").write_text(UPSTREAMS)
