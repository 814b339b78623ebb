"""`farebox serve --workers` in processes of its own, and its customers, for the tests that restart and stop it."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2

from tests.e2e.proxy import Customer
from tests.e2e.test_processes import serve
from tests.fakes.upstream import ScriptedUpstream, head
from tests.postgres import Database

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
SERVING = re.compile(r'^farebox_worker_lease_held\{pid="(\d+)",worker="(\d+)"\} 1\.0$', re.MULTILINE)
STATES = re.compile(r'^farebox_workers\{state="(\w+)"\} (\d+)', re.MULTILINE)


class Workers:
    """A supervisor and its workers, and what its metrics say of them."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, metrics_url: str) -> None:
        self.process = process
        self.url = url
        self._metrics_url = metrics_url

    async def metrics(self) -> str:
        async with httpx2.AsyncClient(timeout=10) as http:
            return (await http.get(self._metrics_url)).text

    async def pids(self) -> dict[int, str]:
        """The workers that answer: process id and slot."""
        return {int(pid): slot for pid, slot in SERVING.findall(await self.metrics())}

    async def states(self) -> dict[str, int]:
        return {state: int(count) for state, count in STATES.findall(await self.metrics())}

    async def until(self, **states: int) -> None:
        """Return once so many workers stand so, and none elsewhere."""

        async def so() -> bool:
            return {state: count for state, count in (await self.states()).items() if count} == states

        await eventually(so)

    async def restart(self, count: int) -> None:
        """SIGHUP, until every one of so many workers is another."""
        before = await self.pids()
        self.process.send_signal(signal.SIGHUP)

        async def replaced() -> bool:
            return len(set(await self.pids()) - set(before)) >= count

        await eventually(replaced)

    async def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await self.process.wait() == 0


@contextlib.asynccontextmanager
async def workers(
    count: int, database: Database, directory: Path, upstream: ScriptedUpstream, **settings: str
) -> AsyncIterator[Workers]:
    port = free_port()
    more = {"WORKERS": str(count), "METRICS_PORT": str(port), "SHUTDOWN_SECONDS": "5"} | settings
    async with serve(database, directory, upstream, **more) as (process, url):
        yield Workers(process, url, f"http://127.0.0.1:{port}/metrics")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def read_stream(http: httpx2.AsyncClient, url: str, customer: Customer) -> bytes:
    """A stream's bytes, to its clean end."""
    body = json.dumps(customer.body(stream=True)).encode()
    async with http.stream("POST", f"{url}/chat/completions", content=body, headers=customer.headers) as answer:
        return b"".join([piece async for piece in answer.aiter_raw()])


async def read_broken(http: httpx2.AsyncClient, url: str, customer: Customer) -> bytes:
    """A stream's bytes, which must not come to a clean end."""
    body, read = json.dumps(customer.body(stream=True)).encode(), b""
    try:
        async with http.stream("POST", f"{url}/chat/completions", content=body, headers=customer.headers) as answer:
            async for piece in answer.aiter_raw():
                read += piece
    except httpx2.RemoteProtocolError:
        return read
    raise AssertionError("a clean end")


async def opened(customer: Customer, count: int) -> None:
    async def so() -> bool:
        return len(await customer.holds()) >= count

    await eventually(so)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once it does, within a minute."""
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
