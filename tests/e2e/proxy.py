"""Farebox as its users meet it: uvicorn on a real socket, a real PostgreSQL, and a scripted upstream behind it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx2

from proxy.app import Farebox, Timing, create_app
from proxy.cli.serve import serving_farebox
from proxy.control.operations import KeyTerms, Operations
from proxy.core.catalog import Catalog, Route
from proxy.core.keys import Peppers
from proxy.core.money import MICROCREDITS_PER_CREDIT
from proxy.ledger.audit import audit
from proxy.ledger.connect import Pool, Role, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.records import Account, Ended
from proxy.local.serving import Stop, base_url, listen
from proxy.settings import Settings
from tests.postgres import Database

PEPPER = "a pepper for tests only"

# More models of the same price, each behind an upstream with a temper of its own.
UPSTREAMS = ("up", "hasty", "curt", "dead", "locked")

# Models by what becomes of an answer whose client leaves: their own names, the upstream's, and what pricing.yaml says.
LEAVERS: tuple[tuple[str, str, list[str]], ...] = (
    ("drained", "gpt-4o-up", ["on_disconnect: drain"]),
    ("frugal", "gpt-4o-up", ["on_disconnect: drain", "drain_tokens: 3"]),
    ("miserly", "gpt-4o-up", ["on_disconnect: drain", "drain_tokens: 0"]),
    ("thinker", "gpt-5-up", ["on_disconnect: cancel", "reasoning_tokens_per_second: 1000"]),
    ("silent", "gpt-5-up", ["drain_tokens: 100", "reasoning_tokens_per_second: 1000"]),
    ("gpt-5", "gpt-5-up", []),
)


def pricing_yaml() -> str:
    lines = ["per: 1000", "models:"]
    for name in UPSTREAMS:
        lines += [f"  {'m' if name == 'up' else name}:", f"    upstream: {name}", "    upstream_model: gpt-4o-up"]
        lines += ["    input: 1", "    output: 3", "    max_output_tokens: 1000"]
        lines += ["    on_disconnect: drain"] if name == "curt" else []
    for name, model, leaving in LEAVERS:
        lines += [f"  {name}:", "    upstream: up", f"    upstream_model: {model}", "    input: 1", "    output: 3"]
        lines += ["    max_output_tokens: 1000", *(f"    {line}" for line in leaving)]
    lines += [
        "  tiny:",
        "    upstream: up",
        "    input: 0.000001",
        "    output: 0.000003",
        "    max_output_tokens: 100",
    ]
    lines += ["  free:", "    upstream: up", "    input: 0", "    output: 0", "    max_output_tokens: 100"]
    return "\n".join(lines) + "\n"


def upstreams_yaml(url: str) -> str:
    lines = ["upstreams:"]
    for name in UPSTREAMS:
        where = "http://127.0.0.1:1/v1" if name == "dead" else url
        key = "api_key_env: FAREBOX_TEST_NO_SUCH_KEY" if name == "locked" else "api_key: none"
        lines += [f"  {name}:", "    dialect: openai", f"    base_url: {where}", f"    {key}"]
    return "\n".join(lines) + "\n"


def hurried(catalog: Catalog) -> Catalog:
    """Times that a test can wait for: no file may say less than a second."""

    def hurry(route: Route) -> Route:
        upstream = route.upstream
        read = 0.3 if upstream.name == "hasty" else upstream.read_seconds
        drain = 0.2 if upstream.name == "curt" else route.drain_seconds
        return replace(route, upstream=replace(upstream, read_seconds=read), drain_seconds=drain)

    routes = {model: hurry(route) for model, route in catalog.routes.items()}
    return replace(catalog, routes=routes)


MESSAGES: Any = [{"role": "user", "content": "Say hello."}]


@dataclass
class Proxy:
    """A running Farebox, and the operator's hand on its ledger."""

    app: Farebox
    base_url: str
    operations: Operations
    database: Database
    directory: Path
    http: httpx2.AsyncClient
    _pool: Pool = field(repr=False)

    async def account(self, credits: float = 1000, **terms: Any) -> "Customer":
        """An account with that many credits, and a key."""
        account = await self.operations.create_account("customer")
        if credits:
            amount = round(credits * MICROCREDITS_PER_CREDIT)
            await self.operations.grant(account.id, amount, reference=str(account.id), actor="test", reason="test")
        key, text = await self.operations.create_key(account.id, KeyTerms(name="test", **terms))
        return Customer(self, account.id, key.id, text)

    async def audit(self) -> None:
        """Fail unless every invariant of the ledger holds."""
        connection = await asyncpg.connect(self.database.owner)
        try:
            checks = await audit(connection)
        finally:
            await connection.close()
        assert [check for check in checks if not check.ok] == []

    async def query(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        """What only a superuser may see."""
        connection = await asyncpg.connect(self.database.superuser)
        try:
            return await connection.fetch(sql, *values)
        finally:
            await connection.close()

    async def query_elsewhere(self, sql: str) -> None:
        """A superuser's statement from another database of the same cluster."""
        dsn = self.database.superuser.replace(self.database.name, "postgres")
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()


@dataclass
class Customer:
    """An account and its key."""

    proxy: Proxy
    id: UUID
    key_id: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": "m", "messages": MESSAGES} | more

    async def post(self, /, **more: Any) -> httpx2.Response:
        """One whole call."""
        return await self.send(json.dumps(self.body(**more)).encode())

    async def send(self, body: bytes) -> httpx2.Response:
        """One whole call with these bytes."""
        return await self.proxy.http.post("/chat/completions", content=body, headers=self.headers)

    def stream(self, **more: Any) -> "contextlib.AbstractAsyncContextManager[httpx2.Response]":
        """A call whose answer is read by the caller."""
        content = json.dumps(self.body(stream=True, **more)).encode()
        return self.proxy.http.stream("POST", "/chat/completions", content=content, headers=self.headers)

    async def money(self) -> Account:
        return await self.proxy.operations.account(str(self.id))

    async def holds(self) -> list[dict[str, Any]]:
        """Every hold that the account ever had, in the order of their making."""
        query = "SELECT * FROM farebox.holds WHERE account_id = $1 ORDER BY id"
        return [dict(row) for row in await self.proxy.query(query, self.id)]

    async def ended(self, count: int = 1, seconds: float = 5.0) -> list[dict[str, Any]]:
        """The account's holds, once there are ``count`` and all have ended."""
        async with asyncio.timeout(seconds):
            while True:
                holds = await self.holds()
                if len(holds) == count and all(hold["state"] != "open" for hold in holds):
                    return holds
                await asyncio.sleep(0.01)

    async def opened(self, seconds: float = 5.0) -> None:
        """Once the account has a hold."""
        async with asyncio.timeout(seconds):
            while True:
                if await self.holds():
                    return
                await asyncio.sleep(0.01)

    async def receipt(self, request_id: str) -> Ended:
        return await self.proxy.operations.receipt(request_id)


@contextlib.asynccontextmanager
async def running_proxy(
    database: Database,
    directory: Path,
    upstream_url: str,
    *,
    pricing: str | None = None,
    upstreams: str | None = None,
    timing: Timing | None = None,
    stop: Stop | None = None,
    **settings: Any,
) -> AsyncIterator[Proxy]:
    """Farebox on a free port, with everything that it needs."""
    (directory / "pricing.yaml").write_text(pricing or pricing_yaml())
    (directory / "upstreams.yaml").write_text(upstreams or upstreams_yaml(upstream_url))
    values: dict[str, Any] = {
        "database_url": database.app,
        "key_pepper": PEPPER,
        "pricing": directory / "pricing.yaml",
        "upstreams": directory / "upstreams.yaml",
        "state_dir": directory / "state",
        "metrics_port": 0,
        "shutdown_seconds": 2.0,
        "reload_seconds": 0.1,
    }
    app = create_app(Settings(**(values | settings)), adapt=hurried, timing=timing)
    listener = listen("127.0.0.1", 0)
    url = base_url(listener)
    pool = await create_pool(database.superuser, Role.CONTROL, size=2)
    try:
        # The client goes last: a stop must not look like clients leaving.
        server = serving_farebox(app, listener, app.settings, stop or Stop())
        async with httpx2.AsyncClient(base_url=url, timeout=30) as http, server:
            operations = Operations(ControlLedger(pool), Peppers.parse(PEPPER))
            yield Proxy(app, url, operations, database, directory, http, pool)
    finally:
        await pool.close()
