"""However an answer ends, its hold ends once: charged what is due, and nothing stays held."""

import asyncio
import json
from typing import Any, NamedTuple

import httpx2
import pytest

from tests.e2e.proxy import Customer
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
    event,
    head,
    stream,
    usage_chunk,
    whole,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

GRANTED = 1000_000_000
SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
# Each a token of o200k_base, so that what was counted can be told by hand.
WORDS = [" one", " two", " three", " four", " five"]
CHUNKS = [*(chunk(word) for word in WORDS), chunk(finish="stop"), usage_chunk(10, 5), DONE]
REPORTED = 10 * 1000 + 5 * 3000
# What the prompt "Say hello." is counted as: 3 tokens, 4 for the message, 3 for the answer's beginning.
PROMPT = 10 * 1000
SAID = 1  # what an answer costs beside its text, in this family of models


class Ended(NamedTuple):
    cost: int
    source: str | None
    ending: str | None


async def ended(customer: Customer) -> Ended:
    """How the account's one call ended. Nothing is held then, and the books are right."""
    [hold] = await customer.ended()
    account = await customer.money()
    assert account.held == 0
    await customer.proxy.audit()
    return Ended(GRANTED - account.balance, hold["usage_source"], hold["ending"])


async def read_some(customer: Customer, length: int, **more: Any) -> bytes:
    """Read so many bytes of a stream, then close the socket."""
    read = b""
    async with customer.stream(**more) as answer:
        if length:
            async for piece in answer.aiter_raw():
                read += piece
                if len(read) >= length:
                    break
    return read


async def read_all(customer: Customer, **more: Any) -> tuple[bytes, bool]:
    """What came of a stream, and whether it came to a clean end."""
    read = b""
    try:
        async with customer.stream(**more) as answer:
            async for piece in answer.aiter_raw():
                read += piece
    except httpx2.RemoteProtocolError:
        return read, False
    return read, True


def error_of(read: bytes) -> Any:
    """The error in the last event of a stream."""
    return json.loads(read.removesuffix(b"\n\n").rpartition(b"data: ")[2])["error"]


# The client leaves.


@pytest.mark.parametrize("pieces", range(len(CHUNKS)))
async def test_a_client_that_leaves_at_any_piece_pays_what_was_reported(
    customer: Customer, upstream: ScriptedUpstream, pieces: int
) -> None:
    upstream.will(*stream(*CHUNKS, delay=0.01))
    seen = [piece for piece in CHUNKS[:pieces] if b'choices": []' not in piece]
    await read_some(customer, sum(map(len, seen)), model="drained")
    assert (await ended(customer))[:2] == (REPORTED, "reported")


async def test_a_drain_that_takes_too_long_is_cut_and_counted(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, *(Chunk(piece) for piece in CHUNKS[:3]), Sleep(30))
    await read_some(customer, len(CHUNKS[0]), model="curt")
    assert await ended(customer) == (PROMPT + (3 + SAID) * 3000, "counted", "client_left_cut")
    assert upstream.requests[-1].closed.is_set()


async def test_a_drain_of_nothing_charges_the_prompt(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(Sleep(30))
    before = len(upstream.requests)
    calling = asyncio.create_task(customer.post(model="curt"))
    async with asyncio.timeout(5):
        while len(upstream.requests) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    calling.cancel()
    assert await ended(customer) == (PROMPT, "counted", "client_left_cut")


# The upstream fails.


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 500, 503, 529])
async def test_an_upstream_that_refuses_costs_nothing(
    customer: Customer, upstream: ScriptedUpstream, status: int
) -> None:
    error = {"error": {"message": "no", "type": "t", "param": None, "code": "c"}}
    upstream.will(*whole(error, status, {"retry-after": "7", "x-should-retry": "false"}))
    answer = await customer.post(stream=True)
    assert (answer.status_code, answer.json()) == (status, error)
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["x-should-retry"] == "false"
    assert await ended(customer) == (0, None, "released")


async def test_an_upstream_that_cannot_be_reached_costs_nothing(customer: Customer) -> None:
    answer = await customer.post(model="dead")
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_unreachable"
    assert await ended(customer) == (0, None, "released")


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_upstream_that_breaks_before_its_headers_costs_nothing(
    customer: Customer, upstream: ScriptedUpstream, streamed: bool
) -> None:
    upstream.will(Cut(reset=True))
    answer = await customer.post(stream=streamed)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_incomplete"
    assert await ended(customer) == (0, None, "released")


@pytest.mark.parametrize("pieces", range(len(CHUNKS) - 1))
@pytest.mark.parametrize("how", ["cut", "reset", "clean end", "inside an event"])
async def test_a_stream_that_breaks_is_charged_as_far_as_it_came(
    customer: Customer, upstream: ScriptedUpstream, pieces: int, how: str
) -> None:
    last: dict[str, list[Step]] = {
        "cut": [Cut()],
        "reset": [Sleep(0.02), Cut(reset=True)],
        "clean end": [Send(b"0\r\n\r\n")],
        "inside an event": [Chunk(b'data: {"choices":[{"index":0,"del'), Cut()],
    }
    upstream.will(SSE, *(Chunk(piece) for piece in CHUNKS[:pieces]), *last[how])
    read, clean = await read_all(customer)
    finished = pieces > len(WORDS)
    if how == "clean end" and finished:
        assert (read, clean) == (b"".join(CHUNKS[:6]), True)
    else:
        assert not clean
        assert read.startswith(b"".join(CHUNKS[: min(pieces, 6)]))
        assert error_of(read)["code"] == "upstream_incomplete"
        assert DONE not in read
    words = min(pieces, len(WORDS))
    if pieces > 6:
        assert await ended(customer) == (REPORTED, "reported", "upstream_incomplete")
    elif words:
        due = PROMPT + (words + SAID) * 3000
        ending = "complete" if how == "clean end" and finished else "upstream_incomplete"
        assert await ended(customer) == (due, "counted", ending)
    else:
        assert await ended(customer) == (0, None, "released")


