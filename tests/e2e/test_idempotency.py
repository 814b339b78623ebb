"""Idempotency-Key, with openai-python as it is: one word, one charge, whatever happens between its retries."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio

from tests.e2e.proxy import MESSAGES, Customer, Proxy, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    ScriptedUpstream,
    Send,
    Step,
    Wait,
    chat_answer,
    chunk,
    head,
    stream,
    usage_chunk,
    whole,
)
from tests.postgres import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
BUSY = whole({"error": {"message": "overloaded", "type": "server_error"}}, status=503, headers={"retry-after-ms": "1"})


async def say(customer: Customer, word: str, *, proxy: Proxy | None = None, **more: Any) -> httpx2.Response:
    """One whole call under that word."""
    headers = customer.headers | {"idempotency-key": word}
    body = json.dumps(customer.body(**more)).encode()
    return await (proxy or customer.proxy).http.post("/chat/completions", content=body, headers=headers)


def error_of(answer: httpx2.Response) -> Any:
    return answer.json()["error"]


async def all_but_one_and_then(
    calls: "list[asyncio.Task[httpx2.Response]]", go: asyncio.Event
) -> list[httpx2.Response]:
    """Once all calls but one are answered, let the upstream go on, and have the answers."""
    waiting = set(calls)
    while len(waiting) > 1:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    go.set()
    return await asyncio.gather(*calls)


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(proxy: Proxy, customer: Customer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key=customer.key, timeout=30, max_retries=60) as client:
        yield client


# The SDK's retries.


@pytest.mark.parametrize("streaming", [False, True])
async def test_fifty_retries_of_the_sdk_under_one_word_are_one_charge(
    sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream, streaming: bool
) -> None:
    good = (
        stream(chunk("Hello."), chunk(finish="stop"), usage_chunk(10, 5), DONE) if streaming else whole(chat_answer())
    )
    upstream.will_in_turn([*[BUSY] * 50, good])
    asked = len(upstream.requests)
    word = {"Idempotency-Key": f"order-{streaming}"}
    if streaming:
        told = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_headers=word)
        text = "".join([c.choices[0].delta.content or "" async for c in told if c.choices])
        assert text == "Hello."
    else:
        answer = await sdk.chat.completions.create(model="m", messages=MESSAGES, extra_headers=word)
        assert answer.choices[0].message.content
    assert len(upstream.requests) - asked == 51
    holds = await customer.ended(51)
    assert [hold["state"] for hold in holds] == ["released"] * 50 + ["final"]
    assert (await customer.money()).balance == 1_000_000_000 - holds[-1]["charge"] < 1_000_000_000
    again = await say(customer, f"order-{streaming}", stream=streaming)
    assert again.status_code in (409, 422)
    await customer.proxy.audit()


async def test_without_a_word_nothing_is_kept(
    sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream
) -> None:
    """openai-python and openai-node send none of their own accord: two calls are two calls."""
    upstream.will_in_turn([BUSY, whole(chat_answer())])
    await sdk.chat.completions.create(model="m", messages=MESSAGES)
    assert "idempotency-key" not in upstream.requests[-1].headers
    query = "SELECT count(*) FROM farebox.idempotency_keys WHERE account_id = $1"
    [row] = await customer.proxy.query(query, customer.id)
    assert row["count"] == 0


async def test_the_sdk_raises_a_conflict_once_and_does_not_retry_it(
    sdk: openai.AsyncOpenAI, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    word = {"Idempotency-Key": "once"}
    first = await sdk.chat.completions.with_raw_response.create(model="m", messages=MESSAGES, extra_headers=word)
    asked = len(upstream.requests)
    with pytest.raises(openai.ConflictError) as raised:
        await sdk.chat.completions.create(model="m", messages=MESSAGES, extra_headers=word)
    assert raised.value.code == "idempotency_key_used"
    assert raised.value.response.headers["x-should-retry"] == "false"
    receipt = raised.value.response.headers["x-farebox-receipt"]
    assert receipt == first.headers["x-request-id"] == raised.value.body["receipt"]  # type: ignore[index]
    read = await customer.proxy.http.get(f"/receipts/{receipt}", headers=customer.headers)
    assert read.status_code == 200
    assert len(upstream.requests) == asked
    await customer.ended(1)


# What a word is while its call lives, and after.


async def test_while_it_runs_and_when_it_has_ended(customer: Customer, upstream: ScriptedUpstream) -> None:
    go = asyncio.Event()
    upstream.will(Wait(go), *whole(chat_answer(prompt=10, completion=5)))
    first = asyncio.create_task(say(customer, "w"))
    await customer.opened()
    asked = len(upstream.requests)
    running = await say(customer, "w")
    assert (running.status_code, error_of(running)["code"]) == (409, "idempotency_key_in_use")
    assert (running.headers["x-should-retry"], int(running.headers["retry-after"]) > 0) == ("true", True)
    other_body = await say(customer, "w", temperature=1)
    assert (other_body.status_code, error_of(other_body)["code"]) == (422, "idempotency_key_mismatch")
    go.set()
    answer = await first
    finished = await say(customer, "w")
    assert (finished.status_code, error_of(finished)["code"]) == (409, "idempotency_key_used")
    assert finished.headers["x-should-retry"] == "false"
    assert finished.headers["x-farebox-receipt"] == error_of(finished)["receipt"] == answer.headers["x-request-id"]
    assert (await say(customer, "w", temperature=1)).status_code == 422
    assert len(upstream.requests) == asked
    [hold] = await customer.ended(1)
    assert hold["charge"] == 25_000


async def test_many_at_once_under_one_word_reach_the_upstream_once(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.will(Wait(go), *whole(chat_answer(prompt=10, completion=5)))
    asked = len(upstream.requests)
    calls = [asyncio.create_task(say(customer, "crowd")) for _ in range(20)]
    answers = await all_but_one_and_then(calls, go)
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 19
    assert len(upstream.requests) == asked + 1
    await customer.ended(1)


async def test_the_same_word_in_two_accounts_is_two_calls(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    other = await proxy.account()
    assert [(await say(who, "shared")).status_code for who in (customer, other)] == [200, 200]
    words = [request.headers["idempotency-key"] for request in upstream.requests[-2:]]
    assert len({*words, "shared"}) == 3, "the provider sees neither the word nor the same one for both"


@pytest.mark.parametrize("other", ["another key of the account", "the same key"])
async def test_a_rotated_key_says_the_same_words(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream, other: str
) -> None:
    upstream.will(*whole(chat_answer()))
    assert (await say(customer, "rotate")).status_code == 200
    if other != "the same key":
        _, text = await proxy.operations.rotate_key(customer.key_id, overlap_seconds=60)
        customer = Customer(proxy, customer.id, customer.key_id, text)
    assert (await say(customer, "rotate")).status_code == 409


# What frees it.


async def test_a_refusal_frees_the_word(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    poor = await proxy.account(credits=0)
    upstream.will(*whole(chat_answer()))
    assert [(await say(poor, "w")).status_code for _ in range(3)] == [402] * 3
    await proxy.operations.grant(poor.id, 10**9, reference=str(poor.id), actor="test", reason="test")
    assert (await say(poor, "w")).status_code == 200
    assert (await say(poor, "w")).status_code == 409


@pytest.mark.parametrize(
    ("model", "first", "status"),
    [
        ("m", BUSY, 503),
        ("m", whole({"error": {"message": "bad"}}, status=400), 400),
        ("m", whole({"error": {"message": "key"}}, status=401), 502),
        ("m", [Cut(reset=True)], 502),
        ("dead", [], 502),
        ("locked", [], 503),
        ("nosuch", [], 404),
    ],
)
async def test_what_costs_nothing_frees_the_word_even_for_another_body(
    customer: Customer, upstream: ScriptedUpstream, model: str, first: Any, status: int
) -> None:
    upstream.will_in_turn([*([first] if first else []), whole(chat_answer())])
    assert (await say(customer, "w", model=model)).status_code == status
    assert (await say(customer, "w", model="m", temperature=1)).status_code == 200
    assert (await say(customer, "w", model="m", temperature=1)).status_code == 409


async def test_a_200_that_broke_before_its_first_word_frees_it_and_one_that_broke_later_does_not(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    empty: list[Step] = [SSE, Cut()]
    begun: list[Step] = [SSE, Chunk(chunk("Hel")), Cut()]
    upstream.will_in_turn([empty, begun, whole(chat_answer())])
    for expected in (0, 1):
        with pytest.raises(httpx2.RemoteProtocolError):
            await say(customer, "w", stream=True)
        holds = await customer.ended(expected + 1)
        assert (holds[-1]["state"] == "final") is bool(expected)
    answer = await say(customer, "w", stream=True)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "idempotency_key_used")


# A client that left.


async def test_a_client_that_left_and_comes_back_finds_it_running_and_then_finished(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.will(
        SSE, Chunk(chunk("Hel")), Wait(go), Chunk(chunk("lo.")), Chunk(usage_chunk(10, 5)), Chunk(DONE), Chunk(b"")
    )
    headers = customer.headers | {"idempotency-key": "left"}
    body = json.dumps(customer.body(stream=True, model="drained")).encode()
    async with customer.proxy.http.stream("POST", "/chat/completions", content=body, headers=headers) as answer:
        async for _ in answer.aiter_raw():
            break
    assert (await say(customer, "left", stream=True, model="drained")).headers["x-should-retry"] == "true"
    go.set()
    await customer.ended(1)
    assert (await say(customer, "left", stream=True, model="drained")).headers["x-should-retry"] == "false"
    [hold] = await customer.holds()
    assert hold["ending"] in ("client_left", "client_left_cut")


# Bad words.


@pytest.mark.parametrize("word", [b"", b"x" * 256, b"caf\xc3\xa9", b"a\x7fb", b"a\tb\x01"])
async def test_a_word_that_cannot_be_one_is_refused(
    customer: Customer, upstream: ScriptedUpstream, word: bytes
) -> None:
    upstream.will(*whole(chat_answer()))
    headers = [*((k.encode(), v.encode()) for k, v in customer.headers.items()), (b"idempotency-key", word)]
    body = json.dumps(customer.body()).encode()
    answer = await customer.proxy.http.post("/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    if answer.headers["content-type"] == "application/json":
        assert error_of(answer)["code"] == "idempotency_key_invalid"
    assert await customer.holds() == []


async def test_two_words_are_refused(customer: Customer) -> None:
    headers = [*customer.headers.items(), ("idempotency-key", "a"), ("Idempotency-Key", "b")]
    body = json.dumps(customer.body()).encode()
    answer = await customer.proxy.http.post("/chat/completions", content=body, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "idempotency_key_invalid")


async def test_a_word_of_the_longest_kind_and_of_a_uuid_in_quotes(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    for word in ("x" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "stainless-python-retry-4f8a", "two words"):
        assert [(await say(customer, word)).status_code for _ in range(2)] == [200, 409]


# Answers that are kept.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keeping(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    """A second server over the same ledger, which keeps answers for an hour, small ones."""
    settings: dict[str, Any] = {"idempotency_answer_seconds": 3600, "idempotency_answer_bytes_max": 4096}
    async with running_proxy(
        module_database, tmp_path_factory.mktemp("keeping"), upstream.base_url, **settings
    ) as running:
        yield running


async def test_a_kept_answer_is_given_again_byte_for_byte(
    keeping: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer("Hello.", 10, 5), headers={"x-request-id": "req_1"}))
    first = await say(customer, "keep", proxy=keeping)
    asked = len(upstream.requests)
    again = await say(customer, "keep", proxy=keeping)
    assert (again.status_code, again.content) == (200, first.content)
    same = ("content-type", "content-length", "x-upstream-request-id")
    assert [again.headers[name] for name in same] == [first.headers[name] for name in same]
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["x-farebox-receipt"] == first.headers["x-request-id"] != again.headers["x-request-id"]
    assert "idempotent-replayed" not in first.headers
    assert len(upstream.requests) == asked
    await customer.ended(1)


async def test_a_stream_is_replayed_to_the_sdk(keeping: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(chunk("Hel"), chunk("lo."), chunk(finish="stop"), usage_chunk(10, 5), DONE))
    headers = {"Idempotency-Key": "sse"}
    texts = []
    async with openai.AsyncOpenAI(base_url=keeping.base_url, api_key=customer.key, max_retries=0) as sdk:
        for _ in range(3):
            told = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_headers=headers)
            texts.append("".join([one.choices[0].delta.content or "" async for one in told if one.choices]))
    assert texts == ["Hello."] * 3
    await customer.ended(1)


async def test_whoever_lost_the_answer_gets_it_by_asking_again(
    keeping: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    """The connection broke after the first words; the upstream was read to its end, and paid."""
    go = asyncio.Event()
    events = [chunk("Hel"), chunk("lo."), chunk(finish="stop"), usage_chunk(10, 5), DONE]
    upstream.will(SSE, Chunk(events[0]), Wait(go), *[Chunk(event) for event in events[1:]], Send(b"0\r\n\r\n"))
    headers = customer.headers | {"idempotency-key": "lost"}
    body = json.dumps(customer.body(stream=True)).encode()
    async with keeping.http.stream("POST", "/chat/completions", content=body, headers=headers) as answer:
        async for _ in answer.aiter_raw():
            break
    go.set()
    [hold] = await customer.ended(1)
    assert hold["ending"] == "client_left"
    again = await say(customer, "lost", proxy=keeping, stream=True)
    assert again.status_code == 200
    # The usage chunk was Farebox's own wish.
    assert again.content == b"".join(event for event in events if b'"choices": []' not in event)
    assert len(await customer.holds()) == 1


async def test_an_answer_too_large_to_keep_is_merely_used_up(
    keeping: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer("x" * 5000)))
    assert (await say(customer, "large", proxy=keeping)).status_code == 200
    assert (await say(customer, "large", proxy=keeping)).status_code == 409


async def test_where_answers_are_not_kept_no_word_of_them_is_stored(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer("a very secret answer")))
    await say(customer, "ada@example.com")
    rows = await customer.proxy.query(
        "SELECT count(*) FROM farebox.idempotency_answers WHERE position($1 IN body) > 0", b"secret"
    )
    assert rows[0]["count"] == 0
    [row] = await customer.proxy.query(
        "SELECT k::text FROM farebox.idempotency_keys k WHERE account_id = $1", customer.id
    )
    assert b"example".hex() not in row["k"]
    assert "example" not in row["k"]


# Two servers, and a ledger that is away.


async def test_a_word_claimed_at_one_server_is_taken_at_the_other(
    proxy: Proxy, keeping: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    go = asyncio.Event()
    upstream.will(Wait(go), *whole(chat_answer()))
    asked = len(upstream.requests)
    calls = [asyncio.create_task(say(customer, "both", proxy=where)) for where in (proxy, keeping) * 5]
    answers = await all_but_one_and_then(calls, go)
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9
    assert len(upstream.requests) == asked + 1


async def test_an_unreachable_ledger_is_a_503_and_costs_the_word_nothing(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    async with running_proxy(database, tmp_path, upstream.base_url, reserve_seconds=1) as proxy:
        customer = await proxy.account()
        assert (await say(customer, "first")).status_code == 200
        lock = "ALTER FUNCTION farebox.claim_key RENAME TO claim_key_away"
        await proxy.query(lock)
        refused = await say(customer, "second")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "ledger_unavailable")
        assert "retry-after" in refused.headers
        await proxy.query("ALTER FUNCTION farebox.claim_key_away RENAME TO claim_key")
        assert (await say(customer, "second")).status_code == 200
        await customer.ended(2)
