"""Holds that grow while their stream runs: what isn't held isn't delivered, and nobody is refused for a maximum."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import httpx2
import pytest
import pytest_asyncio

from proxy.core.money import parse_credits
from tests.e2e.proxy import Customer, Proxy, pricing_yaml, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    ScriptedUpstream,
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

# Microcredits a token. The prompt is counted as 10 tokens and bounded by 27; an answer costs a token beside its words,
# each of which is one.
IN, OUT = 1_000, 3_000
PROMPT, BOUND_IN, SAID = 10, 27, 1
WHOLE = BOUND_IN * IN + 1_000 * OUT
WAIT_SECONDS = 1.5
SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
WORD = " word"

THINKING = """
  ponderer:
    upstream: up
    upstream_model: gpt-5-up
    input: 1
    output: 3
    max_output_tokens: 10000
    hidden_reasoning: true
    reasoning_tokens_per_second: 200
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("proxy")
    pricing = pricing_yaml() + THINKING
    async with running_proxy(
        module_database, directory, upstream.base_url, pricing=pricing, reserve_seconds=WAIT_SECONDS
    ) as running:
        yield running


def credits(*, calls: int = 1, words: int) -> float:
    """What so many calls hold when each has said so many words."""
    return calls * (BOUND_IN * IN + words * OUT) / 1_000_000


def cost(words: int, choices: int = 1) -> int:
    """What a call is charged by count."""
    return PROMPT * IN + (words + SAID * choices) * OUT


def answer(words: int, *, delay: float = 0.0, usage: tuple[int, int] | None = None) -> list[Step]:
    """A stream of so many words, each an event of its own, with a report at its end."""
    ends = [chunk(finish="stop"), usage_chunk(*(usage or (PROMPT, words))), DONE]
    return list(stream(*(chunk(WORD) for _ in range(words)), *ends, delay=delay))


@dataclass
class Heard:
    """What a client got: its words, the error event, and whether the answer came to a clean end."""

    status: int = 0
    words: int = 0
    error: dict[str, Any] = field(default_factory=dict)
    clean: bool = False
    request_id: str = ""
    headers: httpx2.Headers = field(default_factory=httpx2.Headers)


async def listen(customer: Customer, **more: Any) -> Heard:
    """One streamed call. Whatever comes must be whole events."""
    heard, read = Heard(), b""
    async with customer.stream(**more) as response:
        heard.status, heard.headers = response.status_code, response.headers
        heard.request_id = response.headers["x-request-id"]
        try:
            async for piece in response.aiter_raw():
                read += piece
            heard.clean = True
        except httpx2.HTTPError:
            pass
    if heard.status != 200:
        heard.error = json.loads(read)["error"]
        return heard
    assert read.endswith(b"\n\n"), read[-200:]
    for event in read.decode().split("\n\n")[:-1]:
        data = event.removeprefix("data: ")
        if data == "[DONE]":
            continue
        value = json.loads(data)
        heard.error = value.get("error", heard.error)
        for choice in value.get("choices", ()):
            heard.words += (choice["delta"].get("content") or "").count(WORD)
    return heard


async def the_hold(customer: Customer) -> dict[str, Any]:
    """The account's one hold, ended; nothing is held then, and the books are right."""
    [hold] = await customer.ended()
    account = await customer.money()
    assert (account.held, account.balance >= 0) == (0, True)
    await customer.proxy.audit()
    return {**hold, "receipt": json.loads(hold["receipt"]), "quote": json.loads(hold["quote"])}


# Enough credits


