"""Clients that ask for a long stream and never read it: what each costs the server, and what the others notice.

``python -m tests.hostile.slow_readers --readers 1000`` is the measurement; ``test_slow_readers.py`` a smaller one.
"""

import argparse
import asyncio
import json
import secrets
import select
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.fakes.upstream import chunk
from tests.hostile.server import Server, running_server
from tests.postgres import Database, fresh_database, remove_cluster, running_cluster

__all__ = ["Findings", "measure"]

ANSWER_BYTES = 10 * 1024 * 1024
RECEIVE_BUFFER_BYTES = 4096
SEND_BUFFER_BYTES = 64 * 1024
GOOD_TOKENS = 20
WAVE = 50
BYTES_EACH_MAX = 256 * 1024
# A thousand requests at once take a while to be read, and only then does the time of the last begin.
LATE_SECONDS_MAX = 30.0


@dataclass
class Findings:
    """What was seen. Bytes are bytes, times seconds."""

    readers: int
    send_seconds: float
    rss_before: int = 0
    rss_stalled: int = 0
    """While all of them were stalled."""
    rss_peak: int = 0
    """At any time, what is done for those that were aborted included."""
    rss_after: int = 0
    descriptors_after: int = 0
    aborted_after: list[float] = field(default_factory=list)
    """For each reader, from its request to the reset of its connection."""
    alone: list[float] = field(default_factory=list)
    """What good calls took without the crowd, and with it."""
    beside: list[float] = field(default_factory=list)
    open_holds: int = 0
    upstream_bytes: int = 0

    @property
    def bytes_each(self) -> float:
        return (self.rss_stalled - self.rss_before) / self.readers

    def wrongs(self) -> list[str]:
        """What is not as promised. What the good calls took is told, not judged: others may be busy on this machine."""
        late = max(self.aborted_after) - self.send_seconds
        judged = {
            f"{self.bytes_each / 1024:.0f} KiB each": self.bytes_each > BYTES_EACH_MAX,
            f"aborted {late:.0f} s after the limit": late > LATE_SECONDS_MAX,
            f"{self.open_holds} holds left open": self.open_holds > 0,
            f"{self.descriptors_after} descriptors left": self.descriptors_after > 50,
        }
        return [wrong for wrong, found in judged.items() if found]

    def report(self) -> str:
        return (
            f"{self.readers} readers: {self.bytes_each / 1024:.0f} KiB each while stalled "
            f"({(self.rss_peak - self.rss_before) / self.readers / 1024:.0f} at the highest), "
            f"{(self.rss_after - self.rss_before) / 1024 / 1024:.1f} MiB above the start afterwards; aborted after "
            f"{min(self.aborted_after):.1f} to {max(self.aborted_after):.1f} s (limit {self.send_seconds:g} s); "
            f"good calls p50 {percentile(self.alone, 50) * 1000:.1f} -> {percentile(self.beside, 50) * 1000:.1f} ms, "
            f"p99 {percentile(self.alone, 99) * 1000:.1f} -> {percentile(self.beside, 99) * 1000:.1f} ms; "
            f"{self.open_holds} holds left open, {self.descriptors_after} more descriptors"
        )


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@asynccontextmanager
async def flood() -> AsyncIterator[str]:
    """An upstream that answers the model's name ``hasty`` shortly, and everything else with a stream of 10 MB."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower()[:15] == b"content-length:")
                body = json.loads(await reader.readexactly(length))
                await _stream(writer, GOOD_TOKENS if body.get("max_tokens") == GOOD_TOKENS else None)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # Or this machine's kernel would keep gigabytes of what nobody reads.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    server = await asyncio.start_server(answer, sock=listener)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


async def _stream(writer: asyncio.StreamWriter, tokens: int | None) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    piece = chunk(" word")
    framed = b"%x\r\n%s\r\n" % (len(piece), piece)
    # Many at a time for the crowd: this process and the one that is measured share the machine.
    events, at_once = (tokens, 1) if tokens else (ANSWER_BYTES // len(piece), 64)
    for _ in range(events // at_once):
        writer.write(framed * at_once)
        await writer.drain()
    last = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 20}}\n\ndata: [DONE]\n\n'
    writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
    await writer.drain()


async def measure(
    database: Database, directory: Path, *, readers: int, send_seconds: float, good_calls: int
) -> Findings:
    """Good calls alone; the crowd; good calls beside it; until the last of the crowd has been aborted."""
    found = Findings(readers, send_seconds)
    async with flood() as url, running_proxy(database, directory, url) as operator:
        crowd, good = [await operator.account(1_000_000) for _ in range(2)]
        seconds = f"{send_seconds:g}"
        async with running_server(database, directory, url, SEND_SECONDS=seconds, KEY_CALLS_MAX="0") as server:
            await _good_calls(server, good, 50)
            found.alone = await _good_calls(server, good, good_calls)
            found.rss_before, descriptors = server.rss_bytes(), server.descriptors()
            watching = asyncio.create_task(_watch(server, found))
            resets = _Resets()
            looking = asyncio.create_task(resets.run())
            crowding: list[asyncio.Task[float]] = []
            while len(crowding) < readers:
                # In waves: a thousand at the same moment would find out how many can be admitted in a moment.
                wave = min(WAVE, readers - len(crowding))
                crowding += [asyncio.create_task(_never_read(server, crowd, resets)) for _ in range(wave)]
                await _until_open(operator, crowd, len(crowding))
            await _until_stalled(server)
            found.beside = await _good_calls(server, good, good_calls)
            found.rss_stalled = server.rss_bytes()
            found.aborted_after = await asyncio.gather(*crowding)
            watching.cancel()
            looking.cancel()
            await _until_settled(operator, crowd)
            await _good_calls(server, good, 50)
            found.rss_after, found.descriptors_after = server.rss_bytes(), server.descriptors() - descriptors
            found.open_holds = len([hold for hold in await crowd.holds() if hold["state"] == "open"])
    return found


class _Resets:
    """Tells of connections that were reset, cheaply: this process shares the machine with the one that is measured."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._waiting: dict[int, asyncio.Event] = {}

    async def seen(self, connection: socket.socket) -> None:
        """Until it is. Not a byte is taken out of it."""
        number = connection.fileno()
        event = self._waiting[number] = asyncio.Event()
        self._epoll.register(number, 0)  # errors and hang-ups are told of anyway
        try:
            await event.wait()
        finally:
            self._epoll.unregister(number)
            del self._waiting[number]

    async def run(self) -> None:
        while True:
            for number, _ in self._epoll.poll(0):
                self._waiting[number].set()
            await asyncio.sleep(0.2)


