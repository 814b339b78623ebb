"""The museum, first room: how gateways got the money wrong in public, and that Farebox doesn't.

Each test is named after what went wrong and says where it did. Prices: 1 credit a thousand tokens in, 3 out, so that a
token is 1,000 or 3,000 microcredits.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import pytest

from tests.e2e.proxy import Customer, Proxy, pricing_yaml
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    ScriptedUpstream,
    Sleep,
    Wait,
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
INPUT, OUTPUT = 1000, 3000
SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
WORDS = (" one", " two", " three", " four", " five")
SAID = [chunk(word) for word in WORDS]
WHOLE = [*SAID, chunk(finish="stop"), usage_chunk(10, 5), DONE]
PROMPT = 10
"""What the prompt "Say hello." is counted as, framing and all."""


async def spent(customer: Customer, holds: int = 1) -> int:
    """What the account has paid, once nothing is held and the books are right."""
    await customer.ended(holds)
    money = await customer.money()
    assert (money.held, money.debt) == (0, 0)
    await customer.proxy.audit()
    return GRANTED - money.balance


async def leave_after(customer: Customer, pieces: Sequence[bytes], **more: Any) -> None:
    """Read these pieces of a stream, and close the socket."""
    read = b""
    async with customer.stream(**more) as answer:
        async for piece in answer.aiter_raw():
            read += piece
            if len(read) >= sum(map(len, pieces)):
                return


async def read_to_the_end(customer: Customer, **more: Any) -> bytes:
    async with customer.stream(**more) as answer:
        return b"".join([piece async for piece in answer.aiter_raw()])


async def test_a_cancelled_stream_was_never_billed(customer: Customer, upstream: ScriptedUpstream) -> None:
    """LiteLLM #30630, #33736: a stream that its client cancelled was charged nothing."""
    upstream.will(SSE, *(Chunk(piece) for piece in SAID), Sleep(0.2), Chunk(b""))
    await leave_after(customer, SAID[:3])
    assert await spent(customer) >= PROMPT * INPUT + 3 * OUTPUT


