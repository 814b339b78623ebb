"""A place for things to go wrong in: a ledger with short leases, a provider, customers, and workers that may be killed.

Everything is real but the provider: processes, sockets, PostgreSQL. Leases last ``30 s / FACTOR``: the database's by
another ``farebox.lease_length``, the processes' by ``dying.hurry``.
"""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx2

from proxy.app import Timing
from proxy.control.operations import KeyTerms, Operations
from proxy.core.keys import Peppers
from proxy.core.money import MICROCREDITS_PER_CREDIT
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.control import ControlLedger
from tests.e2e.proxy import PEPPER
from tests.faults.caller import Call, make_call
from tests.faults.nursery import Nursery, Process
from tests.faults.provider import Answer, Provider
from tests.postgres import Database

__all__ = ["FACTOR", "LEASE_SECONDS", "RENEW_SECONDS", "SETTLED_SECONDS_MAX", "Customer", "Scene", "open_scene"]

FACTOR = 10.0
"""How many times shorter every lease and sweep is than in a server that runs."""
LEASE_SECONDS = 30.0 / FACTOR
RENEW_SECONDS = Timing().renew_seconds / FACTOR
SETTLED_SECONDS_MAX = 45.0
"""When every hold must have ended, from the end of the trouble. With leases as they are; here it takes a tenth."""
GRANTED_CREDITS = 1_000_000

PRICING = """per: 1000
models:
  m: {upstream: up, upstream_model: gpt-4o-up, input: 1, output: 3, max_output_tokens: 1000000, on_disconnect: drain}
"""


@dataclass(slots=True)
class Customer:
    """An account and its key. ``caps`` gives each of its calls an output limit of its own."""

    id: Any
    key: str
    granted: int
    caps: "itertools.count[int]" = field(default_factory=lambda: itertools.count(200))


@dataclass
class Scene:
    """What there is, and what has been done so far: ``calls``, and ``deaths`` as (moment, process)."""

    database: Database
    provider: Provider
    nursery: Nursery
    directory: Path
    operations: Operations
    http: httpx2.AsyncClient
    sql: "asyncpg.Pool[asyncpg.Record]"
    factor: float = FACTOR
    customers: list[Customer] = field(default_factory=list)
    planned: int = 0
    calls: list[Call] = field(default_factory=list)
    workers: dict[str, Process] = field(default_factory=dict)
    served_by: dict[str, Process] = field(default_factory=dict)
    deaths: dict[int, float] = field(default_factory=dict)
    """The moment at which a process (its pid) was found dead, or was killed."""
    background: "list[asyncio.Task[Call]]" = field(default_factory=list)
    """Calls that nobody waits for yet."""

    async def customer(self) -> Customer:
        """An account with plenty of credits."""
        account = await self.operations.create_account("customer")
        amount = GRANTED_CREDITS * MICROCREDITS_PER_CREDIT
        await self.operations.grant(account.id, amount, reference=str(account.id), actor="test", reason="test")
        _, text = await self.operations.create_key(account.id, KeyTerms(name="test"))
        customer = Customer(account.id, text, amount)
        self.customers.append(customer)
        return customer

    async def worker(self, name: str, *, at: str | None = None, **settings: str) -> Process:
        """``farebox serve`` that may die at a point. One name, one state directory: it comes back to what it wrote."""
        number = sum(1 for known in self.workers if known.rpartition("-")[0] == name)
        run = f"{name}-{number}"
        values = {
            "METRICS_PORT": "0",
            "KEY_PEPPER": PEPPER,
            "DATABASE_URL": self.database.app,
            "LOG_LEVEL": "info",
            "SHUTDOWN_SECONDS": "0.5",
            "STATE_DIR": str(self.directory / name),
        } | settings
        arguments = ["serve", "--port", "0", "--json", "--pricing", "pricing.yaml", "--upstreams", "upstreams.yaml"]
        process = self.workers[run] = await self.run(run, arguments, at=at, **values)
        return process

    async def run(self, name: str, arguments: list[str], *, at: str | None = None, **settings: str) -> Process:
        """Any command, with these FAREBOX_* settings."""
        environment = {"PATH": os.environ["PATH"]} | {f"FAREBOX_{key}": value for key, value in settings.items()}
        return await self.nursery.spawn(
            name, arguments, directory=self.directory, environment=environment, factor=self.factor, at=at
        )

    def plan(self, customer: Customer, answer: Answer, *, stream: bool = True, word: str | None = None) -> Call:
        """A call that will be answered so, not made yet."""
        self.planned += 1
        name = f"{self.directory}-{self.planned}"
        self.provider.will(name, answer)
        call = Call(name, customer.id, next(customer.caps), stream, word)
        self.calls.append(call)
        return call

    async def make(self, process: Process, customer: Customer, call: Call, **how: Any) -> Call:
        """Make the call to that worker, and read its answer to whatever end."""
        self.served_by[call.name] = process
        return await make_call(self.http, await process.url(), customer.key, call, **how)

    async def call(
        self,
        process: Process,
        customer: Customer,
        answer: Answer,
        *,
        stream: bool = True,
        word: str | None = None,
        **how: Any,
    ) -> Call:
        """Plan a call and make it."""
        return await self.make(process, customer, self.plan(customer, answer, stream=stream, word=word), **how)

    async def kill(self, process: Process) -> None:
        """kill -9."""
        self.deaths[process.pid] = time.monotonic()
        await process.kill()

    async def died(self, process: Process, seconds: float = 30.0) -> int:
        """Wait for its end, and remember when that was."""
        status = await process.ended(seconds)
        self.deaths[process.pid] = time.monotonic()
        return status

    def lost_lease(self, name: str) -> bool:
        """Whether the last process of that name was too slow to keep its lease: it then did something else, rightly."""
        runs = [process for run, process in self.workers.items() if run.rpartition("-")[0] == name]
        return bool(runs) and any("the lease has lapsed" in process.errors for process in runs[-2:])

    def forget(self) -> None:
        """What was done so far has been judged: the next customers are others."""
        self.calls.clear()
        self.customers.clear()
        self.served_by.clear()
        self.provider.forget()

    async def holds(self, customer: Customer | None = None) -> list[dict[str, Any]]:
        """A customer's holds (or all there are), with the cap that tells whose call it is (None: nobody knows)."""
        rows = await self.sql.fetch(
            "SELECT *, (quote::json->>'cap_of_client')::bigint AS cap FROM farebox.holds"
            " WHERE $1::uuid IS NULL OR account_id = $1 ORDER BY id",
            customer and customer.id,
        )
        return [dict(row) for row in rows]

    async def settled(self, customer: Customer | None = None, seconds: float = SETTLED_SECONDS_MAX) -> float:
        """Wait until no hold (of that customer) is open; how long that took. Raises TimeoutError."""
        began = time.monotonic()
        query = "SELECT count(*) FROM farebox.holds WHERE state = 'open' AND ($1::uuid IS NULL OR account_id = $1)"
        async with asyncio.timeout(seconds):
            while await self.sql.fetchval(query, customer and customer.id):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return time.monotonic() - began