async def _never_read(server: Server, customer: Customer, resets: _Resets) -> float:
    """One that asks and doesn't read. Seconds from its request to the reset."""
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    await loop.sock_connect(connection, server.address)
    body = json.dumps(customer.body(stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: farebox\r\nauthorization: Bearer {customer.key}\r\n"
    await loop.sock_sendall(connection, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    began = time.monotonic()
    try:
        await resets.seen(connection)
        return time.monotonic() - began
    finally:
        connection.close()


async def _watch(server: Server, found: Findings) -> None:
    while server.process.returncode is None:
        found.rss_peak = max(found.rss_peak, server.rss_bytes())
        await asyncio.sleep(0.5)


async def _good_calls(server: Server, customer: Customer, count: int) -> list[float]:
    """Whole streams, four at a time; seconds each."""
    body = json.dumps(customer.body(stream=True, max_tokens=GOOD_TOKENS)).encode()
    seconds: list[float] = []
    left = iter(range(count))

    async def caller(http: httpx2.AsyncClient) -> None:
        for _ in left:
            began = time.perf_counter()
            answer = await http.post(f"{server.base_url}/chat/completions", content=body, headers=customer.headers)
            assert answer.status_code == 200
            assert answer.content.endswith(b"[DONE]\n\n")
            seconds.append(time.perf_counter() - began)

    async with httpx2.AsyncClient(timeout=60) as http:
        await asyncio.gather(*(caller(http) for _ in range(4)))
    return seconds


async def _until_open(operator: Proxy, customer: Customer, count: int) -> None:
    query = "SELECT count(*) FROM farebox.holds WHERE account_id = $1"
    async with asyncio.timeout(120):
        while True:
            [row] = await operator.query(query, customer.id)
            if row["count"] >= count:
                return
            await asyncio.sleep(0.1)


async def _until_stalled(server: Server) -> None:
    """Until the server has nothing to do: its processor time stands still."""
    before = -1
    while True:
        ticks = server.processor_ticks()
        if ticks - before <= 3:
            return
        before = ticks
        await asyncio.sleep(0.5)


async def _until_settled(operator: Proxy, customer: Customer) -> None:
    query = "SELECT count(*) FROM farebox.holds WHERE account_id = $1 AND state = 'open'"
    async with asyncio.timeout(120):
        while True:
            [row] = await operator.query(query, customer.id)
            if not row["count"]:
                return
            await asyncio.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--send-seconds", type=float, default=30.0)
    parser.add_argument("--good-calls", type=int, default=1000)
    chosen = parser.parse_args()
    run_id = secrets.token_hex(6)
    with (
        running_cluster(run_id) as address,
        fresh_database(address) as database,
        tempfile.TemporaryDirectory() as directory,
    ):
        found = asyncio.run(
            measure(
                database,
                Path(directory),
                readers=chosen.readers,
                send_seconds=chosen.send_seconds,
                good_calls=chosen.good_calls,
            )
        )
    remove_cluster(run_id)
    print(found.report())


if __name__ == "__main__":
    main()
