"""openai-python, unmodified: what its users do and what they catch."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.e2e.proxy import MESSAGES, Customer, Proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    Received,
    ScriptedUpstream,
    Step,
    chat_answer,
    chunk,
    head,
    stream,
    usage_chunk,
    whole,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(proxy: Proxy, customer: Customer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key=customer.key, timeout=20) as client:
        yield client


def answer_as_asked(received: Received) -> list[Step]:
    """As OpenAI does: usage in a stream only where it was asked for."""
    if not received.json.get("stream"):
        return whole(chat_answer(prompt=10, completion=5))
    asked = (received.json.get("stream_options") or {}).get("include_usage")
    null: dict[str, Any] = {"usage": None} if asked else {}
    pieces = [chunk("Hel", **null), chunk("lo.", **null), chunk(finish="stop", **null)]
    return stream(*pieces, *([usage_chunk(10, 5)] if asked else []), DONE)


async def test_a_whole_answer(sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer("Hello.", 10, 5)))
    raw = await sdk.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello."
    assert answer.usage is not None
    assert answer.usage.total_tokens == 15
    [hold] = await customer.ended()
    assert raw.headers["x-request-id"] == str(hold["id"]) == answer._request_id
    assert hold["charge"] == 25_000


@pytest.mark.parametrize("include_usage", [None, True, False])
async def test_a_stream(
    sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream, include_usage: bool | None
) -> None:
    upstream.choose(answer_as_asked)
    options: Any = {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
    answer = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True, **options)
    chunks = [one async for one in answer]
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "Hello."
    # Clients that didn't ask index choices[0] of every chunk.
    assert [one.usage.total_tokens for one in chunks if one.usage] == ([15] if include_usage else [])
    assert all(one.choices for one in chunks) is not bool(include_usage)
    assert upstream.requests[-1].json["stream_options"]["include_usage"] is True
    [hold] = await customer.ended()
    assert (hold["charge"], hold["usage_source"], hold["ending"]) == (25_000, "reported", "complete")


async def test_tools(sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    upstream.will(*whole(chat_answer(prompt=50, completion=9) | {"choices": [choice]}))
    tool: Any = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    answer = await sdk.chat.completions.create(model="m", messages=MESSAGES, tools=[tool])
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.arguments == '{"city":"Bern"}'
    assert upstream.requests[-1].json["tools"] == [tool]
    [hold] = await customer.ended()
    assert hold["charge"] == 50_000 + 27_000


async def test_two_choices(sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream) -> None:
    pieces = [chunk("A", index=0), chunk("B", index=1), chunk(finish="stop", index=0), chunk(finish="stop", index=1)]
    upstream.will(*stream(*pieces, usage_chunk(10, 20), DONE))
    answer = await sdk.chat.completions.create(model="m", messages=MESSAGES, n=2, max_tokens=50, stream=True)
    seen = {one.choices[0].index async for one in answer}
    assert seen == {0, 1}
    [hold] = await customer.ended()
    assert hold["charge"] == 10_000 + 60_000
    assert json.loads(hold["quote"])["output_tokens_max"] == 100


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
    ],
)
async def test_an_upstreams_error_keeps_its_class(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream, status: int, kind: type[openai.APIStatusError]
) -> None:
    upstream.will(*whole({"error": {"message": "no", "type": "t", "param": "p", "code": "c"}}, status))
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key=customer.key, max_retries=0) as sdk:
        with pytest.raises(kind) as caught:
            await sdk.chat.completions.create(model="m", messages=MESSAGES)
    assert (caught.value.code, caught.value.param, caught.value.type) == ("c", "p", "t")
    [hold] = await customer.ended()
    assert hold["state"] == "released"


async def test_out_of_credits_is_told_once(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    poor = await proxy.account(credits=0.001)
    before = len(upstream.requests)
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key=poor.key) as sdk:
        with pytest.raises(openai.APIStatusError) as caught:
            await sdk.chat.completions.create(model="m", messages=MESSAGES)
    told = caught.value
    assert (told.status_code, told.code, told.type) == (402, "insufficient_quota", "insufficient_quota")
    assert told.response.headers["x-should-retry"] == "false"
    assert told.request.headers["x-stainless-retry-count"] == "0"
    assert len(upstream.requests) == before
    assert isinstance(told.body, dict)
    assert told.body["available"] == "0.001"


async def test_a_wrong_key_is_an_authentication_error(proxy: Proxy) -> None:
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key="sk-nonsense") as sdk:
        with pytest.raises(openai.AuthenticationError):
            await sdk.chat.completions.create(model="m", messages=MESSAGES)


async def test_an_unknown_model_is_not_found(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.chat.completions.create(model="nope", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


async def test_the_models_are_listed(sdk: openai.AsyncOpenAI) -> None:
    names = {model.id async for model in sdk.models.list()}
    assert {"m", "tiny", "free"} <= names
    # A route whose upstream has no key can't be served.
    assert "locked" not in names
    assert (await sdk.models.retrieve("m")).id == "m"


async def test_a_stream_that_breaks_raises(sdk: openai.AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    sse = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
    upstream.will(sse, Chunk(chunk("Half an ans")), Cut())
    answer = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    read: list[str | None] = []

    async def read_on() -> None:
        async for one in answer:
            read.append(one.choices[0].delta.content)

    with pytest.raises(openai.APIError) as caught:
        await read_on()
    assert read == ["Half an ans"]
    assert caught.value.code == "upstream_incomplete"


async def test_leaving_a_stream_early_is_charged_once(
    sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*stream(chunk("a"), chunk("b"), chunk(finish="stop"), usage_chunk(10, 5), DONE, delay=0.02))
    answer = await sdk.chat.completions.create(model="drained", messages=MESSAGES, stream=True)
    async for _ in answer:
        break
    await answer.close()
    [hold] = await customer.ended()
    assert (hold["charge"], hold["ending"]) == (25_000, "client_left")


async def test_many_streams_at_once(sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.choose(answer_as_asked)

    async def one() -> int:
        answer = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        return len([part async for part in answer])

    # The account has 1,000 credits, and each call holds three until it is done.
    assert set(await asyncio.gather(*(one() for _ in range(50)))) == {3}
    holds = await customer.ended(50)
    assert {hold["charge"] for hold in holds} == {25_000}
    assert (await customer.money()).held == 0
