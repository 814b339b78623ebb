"""A process is killed with a word in its hands: its client's retry, at another process, is one charge in the end."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest

from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.e2e.test_processes import serve
from tests.fakes.upstream import Chunk, ScriptedUpstream, Sleep, chat_answer, chunk, head, whole
from tests.postgres import Database

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
async def survivor(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Proxy]:
    async with running_proxy(database, tmp_path, upstream.base_url) as running:
        yield running


async def say(customer: Customer, base_url: str, **more: Any) -> httpx2.Response:
    headers = customer.headers | {"idempotency-key": "word"}
    body = json.dumps(customer.body(**more)).encode()
    async with httpx2.AsyncClient(timeout=30) as http:
        return await http.post(f"{base_url}/chat/completions", content=body, headers=headers)


@contextlib.asynccontextmanager
async def killed_in_a_call(
    database: Database, directory: Path, upstream: ScriptedUpstream, customer: Customer, *, reached: asyncio.Event
) -> AsyncIterator[None]:
    """A process that gets the call and is killed once ``reached``."""
    async with serve(database, directory, upstream) as (process, url):
        call = asyncio.create_task(say(customer, url, stream=True))
        async with asyncio.timeout(20):
            await reached.wait()
        process.send_signal(signal.SIGKILL)
        await process.wait()
        with contextlib.suppress(httpx2.TransportError):
            await call
        yield


async def lapse_and_sweep(proxy: Proxy) -> None:
    """What time does: the lease of whoever has the word lapses, and its holds are settled."""
    await proxy.query(
        "UPDATE farebox.workers SET lease_until = clock_timestamp() "
        "WHERE id IN (SELECT worker_id FROM farebox.idempotency_keys)"
    )
    await proxy.query("SELECT farebox.expire_holds(100, interval '0')")


async def once(reached: asyncio.Event, condition: Callable[[], Awaitable[bool]]) -> None:
    while not reached.is_set():
        await asyncio.sleep(0.02)
        if await condition():
            reached.set()


async def test_killed_between_claim_and_reserve(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, survivor: Proxy
) -> None:
    customer = await survivor.account()
    upstream.will(*whole(chat_answer(prompt=10, completion=5)))
    reached = asyncio.Event()
    query = "SELECT FROM farebox.idempotency_keys WHERE account_id = $1"

    async def claimed() -> bool:
        return bool(await survivor.query(query, customer.id))

    owner = await asyncpg.connect(database.superuser)
    lock = owner.transaction()
    await lock.start()
    # No reserve gets past this; a claim does.
    await owner.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", customer.id)
    watching = asyncio.create_task(once(reached, claimed))
    try:
        async with killed_in_a_call(database, tmp_path, upstream, customer, reached=reached):
            assert (await say(customer, survivor.base_url, stream=True)).headers["x-should-retry"] == "true"
            assert await customer.holds() == []
    finally:
        await watching
        await lock.rollback()
        await owner.close()
    await lapse_and_sweep(survivor)
    answer = await say(customer, survivor.base_url, stream=True)
    assert answer.status_code == 200
    holds = [hold for hold in await customer.ended(2) if hold["charge"]]
    assert [str(hold["id"]) for hold in holds] == [answer.headers["x-request-id"]]
    await survivor.audit()


@pytest.mark.parametrize("delivered", [0, 3])
async def test_killed_while_the_upstream_answers(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, survivor: Proxy, delivered: int
) -> None:
    """Nothing known to have been delivered: the word is free. Something: it is used up, and charged for just that."""
    customer = await survivor.account()
    upstream.will(SSE, *[Chunk(chunk(" word"))] * delivered, Sleep(60))
    reached = asyncio.Event()

    async def asked() -> bool:
        return bool(upstream.requests) and bool(await customer.holds())

    watching = asyncio.create_task(once(reached, asked))
    async with killed_in_a_call(database, tmp_path, upstream, customer, reached=reached):
        if delivered:
            # What a heartbeat would have said.
            await survivor.query(
                "UPDATE farebox.holds SET mark = ARRAY[0, 0, 0, 0, $1::bigint, 0, 0] WHERE state = 'open'", delivered
            )
        await watching
        running = await say(customer, survivor.base_url, stream=True)
        assert (running.status_code, running.headers["x-should-retry"]) == (409, "true")
        await lapse_and_sweep(survivor)
    upstream.will(*whole(chat_answer(prompt=10, completion=5)))
    again = await say(customer, survivor.base_url, stream=True)
    charged = [hold for hold in await customer.ended(1 if delivered else 2) if hold["charge"]]
    assert len(charged) == 1
    if delivered:
        assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
        assert again.headers["x-farebox-receipt"] == str(charged[0]["id"])
    else:
        assert (again.status_code, again.headers["x-request-id"]) == (200, str(charged[0]["id"]))
    await survivor.audit()
