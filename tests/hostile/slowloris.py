"""Connections that never finish asking: closed in time, while others are served.

``python -m tests.hostile.slowloris --connections 2000`` is the measurement; ``test_slowloris.py`` a smaller one.
"""

import argparse
import asyncio
import json
import secrets
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import httpx2

from tests.e2e.proxy import Customer, running_proxy
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.hostile.server import Server, running_server
from tests.postgres import Database, fresh_database, remove_cluster, running_cluster

__all__ = ["Findings", "measure"]

TRICKLE_SECONDS = 1.0
LATE_SECONDS_MAX = 5.0
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: farebox\r\n"


@dataclass
class Findings:
    """What was seen; seconds are from the connection's opening to its end."""

    connections: int
    receive_seconds: float
    closed_after: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By the manner of asking."""
    good: Counter[int] = field(default_factory=Counter)
    """Statuses of good calls made meanwhile."""
    good_seconds_max: float = 0.0
    descriptors_peak: int = 0
    descriptors_after: int = 0
    rss_growth_bytes: int = 0

    def wrongs(self) -> list[str]:
        """What is not as promised."""
        closed = sum(map(len, self.closed_after.values()))
        longest = max(max(times) for times in self.closed_after.values())
        judged = {
            f"{self.connections - closed} connections were never closed": closed < self.connections,
            f"one was closed after {longest:.0f} s": longest > self.receive_seconds + LATE_SECONDS_MAX,
            f"good calls were answered {dict(self.good)}": set(self.good) != {200},
            f"{self.descriptors_after} descriptors left": self.descriptors_after > 20,
        }
        return [wrong for wrong, found in judged.items() if found]

    def report(self) -> str:
        manners = "; ".join(
            f"{name}: {len(t)} in {min(t):.1f} to {max(t):.1f} s" for name, t in self.closed_after.items()
        )
        return (
            f"{self.connections} connections, receive limit {self.receive_seconds:g} s. Closed: {manners}. Good calls "
            f"meanwhile: {dict(self.good)}, the slowest {self.good_seconds_max:.2f} s. {self.descriptors_peak} "
            f"descriptors early on, {self.descriptors_after} more than before afterwards; memory "
            f"+{self.rss_growth_bytes / 1024 / 1024:.0f} MiB"
        )


def _nothing(_key: str) -> Iterator[bytes]:
    while True:
        yield b""


def _head(_key: str) -> Iterator[bytes]:
    yield HEAD
    for number in range(1_000_000):
        yield b"x-%d: y\r\n" % number


def _line(_key: str) -> Iterator[bytes]:
    for byte in cycle(b"POST /v1/" + b"a" * 50):
        yield bytes([byte])


def _body(key: str) -> Iterator[bytes]:
    """With a good key: what trickles is the body."""
    yield HEAD + f"authorization: Bearer {key}\r\ncontent-length: 1000000\r\n\r\n".encode()
    while True:
        yield b" "


def _chunked(key: str) -> Iterator[bytes]:
    yield HEAD + f"authorization: Bearer {key}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    while True:
        yield b"1\r\n \r\n"


def _keyless(_key: str) -> Iterator[bytes]:
    """Refused at once, and then goes on with the body that nobody asked for."""
    yield HEAD + b"content-length: 1000000\r\n\r\n"
    while True:
        yield b" "


def _between(_key: str) -> Iterator[bytes]:
    """One whole request, and then the beginning of another."""
    yield b"GET /healthz HTTP/1.1\r\nhost: farebox\r\n\r\n"
    yield HEAD
    while True:
        yield b"x: y\r\n"


MANNERS: dict[str, Callable[[str], Iterator[bytes]]] = {
    "says nothing": _nothing,
    "head": _head,
    "request line": _line,
    "body": _body,
    "chunked body": _chunked,
    "refused body": _keyless,
    "second request": _between,
}


async def measure(
    database: Database, directory: Path, *, connections: int, receive_seconds: float, trickle_seconds: float
) -> Findings:
    """Open them all, trickle on each, call well meanwhile, until the last has been closed."""
    found = Findings(connections, receive_seconds)
    async with ScriptedUpstream() as upstream, running_proxy(database, directory, upstream.base_url) as operator:
        upstream.will(*whole(chat_answer()))
        hostile, good = [await operator.account(1_000_000) for _ in range(2)]
        seconds, calls = f"{receive_seconds:g}", str(connections)
        async with running_server(
            database, directory, upstream.base_url, RECEIVE_SECONDS=seconds, KEY_CALLS_MAX=calls
        ) as server:
            await _call(server, good, found)
            rss, descriptors = server.rss_bytes(), server.descriptors()
            manners = list(islice(cycle(MANNERS), connections))
            attack = [
                asyncio.create_task(_trickle(server, name, hostile.key, found, trickle_seconds)) for name in manners
            ]
            calling = asyncio.create_task(_call_until_cancelled(server, good, found))
            await asyncio.sleep(min(2.0, receive_seconds / 2))
            found.descriptors_peak = server.descriptors()
            await asyncio.gather(*attack)
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            await asyncio.sleep(1)
            found.descriptors_after = server.descriptors() - descriptors
            found.rss_growth_bytes = server.rss_bytes() - rss
    return found


async def _trickle(server: Server, manner: str, key: str, found: Findings, pause_seconds: float) -> None:
    reader, writer = await asyncio.open_connection(*server.address)
    began = time.monotonic()
    ended = asyncio.create_task(_until_closed(reader))
    try:
        for piece in MANNERS[manner](key):
            writer.write(piece)
            done, _ = await asyncio.wait({ended}, timeout=pause_seconds)
            if done:
                break
    finally:
        ended.cancel()
        writer.close()
    found.closed_after[manner].append(time.monotonic() - began)


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(65536):
            pass
    except ConnectionError:
        pass


async def _call_until_cancelled(server: Server, customer: Customer, found: Findings) -> None:
    while True:
        await _call(server, customer, found)
        await asyncio.sleep(0.05)


async def _call(server: Server, customer: Customer, found: Findings) -> None:
    """A whole call on a connection of its own, as a new client makes it."""
    began = time.monotonic()
    body = json.dumps(customer.body()).encode()
    async with httpx2.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{server.base_url}/chat/completions", content=body, headers=customer.headers)
    found.good[answer.status_code] += 1
    found.good_seconds_max = max(found.good_seconds_max, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--receive-seconds", type=float, default=30.0)
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
                connections=chosen.connections,
                receive_seconds=chosen.receive_seconds,
                trickle_seconds=TRICKLE_SECONDS,
            )
        )
    remove_cluster(run_id)
    print(found.report())


if __name__ == "__main__":
    main()
