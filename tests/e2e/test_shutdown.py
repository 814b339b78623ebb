"""What outlives a request: SIGTERM during a stream, a lost lease, a lost database, a client that doesn't read."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest

from proxy.app import Timing
from proxy.local.serving import Stop
from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    ScriptedUpstream,
    Send,
    Sleep,
    Step,
    chat_answer,
    chunk,
    head,
    stream,
    usage_chunk,
    whole,
)
from tests.postgres import Database

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
PROMPT = 10 * 1000
REPORTED = 10 * 1000 + 5 * 3000


# A lease of one second instead of thirty, by rewriting what the renewal wrote.
LEASE = timedelta(seconds=1)
SHORT_LEASES = (
    "CREATE FUNCTION public.shorten() RETURNS trigger LANGUAGE plpgsql AS "
    "$$BEGIN NEW.lease_until := clock_timestamp() + interval '1 second'; RETURN NEW; END$$",
    "CREATE TRIGGER short_leases BEFORE UPDATE ON farebox.workers FOR EACH ROW EXECUTE FUNCTION public.shorten()",
)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


async def read_all(customer: Customer, started: asyncio.Event, **more: object) -> tuple[bytes, bool]:
    """What came of a stream, and whether its end was clean. ``started``: set at the first piece."""
    read = b""
    try:
        async with customer.stream(**more) as answer:
            async for piece in answer.aiter_raw():
                read += piece
                started.set()
    except httpx2.RemoteProtocolError:
        return read, False
    return read, True


async def test_a_stream_that_ends_in_time_is_finished_during_shutdown(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(*stream(chunk("a"), chunk(finish="stop"), usage_chunk(10, 5), DONE, delay=0.2))
    started = asyncio.Event()
    async with running_proxy(database, tmp_path, upstream.base_url, shutdown_seconds=5) as proxy:
        customer = await proxy.account()
        reading = asyncio.create_task(read_all(customer, started))
        await started.wait()
        proxy.app.begin_shutdown()
        answer = await customer.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert (await proxy.http.get(proxy.base_url.removesuffix("/v1") + "/readyz")).status_code == 503
    read, clean = await reading
    assert clean
    assert read.endswith(DONE)
    assert await ended(proxy, customer) == (REPORTED, "reported", "complete")


async def test_a_stream_that_outlasts_the_shutdown_is_charged_as_far_as_it_came(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(30))
    started = asyncio.Event()
    async with running_proxy(database, tmp_path, upstream.base_url, shutdown_seconds=0.3) as proxy:
        customer = await proxy.account()
        silent = await proxy.account()
        reading = asyncio.create_task(read_all(customer, started))
        await started.wait()
        upstream.will(Sleep(30))
        waiting = asyncio.create_task(silent.post())
        await silent.opened()
    read, clean = await reading
    assert not clean
    assert json.loads(read.split(b"data: ")[-1])["error"]["code"] == "shutting_down"
    refused = await waiting
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert await ended(proxy, customer) == (PROMPT + (1 + 1) * 3000, "counted", "shutdown")
    assert await ended(proxy, silent) == (0, None, "released")


async def test_a_second_signal_cuts_what_runs_and_still_charges_it(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """make hands a SIGTERM on that its whole group got; people press Ctrl-C twice."""
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(30))
    started, stop = asyncio.Event(), Stop()
    async with running_proxy(database, tmp_path, upstream.base_url, shutdown_seconds=25, stop=stop) as proxy:
        with stop.on_signals():
            customer = await proxy.account()
            reading = asyncio.create_task(read_all(customer, started))
            await started.wait()
            began = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            await stop.wait()
    assert time.monotonic() - began < 10
    read, clean = await reading
    assert not clean
    assert json.loads(read.split(b"data: ")[-1])["error"]["code"] == "shutting_down"
    assert await ended(proxy, customer) == (PROMPT + (1 + 1) * 3000, "counted", "shutdown")
    [worker] = await proxy.query("SELECT stopped_at FROM farebox.workers")
    assert worker["stopped_at"] is not None


async def test_a_drain_is_settled_at_shutdown(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(30))
    async with running_proxy(database, tmp_path, upstream.base_url, shutdown_seconds=0.3) as proxy:
        customer = await proxy.account()
        async with customer.stream(model="drained") as answer:
            await anext(answer.aiter_raw())
    assert await ended(proxy, customer) == (PROMPT + (1 + 1) * 3000, "counted", "shutdown")


async def test_a_stream_that_outlasts_every_lease_period_is_charged_in_full(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """The lease is 30 s; here it is shortened in the database whenever it is renewed, and swept as often as can be."""
    pieces = [chunk(f" {i}") for i in range(30)]
    upstream.will(*stream(*pieces, chunk(finish="stop"), usage_chunk(10, 30), DONE, delay=0.1))
    timing = Timing(renew_seconds=0.1, sweep_seconds=0.1, settled_seconds=0.1)
    async with running_proxy(database, tmp_path, upstream.base_url, timing=timing) as proxy:
        for statement in SHORT_LEASES:
            await proxy.query(statement)
        customer = await proxy.account()
        await read_all(customer, asyncio.Event())
        [hold] = await customer.ended()
        assert hold["ended_at"] - hold["opened_at"] > 3 * LEASE
        assert (hold["state"], hold["charge"]) == ("final", 10_000 + 30 * 3000)
    assert await ended(proxy, customer) == (10_000 + 30 * 3000, "reported", "complete")


async def test_a_lost_lease_closes_what_is_open_and_admits_nothing(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(30))
    started = asyncio.Event()
    timing = Timing(renew_seconds=0.1, lease_seconds=0.5)
    async with running_proxy(database, tmp_path, upstream.base_url, timing=timing) as proxy:
        customer = await proxy.account()
        reading = asyncio.create_task(read_all(customer, started))
        await started.wait()
        await proxy.query("UPDATE farebox.workers SET stopped_at = clock_timestamp()")
        read, clean = await reading
        assert not clean
        assert json.loads(read.split(b"data: ")[-1])["error"]["code"] == "ledger_unavailable"
        answer = await customer.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert answer.headers["retry-after"]
    assert await ended(proxy, customer) == (PROMPT + (1 + 1) * 3000, "counted", "lease_lapsed")


@pytest.mark.parametrize("model", ["drained", "m"])
async def test_a_client_that_does_not_read_counts_as_gone(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, model: str
) -> None:
    """And what becomes of its answer is what becomes of any whose client leaves."""
    steps: list[Step] = [SSE, *(Chunk(chunk("x" * 60_000)) for _ in range(400))]
    upstream.will(*steps, Chunk(chunk(finish="stop")), Chunk(usage_chunk(10, 5)), Chunk(DONE), Send(b"0\r\n\r\n"))
    async with running_proxy(database, tmp_path, upstream.base_url, send_seconds=0.4) as proxy:
        customer = await proxy.account()
        host, port = proxy.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        body = json.dumps(customer.body(stream=True, model=model)).encode()
        lines = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {customer.key}\r\n"
        writer.write(lines.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        [hold] = await customer.ended()
        if model == "drained":
            assert (hold["charge"], hold["ending"]) == (REPORTED, "client_left")
        else:
            assert (hold["usage_source"], hold["ending"]) == ("counted", "client_left_cut")
            await asyncio.wait_for(upstream.requests[-1].closed.wait(), 2)
        # Its connection was reset: closed politely, it would keep what is buffered for it until it reads.
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_more_drains_than_allowed_are_cut(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Chunk(chunk(" one")), Sleep(0.5), *stream(usage_chunk(10, 5), DONE)[1:])
    async with running_proxy(database, tmp_path, upstream.base_url, drains_max=1) as proxy:
        customer = await proxy.account()
        for _ in range(2):
            async with customer.stream(model="drained") as answer:
                await anext(answer.aiter_raw())
        endings = sorted(hold["ending"] for hold in await customer.ended(2))
        assert endings == ["client_left", "client_left_cut"]
        # A place is free again once a drain is over.
        async with customer.stream(model="drained") as answer:
            await anext(answer.aiter_raw())
        assert (await customer.ended(3))[2]["ending"] == "client_left"


async def test_no_ledger_is_a_503_and_nothing_is_sent(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    async with running_proxy(database, tmp_path, upstream.base_url, reserve_seconds=0.3) as proxy:
        customer = await proxy.account()
        assert (await customer.post()).status_code == 200
        await customer.ended()
        sent = len(upstream.requests)
        # Everybody but a superuser is shut out, and those who are in are thrown out.
        await proxy.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
        await proxy.query_elsewhere(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database.name}'"
        )
        began = time.monotonic()
        answer = await customer.post()
        assert time.monotonic() - began < 3
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "ledger_unavailable"
        assert len(upstream.requests) == sent
        await proxy.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
        async with asyncio.timeout(10):
            while True:
                if (await customer.post()).status_code == 200:
                    break
                await asyncio.sleep(0.1)
        holds = await customer.holds()
        await customer.ended(len(holds))
    [account] = await proxy.query("SELECT held FROM farebox.accounts WHERE id = $1", customer.id)
    assert account["held"] == 0


async def test_a_charge_waits_for_the_ledger(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Chunk(chunk("a")), Sleep(0.4), *stream(chunk(finish="stop"), usage_chunk(10, 5), DONE)[1:])
    started = asyncio.Event()
    async with running_proxy(database, tmp_path, upstream.base_url) as proxy:
        customer = await proxy.account()
        reading = asyncio.create_task(read_all(customer, started))
        await started.wait()
        await proxy.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
        kick = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database.name}'"
        await proxy.query_elsewhere(kick)
        _, clean = await reading
        assert clean
        await asyncio.sleep(0.3)
        await proxy.query_elsewhere(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS true")
        [hold] = await customer.ended(seconds=10)
        assert (hold["state"], hold["charge"]) == ("final", REPORTED)
        await proxy.audit()


async def ended(proxy: Proxy, customer: Customer) -> tuple[int, str | None, str | None]:
    """How the account's one call ended, once the server is gone."""
    [hold] = await customer.holds()
    assert hold["state"] != "open"
    [account] = await proxy.query("SELECT balance, held FROM farebox.accounts WHERE id = $1", customer.id)
    assert account["held"] == 0
    await proxy.audit()
    return 1000_000_000 - account["balance"], hold["usage_source"], hold["ending"]
