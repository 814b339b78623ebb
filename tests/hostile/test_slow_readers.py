"""Clients that don't read, and one that reads slowly."""

import asyncio
import json
import socket
from pathlib import Path

import pytest

from tests.e2e.proxy import running_proxy
from tests.fakes.upstream import Chunk, ScriptedUpstream, chunk, head
from tests.hostile.slow_readers import measure
from tests.postgres import Database

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})


@pytest.mark.timeout(240)
async def test_who_never_reads_costs_little_is_aborted_and_is_in_nobodys_way(
    database: Database, tmp_path: Path
) -> None:
    """A small crowd; ``python -m tests.hostile.slow_readers`` measures a thousand, and what the others notice."""
    found = await measure(database, tmp_path, readers=60, send_seconds=5, good_calls=60)
    print(found.report())
    assert len(found.aborted_after) == 60
    assert found.bytes_each < 512 * 1024, "among sixty, what the first one needs counts, too"
    assert len(found.beside) == 60
    assert found.open_holds == 0
    assert found.descriptors_after < 20


async def test_who_reads_slowly_makes_progress(database: Database, tmp_path: Path) -> None:
    """For three times as long as one may stand still; then it stands still."""
    async with (
        ScriptedUpstream() as upstream,
        running_proxy(database, tmp_path, upstream.base_url, send_seconds=2) as proxy,
    ):
        customer = await proxy.account(1_000_000)
        upstream.will(SSE, *[Chunk(chunk("word " * 400)) for _ in range(2000)])
        host, port = proxy.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(client, (host, int(port)))
            body = json.dumps(customer.body(stream=True)).encode()
            start = f"POST /v1/chat/completions HTTP/1.1\r\nhost: f\r\nauthorization: Bearer {customer.key}\r\n"
            await loop.sock_sendall(client, f"{start}content-length: {len(body)}\r\n\r\n".encode() + body)
            began = loop.time()
            while loop.time() - began < 6:
                # Five to ten kilobytes a second: a piece of what waits takes longer than one may stand still.
                assert await loop.sock_recv(client, 2048), "it was aborted, though it read"
                await asyncio.sleep(0.2)
            async with asyncio.timeout(30):
                await _reset(client)
        await customer.ended(1, seconds=20)


async def _reset(client: socket.socket) -> None:
    """Once the connection is reset; the socket itself tells, since nothing is read."""
    while True:
        await asyncio.sleep(0.05)
        if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return
