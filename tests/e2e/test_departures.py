"""A client leaves: at every piece of an answer, under every policy, whatever the upstream reports.

The upstream's script stops where the client is to leave, and goes on when the proxy has noticed; so what was seen
before and after is the same in every run. The oracle below knows the prices and the words, and none of the code.
"""

import asyncio
import contextlib
import json
from typing import Any, NamedTuple

import httpx2
import pytest

from proxy.gateway.exchange import Exchange
from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    ScriptedUpstream,
    Send,
    Sleep,
    Wait,
    chat_answer,
    chunk,
    head,
    stream,
    usage_chunk,
    usage_of,
    whole,
)
from tests.postgres import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

GRANTED = 1000_000_000
INPUT, OUTPUT = 1000, 3000  # microcredits a token
SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
END = Send(b"0\r\n\r\n")
# Each a token of o200k_base.
WORDS = [" one", " two", " three", " four", " five"]
REASONING = 5  # its place among the classes of usage
PROMPT, SAID = 10, 1  # tokens: what "Say hello." is counted as, and what an answer costs beside its text
FINISH = chunk(finish="stop")


class Ended(NamedTuple):
    cost: int
    source: str | None
    ending: str | None
    cut_by: str | None


async def ended(customer: Customer) -> Ended:
    """How the account's one call ended. Nothing is held then, and the books are right."""
    [hold] = await customer.ended()
    account = await customer.money()
    assert account.held == 0
    await customer.proxy.audit()
    receipt = json.loads(hold["receipt"]) if hold["receipt"] else {}
    return Ended(GRANTED - account.balance, hold["usage_source"], hold["ending"], receipt.get("cut_by"))


def exchanges(proxy: Proxy) -> list[Exchange]:
    """What the proxy has open."""
    assert proxy.app._services is not None
    return list(proxy.app._services.settler._open)


