"""Comments into silent streams, over real sockets: where they stand, where they don't, and what SDKs make of them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio

from proxy.gateway.keepalive import COMMENT
from tests.e2e.proxy import MESSAGES, Customer, Proxy, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
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

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECONDS = 0.05
SILENCE = Sleep(SECONDS * 6)
SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
END = Send(b"0\r\n\r\n")
EVENTS = [chunk("Hel"), chunk("lo."), chunk(finish="stop"), usage_chunk(10, 5), DONE]
SEEN = [event for event in EVENTS if b'"choices": []' not in event]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("keepalive")
    async with running_proxy(module_database, directory, upstream.base_url, keepalive_seconds=SECONDS) as running:
        yield running


async def read(customer: Customer, **more: object) -> tuple[bytes, bool]:
    """What came of a stream, and whether it came to a clean end."""
    got = b""
    try:
        async with customer.stream(**more) as answer:
            async for piece in answer.aiter_raw():
                got += piece
    except httpx2.RemoteProtocolError:
        return got, False
    return got, True


async def test_silence_before_between_and_behind_events(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, *[step for event in EVENTS for step in (SILENCE, Chunk(event))], END)
    got, clean = await read(customer)
    assert clean
    assert got.startswith(COMMENT)
    assert got.count(COMMENT) >= len(EVENTS)
    assert got.replace(COMMENT, b"") == b"".join(SEEN)
    assert got.endswith(DONE)
    for event in SEEN[1:]:
        assert COMMENT + event in got, "the silence before each event was filled"


async def test_none_where_nothing_is_silent(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(*EVENTS))
    assert await read(customer) == (b"".join(SEEN), True)


@pytest.mark.parametrize("at", [1, 5, 6, 20, -2, -1])
@pytest.mark.parametrize("usage_asked", [True, False])
async def test_none_in_the_middle_of_an_event(
    customer: Customer, upstream: ScriptedUpstream, at: int, usage_asked: bool
) -> None:
    """To a client that asked for usage, bytes go as they come, once all is held; to others, an event that is whole."""
    options: dict[str, Any] = {"stream_options": {"include_usage": True}, "max_tokens": 50} if usage_asked else {}
    first = EVENTS[0]
    upstream.will(SSE, Chunk(first[:at]), SILENCE, Chunk(first[at:]), *map(Chunk, EVENTS[1:]), END)
    got, clean = await read(customer, **options)
    assert clean
    assert got.replace(COMMENT, b"") == b"".join(EVENTS if usage_asked else SEEN)
    assert first in got
    if usage_asked:
        assert COMMENT not in got


async def test_none_in_the_middle_of_an_upstreams_own_comment(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Chunk(b": OPENROUTER PROC"), SILENCE, Chunk(b"ESSING\n\n"), *map(Chunk, EVENTS), END)
    got, _ = await read(customer, stream_options={"include_usage": True}, max_tokens=50)
    assert got == b": OPENROUTER PROCESSING\n\n" + b"".join(EVENTS)


async def test_none_before_the_head(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SILENCE, *stream(*EVENTS))
    assert await read(customer) == (b"".join(SEEN), True)
    upstream.will(SILENCE, *whole({"error": {"message": "no"}}, 400))
    async with customer.stream() as answer:
        assert (answer.status_code, await answer.aread()) == (400, b'{"error": {"message": "no"}}')


@pytest.mark.parametrize("events", [EVENTS, [*EVENTS[:3], DONE]], ids=["reported", "unreported"])
async def test_none_behind_the_end(
    customer: Customer, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, events: list[bytes]
) -> None:
    """The upstream stays open for a while; without a report, one may still come."""
    monkeypatch.setattr("proxy.gateway.relay.TAIL_SECONDS", SECONDS * 6)
    upstream.will(SSE, *map(Chunk, events), Sleep(30))
    assert await read(customer) == (b"".join(SEEN), True)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
async def test_none_in_an_answer_that_is_no_stream(
    customer: Customer, upstream: ScriptedUpstream, content_type: str
) -> None:
    head_step, body_step = whole(chat_answer(), headers={"content-type": content_type})
    assert isinstance(body_step, Send)
    upstream.will(head_step, SILENCE, Send(body_step.data[:40]), SILENCE, Send(body_step.data[40:]))
    assert await read(customer) == (body_step.data, True)
    assert (await customer.post()).content == body_step.data


async def test_a_stream_that_says_it_is_something_else_gets_them_once_it_has_begun(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    lying = head(200, {"content-type": "application/json", "transfer-encoding": "chunked"})
    upstream.will(lying, SILENCE, Chunk(EVENTS[0]), SILENCE, *map(Chunk, EVENTS[1:]), END)
    got, clean = await read(customer)
    assert clean
    assert got.startswith(EVENTS[0] + COMMENT)
    assert got.replace(COMMENT, b"") == b"".join(SEEN)


async def test_they_are_no_text_and_cost_nothing(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, SILENCE, Chunk(EVENTS[0]), SILENCE, Chunk(EVENTS[2]), Chunk(DONE), END)
    await read(customer)
    [hold] = await customer.ended()
    assert (hold["usage"][0], hold["usage"][5 - 1], hold["usage_source"]) == (10, 2, "counted")


async def test_a_break_behind_them_is_still_told(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, SILENCE, Chunk(EVENTS[0]), SILENCE, Cut())
    got, clean = await read(customer)
    assert not clean
    assert got.replace(COMMENT, b"").startswith(EVENTS[0] + b'data: {"error"')


@pytest.mark.parametrize("usage_asked", [True, False])
@pytest.mark.parametrize("pieces", [1, 3])
async def test_openai_python_reads_over_them(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream, usage_asked: bool, pieces: int
) -> None:
    steps: list[Step] = [SSE, SILENCE]
    for event in EVENTS:
        size = len(event) // pieces + 1
        steps += [step for at in range(0, len(event), size) for step in (Chunk(event[at : at + size]), SILENCE)]
    upstream.will(*steps, END)
    options = {"stream_options": {"include_usage": True}} if usage_asked else {}
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key=customer.key, max_retries=0) as sdk:
        told = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_body=options)
        chunks = [one async for one in told]
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "Hello."
    assert len(chunks) == (4 if usage_asked else 3)
    assert [one.usage.total_tokens for one in chunks if one.usage] == ([15] if usage_asked else [])


async def test_many_silent_streams_each_get_their_own(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, SILENCE, *map(Chunk, EVENTS), END)
    customers = [await proxy.account() for _ in range(20)]
    for got, clean in await asyncio.gather(*map(read, customers)):
        assert clean
        assert got.startswith(COMMENT)
        assert got.replace(COMMENT, b"") == b"".join(SEEN)
