"""The demo upstream: deterministic, OpenAI-shaped, and honest about its tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import pytest
import tiktoken

from proxy.gateway.tokens import build_encoding
from proxy.local.demo_upstream import FIRST_SENTENCE, PIECE, SENTENCES, DemoUpstream

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello, world!"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}},
        },
    },
}


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return build_encoding("o200k_base")


@pytest.fixture
async def client(encoding: tiktoken.Encoding) -> AsyncIterator[httpx2.AsyncClient]:
    async def count(texts: Sequence[str]) -> int:
        return sum(len(encoding.encode_ordinary(text)) for text in texts)

    app = DemoUpstream(count, token_seconds=0, models=["gpt-4o"]).app
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://demo/v1") as found:
        yield found


async def ask(client: httpx2.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await client.post("/chat/completions", json={**HELLO, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: httpx2.AsyncClient, **more: Any) -> list[dict[str, Any]]:
    answer = await client.post("/chat/completions", json={**HELLO, "stream": True, **more})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_every_piece_is_one_token(encoding: tiktoken.Encoding) -> None:
    for text in (*SENTENCES, FIRST_SENTENCE, " ".join([FIRST_SENTENCE, *SENTENCES])):
        assert PIECE.findall(text) == [encoding.decode([token]) for token in encoding.encode_ordinary(text)]
        assert "".join(PIECE.findall(text)) == text


async def test_usage_is_what_was_read_and_written(client: httpx2.AsyncClient, encoding: tiktoken.Encoding) -> None:
    answer = await ask(client)
    text = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == len(encoding.encode_ordinary(text))
    assert answer["usage"]["prompt_tokens"] == len(encoding.encode_ordinary("Hello, world!")) + 6
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_the_same_request_gets_the_same_answer_and_another_one_another(client: httpx2.AsyncClient) -> None:
    assert await ask(client) == await ask(client)
    other = await ask(client, messages=[{"role": "user", "content": "Hello, moon!"}])
    assert other["choices"] != (await ask(client))["choices"]


async def test_a_stream_carries_one_token_a_chunk_and_usage_where_asked(client: httpx2.AsyncClient) -> None:
    chunks = await stream(client, stream_options={"include_usage": True})
    whole = (await ask(client))["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == []
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1]]
    assert len([text for text in deltas if text]) == chunks[-1]["usage"]["completion_tokens"]
    assert "".join(text for text in deltas if text) == whole
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in await stream(client))


async def test_n_choices_differ_and_all_count(client: httpx2.AsyncClient) -> None:
    answer = await ask(client, n=3)
    texts = {choice["message"]["content"] for choice in answer["choices"]}
    assert len(texts) == 3
    assert answer["usage"]["completion_tokens"] == sum(len(PIECE.findall(text)) for text in texts)
    assert {chunk["choices"][0]["index"] for chunk in await stream(client, n=3)} == {0, 1, 2}


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_cap_ends_the_answer(client: httpx2.AsyncClient, name: str) -> None:
    answer = await ask(client, **{name: 7})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7
    assert len(PIECE.findall(answer["choices"][0]["message"]["content"])) == 7


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_tool_is_called_when_asked_for(
    client: httpx2.AsyncClient, encoding: tiktoken.Encoding, choice: object
) -> None:
    answer = await ask(client, tools=[WEATHER], tool_choice=choice)
    message = answer["choices"][0]["message"]
    call = message["tool_calls"][0]
    assert (message["content"], answer["choices"][0]["finish_reason"]) == (None, "tool_calls")
    assert json.loads(call["function"]["arguments"]) == {"city": "demo", "unit": "C", "days": 1}
    assert answer["usage"]["completion_tokens"] == len(encoding.encode_ordinary(call["function"]["arguments"]))

    deltas = [
        chunk["choices"][0]["delta"] for chunk in await stream(client, tools=[WEATHER], tool_choice=choice, seed=1)
    ]
    pieces = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas if "tool_calls" in delta]
    assert "".join(pieces) == call["function"]["arguments"]


async def test_tools_alone_are_answered_with_text(client: httpx2.AsyncClient) -> None:
    answer = await ask(client, tools=[WEATHER])
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > (await ask(client))["usage"]["prompt_tokens"]


async def test_a_schema_is_kept(client: httpx2.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string"}}}}
    answer = await ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"names": ["demo"]}


async def test_a_count_that_fails_is_estimated() -> None:
    async def none(texts: Sequence[str]) -> None:
        return None

    app = DemoUpstream(none, token_seconds=0).app
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://demo/v1") as client:
        assert (await ask(client))["usage"]["prompt_tokens"] == len("Hello, world!") // 4 + 6


async def test_tokens_take_their_time(encoding: tiktoken.Encoding) -> None:
    async def none(texts: Sequence[str]) -> None:
        return None

    app = DemoUpstream(none, token_seconds=0.05).app
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://demo/v1") as client:
        began = asyncio.get_running_loop().time()
        await ask(client, max_tokens=4)
        assert asyncio.get_running_loop().time() - began >= 0.19


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"messages": []}', "model"),
        (b'{"model": "m", "messages": []}', "messages"),
        (b'{"model": "m", "messages": ["hi"]}', "messages"),
        (b'{"model": "m", "messages": [{}], "n": 0}', "n"),
        (b'{"model": "m", "messages": [{}], "max_tokens": -1}', "max_tokens"),
        (b'{"model": "m", "messages": [{}], "stream_options": {}}', "stream_options"),
        (b'{"model": "m", "messages": [{}], "response_format": "json"}', "response_format"),
        (b'{"model": "m", "messages": [{}], "tool_choice": "required"}', "tool_choice"),
        (b'{"model": "m", "messages": [{}], "tools": [{"function": {}}, 1], "tool_choice": "required"}', "tool_choice"),
    ],
)
async def test_nonsense_is_400(client: httpx2.AsyncClient, body: bytes, param: str | None) -> None:
    answer = await client.post("/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_models_are_listed(client: httpx2.AsyncClient) -> None:
    assert [model["id"] for model in (await client.get("/models")).json()["data"]] == ["gpt-4o"]