async def until(true: Any, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def leave_after(customer: Customer, pieces: int, **more: Any) -> None:
    """Call for a stream, and leave once the proxy has seen so many of the upstream's pieces."""
    async with customer.stream(**more) as answer:
        await until(lambda: all(_seen(exchange) >= pieces for exchange in exchanges(customer.proxy)))
        await answer.aclose()


def _seen(exchange: Exchange) -> int:
    meter = exchange.meter
    return 0 if meter is None else meter.chunks + meter.done


async def called(customer: Customer, upstream: ScriptedUpstream, **more: Any) -> "asyncio.Task[httpx2.Response]":
    """A call whose request has reached the upstream."""
    before = len(upstream.requests)
    calling = asyncio.create_task(customer.post(**more))
    await until(lambda: len(upstream.requests) > before)
    return calling


async def leave_at_once(customer: Customer, upstream: ScriptedUpstream, **more: Any) -> None:
    """Call, and leave when the upstream has the request but has said nothing."""
    calling = await called(customer, upstream, **more)
    calling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await calling


# At every piece.

# The chunk behind the text, or none; and what it says, if it is a report: an explicit zero of one side is.
REPORTS: dict[str, tuple[list[bytes], int | None]] = {
    "present": ([usage_chunk(12, 7)], 12 * INPUT + 7 * OUTPUT),
    "absent": ([], None),
    "zeros": ([usage_chunk(0, 0)], None),
    "no output": ([usage_chunk(12, 0)], 12 * INPUT),
    "null": ([chunk(usage=None, choices=[])], None),
}


def oracle(policy: str, report: str, pieces: int) -> tuple[int, str, set[str]]:
    """What is charged, by whose word, and how the answer may have ended."""
    chunks, reported = REPORTS[report]
    counted = PROMPT * INPUT + (pieces + SAID) * OUTPUT if pieces else PROMPT * INPUT
    whole_text = (PROMPT * INPUT + (len(WORDS) + SAID) * OUTPUT, "counted")
    finished = pieces > len(WORDS)
    if policy == "cancel" and not finished:
        return counted, "counted", {"client_left_cut"}
    over = pieces == len(WORDS) + 1 + len(chunks) + 1
    endings = {"client_left", "complete"} if over else {"client_left"}
    return (*((reported, "reported") if reported is not None else whole_text), endings)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("policy", ["cancel", "drain"])
async def test_a_client_that_leaves_pays_what_is_due_wherever_it_leaves(
    proxy: Proxy, upstream: ScriptedUpstream, policy: str, report: str, asked: bool
) -> None:
    answer = [*(chunk(word) for word in WORDS), FINISH, *REPORTS[report][0], DONE]
    options = {"stream_options": {"include_usage": True}} if asked else {}
    for pieces in range(len(answer) + 1):
        gate = asyncio.Event()
        before, after = answer[:pieces], answer[pieces:]
        upstream.will(SSE, *map(Chunk, before), Wait(gate), *map(Chunk, after), END)
        customer = await proxy.account()
        await leave_after(customer, pieces, model="m" if policy == "cancel" else "drained", **options)
        await until(lambda: all(exchange.left_at for exchange in exchanges(proxy)))
        cost, source, endings = oracle(policy, report, pieces)
        if endings == {"client_left_cut"}:
            await asyncio.wait_for(upstream.requests[-1].closed.wait(), 2)
            assert not upstream.requests[-1].finished
        gate.set()
        found = await ended(customer)
        assert (found.cost, found.source) == (cost, source), f"left after {pieces} pieces"
        assert found.ending in endings
        assert found.cut_by == ("on_disconnect" if endings == {"client_left_cut"} else None)


# Before anything came.


@pytest.mark.parametrize("model", ["m", "drained"])
async def test_a_hedging_client_of_a_model_that_is_cancelled_pays_for_the_prompt_alone(
    customer: Customer, upstream: ScriptedUpstream, model: str
) -> None:
    """sub2api #4408: a client that asks two and leaves the slower one was charged for an answer that it never saw."""
    gate = asyncio.Event()
    upstream.will(Wait(gate), *stream(*map(chunk, WORDS), FINISH, usage_chunk(12, 7), DONE))
    await leave_at_once(customer, upstream, model=model, stream=True)
    if model == "m":
        await asyncio.wait_for(upstream.requests[-1].closed.wait(), 2)
        assert await ended(customer) == (PROMPT * INPUT, "counted", "client_left_cut", "on_disconnect")
    else:
        gate.set()
        assert await ended(customer) == (12 * INPUT + 7 * OUTPUT, "reported", "client_left", None)


@pytest.mark.parametrize("model", ["m", "drained", "thinker"])
async def test_an_answer_in_one_piece_is_read_on_whatever_the_policy(
    customer: Customer, upstream: ScriptedUpstream, model: str
) -> None:
    gate = asyncio.Event()
    upstream.will(Wait(gate), *whole(chat_answer(prompt=12, completion=7)))
    await leave_at_once(customer, upstream, model=model)
    await until(lambda: all(exchange.left_at for exchange in exchanges(customer.proxy)))
    gate.set()
    assert await ended(customer) == (12 * INPUT + 7 * OUTPUT, "reported", "client_left", None)


async def test_zeros_of_an_answer_that_says_nothing_stay_zero(customer: Customer, upstream: ScriptedUpstream) -> None:
    """LiteLLM #37992: after a disconnect, a report of zeros was replaced by an estimate."""
    gate = asyncio.Event()
    upstream.will(SSE, Wait(gate), *map(Chunk, (FINISH, usage_chunk(0, 0), DONE)), END)
    await leave_after(customer, 0, model="drained")
    await until(lambda: all(exchange.left_at for exchange in exchanges(customer.proxy)))
    gate.set()
    assert (await ended(customer))[:2] == (0, None)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("model", ["m", "gpt-5"])
async def test_a_client_that_leaves_while_the_way_to_the_upstream_is_made_owes_nothing(
    database: Database, tmp_path_factory: pytest.TempPathFactory, streamed: bool, model: str
) -> None:
    """The upstream takes the connection and never answers its TLS greeting: it hasn't been asked anything."""
    greeted, gone = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        greeted.set()
        await reader.read()
        gone.set()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with running_proxy(database, tmp_path_factory.mktemp("unsent"), url) as proxy:
            customer = await proxy.account()
            calling = asyncio.create_task(customer.post(model=model, stream=streamed))
            await asyncio.wait_for(greeted.wait(), 5)
            calling.cancel()
            await asyncio.wait_for(gone.wait(), 2)
            assert await ended(customer) == (0, None, "released", None)


async def test_a_client_that_leaves_while_its_request_goes_out_owes_nothing(
    database: Database, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Half a request is none: the upstream reads its head and no more."""
    begun, over = asyncio.Event(), asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        begun.set()
        await over.wait()
        writer.transport.abort()

    async with await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1024) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        directory = tmp_path_factory.mktemp("upload")
        async with running_proxy(database, directory, url, body_bytes_max=64 * 1024 * 1024) as proxy:
            customer = await proxy.account(credits=100_000)
            # A picture of which only the header is looked at; far more than the buffers between the two hold.
            picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 24_000_000}}
            calling = asyncio.create_task(customer.post(messages=[{"role": "user", "content": [picture]}]))
            await asyncio.wait_for(begun.wait(), 20)
            calling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await calling
            [hold] = await customer.ended(seconds=10)
            assert (hold["charge"], hold["ending"]) == (0, "released")
            over.set()


async def test_a_client_that_leaves_an_upstream_that_refuses_owes_nothing(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(head(500, {"content-length": "100"}), Send(b'{"error"'), Sleep(30))
    calling = asyncio.create_task(customer.post(stream=True))
    await until(lambda: any(exchange.upstream_status for exchange in exchanges(customer.proxy)))
    calling.cancel()
    assert await ended(customer) == (0, None, "released", None)
    assert upstream.requests[-1].closed.is_set()


# What is cut off is counted to the token.


async def test_what_was_cancelled_is_counted_on_the_joined_text_of_each_choice(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """Each letter by itself would be a token; together they are a word."""
    letters = [chunk(letter, index=index) for letter in " hello there" for index in (0, 1)]
    gate = asyncio.Event()
    upstream.will(SSE, *map(Chunk, letters), Wait(gate))
    await leave_after(customer, len(letters), n=2)
    assert await ended(customer) == (
        PROMPT * INPUT + 2 * (2 + SAID) * OUTPUT,
        "counted",
        "client_left_cut",
        "on_disconnect",
    )
    gate.set()


async def test_a_running_report_of_a_cancelled_answer_is_completed_by_counting(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.will(SSE, Chunk(chunk(WORDS[0], usage=usage_of(12, 1))), *map(Chunk, map(chunk, WORDS[1:4])), Wait(gate))
    await leave_after(customer, 4)
    cost = 12 * INPUT + (4 + SAID) * OUTPUT
    assert await ended(customer) == (cost, "partly_counted", "client_left_cut", "on_disconnect")
    gate.set()


async def test_a_cancelled_upstream_is_closed_though_it_is_in_the_middle_of_much(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """The proxy reads no more than its client does, so this upstream is stuck in a write when it is cancelled."""
    much = chunk(" word" * 2_000)
    upstream.will(SSE, *[Chunk(much)] * 5_000, END)
    async with customer.stream() as answer:
        await anext(answer.aiter_raw())
        await asyncio.sleep(0.2)
    await asyncio.wait_for(upstream.requests[-1].closed.wait(), 2)
    [hold] = await customer.ended()
    assert (hold["ending"], hold["usage_source"]) == ("client_left_cut", "counted")
    assert upstream.open_connections == 0


async def test_only_the_report_of_a_text_that_is_complete_is_waited_for_and_not_long(
    customer: Customer, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.gateway.departure.REPORT_SECONDS", 0.2)
    upstream.will(SSE, *map(Chunk, map(chunk, WORDS)), Chunk(FINISH), Sleep(30))
    await leave_after(customer, 6)
    cost = PROMPT * INPUT + (5 + SAID) * OUTPUT
    assert await ended(customer) == (cost, "counted", "client_left_cut", "drain_seconds")


# Reasoning that isn't shown.


async def test_hanging_up_before_the_hidden_tail_pays_for_all_of_it(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """new-api #4500: take the visible answer, leave before the usage event."""
    gate = asyncio.Event()
    report = usage_of(12, 907) | {"completion_tokens_details": {"reasoning_tokens": 900}}
    upstream.will(
        SSE,
        *map(Chunk, map(chunk, WORDS)),
        Wait(gate),
        *map(Chunk, (FINISH, chunk(usage=report, choices=[]), DONE)),
        END,
    )
    await leave_after(customer, 5, model="gpt-5")
    await until(lambda: all(exchange.left_at for exchange in exchanges(customer.proxy)))
    gate.set()
    assert await ended(customer) == (12 * INPUT + 907 * OUTPUT, "reported", "client_left", None)


@pytest.mark.parametrize("head_first", [True, False])
async def test_a_reasoning_model_that_is_cancelled_in_silence_is_charged_by_the_time(
    customer: Customer, upstream: ScriptedUpstream, head_first: bool
) -> None:
    loop = asyncio.get_running_loop()
    upstream.will(*([SSE] if head_first else []), Sleep(30))
    before = loop.time()
    if head_first:
        async with customer.stream(model="thinker") as answer:
            began = loop.time()
            await asyncio.sleep(0.2)
            left = loop.time()
            await answer.aclose()
    else:
        calling = await called(customer, upstream, model="thinker", stream=True)
        began = loop.time()
        await asyncio.sleep(0.2)
        left = loop.time()
        calling.cancel()
    found = await ended(customer)
    over = loop.time()
    [hold] = await customer.holds()
    unseen = hold["usage"][REASONING]
    assert (left - began) * 1000 - 1 <= unseen <= (over - before) * 1000
    assert found == (PROMPT * INPUT + unseen * OUTPUT, "counted", "client_left_cut", "on_disconnect")
    assert "timed_reasoning" in json.loads(hold["receipt"])["usage_flags"]


async def test_silence_before_a_text_is_charged_beside_the_text(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Only that: while it speaks, its text is counted."""
    loop = asyncio.get_running_loop()
    upstream.will(SSE, Sleep(0.2), *map(Chunk, map(chunk, WORDS)), Sleep(30))
    before = loop.time()
    async with customer.stream(model="thinker") as answer:
        await until(lambda: _seen(exchanges(customer.proxy)[0]) == 5)
        spoke = loop.time()
        await asyncio.sleep(0.3)
        await answer.aclose()
    found = await ended(customer)
    [hold] = await customer.holds()
    unseen, said = hold["usage"][REASONING], 5 + 9  # 9: what an answer of this family costs beside its text
    assert 199 <= unseen <= (spoke - before) * 1000
    assert found.cost == PROMPT * INPUT + (unseen + said) * OUTPUT


async def test_time_never_costs_more_than_was_held(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Sleep(30))
    async with customer.stream(model="thinker", max_tokens=20):
        await asyncio.sleep(0.2)
    await customer.ended()
    [hold] = await customer.holds()
    assert hold["usage"][REASONING] == 20
    assert hold["charge"] == PROMPT * INPUT + 20 * OUTPUT <= hold["amount"]


async def test_an_answer_that_reports_as_it_runs_is_not_charged_by_the_time(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    report = usage_of(12, 40) | {"completion_tokens_details": {"reasoning_tokens": 39}}
    upstream.will(SSE, Sleep(0.2), Chunk(chunk(WORDS[0], usage=report)), Sleep(30))
    await leave_after(customer, 1, model="thinker")
    assert (await ended(customer))[:2] == (12 * INPUT + 40 * OUTPUT, "partly_counted")


async def test_departures_are_counted(customer: Customer, upstream: ScriptedUpstream) -> None:
    assert customer.proxy.app._services is not None
    registry = customer.proxy.app._services.metrics.registry

    def count(outcome: str) -> float:
        return registry.get_sample_value("farebox_departures_total", {"outcome": outcome}) or 0.0

    before = count("on_disconnect"), count("read_on")
    upstream.will(SSE, Sleep(30))
    await leave_after(customer, 0)
    await customer.ended(1)
    gate = asyncio.Event()
    upstream.will(SSE, Wait(gate), *map(Chunk, (FINISH, usage_chunk(12, 7), DONE)), END)
    await leave_after(customer, 0, model="drained")
    await until(lambda: registry.get_sample_value("farebox_drains") == 1)
    gate.set()
    await customer.ended(2)
    assert (count("on_disconnect"), count("read_on")) == (before[0] + 1, before[1] + 1)
    await until(lambda: registry.get_sample_value("farebox_drains") == 0)


# Limits of reading on.


async def test_a_drain_ends_when_it_has_read_its_tokens(customer: Customer, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    words = [step for number in range(200) for step in (Chunk(chunk(f" {WORDS[number % 5].strip()}")), Sleep(0.005))]
    upstream.will(SSE, Chunk(chunk(" zero")), Wait(gate), *words, END)
    await leave_after(customer, 1, model="frugal")
    await until(lambda: all(exchange.left_at for exchange in exchanges(customer.proxy)))
    gate.set()
    found = await ended(customer)
    assert (found.source, found.ending, found.cut_by) == ("counted", "client_left_cut", "drain_tokens")
    said = (found.cost - PROMPT * INPUT) // OUTPUT - SAID
    # The first piece behind the client's leaving is where the three are counted from; pieces may come together.
    assert 4 <= said <= 40
    assert upstream.requests[-1].closed.is_set()


async def test_a_drain_of_no_tokens_is_none(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, *map(Chunk, map(chunk, WORDS)), Sleep(30))
    await leave_after(customer, 5, model="miserly")
    cost = PROMPT * INPUT + (5 + SAID) * OUTPUT
    assert await ended(customer) == (cost, "counted", "client_left_cut", "drain_tokens")


async def test_silent_reasoning_uses_up_the_tokens_of_a_drain(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(SSE, Sleep(30))
    async with customer.stream(model="silent"):
        pass
    found = await ended(customer)
    [hold] = await customer.holds()
    assert (found.ending, found.cut_by) == ("client_left_cut", "drain_tokens")
    assert hold["usage"][REASONING] >= 99
    assert found.cost == PROMPT * INPUT + hold["usage"][REASONING] * OUTPUT


# An answer in one piece where a stream was asked for.


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream", None])
@pytest.mark.parametrize("usage_asked", [True, False])
@pytest.mark.parametrize("bytes_sent", [1, 60, 200, 10_000])
async def test_half_an_answer_in_one_piece_is_not_given_away(
    customer: Customer, upstream: ScriptedUpstream, content_type: str | None, usage_asked: bool, bytes_sent: int
) -> None:
    """What was passed on as it came could be read by its client, and couldn't be counted."""
    body = json.dumps(chat_answer(prompt=12, completion=7)).encode()
    headers = {"content-length": str(len(body))} | ({"content-type": content_type} if content_type else {})
    upstream.will(head(200, headers), Send(body[:50]), Sleep(0.02), Send(body[50:bytes_sent]))
    options = {"stream_options": {"include_usage": True}} if usage_asked else {}
    read, clean = b"", True
    if bytes_sent < len(body):
        upstream.will(head(200, headers), Send(body[:bytes_sent]), Sleep(0.02), Cut())
    try:
        async with customer.stream(**options) as answer:
            status = answer.status_code
            async for piece in answer.aiter_raw():
                read += piece
    except httpx2.RemoteProtocolError:
        clean = False
    if bytes_sent < len(body):
        assert b"Hello" not in read
        assert (status == 502 and b"upstream_incomplete" in read) or not clean
        assert (await ended(customer))[:2] == (0, None)
    else:
        assert (clean, read) == (True, body)
        assert await ended(customer) == (12 * INPUT + 7 * OUTPUT, "reported", "complete", None)
