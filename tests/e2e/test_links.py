"""Faulty links: between client, Farebox, upstream and Postgres bytes are late, cut, reset, sliced, throttled, stalled.

Whatever the link does, and in which direction: nobody waits longer than his deadline, every hold ends once, no charge
is above what was said or below what was received, and the books are right. Each cell of the matrix makes its calls
while the link is bad, and then one through the healed link.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.e2e.proxy import Customer, Proxy, running_proxy, upstreams_yaml
from tests.fakes.link import Cut, Delay, Direction, Fault, Link, Refuse, Slice, Stall, Throttle
from tests.fakes.upstream import DONE, ScriptedUpstream, Step, chat_answer, chunk, stream, usage_chunk, whole
from tests.postgres import Database

WORDS = [" one", " two", " three", " four", " five"]
PIECES = [*(chunk(word) for word in WORDS), chunk(finish="stop"), usage_chunk(10, 5), DONE]
REPORTED = 10 * 1000 + 5 * 3000
# As it is counted where no report came: one token more, for the answer's framing.
MOST = 10 * 1000 + (len(WORDS) + 1) * 3000

# The deadlines, in seconds.
RESERVE, READ, SEND, CLIENT = 2.0, 2, 2.0, 8.0
GRACE = 1.0
"""What DESIGN allows beyond a deadline."""
BUSY = 3.0
"""What a busy test machine may add."""

DEADLINES = {"client": CLIENT, "upstream": READ, "postgres": RESERVE}

FAULTS: dict[str, Fault] = {
    "delay": Delay(0.05),
    "throttle": Throttle(20_000),
    "slice": Slice(16),
    "stall": Stall(),
    "cut": Cut(300),
    "cut-at-once": Cut(0),
    "reset": Cut(300, reset=True),
    "refuse": Refuse(),
}
HARMLESS = {"delay", "throttle", "slice"}


@dataclass
class Net:
    """Farebox with a link on every side, all good until they are spoiled."""

    proxy: Proxy
    upstream: ScriptedUpstream
    links: dict[str, Link]
    http: httpx2.AsyncClient


@dataclass
class Heard:
    """What one call's client got."""

    status: int | None
    words: int
    whole: bool
    seconds: float


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def net(module_database: Database, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Net]:
    database, directory = module_database, tmp_path_factory.mktemp("proxy")
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(ScriptedUpstream())
        upstream.choose(_script)
        host, port = upstream.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        to_upstream = await stack.enter_async_context(Link((host, int(port))))
        to_postgres = await stack.enter_async_context(Link(_socket_of(database)))
        url = f"http://127.0.0.1:{to_upstream.port}/v1"
        behind = Database(database.name, database.owner, _by_tcp(database.app, to_postgres.port), database.superuser)
        proxy = await stack.enter_async_context(
            running_proxy(
                behind,
                directory,
                url,
                upstreams=upstreams_yaml(url).replace("api_key: none", f"api_key: none\n    read_seconds: {READ}"),
                reserve_seconds=RESERVE,
                send_seconds=SEND,
                shutdown_seconds=1.0,
            )
        )
        host, port = proxy.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        to_proxy = await stack.enter_async_context(Link((host, int(port))))
        http = await stack.enter_async_context(
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{to_proxy.port}/v1", timeout=CLIENT)
        )
        yield Net(proxy, upstream, {"client": to_proxy, "upstream": to_upstream, "postgres": to_postgres}, http)


@pytest.mark.parametrize("direction", ["to", "back"])
@pytest.mark.parametrize("name", list(FAULTS))
@pytest.mark.parametrize("where", ["client", "upstream", "postgres"])
async def test_a_bad_link_costs_nobody_anything(net: Net, where: str, name: str, direction: Direction) -> None:
    customer = await net.proxy.account()
    link, requests = net.links[where], len(net.upstream.requests)
    link.hit = 0
    # Connections that were good are there when it begins.
    assert (await _call(net, customer, stream=False)).status == 200
    calls = [asyncio.create_task(_call(net, customer, stream=bool(i % 2))) for i in range(4)]
    # The streams among them are being read when it begins.
    await asyncio.sleep(0.15)
    link.spoil(direction, FAULTS[name])
    calls += [asyncio.create_task(_call(net, customer, stream=bool(i % 2))) for i in range(5)]
    heard = await asyncio.gather(*calls)
    link.heal()
    assert link.hit > 0, "the fault touched nothing"
    if name in HARMLESS:
        assert all(one.whole for one in heard)
    assert max(one.seconds for one in heard) < DEADLINES[where] + GRACE + BUSY
    assert await _served_again(net, customer)
    holds = await _settled(customer)
    _check_charges(holds, heard)
    assert len(net.upstream.requests) - requests <= len(holds)
    money = await customer.money()
    assert (money.held, money.debt) == (0, 0)
    assert money.balance == 1000_000_000 - sum(hold["charge"] for hold in holds)
    await net.proxy.audit()


async def _served_again(net: Net, customer: Customer) -> bool:
    """Soon; a call that finds no connection yet is refused."""
    for _ in range(20):
        if (await _call(net, customer, stream=False, patience=20)).status == 200:
            return True
        await asyncio.sleep(0.2)
    return False


def _check_charges(holds: list[dict[str, Any]], heard: list[Heard]) -> None:
    """Every hold within what was said; together at least what the clients received."""
    assert all(0 <= hold["charge"] <= MOST for hold in holds)
    paid = sorted((hold["charge"] for hold in holds), reverse=True)
    # The first and the last call of the test were whole, too.
    received = sorted([REPORTED, REPORTED, *(_worth(one) for one in heard)], reverse=True)
    assert all(charge >= worth for charge, worth in zip(paid, received, strict=False))


def _worth(heard: Heard) -> int:
    """The least that what a client received costs."""
    if heard.whole:
        return REPORTED
    return 10 * 1000 + heard.words * 3000 if heard.words else 0


async def _call(net: Net, customer: Customer, *, stream: bool, patience: float = CLIENT) -> Heard:
    loop = asyncio.get_running_loop()
    began = loop.time()
    body = json.dumps(customer.body(stream=stream, max_tokens=100)).encode()
    status, read, ended = None, b"", False
    with contextlib.suppress(httpx2.HTTPError, TimeoutError):
        async with (
            asyncio.timeout(patience),
            net.http.stream("POST", "/chat/completions", content=body, headers=customer.headers) as answer,
        ):
            status = answer.status_code
            async for piece in answer.aiter_raw():
                read += piece
            ended = status == 200
    words = sum(read.count(json.dumps(word).encode()) for word in WORDS)
    return Heard(status, words, ended, loop.time() - began)


def _script(received: Any) -> list[Step]:
    if received.json and received.json.get("stream"):
        return [*stream(*PIECES, delay=0.04)]
    return [*whole(chat_answer("".join(WORDS), prompt=10, completion=5))]


async def _settled(customer: Customer) -> list[dict[str, Any]]:
    """Every hold of the account, once none is open any more."""
    async with asyncio.timeout(30):
        while True:
            holds = await customer.holds()
            if all(hold["state"] != "open" for hold in holds) and (await customer.money()).held == 0:
                return holds
            await asyncio.sleep(0.05)


def _socket_of(database: Database) -> str:
    url = httpx2.URL(database.app)
    return f"{url.params['host']}/.s.PGSQL.{url.params.get('port', '5432')}"


def _by_tcp(dsn: str, port: int) -> str:
    url = httpx2.URL(dsn)
    return f"postgresql://{url.userinfo.decode()}@127.0.0.1:{port}{url.path}"
