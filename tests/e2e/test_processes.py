"""Farebox in processes of its own, as an operator runs it: two over one ledger, and one that is told to stop."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.proxy import PEPPER, Customer, Proxy, pricing_yaml, running_proxy, upstreams_yaml
from tests.fakes.upstream import Chunk, ScriptedUpstream, Sleep, Wait, chat_answer, chunk, head, whole
from tests.postgres import Database

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def serve(
    database: Database,
    directory: Path,
    upstream: ScriptedUpstream,
    *,
    root: str | Path = ROOT,
    pricing: str | None = None,
    **settings: str,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """``farebox serve`` on a free port: the process and its base URL. ``root``: where its code is."""
    (directory / "pricing.yaml").write_text(pricing or pricing_yaml())
    (directory / "upstreams.yaml").write_text(upstreams_yaml(upstream.base_url))
    values = {
        "METRICS_PORT": "0",
        "KEY_PEPPER": PEPPER,
        "DATABASE_URL": database.app,
        "LOG_LEVEL": "warning",
    } | settings
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root)}
    environment |= {f"FAREBOX_{name}": value for name, value in values.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy.cli", "serve", "--port", "0", "--json"),
        *("--pricing", str(directory / "pricing.yaml"), "--upstreams", str(directory / "upstreams.yaml")),
        env=environment,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        yield process, json.loads(line)["base_url"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
async def operator(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Proxy]:
    """The operator's hand on the ledger (its own server gets no request)."""
    async with running_proxy(database, tmp_path, upstream.base_url) as running:
        yield running


async def test_two_processes_never_sell_the_same_credit_twice(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    affordable, asked = 20, 200
    # Every call holds, and then costs, 27 tokens of prompt and 100 of answer.
    cost = 27 * 1000 + 100 * 3000
    customer = await operator.account(credits=(affordable * cost + cost - 1) / 1_000_000)
    everybody_was_answered = asyncio.Event()
    upstream.will(Wait(everybody_was_answered), *whole(chat_answer(prompt=27, completion=100)))
    samples: list[tuple[int, int]] = []

    async def sample() -> None:
        while True:
            money = await customer.money()
            samples.append((money.balance, money.held))
            await asyncio.sleep(0.01)

    async with contextlib.AsyncExitStack() as stack:
        urls = [(await stack.enter_async_context(serve(database, tmp_path, upstream)))[1] for _ in range(2)]
        limits = httpx2.Limits(max_connections=None)
        http = await stack.enter_async_context(httpx2.AsyncClient(timeout=60, limits=limits))
        sampling = asyncio.create_task(sample())
        body = json.dumps(customer.body(max_tokens=100)).encode()

        async def call(i: int) -> httpx2.Response:
            return await http.post(f"{urls[i % 2]}/chat/completions", content=body, headers=customer.headers)

        calls = [asyncio.create_task(call(i)) for i in range(asked)]
        async with asyncio.timeout(60):
            refused: list[asyncio.Task[httpx2.Response]] = []
            while len(refused) < asked - affordable:
                await asyncio.wait([one for one in calls if not one.done()], return_when=asyncio.FIRST_COMPLETED)
                refused = [one for one in calls if one.done()]
        everybody_was_answered.set()
        answers = await asyncio.gather(*calls)
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * affordable + [402] * (asked - affordable)
        await customer.ended(affordable)
        sampling.cancel()
    money = await customer.money()
    assert (money.balance, money.held) == (cost - 1, 0)
    assert len(samples) > 2
    assert all(balance - held >= 0 and held >= 0 for balance, held in samples)
    await operator.audit()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_a_process_that_is_told_to_stop_settles_what_it_has(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy, name: str
) -> None:
    customer = await operator.account()
    upstream.will(SSE, Chunk(chunk(" one")), Chunk(chunk(" two")), Sleep(60))
    async with serve(database, tmp_path, upstream, SHUTDOWN_SECONDS="0.5") as (process, url):
        pieces: list[bytes] = []

        async def read_and_tell() -> None:
            async for piece in pieces_of(url, customer):
                pieces.append(piece)
                if len(pieces) == 1:
                    process.send_signal(getattr(signal, name))

        with pytest.raises(httpx2.RemoteProtocolError):
            await read_and_tell()
        async with asyncio.timeout(15):
            assert await process.wait() == 0
    assert error_of(b"".join(pieces)) == "shutting_down"
    [hold] = await customer.holds()
    assert (hold["state"], hold["ending"], hold["charge"]) == ("final", "shutdown", 10_000 + 3 * 3000)
    assert (await customer.money()).held == 0
    await operator.audit()


async def pieces_of(url: str, customer: Customer) -> AsyncIterator[bytes]:
    body = json.dumps(customer.body(stream=True)).encode()
    async with (
        httpx2.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{url}/chat/completions", content=body, headers=customer.headers) as answer,
    ):
        async for piece in answer.aiter_raw():
            yield piece


def error_of(read: bytes) -> Any:
    return json.loads(read.split(b"data: ")[-1])["error"]["code"]
