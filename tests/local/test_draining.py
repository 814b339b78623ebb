"""How a server takes leave of its connections: what is announced, what is left open for a while, what is cut when."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy.gateway.limits import DEFAULT
from proxy.gateway.protocol import Parting, guarded_protocol
from proxy.local.draining import Drain, DrainLimits
from proxy.local.serving import Stop, listen, serving

LIMITS = DrainLimits(delay=0, retire=30, idle=0.5)
GET = b"GET %b HTTP/1.1\r\nhost: test\r\n\r\n"


class App:
    """/stream gives a piece, waits to be allowed, and ends. It counts what is open, as Farebox does."""

    def __init__(self) -> None:
        self.open_exchanges = 0
        self.stop_at: float | None = None
        self.left = False
        self.go_on = asyncio.Event()
        self.shutdown_seconds = 30.0

    def leave(self) -> None:
        self.left = True

    def begin_shutdown(self) -> None:
        self.stop_at = asyncio.get_running_loop().time() + self.shutdown_seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": (await receive())["type"] + ".complete"})
            return
        path = scope["path"]
        if path == "/late":
            await self.go_on.wait()
        await send({"type": "http.response.start", "status": 503 if self.stop_at else 200, "headers": []})
        if path == "/stream":
            self.open_exchanges += 1
            await send({"type": "http.response.body", "body": b"begin ", "more_body": True})
            await self.go_on.wait()
            self.open_exchanges -= 1
        await send({"type": "http.response.body", "body": b"end", "more_body": False})


@dataclass
class Served:
    """A server that can be told to end."""

    app: App
    port: int
    stop: Stop
    listener: socket.socket
    ended: "asyncio.Task[None]" = field(init=False)
    up: asyncio.Event = field(default_factory=asyncio.Event)


@contextlib.asynccontextmanager
async def served(limits: DrainLimits = LIMITS) -> AsyncIterator[Served]:
    listener = listen("127.0.0.1", 0)
    # As under a supervisor, another process has the socket as well.
    other = listener.dup()
    one = Served(App(), listener.getsockname()[1], Stop(), other)

    async def serve() -> None:
        parting = Parting()
        drain = Drain(one.app, one.stop, parting, limits)
        async with serving(one.app, listener, http=guarded_protocol(DEFAULT, parting), drain=drain):
            one.up.set()
            await one.stop.wait()

    one.ended = asyncio.create_task(serve())
    await one.up.wait()
    try:
        yield one
    finally:
        one.app.go_on.set()
        one.stop.ask()
        await asyncio.wait_for(one.ended, 30)
        other.close()


class Connection:
    """A raw client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str) -> None:
        self.writer.write(GET % path.encode())
        await self.writer.drain()

    async def head(self) -> bytes:
        return (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)).lower()

    async def body(self) -> bytes:
        """The rest of a chunked answer."""
        return await asyncio.wait_for(self.reader.readuntil(b"0\r\n\r\n"), 20)

    async def closed(self) -> bool:
        """Whether the server closes within a while, without another byte."""
        return await asyncio.wait_for(self.reader.read(), 20) == b""


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def test_a_retiring_server_ends_a_stream_whole_and_the_connection_with_its_next_answer() -> None:
    async with served() as one, connected(one.port) as client:
        await client.ask("/stream")
        assert b"connection: close" not in await client.head()
        one.stop.retire()
        await asyncio.sleep(0.1)
        one.app.go_on.set()
        assert (await client.body()).endswith(b"end\r\n0\r\n\r\n")
        # It wasn't announced on this answer, so the next request is on its way already.
        await client.ask("/")
        head = await client.head()
        assert b"200" in head
        assert b"connection: close" in head
        await client.body()
        assert await client.closed()
        await asyncio.wait_for(one.ended, 20)
        assert not one.app.left or one.app.stop_at


async def test_what_is_not_answered_yet_is_answered_with_close() -> None:
    async with served() as one, connected(one.port) as client:
        await client.ask("/late")
        await asyncio.sleep(0.1)
        one.stop.retire()
        await asyncio.sleep(0.1)
        one.app.go_on.set()
        assert b"connection: close" in await client.head()
        await client.body()
        assert await client.closed()