async def test_a_stalled_stream_is_ended_and_charged(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Chunk(CHUNKS[0]), Sleep(30))
    read, clean = await read_all(customer, model="hasty")
    assert not clean
    assert error_of(read)["code"] == "upstream_timeout"
    assert await ended(customer) == (PROMPT + (1 + SAID) * 3000, "counted", "upstream_stalled")


async def test_an_upstream_that_never_answers_costs_nothing(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(Sleep(30))
    answer = await customer.post(model="hasty")
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_timeout"
    assert await ended(customer) == (0, None, "released")


async def test_a_whole_answer_that_breaks_costs_nothing(customer: Customer, upstream: ScriptedUpstream) -> None:
    body = json.dumps(chat_answer()).encode()
    upstream.will(head(200, {"content-length": str(len(body))}), Send(body[:40]), Cut())
    answer = await customer.post()
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_incomplete"
    assert await ended(customer) == (0, None, "released")


@pytest.mark.parametrize("words", [0, 2])
async def test_an_error_inside_a_stream_is_passed_on(
    customer: Customer, upstream: ScriptedUpstream, words: int
) -> None:
    error = event({"error": {"message": "overloaded", "type": "server_error", "code": None}})
    upstream.will(*stream(*CHUNKS[:words], error))
    read, clean = await read_all(customer)
    assert (read, clean) == (b"".join(CHUNKS[:words]) + error, True)
    cost, source, _ = await ended(customer)
    assert (cost, source) == ((PROMPT + (words + SAID) * 3000, "counted") if words else (0, None))


async def test_an_error_with_status_200_costs_nothing(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole({"error": {"message": "filtered"}}))
    answer = await customer.post()
    assert (answer.status_code, answer.json()) == (200, {"error": {"message": "filtered"}})
    assert await ended(customer) == (0, None, "released")


async def test_an_encoded_answer_is_refused(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(b"\x1f\x8b", headers={"content-encoding": "gzip"}))
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_encoded")
    assert upstream.requests[-1].headers["accept-encoding"] == "identity"
    assert await ended(customer) == (0, None, "released")


async def test_an_upstream_that_stays_open_after_done_is_not_waited_for(
    customer: Customer, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.gateway.relay.TAIL_SECONDS", 0.1)
    upstream.will(SSE, *(Chunk(piece) for piece in CHUNKS), Sleep(30))
    read, clean = await read_all(customer)
    assert clean
    assert read.endswith(DONE)
    assert await ended(customer) == (REPORTED, "reported", "complete")


# Answers that are whole, in other ways.


async def test_no_usage_is_counted(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(*CHUNKS[:6], DONE))
    _, clean = await read_all(customer)
    assert clean
    assert await ended(customer) == (PROMPT + (5 + SAID) * 3000, "counted", "complete")


async def test_a_usage_far_above_its_bound_is_not_believed(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(*CHUNKS[:6], usage_chunk(10, 100_000), DONE))
    await read_all(customer, max_tokens=50)
    [hold] = await customer.ended()
    assert (hold["charge"], hold["capped"]) == (hold["amount"], "implausible_usage")


async def test_a_report_behind_the_end_mark_is_charged(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(
        SSE, *(Chunk(piece) for piece in CHUNKS[:6]), Chunk(DONE), Sleep(0.1), Chunk(CHUNKS[6]), Send(b"0\r\n\r\n")
    )
    _, clean = await read_all(customer)
    assert clean
    assert await ended(customer) == (REPORTED, "reported", "complete")


async def test_a_report_at_the_beginning_is_completed_by_counting(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    first = chunk("", usage={"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12})
    upstream.will(*stream(first, *CHUNKS[:6], DONE))
    await read_all(customer)
    assert await ended(customer) == (12 * 1000 + (5 + SAID) * 3000, "partly_counted", "complete")


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"x":' + b"[" * 5000 + b"]" * 5000 + b',"choices":[]}', b"Sure! Here is a poem.", b""]
)
async def test_what_cannot_be_read_is_not_given_away(
    customer: Customer, upstream: ScriptedUpstream, body: bytes
) -> None:
    upstream.will(*whole(body))
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreadable")
    assert await ended(customer) == (0, None, "released")


@pytest.mark.parametrize("status", [600, 999])
async def test_a_status_that_is_none(customer: Customer, upstream: ScriptedUpstream, status: int) -> None:
    upstream.will(*whole(chat_answer(), status))
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_status")
    assert await ended(customer) == (0, None, "released")


async def test_an_error_that_cannot_be_read(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(b"\x1f\x8b", 400, {"content-encoding": "gzip"}))
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "upstream_unreadable")
    assert await ended(customer) == (0, None, "released")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_cap_that_the_upstream_ignores_buys_nothing(
    customer: Customer, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.will(*stream(chunk("word " * 900), chunk(finish="stop"), usage_chunk(10, 900), DONE))
    await read_all(customer, **{name: 1})
    assert await ended(customer) == (10 * 1000 + 900 * 3000, "reported", "complete")


async def test_a_usage_above_the_hold_is_charged(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(*CHUNKS[:6], usage_chunk(10, 150), DONE))
    await read_all(customer, max_tokens=50)
    [hold] = await customer.ended()
    assert hold["charge"] == 10 * 1000 + 150 * 3000 > hold["amount"]
    assert hold["capped"] is None