@contextlib.asynccontextmanager
async def open_scene(
    database: Database, provider: Provider, nursery: Nursery, directory: Path, *, factor: float = FACTOR
) -> AsyncIterator[Scene]:
    """A scene on an empty ledger. Its processes are gone at the end; whether they should be is the test's to say."""
    _configure(directory, provider)
    await shorten_leases(database, factor)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with contextlib.AsyncExitStack() as stack:
        pool = await create_pool(database.superuser, Role.CONTROL, size=2)
        stack.push_async_callback(pool.close)
        sql = await asyncpg.create_pool(database.superuser, min_size=0, max_size=2)
        stack.push_async_callback(sql.close)
        http = await stack.enter_async_context(httpx2.AsyncClient(timeout=60, limits=limits))
        operations = Operations(ControlLedger(pool), Peppers.parse(PEPPER))
        scene = Scene(database, provider, nursery, directory, operations, http, sql, factor)
        try:
            yield scene
        finally:
            for process in scene.workers.values():
                await process.kill()
            await asyncio.gather(*scene.background, return_exceptions=True)


def _configure(directory: Path, provider: Provider) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pricing.yaml").write_text(PRICING)
    (directory / "upstreams.yaml").write_text(
        f"upstreams:\n  up: {{dialect: openai, base_url: '{provider.upstream.base_url}', api_key: none}}\n"
    )


async def shorten_leases(database: Database, factor: float) -> None:
    """The ledger's lease, divided. As the owner, who alone may replace a function of the schema."""
    connection = await asyncpg.connect(database.owner)
    try:
        seconds = await connection.fetchval("SELECT extract(epoch FROM farebox.lease_length())")
        await connection.execute(
            "CREATE OR REPLACE FUNCTION farebox.lease_length() RETURNS interval LANGUAGE sql IMMUTABLE AS "
            f"$$ SELECT interval '{float(seconds) / factor} seconds' $$"
        )
    finally:
        await connection.close()