async def test_a_cancelled_stream_was_billed_for_its_prompt_only(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """LiteLLM's cancel path charged the input and gave the delivered output away."""
    upstream.will(*stream(*WHOLE, delay=0.01))
    await leave_after(customer, SAID)
    assert await spent(customer) > PROMPT * INPUT + len(WORDS) * OUTPUT - OUTPUT


async def test_a_missing_usage_report_refunded_everything(customer: Customer, upstream: ScriptedUpstream) -> None:
    """new-api #5235: no usage in the last chunk, and the whole pre-consumed quota went back."""
    upstream.will(*stream(*SAID, chunk(finish="stop"), DONE))
    await read_to_the_end(customer)
    assert await spent(customer) >= PROMPT * INPUT + len(WORDS) * OUTPUT


async def test_hanging_up_before_the_usage_event_made_the_answer_free(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """new-api PR #4500: take every visible word, then close the socket before the report comes."""
    gate = asyncio.Event()
    upstream.will(SSE, *(Chunk(piece) for piece in WHOLE[:-2]), Wait(gate), *(Chunk(p) for p in WHOLE[-2:]), Chunk(b""))
    await leave_after(customer, WHOLE[:-2])
    gate.set()
    assert await spent(customer) >= PROMPT * INPUT + len(WORDS) * OUTPUT


async def test_an_upstream_that_broke_midway_was_refunded_in_full(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """new-api refunded all of an answer whose upstream broke off, words delivered included."""
    upstream.will(SSE, *(Chunk(piece) for piece in SAID), Cut())
    with pytest.raises(httpx2.RemoteProtocolError):
        await read_to_the_end(customer)
    assert await spent(customer) >= PROMPT * INPUT + len(WORDS) * OUTPUT


async def test_an_explicit_zero_was_replaced_by_an_estimate(customer: Customer, upstream: ScriptedUpstream) -> None:
    """LiteLLM #37992: an answer without a word, reported as zero tokens, was charged by estimate."""
    upstream.will(*stream(chunk(finish="stop"), usage_chunk(0, 0), DONE))
    await read_to_the_end(customer)
    assert await spent(customer) == 0


async def test_zeros_beside_a_whole_answer_were_believed(customer: Customer, upstream: ScriptedUpstream) -> None:
    """The other way round: servers that fill the report with zeros gave their answers away."""
    upstream.will(*stream(*SAID, chunk(finish="stop"), usage_chunk(0, 0), DONE))
    await read_to_the_end(customer)
    assert await spent(customer) >= PROMPT * INPUT + len(WORDS) * OUTPUT


async def test_running_usage_was_added_up(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Perplexity and Databricks report on every chunk: sums of those charged several times over."""
    running = [
        event({"choices": [{"index": 0, "delta": {"content": word}}], "usage": _usage(10, number)})
        for number, word in enumerate(WORDS, 1)
    ]
    upstream.will(*stream(*running, chunk(finish="stop"), DONE))
    await read_to_the_end(customer)
    assert await spent(customer) == 10 * INPUT + 5 * OUTPUT


async def test_a_figure_told_three_times_was_charged_three_times(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """Groq says the same usage on the finish chunk, in x_groq and in a last chunk of its own."""
    usage = _usage(10, 5)
    finish = event(
        {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "usage": usage,
            "x_groq": {"usage": usage},
        }
    )
    upstream.will(*stream(*SAID, finish, usage_chunk(10, 5), DONE))
    await read_to_the_end(customer)
    assert await spent(customer) == 10 * INPUT + 5 * OUTPUT


async def test_each_delta_was_counted_by_itself(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Letters that arrive one by one are one word: counted singly they cost up to five times as much."""
    letters = [chunk(letter) for letter in " internationalization"]
    upstream.will(*stream(*letters, chunk(finish="stop"), DONE))
    await read_to_the_end(customer)
    one_word = await spent(customer)
    assert PROMPT * INPUT < one_word < PROMPT * INPUT + 6 * OUTPUT


async def test_reasoning_beside_the_completion_was_free(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Google's and Vercel's gateways leave thinking out of completion_tokens: it shows in the total alone."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 110}
    upstream.will(*stream(*SAID, chunk(finish="stop"), event({"choices": [], "usage": usage}), DONE))
    await read_to_the_end(customer)
    assert await spent(customer) == 10 * INPUT + 100 * OUTPUT


async def test_the_second_choice_was_free(customer: Customer, upstream: ScriptedUpstream) -> None:
    """n=2: the prompt counts once and what every choice says counts, joined to no other choice."""
    pieces = [event({"choices": [{"index": index, "delta": {"content": word}}]}) for word in WORDS for index in (0, 1)]
    upstream.will(*stream(*pieces, chunk(finish="stop"), DONE))
    await read_to_the_end(customer, n=2)
    assert await spent(customer) >= PROMPT * INPUT + 2 * len(WORDS) * OUTPUT


async def test_cached_tokens_were_charged_twice(customer: Customer, upstream: ScriptedUpstream) -> None:
    """OpenAI's cached tokens are a part of prompt_tokens; adding them charged them twice."""
    usage = _usage(10, 5) | {"prompt_tokens_details": {"cached_tokens": 8}}
    upstream.will(*stream(*SAID, chunk(finish="stop"), event({"choices": [], "usage": usage}), DONE))
    await read_to_the_end(customer)
    [hold] = await customer.ended()
    assert hold["usage"][:2] == [2, 8]
    assert await spent(customer) <= 10 * INPUT + 5 * OUTPUT


async def test_a_hedge_that_read_nothing_paid_in_full(customer: Customer, upstream: ScriptedUpstream) -> None:
    """sub2api #4408: a client that raced two models and dropped one before its first byte paid for the whole answer."""
    upstream.will(Sleep(20), *stream(*WHOLE))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), customer.stream(max_tokens=800):
            pytest.fail("the upstream hasn't answered")
    await _until_left(upstream)
    assert await spent(customer) <= PROMPT * INPUT


async def test_the_upstream_went_on_for_nobody(customer: Customer, upstream: ScriptedUpstream) -> None:
    """new-api #4184, #4186: the client had gone and the upstream was left running, at the operator's expense."""
    upstream.will(SSE, *(Chunk(piece) for piece in SAID), Sleep(30), Chunk(b""))
    await leave_after(customer, SAID[:2], model="curt")
    await _until_left(upstream)
    assert await spent(customer) > 0


async def test_check_and_deduct_were_two_statements(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """new-api #5690, #6607 and one-api #2440: concurrent calls all saw the same balance and all went ahead."""
    gate = asyncio.Event()
    upstream.will(Wait(gate), *whole(chat_answer(prompt=10, completion=100)))
    customer = await proxy.account(credits=1)
    calls = [asyncio.create_task(customer.post(max_tokens=100)) for _ in range(20)]
    async with asyncio.timeout(10):
        while sum(task.done() for task in calls) < 17:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    gate.set()
    statuses = [(await task).status_code for task in calls]
    await customer.ended(3)
    money = await customer.money()
    assert statuses.count(200) == 3
    assert set(statuses) == {200, 402}
    assert (money.balance, money.debt) == (1_000_000 - 3 * (10 * INPUT + 100 * OUTPUT), 0)


async def test_a_rich_account_skipped_the_reservation(customer: Customer, upstream: ScriptedUpstream) -> None:
    """new-api's "trust quota": an account with enough credits was served without holding any."""
    gate = asyncio.Event()
    upstream.will(Wait(gate), *whole(chat_answer()))
    call = asyncio.create_task(customer.post(max_tokens=100))
    await customer.opened()
    assert (await customer.money()).held >= 100 * OUTPUT
    gate.set()
    assert (await call).status_code == 200


async def test_a_balance_went_below_zero(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """new-api let the balance turn negative where the cost outgrew what was pre-consumed: here it is debt, and it
    blocks until it is paid."""
    upstream.will(*whole(chat_answer(prompt=10, completion=400)))
    customer = await proxy.account(credits=0.4)
    assert (await customer.post(max_tokens=100)).status_code == 200
    await customer.ended()
    money = await customer.money()
    assert (money.balance, money.held) == (0, 0)
    assert money.debt == 10 * INPUT + 400 * OUTPUT - 400_000
    assert (await customer.post(max_tokens=1)).status_code == 402
    await proxy.audit()


async def test_a_refused_call_kept_its_reservation(customer: Customer, upstream: ScriptedUpstream) -> None:
    """LiteLLM's counters stayed pinned until a TTL, new-api refunded in a goroutine that a restart lost."""
    upstream.will(*whole({"error": {"message": "overloaded"}}, 503))
    assert (await customer.post()).status_code == 503
    assert await spent(customer) == 0


async def test_a_price_edited_midway_changed_a_running_answer(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    """The price was looked up when the answer ended: an edit changed what had been agreed to."""
    gate = asyncio.Event()
    upstream.will(Wait(gate), *whole(chat_answer(prompt=10, completion=5)))
    call = asyncio.create_task(customer.post(max_tokens=100))
    await customer.opened()
    prices, before = proxy.directory / "pricing.yaml", proxy.app.price_version
    try:
        prices.write_text(pricing_yaml().replace("output: 3\n", "output: 4\n", 1))
        await _until_price_version(proxy, lambda version: version != before)
        gate.set()
        assert (await call).status_code == 200
        assert await spent(customer) == 10 * INPUT + 5 * OUTPUT
    finally:
        prices.write_text(pricing_yaml())
        await _until_price_version(proxy, lambda version: version == before)


async def test_many_small_charges_drifted(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Floats and counters drift (LiteLLM #28247, #30460): a hundred odd charges are exact to the microcredit."""
    upstream.choose(lambda received: whole(chat_answer(prompt=7, completion=len(received.body) % 13)))
    customer = await proxy.account(credits=1000)
    bodies = [json.dumps(customer.body(model="tiny", user="u" * number)).encode() for number in range(100)]
    answers = [await customer.send(body) for body in bodies]
    assert {answer.status_code for answer in answers} == {200}
    holds = await customer.ended(100)
    assert GRANTED - (await customer.money()).balance == sum(hold["charge"] for hold in holds)
    # 0.000001 and 0.000003 credits a thousand tokens: each call costs less than one microcredit, rounded up once.
    assert {hold["charge"] for hold in holds} == {1}
    await proxy.audit()


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _until_left(upstream: ScriptedUpstream) -> None:
    """Once the proxy has closed the connection of the last request."""
    async with asyncio.timeout(10):
        await upstream.requests[-1].closed.wait()


async def _until_price_version(proxy: Proxy, serves: Callable[[str], bool]) -> None:
    async with asyncio.timeout(10):
        while not serves(proxy.app.price_version):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