async def test_a_connection_between_two_requests_is_left_open_for_a_while() -> None:
    async with served(DrainLimits(retire=30, idle=1.0)) as one, connected(one.port) as client:
        await client.ask("/")
        await client.head()
        await client.body()
        one.stop.retire()
        await asyncio.sleep(0.3)
        await client.ask("/")
        assert b"connection: close" in await client.head()
        await client.body()
        async with connected(one.port):
            # Nobody accepts here any more: another process's turn.
            assert await client.closed()
        await asyncio.wait_for(one.ended, 20)


async def test_an_idle_connection_doesnt_keep_a_retired_server_for_long() -> None:
    async with served() as one, connected(one.port) as client:
        await client.ask("/")
        await client.head()
        await client.body()
        one.stop.retire()
        assert await client.closed()
        await asyncio.wait_for(one.ended, 20)


async def test_a_retiring_server_accepts_nothing_and_leaves_the_queue_to_others() -> None:
    async with served() as one, connected(one.port) as busy:
        await busy.ask("/stream")
        await busy.head()
        one.stop.retire()
        await asyncio.sleep(0.2)
        async with connected(one.port) as waiting:
            await waiting.ask("/")
            await asyncio.sleep(0.2)
            taken, _ = await asyncio.get_running_loop().sock_accept(one.listener)
            assert taken.recv(100).startswith(b"GET / ")
            taken.close()


async def test_a_stop_overtakes_a_retirement() -> None:
    async with served() as one, connected(one.port) as client:
        one.app.shutdown_seconds = 0.1
        await client.ask("/stream")
        await client.head()
        one.stop.retire()
        await asyncio.sleep(0.1)
        assert one.app.stop_at is None
        one.stop.signalled()
        async with asyncio.timeout(20):
            while one.app.stop_at is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_the_limit_of_a_retirement_is_kept() -> None:
    async with served(DrainLimits(retire=0.2, idle=0.5)) as one, connected(one.port) as client:
        one.app.shutdown_seconds = 0.1
        await client.ask("/stream")
        await client.head()
        one.stop.retire()
        await asyncio.wait_for(one.ended, 20)


async def test_a_stopping_server_listens_and_says_no_until_it_is_gone() -> None:
    async with served() as one, connected(one.port) as busy:
        await busy.ask("/stream")
        await busy.head()
        one.stop.signalled()
        async with asyncio.timeout(20):
            while one.app.stop_at is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with connected(one.port) as late:
            await late.ask("/")
            head = await late.head()
            assert b"503" in head
            assert b"connection: close" in head
        one.app.go_on.set()
        assert (await busy.body()).endswith(b"end\r\n0\r\n\r\n")
        await asyncio.wait_for(one.ended, 20)


async def test_requests_are_taken_during_the_delay_though_it_says_that_it_leaves() -> None:
    async with served(DrainLimits(delay=20)) as one, connected(one.port) as client:
        one.stop.signalled()
        async with asyncio.timeout(20):
            while not one.app.left:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await client.ask("/")
        assert b"200" in await client.head()
        assert one.app.stop_at is None
        # Nobody waits for it once somebody is in a hurry.
        one.stop.signalled()
        await asyncio.wait_for(one.ended, 10)


async def test_an_orphan_gives_the_port_free_while_it_drains() -> None:
    async with served() as one, connected(one.port) as busy:
        await busy.ask("/stream")
        await busy.head()
        one.listener.close()
        one.stop.orphaned = True
        one.stop.ask()
        async with asyncio.timeout(20):
            while one.app.stop_at is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        listen("127.0.0.1", one.port).close()
        one.app.go_on.set()
        assert (await busy.body()).endswith(b"end\r\n0\r\n\r\n")


@pytest.mark.parametrize("times", [1, 2])
async def test_a_server_without_connections_ends_at_once(times: int) -> None:
    async with served() as one:
        for _ in range(times):
            one.stop.signalled()
        await asyncio.wait_for(one.ended, 10)
