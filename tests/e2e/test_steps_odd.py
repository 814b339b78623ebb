"""Holds that grow, under answers that come in odd ways: nothing unheld gets through, and nobody is cut for nothing."""

import asyncio
import json
from collections.abc import AsyncIterator

import asyncpg
import httpx2
import pytest
import pytest_asyncio

from tests.e2e.proxy import Proxy, pricing_yaml, running_proxy
from tests.e2e.test_steps import IN, OUT, PROMPT, SSE, THINKING, WORD, answer, cost, credits, listen, the_hold
from tests.fakes.upstream import DONE, Chunk, ScriptedUpstream, Sleep, chunk, head, usage_chunk
from tests.postgres import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("proxy")
    pricing = pricing_yaml() + THINKING
    async with running_proxy(module_database, directory, upstream.base_url, pricing=pricing) as running:
        yield running


def body(words: int) -> bytes:
    """An answer in one piece that reports no usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": WORD * words}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()


@pytest.mark.parametrize("type_", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("rich", [True, False])
async def test_a_stream_that_comes_in_one_piece_is_held_too(
    proxy: Proxy, upstream: ScriptedUpstream, type_: str, rich: bool
) -> None:
    customer = await proxy.account(credits=1000 if rich else credits(words=100))
    upstream.will(head(200, {"content-type": type_, "transfer-encoding": "chunked"}), Chunk(body(300)), Chunk(b""))
    read = b""
    try:
        async with customer.stream(max_tokens=900) as response:
            async for piece in response.aiter_raw():
                read += piece
    except httpx2.HTTPError:
        pass
    hold = await the_hold(customer)
    if rich:
        assert (read.count(WORD.encode()), hold["charge"], hold["capped"]) == (300, cost(300), None)
    else:
        assert read.count(WORD.encode()) == 0
        assert b"insufficient_quota" in read
        assert (hold["charge"], hold["ending"]) == (PROMPT * IN, "out_of_credits")


@pytest.mark.parametrize("asked", [False, True])
async def test_of_a_long_event_nothing_is_delivered_before_it_is_held(
    proxy: Proxy, upstream: ScriptedUpstream, asked: bool
) -> None:
    customer = await proxy.account(credits=credits(words=100))
    event = chunk(WORD * 30_000)
    parts = [event[at : at + 20_000] for at in range(0, len(event), 20_000)]
    upstream.will(SSE, Chunk(chunk(WORD * 30)), *(Chunk(part) for part in parts), Sleep(30))
    heard = await listen(customer, max_tokens=900, stream_options={"include_usage": asked})
    assert (heard.words, heard.error["code"]) == (30, "insufficient_quota")
    assert (await the_hold(customer))["charge"] == cost(30)


async def test_events_with_mixed_line_ends_go_as_they_come(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=1000)
    mixed = chunk(WORD).removesuffix(b"\n\n") + b"\n\r\n"
    upstream.will(SSE, Chunk(mixed), Sleep(30))
    async with asyncio.timeout(5), customer.stream() as response:
        assert WORD.encode() in await anext(response.aiter_raw())


async def test_what_waits_for_its_hold_when_the_client_leaves_is_not_charged(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(SSE, Chunk(chunk(WORD * 30)), Sleep(0.5), Chunk(chunk(WORD * 300)), Sleep(30))
    connection = await asyncpg.connect(proxy.database.superuser)
    try:
        async with customer.stream() as response:
            pieces = response.aiter_raw()
            assert WORD.encode() in await anext(pieces)
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", customer.id)
            await asyncio.sleep(1.2)
        await asyncio.sleep(0.3)
        await transaction.rollback()
    finally:
        await connection.close()
    hold = await the_hold(customer)
    assert (hold["ending"], hold["charge"], hold["capped"]) == ("client_left_cut", cost(30), None)


async def test_text_that_is_shown_is_not_metered_by_the_time_too(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(words=330))
    upstream.will(*answer(80, delay=0.04))
    heard = await listen(customer, model="ponderer", max_tokens=9_000)
    assert (heard.words, heard.clean, heard.error) == (80, True, {})
    assert (await the_hold(customer))["charge"] == PROMPT * IN + 80 * OUT


async def test_unseen_reasoning_is_held_beside_the_text_that_follows(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(words=600))
    words = [Chunk(chunk(WORD)) for _ in range(900)]
    upstream.will(SSE, Chunk(chunk("")), Sleep(1.0), *words, Chunk(usage_chunk(PROMPT, 900)), Chunk(DONE), Sleep(30))
    heard = await listen(customer, model="ponderer", max_tokens=9_000)
    assert heard.error["code"] == "insufficient_quota"
    hold = await the_hold(customer)
    assert (hold["ending"], hold["capped"]) == ("out_of_credits", None)
    assert hold["charge"] >= PROMPT * IN + (heard.words + 200) * OUT, "the second of thinking, and every word"
