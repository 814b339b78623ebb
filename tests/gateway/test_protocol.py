"""gateway/protocol.py and gateway/limits.py behind a real server and real sockets: what trickles in is cut off."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn

from proxy.core.errors import Refusal
from proxy.gateway.client import ABORT
from proxy.gateway.front import send_json
from proxy.gateway.limits import DEFAULT, ClientLeft, LimitsProfile, check_headers, read_body
from proxy.gateway.protocol import guarded_protocol

LIMITS = replace(DEFAULT, receive_seconds=0.4, header_bytes_max=4096, body_bytes_max=100_000)
REQUEST = b"POST / HTTP/1.1\r\nhost: test\r\n"


class Echo:
    """An app that receives a body under the limits and answers with its length; ``slow`` answers after a while."""

    def __init__(self, limits: LimitsProfile) -> None:
        self.limits = limits
        self.left = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        try:
            check_headers(scope["headers"], self.limits)
            if scope["path"] == "/early":
                await send_json(send, 200, {"early": True}, [])
                return
            body = await read_body(receive, scope["headers"], self.limits)
            if scope["path"] == "/slow":
                await asyncio.sleep(2 * self.limits.receive_seconds)
            await send_json(send, 200, {"length": len(body)}, [])
        except Refusal as refusal:
            headers = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
            await send_json(send, refusal.status, refusal.body(), headers)
        except ClientLeft:
            self.left += 1


@asynccontextmanager
async def serving(app: Echo, *, send_buffer_bytes: int | None = None) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    config = uvicorn.Config(
        app,
        http=guarded_protocol(app.limits),  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        access_log=False,
        ws="none",
    )
    server = uvicorn.Server(config)
    serving_task = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving_task
        listener.close()


class Connection:
    """A raw client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        try:
            return await asyncio.wait_for(self.reader.read(-1), 30)
        except ConnectionError:
            return b""

    async def answer(self) -> bytes:
        """One answer's body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return await self.reader.readexactly(length)

    async def trickle(self, data: bytes, pause_seconds: float = 0.02) -> bool:
        """Send byte by byte; True if the server hung up before the end."""
        try:
            for at in range(len(data)):
                await self.send(data[at : at + 1])
                await asyncio.sleep(pause_seconds)
                if self.reader.at_eof():
                    return True
        except ConnectionError:
            return True
        return False


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving(Echo(LIMITS)) as found:
        yield found


@pytest.mark.parametrize("start", [b"", b"\r\n", b"P", b"POST / HT", REQUEST, REQUEST + b"x-name: val"])
async def test_a_connection_that_sends_no_whole_head_is_closed(port: int, start: bytes) -> None:
    async with connected(port) as client:
        before = time.monotonic()
        await client.send(start)

        assert await client.rest() == b""
        assert time.monotonic() - before > 0.3


async def test_a_head_that_trickles_is_cut_off(port: int) -> None:
    async with connected(port) as client:
        assert await client.trickle(REQUEST + b"x-padding: " + b"x" * 1000)


async def test_empty_lines_between_requests_do_not_keep_a_connection_alive(port: int) -> None:
    async with connected(port) as client:
        await client.send(REQUEST + b"content-length: 0\r\n\r\n")
        assert await client.answer() == b'{"length": 0}'

        assert await client.trickle(b"\r\n" * 1000)


async def test_a_body_that_trickles_is_refused_and_cut_off(port: int) -> None:
    async with connected(port) as client:
        await client.send(REQUEST + b"content-length: 1000\r\n\r\n")
        answer, hung_up = await asyncio.gather(client.answer(), client.trickle(b"x" * 1000), return_exceptions=True)

    assert hung_up is True
    # A client that goes on writing to a closed connection may lose what was said to it before.
    assert not isinstance(answer, bytes) or b"request_too_slow" in answer


async def test_a_body_that_trickles_on_after_its_answer_is_cut_off(port: int) -> None:
    async with connected(port) as client:
        await client.send(REQUEST.replace(b"/ ", b"/early ") + b"content-length: 1000\r\n\r\n")
        assert await client.answer() == b'{"early": true}'

        assert await client.trickle(b"x" * 1000)


async def test_an_endless_header_is_cut_off_by_size(port: int) -> None:
    async with connected(port) as client:
        await client.send(REQUEST + b"x-padding: ")
        sent = 0
        try:
            while not client.reader.at_eof() and sent < 10_000_000:
                await client.send(b"x" * 1000)
                sent += 1000
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        assert sent < 1_000_000


@pytest.mark.parametrize("path", [b"/ ", b"/early "])
@pytest.mark.parametrize(
    ("start", "more"), [(b"0\r\n", b"x: " + b"y" * 995 + b"\r\n"), (b"0\r\nx: ", b"y" * 1000), (b"1;", b"y" * 1000)]
)
async def test_what_is_wrapped_around_a_body_has_an_end(port: int, path: bytes, start: bytes, more: bytes) -> None:
    async with connected(port) as client:
        await client.send(REQUEST.replace(b"/ ", path) + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n" + start)
        sent = 0
        try:
            while sent < 10_000_000:
                await client.send(more * 20)
                sent += 20_000
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        assert sent < 5_000_000


async def test_trailers_are_no_headers(port: int) -> None:
    trailers = b"".join(b"x-%d: y\r\n" % i for i in range(100))
    async with connected(port) as client:
        await client.send(REQUEST + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + trailers + b"\r\n")
        assert await client.answer() == b'{"length": 1}'


async def test_an_answer_that_is_not_read_does_not_keep_the_connection() -> None:
    class Large(Echo):
        async def __call__(self, _scope: MutableMapping[str, Any], _receive: Any, send: Any) -> None:
            await send_json(send, 200, ["x" * 8_000_000], [])
            self.left += 1

    app = Large(LIMITS)
    async with serving(app) as port, connected(port) as client:
        await client.send(REQUEST + b"content-length: 0\r\n\r\n")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(3 * LIMITS.receive_seconds)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert app.left == 1
        assert len(await client.rest()) < 8_000_000


class Large(Echo):
    """Answers with much, whole or without an end."""

    async def __call__(self, scope: MutableMapping[str, Any], _receive: Any, send: Any) -> None:
        if scope["path"] == "/broken":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * 300_000, "more_body": True})
            scope["extensions"][ABORT]["broken"]()
        else:
            await send_json(send, 200, ["x" * 300_000], [])
        self.left += 1


@asynccontextmanager
async def reading_little(port: int, path: bytes, header: bytes) -> AsyncIterator[socket.socket]:
    """A client with a small buffer, that reads only when it is told to; its request is out."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    try:
        await loop.sock_sendall(
            client, b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n" + header + b"\r\n"
        )
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("path", [b"/", b"/broken"])
@pytest.mark.parametrize("header", [b"", b"connection: close\r\n"])
async def test_an_answer_that_is_over_is_offered_as_long_as_it_is_read(path: bytes, header: bytes) -> None:
    """However slowly; some time after the last byte was taken, the connection is gone, whatever it was to become."""
    app = Large(LIMITS)
    async with serving(app, send_buffer_bytes=8192) as port, reading_little(port, path, header) as client:
        loop = asyncio.get_running_loop()
        read = 0
        while read < 100_000:  # takes far longer than the server waits for one who doesn't read
            read += len(await loop.sock_recv(client, 2_000))
            await asyncio.sleep(LIMITS.receive_seconds / 10)
        assert app.left == 1
        await asyncio.sleep(4 * LIMITS.receive_seconds)
        reset = False
        while not reset:
            try:
                data = await loop.sock_recv(client, 65_536)
            except ConnectionResetError:
                reset = True
            else:
                assert data, "an answer that isn't whole may not end as if it were"
                read += len(data)
        assert read < 300_000


