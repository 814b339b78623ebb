"""`farebox serve --workers`: several processes on one socket, replaced and stopped without cutting anybody off."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.e2e.proxy import Customer, Proxy, pricing_yaml, running_proxy
from tests.e2e.test_processes import error_of
from tests.e2e.workers import SSE, eventually, opened, read_broken, read_stream, runs, workers
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Received,
    Script,
    ScriptedUpstream,
    Sleep,
    chat_answer,
    chunk,
    stream,
    usage_chunk,
    whole,
)
from tests.postgres import Database

STREAM_COST = 10 * 1000 + 30 * 3000
CALL_COST = 10 * 1000 + 5 * 3000


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
async def operator(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Proxy]:
    """The operator's hand on the ledger (its own server gets no request)."""
    directory = tmp_path / "operator"
    directory.mkdir()
    async with running_proxy(database, directory, upstream.base_url) as running:
        yield running


async def call_on_and_on(http: httpx2.AsyncClient, url: str, customer: Customer, enough: asyncio.Event) -> int:
    """Call after call, each on the connection of the last where it may be used again; how many were answered."""
    body, count = json.dumps(customer.body()).encode(), 0
    while not enough.is_set():
        answer = await http.post(f"{url}/chat/completions", content=body, headers=customer.headers)
        assert answer.status_code == 200, answer.text
        count += 1
        await asyncio.sleep(0.02)
    return count


async def test_a_rolling_restart_cuts_no_stream_and_refuses_nobody(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    pieces = [chunk(f" {i}") for i in range(30)]
    slow = stream(*pieces, chunk(finish="stop"), usage_chunk(10, 30), DONE, delay=0.4)

    def answer(received: Received) -> Script:
        return slow if received.json.get("stream") else whole(chat_answer(prompt=10, completion=5))

    upstream.choose(answer)
    customer = await operator.account(credits=1_000_000)
    async with workers(4, database, tmp_path, upstream) as supervised:
        url = supervised.url
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=60, limits=limits) as http:
            enough = asyncio.Event()
            calls = [asyncio.create_task(call_on_and_on(http, url, customer, enough)) for _ in range(8)]
            streams = [asyncio.create_task(read_stream(http, url, customer)) for _ in range(120)]
            await asyncio.sleep(2)
            restart = asyncio.create_task(supervised.restart(4))
            for _ in range(80):
                streams.append(asyncio.create_task(read_stream(http, url, customer)))
                await asyncio.sleep(0.03)
            read = await asyncio.gather(*streams)
            await restart
            enough.set()
            answered = sum(await asyncio.gather(*calls))
        await supervised.until(serving=4)
        await supervised.stop()
    assert [text.endswith(DONE) and text.count(b"chat.completion.chunk") for text in read] == [31] * 200
    assert answered > 100
    holds = await customer.ended(200 + answered, seconds=5)
    assert {hold["state"] for hold in holds} == {"final"}
    assert sorted({hold["charge"] for hold in holds}) == [CALL_COST, STREAM_COST]
    money = await customer.money()
    assert (money.held, money.balance) == (0, 10**12 - 200 * STREAM_COST - answered * CALL_COST)
    await operator.audit()


async def test_sigterm_during_a_restart_stops_all_of_them(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(60))
    customer = await operator.account()
    async with workers(2, database, tmp_path, upstream, SHUTDOWN_SECONDS="0.5") as supervised:
        async with httpx2.AsyncClient(timeout=60) as http:
            reading = [asyncio.create_task(read_broken(http, supervised.url, customer)) for _ in range(4)]
            await opened(customer, 4)
            pids = await supervised.pids()
            supervised.process.send_signal(signal.SIGHUP)
            supervised.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.5)
            pids |= await supervised.pids()
            await supervised.stop()
            assert {error_of(read) for read in await asyncio.gather(*reading)} == {"shutting_down"}
        assert [pid for pid in pids if runs(pid)] == []
    assert {hold["charge"] for hold in await customer.ended(4)} == {10_000 + 2 * 3000}
    await operator.audit()


async def test_a_worker_that_cannot_start_leaves_the_others_serving(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    upstream.will(*whole(chat_answer(prompt=10, completion=5)))
    customer = await operator.account()
    body = json.dumps(customer.body()).encode()
    async with workers(2, database, tmp_path, upstream, RELOAD_SECONDS="86400") as supervised:
        before = await supervised.pids()
        (tmp_path / "pricing.yaml").write_text("models: [not, a, mapping]\n")
        supervised.process.send_signal(signal.SIGHUP)

        async def given_up() -> bool:
            return 'farebox_worker_restarts_total{outcome="given_up"} 1.0' in await supervised.metrics()

        await eventually(given_up)
        assert await supervised.pids() == before
        async with httpx2.AsyncClient(timeout=30) as http:
            for _ in range(5):
                answer = await http.post(f"{supervised.url}/chat/completions", content=body, headers=customer.headers)
                assert answer.status_code == 200
        # Mended, and asked again.
        (tmp_path / "pricing.yaml").write_text(pricing_yaml())
        await supervised.restart(2)
        await supervised.stop()


async def test_a_dead_worker_is_replaced_and_its_hold_is_ended_by_the_others(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    upstream.will(*whole(chat_answer(prompt=10, completion=5)))
    customer = await operator.account()
    body = json.dumps(customer.body()).encode()
    async with workers(2, database, tmp_path, upstream) as supervised:
        before = await supervised.pids()
        victim = min(before)
        os.kill(victim, signal.SIGKILL)

        async def replaced() -> bool:
            pids = await supervised.pids()
            return len(pids) == 2 and victim not in pids

        await eventually(replaced)
        assert set((await supervised.pids()).values()) == {"1", "2"}
        async with httpx2.AsyncClient(timeout=30) as http:
            answer = await http.post(f"{supervised.url}/chat/completions", content=body, headers=customer.headers)
        assert answer.status_code == 200
        await supervised.stop()


async def test_workers_end_themselves_when_their_supervisor_is_killed(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(60))
    customer = await operator.account()
    async with workers(2, database, tmp_path, upstream, SHUTDOWN_SECONDS="0.5") as supervised:
        pids = await supervised.pids()
        async with httpx2.AsyncClient(timeout=60) as http:
            reading = asyncio.create_task(read_broken(http, supervised.url, customer))
            await opened(customer, 1)
            supervised.process.kill()
            assert error_of(await reading) == "shutting_down"

        async def ended() -> bool:
            return not any(runs(pid) for pid in pids)

        await eventually(ended)
    [hold] = await customer.ended(1)
    assert (hold["ending"], hold["charge"]) == ("shutdown", 10_000 + 2 * 3000)
    await operator.audit()
