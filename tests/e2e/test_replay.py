"""Recorded answers through the real proxy: bytes in, bytes out, and the charge that the usage in them asks for.

Every stream is replayed whole, per event, per byte and at random cuts, with usage asked for and not. What must come out
is found the slow way (``tests/recordings.py``), and what must be charged by arithmetic of this file's own.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import httpx2
import pytest
import pytest_asyncio

from proxy.core.catalog import Quirks
from proxy.core.meter import Ending
from proxy.core.usage_report import normalise
from tests.answers import ANSWERS
from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.fakes.upstream import ScriptedUpstream, stream, whole
from tests.postgres import Database
from tests.recordings import chat_recordings, cuts_of, needs_recordings, seen_by_who_did_not_ask

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Dear and long enough that every recorded answer stays within its hold, with rates that don't come out even.
PRICING = """
per: 1000000
models:
  m:
    upstream: up
    input: 1.000007
    cached_input: 0.1
    cache_write: 1.25
    output: 3.1
    reasoning: 2.9
    audio_input: 40
    audio_output: 80
    per_request: 0.000005
    max_output_tokens: 4000000
"""
RATES = [1_000_007, 100_000, 1_250_000, 40_000_000, 3_100_000, 2_900_000, 80_000_000]
PER_REQUEST = 5

AT_ONCE = 16
BYTEWISE_MAX = 6_000


@dataclass(frozen=True)
class Replay:
    """One answer to be played to one client."""

    name: str
    body: bytes
    pieces: list[bytes]
    asked: bool
    streamed: bool = True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("replay")
    async with running_proxy(module_database, directory, upstream.base_url, pricing=PRICING) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def customer(proxy: Proxy) -> Customer:
    return await proxy.account(credits=10_000_000)


async def test_our_own_fixtures(customer: Customer, upstream: ScriptedUpstream) -> None:
    streams = [(answer.name, answer.body) for answer in ANSWERS if answer.streamed]
    replays = [replay for name, body in streams for replay in replays_of(name, body)]
    broken = await play(replays, customer, upstream)
    assert {name.split()[0] for name in broken} == {one.name for one in ANSWERS if one.ending is Ending.TRUNCATED}


async def test_our_own_whole_answers(customer: Customer, upstream: ScriptedUpstream) -> None:
    bodies = [(answer.name, answer.body) for answer in ANSWERS if not answer.streamed]
    await play([Replay(name, body, [], asked=False, streamed=False) for name, body in bodies], customer, upstream)


@needs_recordings
async def test_recorded_streams(customer: Customer, upstream: ScriptedUpstream) -> None:
    recordings = [one for one in chat_recordings() if one.kind == "sse" and one.status == 200]
    assert len(recordings) > 200
    replays = [replay for i, one in enumerate(recordings) for replay in replays_of(f"{i}", one.body)]
    broken = await play(replays, customer, upstream)
    # What broke off was broken when it was recorded: neither an end mark nor a finish reason is in it.
    assert [name for name in broken if is_whole(recordings[int(name.split()[0])].body)] == []


@needs_recordings
async def test_recorded_whole_answers(customer: Customer, upstream: ScriptedUpstream) -> None:
    recordings = [one for one in chat_recordings() if one.kind == "json" and one.status == 200]
    assert len(recordings) > 200
    replays = [Replay(f"{i}", one.body, [], asked=False, streamed=False) for i, one in enumerate(recordings)]
    await play(replays, customer, upstream)


@needs_recordings
async def test_recorded_refusals_cost_nothing(customer: Customer, upstream: ScriptedUpstream) -> None:
    refusals = [one for one in chat_recordings() if one.status >= 400]
    assert len(refusals) > 20
    for one in refusals:
        upstream.will(*whole(one.body, one.status))
        answer = await customer.post()
        if one.status in (401, 402, 403):
            assert (answer.status_code, answer.json()["error"]["type"]) == (502, "upstream_error")
            assert answer.content != one.body
        else:
            assert (answer.status_code, answer.content) == (one.status, one.body)
    assert {hold["state"] for hold in await customer.ended(len(refusals))} == {"released"}
    assert (await customer.money()).balance == 10_000_000_000_000


def replays_of(name: str, body: bytes) -> Iterable[Replay]:
    rng = random.Random(name)
    for cut, pieces in cuts_of(body, rng, bytewise_max=BYTEWISE_MAX):
        for asked in (False, True) if cut == "per event" else (rng.random() < 0.5,):
            yield Replay(f"{name} {cut} {asked}", body, [piece for piece in pieces if piece], asked)


async def play(replays: list[Replay], customer: Customer, upstream: ScriptedUpstream) -> list[str]:
    """Play each, check each, and return the names of those whose client saw a broken stream."""
    by_name = {replay.name: replay for replay in replays}
    assert len(by_name) == len(replays)
    upstream.choose(
        lambda received: (
            stream(*by_name[received.headers["x-client-request-id"]].pieces)
            if by_name[received.headers["x-client-request-id"]].streamed
            else whole(by_name[received.headers["x-client-request-id"]].body)
        )
    )
    slots = asyncio.Semaphore(AT_ONCE)
    request_ids: dict[str, Replay] = {}
    broken: list[str] = []

    async def one(replay: Replay) -> None:
        async with slots:
            request_id, read, clean = await call(customer, replay)
        request_ids[request_id] = replay
        expected = replay.body if replay.asked or not replay.streamed else seen_by_who_did_not_ask(replay.body)
        if clean:
            assert read == expected, replay.name
        else:
            broken.append(replay.name)
            assert b"upstream_incomplete" in read or replay.asked, replay.name
            assert expected.startswith(read.partition(b'data: {"error": {"message": "The upstream')[0]), replay.name

    await asyncio.gather(*(one(replay) for replay in replays))
    holds = await customer.ended(len(replays), seconds=30)
    for hold in holds:
        check_charge(hold, request_ids[str(hold["id"])])
    spent = 10_000_000_000_000 - (await customer.money()).balance
    assert spent == sum(hold["charge"] for hold in holds)
    await customer.proxy.audit()
    return broken


async def call(customer: Customer, replay: Replay) -> tuple[str, bytes, bool]:
    options = {"stream_options": {"include_usage": True}} if replay.asked and replay.streamed else {}
    body = json.dumps(customer.body(stream=replay.streamed, **options)).encode()
    headers = customer.headers | {"x-client-request-id": replay.name}
    read = b""
    async with customer.proxy.http.stream("POST", "/chat/completions", content=body, headers=headers) as answer:
        assert answer.status_code == 200
        try:
            async for piece in answer.aiter_raw():
                read += piece
        except httpx2.RemoteProtocolError:
            return answer.headers["x-request-id"], read, False
    return answer.headers["x-request-id"], read, True


def check_charge(hold: dict[str, object], replay: Replay) -> None:
    assert hold["state"] in ("final", "released"), replay.name
    if hold["usage_source"] != "reported":
        return
    receipt = json.loads(str(hold["receipt"]))
    assert receipt["usage_reported"] == last_usage(replay.body), replay.name
    reported = normalise(receipt["usage_reported"], Quirks())
    assert reported is not None
    tokens = list(reported.usage.as_tuple())
    assert hold["usage"] == tokens, replay.name
    total = sum(rate * count for rate, count in zip(RATES, tokens, strict=True))
    assert hold["charge"] == PER_REQUEST + (total + 999_999) // 1_000_000, replay.name


def last_usage(body: bytes) -> object:
    """The last usage report in an answer, read as plainly as can be."""
    found: object = None
    for line in (
        body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n") if body.lstrip()[:1] != b"{" else [body]
    ):
        data = line.removeprefix(b"\xef\xbb\xbf").removeprefix(b"data:").strip()
        if not data.startswith(b"{"):
            continue
        try:
            chunk = json.loads(data)
        except ValueError:
            continue
        for usage in (chunk.get("usage"), (chunk.get("x_groq") or {}).get("usage")):
            if isinstance(usage, dict) and any(isinstance(value, int | float) and value for value in usage.values()):
                found = usage
                break
    return found


def is_whole(body: bytes) -> bool:
    return b"[DONE]" in body or any(
        choice.get("finish_reason")
        for line in body.split(b"\n")
        if line.startswith(b"data:") and line[5:].strip().startswith(b"{")
        for choice in json.loads(line[5:]).get("choices") or []
    )
