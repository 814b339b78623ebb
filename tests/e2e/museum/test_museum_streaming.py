"""The museum, second room: how gateways broke streams in public, and that Farebox doesn't."""

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest

from tests.e2e.proxy import MESSAGES, Customer
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    ScriptedUpstream,
    Wait,
    chunk,
    event,
    head,
    stream,
    usage_chunk,
    whole,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})


async def relayed(customer: Customer, **more: Any) -> bytes:
    async with customer.stream(**more) as answer:
        assert answer.status_code == 200
        return b"".join([piece async for piece in answer.aiter_raw()])


async def charged(customer: Customer) -> tuple[int, str]:
    [hold] = await customer.ended()
    assert (await customer.money()).held == 0
    return hold["charge"], hold["usage_source"]


async def test_a_letter_was_cut_in_two(customer: Customer, upstream: ScriptedUpstream) -> None:
    """lobehub #18640, spiceai #12588: bytes decoded chunk by chunk turned split UTF-8 into replacement characters."""
    body = chunk("Dünen 🏜 wandern") + chunk(finish="stop") + usage_chunk(10, 5) + DONE
    body = body.replace(json.dumps("Dünen 🏜 wandern").encode(), '"Dünen 🏜 wandern"'.encode())
    upstream.will(*stream(*(body[at : at + 1] for at in range(len(body)))))
    read = await relayed(customer)
    assert '"Dünen 🏜 wandern"'.encode() in read
    assert await charged(customer) == (10 * 1000 + 5 * 3000, "reported")


async def test_a_line_was_split_where_no_line_ended(customer: Customer, upstream: ScriptedUpstream) -> None:
    """str.splitlines also splits at U+2028, U+0085, VT and FF: a text with one of them broke its event in two."""
    text = "a\u2028b\u0085c\u000bd\u000ce"
    piece = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}, ensure_ascii=False).encode()
    piece += b"\n\n"
    upstream.will(*stream(piece, chunk(finish="stop"), usage_chunk(10, 5), DONE))
    assert piece in await relayed(customer)
    assert await charged(customer) == (25_000, "reported")


async def test_carriage_returns_hid_the_usage(customer: Customer, upstream: ScriptedUpstream) -> None:
    """praxis #739: a parser that knew only \\n\\n saw one endless event in a CRLF stream."""
    pieces = [chunk("one"), chunk(finish="stop"), usage_chunk(10, 5), DONE]
    upstream.will(*stream(*(piece.replace(b"\n", b"\r\n") for piece in pieces)))
    await relayed(customer)
    assert await charged(customer) == (25_000, "reported")


async def test_data_without_a_blank_was_no_data(customer: Customer, upstream: ScriptedUpstream) -> None:
    """aisix #111: `data:{...}` was not recognised, so the answer was free."""
    pieces = [chunk("one"), chunk(finish="stop"), usage_chunk(10, 5), DONE]
    upstream.will(*stream(*(piece.replace(b"data: ", b"data:") for piece in pieces)))
    await relayed(customer)
    assert await charged(customer) == (25_000, "reported")


async def test_a_comment_was_taken_for_data(customer: Customer, upstream: ScriptedUpstream) -> None:
    """OpenRouter sends `: OPENROUTER PROCESSING` while it waits; parsers choked on it."""
    comment = b": OPENROUTER PROCESSING\n\n"
    upstream.will(*stream(comment, comment, chunk("one"), comment, chunk(finish="stop"), usage_chunk(10, 5), DONE))
    assert (await relayed(customer)).count(comment) == 3
    assert await charged(customer) == (25_000, "reported")


async def test_an_azure_chunk_without_choices_vanished(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Azure's first chunk has no choices and no usage: filters that drop every empty `choices` lost it."""
    first = event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]})
    upstream.will(*stream(first, chunk("one"), chunk(finish="stop"), usage_chunk(10, 5), DONE))
    assert (await relayed(customer)).startswith(first)


async def test_an_unasked_usage_chunk_crashed_clients(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Clients index choices[0]: a usage chunk that only the proxy asked for must not reach them."""
    upstream.will(*stream(chunk("one"), chunk(finish="stop"), usage_chunk(10, 5), DONE))
    client = openai.AsyncOpenAI(base_url=customer.proxy.base_url, api_key=customer.key, max_retries=0)
    async with client:
        said = [
            piece.choices[0].delta.content
            async for piece in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        ]
    assert [word for word in said if word] == ["one"]


async def test_a_broken_stream_ended_cleanly(customer: Customer, upstream: ScriptedUpstream) -> None:
    """A truncated stream that ends without an error is taken for a whole answer by openai, langchain and others."""
    upstream.will(SSE, Chunk(chunk("one")), Cut(reset=True))
    read = b""
    with pytest.raises(httpx2.RemoteProtocolError):  # noqa: PT012
        async with customer.stream() as answer:
            async for piece in answer.aiter_raw():
                read += piece
    assert b"[DONE]" not in read


async def test_an_error_after_200_was_a_success(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Groq's `event: error` in the middle of a 200 answer, without usage or [DONE], looked like its end."""
    wrong = b'event: error\ndata: {"error":{"message":"overloaded","type":"server_error"}}\n\n'
    upstream.will(*stream(chunk("one"), wrong))
    read = await relayed(customer)
    assert read.endswith(wrong)
    charge, source = await charged(customer)
    assert source == "counted"
    assert charge > 10 * 1000


async def test_an_error_with_status_200_was_charged(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Azure answered a content filter's error with 200: no answer, and yet it was billed."""
    upstream.will(*whole({"error": {"message": "filtered", "code": "content_filter"}}))
    answer = await customer.post()
    assert answer.json()["error"]["code"] == "content_filter"
    [hold] = await customer.ended()
    assert hold["charge"] == 0


async def test_the_answer_was_gathered_before_it_was_sent(customer: Customer, upstream: ScriptedUpstream) -> None:
    """BaseHTTPMiddleware (Starlette #1012) and compressing proxies held a stream back until it was whole."""
    gate = asyncio.Event()
    later = [Chunk(chunk(finish="stop")), Chunk(DONE), Chunk(b"")]
    upstream.choose(lambda received: [SSE, Chunk(chunk("first")), Wait(gate), *later])
    async with asyncio.timeout(10), customer.stream() as answer:
        async for piece in answer.aiter_raw():
            assert chunk("first") in piece
            break
        gate.set()


async def test_a_prompt_that_names_a_special_token_failed(customer: Customer, upstream: ScriptedUpstream) -> None:
    """tiktoken's encode raises on `<|endoftext|>` in a user's text; an error there must be neither 500 nor free."""
    upstream.will(*stream(chunk("<|endoftext|>"), chunk(finish="stop"), DONE))
    await relayed(customer, messages=[{"role": "user", "content": "What is <|endoftext|>?"}])
    charge, _ = await charged(customer)
    assert charge > 0


async def test_a_million_blanks_brought_the_counter_down(customer: Customer, upstream: ScriptedUpstream) -> None:
    """tiktoken panics, with a BaseException, on about a million blanks."""
    upstream.will(*stream(*(chunk(" " * 250_000) for _ in range(5)), chunk(finish="stop"), DONE))
    await relayed(customer)
    charge, source = await charged(customer)
    assert (charge > 10 * 1000, source) == (True, "counted")
