"""How real servers end: in a hurry, without their database, without their supervisor, and when only one is told."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from proxy.local.processes import is_running
from tests.e2e.proxy import Customer, Proxy, pricing_yaml, running_proxy, upstreams_yaml
from tests.e2e.test_processes import ROOT, error_of, serve
from tests.e2e.workers import SSE, eventually, opened, read_broken, read_stream, workers
from tests.fakes.upstream import DONE, Chunk, ScriptedUpstream, Sleep, chunk, stream, usage_chunk
from tests.postgres import Database

PARTIAL = 10 * 1000 + 2 * 3000
REPORTED = 10 * 1000 + 5 * 3000


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


async def test_a_second_signal_cuts_what_every_worker_has(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(120))
    customer = await operator.account()
    async with (
        workers(2, database, tmp_path, upstream, SHUTDOWN_SECONDS="100") as supervised,
        httpx2.AsyncClient(timeout=60) as http,
    ):
        reading = [asyncio.create_task(read_broken(http, supervised.url, customer)) for _ in range(4)]
        await opened(customer, 4)
        await asyncio.sleep(1)
        supervised.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert supervised.process.returncode is None
        supervised.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            assert await supervised.process.wait() == 0
        assert {error_of(read) for read in await asyncio.gather(*reading)} == {"shutting_down"}
    assert {hold["charge"] for hold in await customer.ended(4)} == {PARTIAL}
    await operator.audit()


async def test_a_worker_that_is_told_to_stop_by_itself_ends_its_streams_and_is_replaced(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    pieces = [chunk(f" {i}") for i in range(5)]
    upstream.will(*stream(*pieces, chunk(finish="stop"), usage_chunk(10, 5), DONE, delay=0.3))
    customer = await operator.account()
    async with workers(2, database, tmp_path, upstream, SHUTDOWN_SECONDS="30") as supervised:
        before = await supervised.pids()
        async with httpx2.AsyncClient(timeout=60) as http:
            reading = [asyncio.create_task(read_stream(http, supervised.url, customer)) for _ in range(6)]
            await opened(customer, 6)
            for pid in before:
                os.kill(pid, signal.SIGTERM)
            assert all(read.endswith(DONE) for read in await asyncio.gather(*reading))

        async def replaced() -> bool:
            pids = await supervised.pids()
            return len(pids) == 2 and set(pids).isdisjoint(before)

        await eventually(replaced)
        await supervised.stop()
    assert {hold["charge"] for hold in await customer.ended(6)} == {REPORTED}


@pytest.mark.parametrize("count", ["", "1"])
async def test_a_server_whose_database_is_gone_doesnt_wait_for_it(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy, count: str
) -> None:
    state = {"STATE_DIR": str(tmp_path / "state"), "WORKERS": count}
    customer = await operator.account()
    assert await stopped_without_its_database(database, tmp_path, upstream, customer, state) == 0
    # What it knew is in its journal: the next start books it.
    async with serve(database, tmp_path, upstream, **state):
        [hold] = await customer.ended(seconds=30)
    assert (hold["state"], hold["charge"]) == ("final", REPORTED)
    await operator.audit()


@pytest.mark.parametrize("count", ["", "1"])
async def test_a_charge_that_could_be_written_nowhere_is_said_by_the_exit_status(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy, count: str
) -> None:
    customer = await operator.account()
    settings = {"JOURNAL_DIR": "off", "WORKERS": count}
    assert await stopped_without_its_database(database, tmp_path, upstream, customer, settings) == 1


async def stopped_without_its_database(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, customer: Customer, settings: dict[str, str]
) -> int:
    """The exit status of a server that is stopped when its database is gone, with an answer to charge."""
    upstream.will(SSE, Chunk(chunk("a")), Sleep(1.5), *stream(chunk(finish="stop"), usage_chunk(10, 5), DONE)[1:])
    async with serve(database, tmp_path, upstream, SHUTDOWN_SECONDS="100", **settings) as (process, url):
        async with httpx2.AsyncClient(timeout=60) as http:
            reading = asyncio.create_task(read_stream(http, url, customer))
            await opened(customer, 1)
            await shut_out(customer.proxy, database)
            assert (await reading).endswith(DONE)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(90):
            status = await process.wait()
        assert time.monotonic() - began < 50
    await customer.proxy.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
    return status


async def shut_out(operator: Proxy, database: Database) -> None:
    """Everybody but a superuser is shut out, and those who are in are thrown out."""
    await operator.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
    kick = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database.name}'"
    await operator.query_elsewhere(kick)


async def test_a_server_says_that_it_leaves_before_it_refuses(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    upstream.will(*stream(chunk("a"), chunk(finish="stop"), usage_chunk(10, 5), DONE))
    customer = await operator.account()
    async with (
        serve(database, tmp_path, upstream, SHUTDOWN_DELAY_SECONDS="60") as (process, url),
        httpx2.AsyncClient(timeout=60) as http,
    ):
        ready = url.removesuffix("/v1") + "/readyz"
        assert (await http.get(ready)).status_code == 200
        process.send_signal(signal.SIGTERM)

        async def leaving() -> bool:
            return (await http.get(ready)).status_code == 503

        await eventually(leaving)
        assert (await read_stream(http, url, customer)).endswith(DONE)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0


async def test_a_metrics_port_that_is_taken_is_said_at_the_start(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    (tmp_path / "pricing.yaml").write_text(pricing_yaml())
    (tmp_path / "upstreams.yaml").write_text(upstreams_yaml(upstream.base_url))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"METRICS_PORT": str(port), "KEY_PEPPER": "p" * 40, "DATABASE_URL": database.app, "PORT": "0"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy.cli", "serve", "--workers", "2"),
            *("--pricing", "pricing.yaml", "--upstreams", "upstreams.yaml"),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
            | {f"FAREBOX_{name}": value for name, value in settings.items()},
            cwd=tmp_path,
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == (
        f"farebox: FAREBOX_METRICS_PORT: can't listen on 127.0.0.1:{port}: Address already in use"
    )


async def test_an_embedded_database_outlives_its_killed_supervisor_until_the_workers_have_settled(
    state_path: Path, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(120))
    (tmp_path / "pricing.yaml").write_text(pricing_yaml())
    (tmp_path / "upstreams.yaml").write_text(upstreams_yaml(upstream.base_url))
    settings = {"STATE_DIR": str(state_path), "METRICS_PORT": "0", "PORT": "0", "WORKERS": "2", "LOG_LEVEL": "warning"}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "FAREBOX_SHUTDOWN_SECONDS": "1"}
    environment |= {f"FAREBOX_{name}": value for name, value in settings.items()}
    files = ("--pricing", "pricing.yaml", "--upstreams", "upstreams.yaml")

    async def farebox(*words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy.cli", *words, "--json"),
            env=environment,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
        )

    async def said(*words: str) -> dict[str, object]:
        process = await farebox(*words)
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, out
        found: dict[str, object] = json.loads(out)
        return found

    server = await farebox("serve", *files)
    assert server.stdout is not None
    url = json.loads(await asyncio.wait_for(server.stdout.readline(), 120))["base_url"]
    await said("accounts", "create", "ann")
    await said("credits", "grant", "ann", "1000", "--ref", "first")
    key = (await said("keys", "create", "ann"))["key"]
    children = set(pids_below(server.pid))
    assert len(children) >= 3
    read = b""
    body = {"model": "m", "messages": [{"role": "user", "content": "Say hello."}], "stream": True}
    async with httpx2.AsyncClient(timeout=60) as http:
        try:
            headers = {"authorization": f"Bearer {key}"}
            async with http.stream("POST", f"{url}/chat/completions", json=body, headers=headers) as answer:
                async for piece in answer.aiter_raw():
                    if not read:
                        server.kill()
                    read += piece
        except httpx2.RemoteProtocolError:
            pass
    assert error_of(read) == "shutting_down"
    await server.wait()

    async def all_gone() -> bool:
        return not any(is_running(pid) for pid in children)

    await eventually(all_gone)
    account = await said("accounts", "show", "ann")
    assert (account["held"], account["balance"]) == ("0", "999.984")
    await said("audit")


def pids_below(pid: int) -> list[int]:
    """A process's descendants, by /proc."""
    below = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if (entry / "stat").exists() and parent_of(entry) == pid
    ]
    return below + [deeper for child in below for deeper in pids_below(child)]


def parent_of(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