async def test_a_hold_grows_with_its_answer(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(*answer(300, delay=0.001))
    heard = await listen(customer)
    assert (heard.words, heard.clean, heard.error) == (300, True, {})
    hold = await the_hold(customer)
    assert hold["charge"] == PROMPT * IN + 300 * OUT
    assert hold["charge"] < hold["amount"] < WHOLE
    assert parse_credits(hold["quote"]["quote"]) == WHOLE
    assert parse_credits(hold["quote"]["held_at_first"]) == BOUND_IN * IN + 64 * OUT
    assert parse_credits(hold["receipt"]["held_at_last"]) == hold["amount"]
    assert 1 <= hold["receipt"]["extensions"] <= 4
    assert "x-farebox-output-cap" not in heard.headers
    assert "max_tokens" not in upstream.requests[-1].json


async def test_an_account_that_is_known_to_have_plenty_needs_no_growth(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(*answer(300))
    for _ in range(2):
        assert (await listen(customer)).words == 300
    _, second = await customer.ended(2)
    assert json.loads(second["receipt"])["extensions"] == 0
    assert second["amount"] == WHOLE, "1,000 tokens are the first slice of an account that has plenty"


async def test_a_small_cap_of_the_clients_is_held_at_once(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(*answer(50))
    assert (await listen(customer, max_tokens=50)).clean
    hold = await the_hold(customer)
    assert (hold["amount"], hold["receipt"]["extensions"]) == (BOUND_IN * IN + 50 * OUT, 0)


@pytest.mark.parametrize("asked", [False, True])
async def test_an_answer_that_comes_at_once_waits_for_its_hold_and_is_whole(
    proxy: Proxy, upstream: ScriptedUpstream, asked: bool
) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(*whole(b"".join([*(chunk(WORD) for _ in range(700)), usage_chunk(PROMPT, 700), DONE])))
    heard = await listen(customer, stream_options={"include_usage": asked})
    assert (heard.words, heard.clean, heard.error) == (700, True, {})
    hold = await the_hold(customer)
    assert hold["charge"] == PROMPT * IN + 700 * OUT <= hold["amount"]


async def test_a_report_above_the_count_is_charged_out_of_what_is_available(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    customer = await proxy.account(credits=10)
    upstream.will(*answer(20, usage=(PROMPT, 900)))
    assert (await listen(customer)).clean
    hold = await the_hold(customer)
    assert hold["charge"] == PROMPT * IN + 900 * OUT > hold["amount"]
    assert (hold["overrun"], hold["capped"]) == (0, None)


# Not enough


@pytest.mark.parametrize("bursts", [False, True])
@pytest.mark.parametrize("asked", [False, True])
async def test_credits_that_run_out_end_the_stream_and_all_that_came_is_paid(
    proxy: Proxy, upstream: ScriptedUpstream, bursts: bool, asked: bool
) -> None:
    customer = await proxy.account(credits=credits(words=150))
    body = [*(chunk(WORD) for _ in range(400)), chunk(finish="stop"), usage_chunk(PROMPT, 400), DONE]
    # Cut in the middle of events, too.
    joined = b"".join(body)
    pieces = [joined] if bursts else [joined[at : at + 97] for at in range(0, len(joined), 97)]
    upstream.will(SSE, *(Chunk(piece) for piece in pieces), Sleep(30))
    heard = await listen(customer, max_tokens=900, stream_options={"include_usage": asked})
    assert (heard.error["type"], heard.error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert not heard.clean
    hold = await the_hold(customer)
    assert hold["ending"] == "out_of_credits"
    assert hold["charge"] == cost(heard.words) <= hold["amount"]
    assert 150 - 8 <= heard.words <= 150, "whatever it could pay for was delivered"
    assert (hold["overrun"], hold["capped"], hold["usage_source"]) == (0, None, "counted")
    await asyncio.wait_for(upstream.requests[-1].closed.wait(), 5)
    assert not upstream.requests[-1].finished, "the upstream was cancelled"


async def test_an_event_that_cannot_be_paid_is_kept_back_whole(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(words=100))
    upstream.will(*stream(chunk(WORD * 30), chunk(WORD * 300), usage_chunk(PROMPT, 330), DONE))
    heard = await listen(customer, max_tokens=900)
    assert (heard.words, heard.error["code"]) == (30, "insufficient_quota")
    assert (await the_hold(customer))["charge"] == cost(30)


async def test_nothing_delivered_costs_the_prompt_alone(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(words=100))
    upstream.will(*stream(chunk(WORD * 300), usage_chunk(PROMPT, 300), DONE))
    heard = await listen(customer, max_tokens=900)
    assert (heard.words, heard.error["code"]) == (0, "insufficient_quota")
    assert (await the_hold(customer))["charge"] == PROMPT * IN


async def test_two_choices_are_metered_together(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(words=300))
    words = [chunk(WORD, index=number % 2) for number in range(800)]
    upstream.will(*stream(*words, usage_chunk(PROMPT, 800), DONE))
    heard = await listen(customer, max_tokens=900, n=2)
    assert heard.error["code"] == "insufficient_quota"
    assert 300 - 8 <= heard.words <= 300
    assert (await the_hold(customer))["charge"] == cost(heard.words, choices=2)


async def test_a_spend_limit_ends_the_stream_with_its_own_code(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    limit = int(credits(words=120) * 1_000_000)
    customer = await proxy.account(credits=1000, spend_limit=limit)
    upstream.will(*answer(400))
    heard = await listen(customer, max_tokens=900)
    assert (heard.error["type"], heard.error["code"]) == ("insufficient_quota", "spend_limit_reached")
    hold = await the_hold(customer)
    assert (hold["ending"], hold["charge"]) == ("spend_limit", cost(heard.words))
    assert hold["charge"] <= limit


async def test_a_key_that_wants_no_cut_answer_holds_everything_or_is_refused(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream.will(*answer(300))
    poor = await proxy.account(credits=(WHOLE - 1) / 1_000_000, affordable_cap=False)
    assert (await listen(poor)).error["code"] == "insufficient_quota"
    assert await poor.holds() == []
    able = await proxy.account(credits=WHOLE / 1_000_000, affordable_cap=False)
    assert (await listen(able)).clean
    assert (await the_hold(able))["amount"] == WHOLE


async def test_below_the_least_slice_a_stream_is_refused(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    sent = len(upstream.requests)
    customer = await proxy.account(credits=credits(words=64) - 0.000001)
    heard = await listen(customer, max_tokens=900)
    assert (heard.status, heard.error["code"]) == (402, "insufficient_quota")
    assert parse_credits(heard.error["needed"]) == BOUND_IN * IN + 64 * OUT
    assert len(upstream.requests) == sent


# Many at once


@pytest.mark.parametrize("words", [60, 200])
async def test_fifty_streams_share_a_balance_that_carries_them_and_not_their_maximums(
    proxy: Proxy, upstream: ScriptedUpstream, words: int
) -> None:
    # Each carries what it has said, and the least slice ahead of it at its beginning.
    enough = credits(calls=50, words=max(words, 64)) * 1.08
    customer = await proxy.account(credits=enough)
    upstream.will(*answer(words, delay=0.004))
    heard = await asyncio.gather(*(listen(customer) for _ in range(50)))
    assert [(one.status, one.words, one.clean) for one in heard] == [(200, words, True)] * 50
    await customer.ended(50)
    money = await customer.money()
    assert (money.held, money.debt) == (0, 0)
    assert money.balance == round(enough * 1_000_000) - 50 * (PROMPT * IN + words * OUT)
    assert enough * 1_000_000 < 50 * WHOLE / 3
    await proxy.audit()


async def test_fifty_streams_that_exhaust_a_balance_end_cleanly_and_pay_for_what_they_got(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    customer = await proxy.account(credits=credits(calls=50, words=80))
    before = (await customer.money()).balance
    upstream.will(*answer(300, delay=0.002))
    heard = await asyncio.gather(*(listen(customer, max_tokens=900) for _ in range(50)))
    holds = await customer.ended(50, seconds=20)
    assert {one.error["code"] for one in heard if one.error} == {"insufficient_quota"}
    assert all(one.clean == (one.words == 300) == (not one.error) for one in heard)
    by_id = {str(hold["id"]): hold for hold in holds}
    for one in heard:
        paid = by_id[one.request_id]
        assert paid["charge"] == (PROMPT * IN + 300 * OUT if one.clean else cost(one.words))
    money = await customer.money()
    assert money.balance == before - sum(hold["charge"] for hold in holds) >= 0
    assert (money.held, money.debt) == (0, 0)
    assert money.balance < before * 0.2, "what there was was used"
    await proxy.audit()


async def test_credits_that_others_hold_are_waited_for(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(calls=2, words=300))
    upstream.will_in_turn(
        [
            [Sleep(0.8), *whole(chat_answer())],  # holds all that is left, and gives it back
            answer(250, delay=0.001),
        ]
    )
    other = asyncio.create_task(customer.post(max_tokens=480))
    await customer.opened()
    heard = await listen(customer)
    assert (heard.words, heard.clean) == (250, True)
    assert "x-farebox-output-cap" not in heard.headers, "others may give back what they hold"
    assert (await other).status_code == 200
    await customer.ended(2)
    await proxy.audit()


# The ledger


@pytest.mark.parametrize(("seconds", "clean"), [(0.3, True), (3.5, False)])
async def test_a_locked_account_is_waited_for_and_not_for_ever(
    proxy: Proxy, upstream: ScriptedUpstream, seconds: float, clean: bool
) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(SSE, *(Chunk(chunk(WORD)) for _ in range(30)), Sleep(0.3), *answer(270)[1:])
    connection = await asyncpg.connect(proxy.database.superuser)
    try:
        listening = asyncio.create_task(listen(customer))
        await customer.opened()
        async with connection.transaction():
            await connection.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", customer.id)
            await asyncio.sleep(0.3 + seconds)
        heard = await listening
    finally:
        await connection.close()
    hold = await the_hold(customer)
    if clean:
        assert (heard.words, heard.clean) == (300, True)
        assert hold["ending"] == "complete"
    else:
        assert (heard.clean, heard.error["code"]) == (False, "ledger_unavailable")
        assert hold["ending"] == "ledger_lost"
        assert hold["charge"] == cost(heard.words) <= parse_credits(hold["receipt"]["held_at_last"])
        assert 56 <= heard.words <= 64


# Reasoning that isn't shown


async def test_hidden_reasoning_grows_its_hold_while_nothing_comes(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=1000)
    upstream.will(SSE, Chunk(chunk("")), Sleep(2.5), *answer(3, usage=(PROMPT, 503))[1:])
    heard = await listen(customer, model="ponderer")
    assert (heard.words, heard.clean) == (3, True)
    hold = await the_hold(customer)
    assert hold["charge"] == PROMPT * IN + 503 * OUT
    assert hold["amount"] >= 400 * OUT
    assert hold["receipt"]["extensions"] >= 1


async def test_hidden_reasoning_that_cannot_be_held_ends(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=credits(words=300))
    upstream.will(SSE, Chunk(chunk("")), Sleep(30))
    heard = await asyncio.wait_for(listen(customer, model="ponderer", max_tokens=9_000), 15)
    assert (heard.clean, heard.error["code"]) == (False, "insufficient_quota")
    hold = await the_hold(customer)
    assert hold["ending"] == "out_of_credits"
    assert PROMPT * IN <= hold["charge"] <= hold["amount"]


# Overruns


async def test_an_overrun_becomes_debt_which_blocks_until_a_top_up_pays_it(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    customer = await proxy.account(credits=credits(words=100))
    had = (await customer.money()).balance
    upstream.will(*answer(20, usage=(PROMPT, 900)))
    heard = await listen(customer, max_tokens=900)
    assert heard.clean, "an answer that has been given isn't taken back"
    [hold] = await customer.ended()
    due = PROMPT * IN + 900 * OUT
    assert (hold["charge"], hold["overrun"]) == (due, due - had)
    money = await customer.money()
    assert (money.balance, money.held, money.debt) == (0, 0, due - had)
    assert (await customer.receipt(heard.request_id)).overrun == due - had
    refused = await listen(customer)
    assert (refused.status, refused.error["code"]) == (402, "insufficient_quota")
    amount = due - had + 5_000_000
    await proxy.operations.grant(customer.id, amount, reference="top-up", actor="test", reason="test")
    money = await customer.money()
    assert (money.balance, money.debt) == (5_000_000, 0)
    upstream.will(*answer(5))
    assert (await listen(customer)).clean
    await customer.ended(2)
    await proxy.audit()