async def test_headers_above_the_limit_in_one_piece_are_a_readable_400(port: int) -> None:
    async with connected(port) as client:
        await client.send(REQUEST + b"x-padding: " + b"x" * 5000 + b"\r\ncontent-length: 0\r\n\r\n")
        assert b"headers_too_large" in await client.answer()


async def test_a_slow_answer_is_not_the_clients_fault(port: int) -> None:
    async with connected(port) as client:
        await client.send(REQUEST.replace(b"/ ", b"/slow ") + b"content-length: 3\r\n\r\nabc")
        assert await client.answer() == b'{"length": 3}'


async def test_requests_follow_one_another_on_a_connection(port: int) -> None:
    async with connected(port) as client:
        for _ in range(3):
            await client.send(REQUEST + b"content-length: 3\r\n\r\nabc")
            assert await client.answer() == b'{"length": 3}'
            await asyncio.sleep(0.2)


async def test_a_pipelined_request_waits_for_its_turn_and_is_served(port: int) -> None:
    slow = REQUEST.replace(b"/ ", b"/slow ") + b"content-length: 3\r\n\r\nabc"
    async with connected(port) as client:
        await client.send(slow + slow + REQUEST + b"content-length: 1\r\n\r\nx")
        assert [await client.answer() for _ in range(3)] == [b'{"length": 3}', b'{"length": 3}', b'{"length": 1}']
        # And then the connection is watched again.
        assert await client.rest() == b""


@pytest.mark.parametrize("size", [100_001, 1_000_000, 8_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_the_limit_is_a_413_that_arrives(port: int, size: int, chunked: bool) -> None:
    """The client sends all of it before it reads: the answer must survive that."""
    async with connected(port) as client:
        if chunked:
            await client.send(REQUEST + b"transfer-encoding: chunked\r\n\r\n")
            await client.send(b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n")
        else:
            await client.send(REQUEST + b"content-length: %d\r\n\r\n" % size + b"x" * size)
        answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in answer


async def test_a_client_that_leaves_mid_body_is_noticed() -> None:
    app = Echo(LIMITS)
    async with serving(app) as port:
        async with connected(port) as client:
            await client.send(REQUEST + b"content-length: 1000\r\n\r\nabc")
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        assert app.left == 1
