"""Marks: what a crash would leave to be charged is never more than was delivered, and not much less."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

import pytest

from proxy.core.bounds import output_estimate
from proxy.core.meter import Meter
from proxy.core.usage import Usage
from proxy.gateway.channel import Channel
from proxy.gateway.exchange import Exchange
from proxy.gateway.marks import Marks
from proxy.gateway.progress import CHECKPOINT_BYTES, MARGIN_TOKENS, CountEach, Progress
from proxy.gateway.settle import Settler
from proxy.gateway.tokens import TokenCounter
from proxy.ledger.records import Mark
from proxy.metrics import Metrics
from tests.gateway.test_progress import PROMPT, called, counter, deltas, progress_of, random_text, text
from tests.gateway.test_settle import Ledger, ticket

__all__ = ["counter"]


def given(progress: Progress, size: int = 10) -> None:
    """What the meter has seen goes to the client, and arrives."""
    assert progress.channel is not None
    progress.channel.put_at_once(b"x" * size)
    progress.channel.sent_bytes = progress.channel.produced_bytes


def estimate(counter: TokenCounter, texts: list[list[str]], calls: int = 0) -> int:
    """What these texts come to, by choice."""
    counted = counter.count_now([part for choice in texts for part in choice if part])
    assert counted is not None
    return output_estimate("gpt-4", counted, choices=sum(any(choice) for choice in texts), calls=calls)


async def marked(progress: Progress, count_each: CountEach) -> Usage | None:
    progress.note()
    await progress.prompt()
    if progress.to_mark:
        counting = progress.counting(for_mark=True)
        progress.mark(counting, await count_each(counting.texts))
    return progress.marked


@pytest.mark.parametrize("seed", range(40))
async def test_a_mark_is_never_above_what_was_delivered_nor_far_below(counter: TokenCounter, seed: int) -> None:
    rng = random.Random(seed)
    progress = progress_of(counter)
    meter, channel = progress.meter, progress.channel
    assert meter is not None
    assert channel is not None
    said = ["", "", ""]
    produced: list[tuple[int, list[str]]] = [(0, list(said))]
    for delta in deltas(rng, random_text(rng, rng.randint(1, 4_000))):
        choice = rng.randrange(3)
        meter.observe(text(delta, choice))
        said[choice] += delta
        channel.put_at_once(b"x" * rng.randint(1, 300))
        produced.append((channel.produced_bytes, list(said)))
        if rng.random() < 0.6:
            channel.sent_bytes = rng.randint(channel.sent_bytes, channel.produced_bytes)
        if rng.random() < 0.5:
            await marked(progress, counter.count_each)
        delivered = next(texts for size, texts in reversed(produced) if size <= channel.delivered_bytes)
        if progress.marked is not None:
            most = estimate(counter, [[part] for part in delivered])
            assert progress.marked.output <= most, f"seed {seed}"
            assert any(delivered), f"seed {seed}"
        if channel.delivered_bytes == channel.produced_bytes and meter.delivered:
            now = await marked(progress, counter.count_each)
            least = estimate(counter, [[part] for part in said]) - 3 * MARGIN_TOKENS * (1 + len(delta) // 4096)
            assert now is not None
            assert now.output >= least, f"seed {seed}"
            assert now.input == PROMPT


@pytest.mark.parametrize("letters", ["a", "长", "ก", "5", "\u0301", "🙂", "ab1"])
async def test_text_without_a_place_to_cut_is_marked_too(counter: TokenCounter, letters: str) -> None:
    rng = random.Random(1)
    progress = progress_of(counter)
    meter = progress.meter
    assert meter is not None
    whole = ""
    for _ in range(12):
        delta = "".join(rng.choice(letters) for _ in range(1_500))
        meter.observe(text(delta))
        whole += delta
        given(progress)
        now = await marked(progress, counter.count_each)
        assert now is not None
        most = estimate(counter, [[whole]])
        assert most - (len(whole) // 4096 + 1) * MARGIN_TOKENS <= now.output <= most


async def test_calls_reasoning_and_refusals_are_marked(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter = progress.meter
    assert meter is not None
    think, arguments = "I wonder what it is, " * 20, '{"city": "Paris", "days": [1, 2, 3]}' * 10
    for chunk in (
        text("", 0, reasoning_content=think),
        text("", 1, refusal="No, " * 30),
        called(arguments, 0, "weather"),
        called("{}", 1, "time"),
    ):
        meter.observe(chunk)
    given(progress)
    now = await marked(progress, counter.count_each)
    assert now is not None
    most = estimate(counter, [[think, "weather" + arguments, "time{}"], ["No, " * 30]], calls=2)
    assert most - 4 * MARGIN_TOKENS <= now.output <= most


async def test_what_waits_for_the_client_isnt_marked_until_it_is_gone(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter, channel = progress.meter, progress.channel
    assert meter is not None
    assert channel is not None
    waiting = [0]
    channel.unsent_bytes = lambda: waiting[0]
    meter.observe(text("Hello there, my dear old friend. " * 20))
    channel.put_at_once(b"x" * 100)
    assert await marked(progress, counter.count_each) is None, "in the channel"
    channel.sent_bytes, waiting[0] = 100, 1
    assert await marked(progress, counter.count_each) is None, "in the server"
    waiting[0] = 0
    first = await marked(progress, counter.count_each)
    assert first is not None
    meter.observe(text("And so on, and so on. " * 20))
    progress.holding = True
    assert await marked(progress, counter.count_each) == first, "held back by the pump"
    progress.holding = False
    channel.put_at_once(b"x" * 100)
    channel.abandon()
    second = await marked(progress, counter.count_each)
    assert second is not None
    assert second.output > first.output, "nobody reads any more: what is read on is what is charged"


async def test_a_client_far_behind_is_marked_where_it_is(counter: TokenCounter) -> None:
    """However long ago it was that what it has got was noted, and however fast that came."""
    progress = progress_of(counter)
    meter, channel = progress.meter, progress.channel
    assert meter is not None
    assert channel is not None
    words, size = 3_000, 100
    for number in range(words):
        progress.hold_back()
        meter.observe(text(" word"))
        progress.holding = False
        channel.put_at_once(b"x" * size)
        if number % 10 == 0:
            progress.note()
    for got in range(0, words + 1, 250):
        channel.sent_bytes = got * size
        now = await marked(progress, counter.count_each)
        if got:
            assert now is not None
            assert got - 2 * CHECKPOINT_BYTES // size - 2 <= now.output <= got + 1


async def test_a_running_report_is_marked_only_once_it_was_delivered(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter, channel = progress.meter, progress.channel
    assert meter is not None
    assert channel is not None
    report = {"usage": {"prompt_tokens": 3, "completion_tokens": 90, "prompt_tokens_details": {"cached_tokens": 2}}}
    meter.observe(text("Hello") | report)
    channel.put_at_once(b"x")
    assert await marked(progress, counter.count_each) is None
    channel.sent_bytes = 1
    assert await marked(progress, counter.count_each) == Usage(input=1, cached_input=2, output=90)


async def test_a_report_alone_is_no_delivery(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter = progress.meter
    assert meter is not None
    meter.observe({"choices": [], "usage": {"prompt_tokens": 3}})
    given(progress)
    assert await marked(progress, counter.count_each) is None


async def test_a_great_deal_at_once_is_marked_in_steps(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter = progress.meter
    assert meter is not None
    meter.observe(text("so it goes, " * 20_000))
    given(progress)
    seen: list[int] = []
    while progress.to_mark or not seen:
        now = await marked(progress, counter.count_each)
        assert now is not None
        seen.append(now.output)
    assert len(seen) == 4
    assert seen == sorted(seen)
    assert seen[-1] >= estimate(counter, [["so it goes, " * 20_000]]) - MARGIN_TOKENS


# All open exchanges together.


def an_exchange(settler: Settler) -> Exchange:
    exchange = settler.open(replace(ticket(), hold_id=uuid4()))
    exchange.progress.channel = Channel()
    exchange.meter = Meter()
    return exchange


def speak(exchange: Exchange, said: str) -> None:
    assert exchange.meter is not None
    exchange.meter.observe(text(said))
    given(exchange.progress)


async def test_every_mark_is_sent_until_it_is_stored_and_then_when_it_changes(counter: TokenCounter) -> None:
    settler = Settler(Ledger(), metrics=Metrics(), count_each=counter.count_each)
    marks = Marks(lambda: settler.exchanges, counter.count_each, metrics=Metrics())
    one, two, silent = (an_exchange(settler) for _ in range(3))
    assert await marks.gather() == []
    speak(one, "Hello, you there! ")
    speak(two, "And hello to you. ")
    first = await marks.gather()
    assert {mark.hold_id for mark in first} == {one.ticket.hold_id, two.ticket.hold_id}
    assert all(mark.usage.input == 7 for mark in first)
    assert set(await marks.gather()) == set(first), "nobody said that they were stored"
    marks.stored([one.ticket.hold_id, silent.ticket.hold_id])
    assert [mark.hold_id for mark in await marks.gather()] == [two.ticket.hold_id]
    marks.stored([two.ticket.hold_id])
    assert await marks.gather() == []
    speak(one, "So here we are again, it seems, you and I. ")
    [mark] = await marks.gather()
    assert mark.hold_id == one.ticket.hold_id


async def test_what_was_counted_in_time_is_sent_and_the_rest_comes_first_next_time(counter: TokenCounter) -> None:
    gate = asyncio.Event()
    calls: list[int] = []

    async def slowly(texts: Sequence[str]) -> list[int] | None:
        calls.append(len(texts))
        if len(calls) > 1:
            await gate.wait()
        return counter.count_each_now(texts)

    settler = Settler(Ledger(), metrics=Metrics(), count_each=slowly)
    marks = Marks(lambda: settler.exchanges, slowly, metrics=Metrics(), budget_seconds=0.2)
    exchanges = [an_exchange(settler) for _ in range(300)]
    for exchange in exchanges:
        speak(exchange, "Hello, you there! ")
    first = await marks.gather()
    assert len(first) == 200
    gate.set()
    marks.stored([mark.hold_id for mark in first])
    second = await marks.gather()
    assert len(second) == 100
    assert not {m.hold_id for m in first} & {m.hold_id for m in second}


async def test_a_counter_that_cant_count_leaves_the_mark_as_it_was() -> None:
    async def never(_texts: Sequence[str]) -> list[int] | None:
        return None

    settler = Settler(Ledger(), metrics=Metrics(), count_each=never)
    marks = Marks(lambda: settler.exchanges, never, metrics=Metrics())
    speak(an_exchange(settler), "Hello, you there! ")
    assert await marks.gather() == []


async def test_who_stops_waiting_for_the_prompts_count_takes_it_from_nobody(counter: TokenCounter) -> None:
    progress, begun, gate = progress_of(counter), asyncio.Event(), asyncio.Event()

    async def slowly(_meter: Meter | None) -> tuple[int, int]:
        begun.set()
        await gate.wait()
        return 7, 0

    progress._count_answer = slowly
    assert progress.meter is not None
    progress.meter.observe(text("Hello, you there! "))
    given(progress)
    waiter = asyncio.create_task(progress.count())
    await begun.wait()
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    gate.set()
    usage = await marked(progress, counter.count_each)
    assert usage is not None
    assert usage.input == 7


async def test_a_count_of_the_prompt_that_was_cancelled_is_begun_anew(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    assert progress.meter is not None
    progress.meter.observe(text("Hello, you there! "))
    given(progress)
    progress.note()
    progress.prompt().cancel()
    await asyncio.sleep(0)
    counting = progress.counting(for_mark=True)
    progress.mark(counting, await counter.count_each(counting.texts))
    assert progress.marked is not None
    assert progress.marked.input == 0
    usage = await marked(progress, counter.count_each)
    assert usage is not None
    assert usage.input == 7


async def test_an_ended_exchange_has_no_mark(counter: TokenCounter) -> None:
    settler = Settler(Ledger(), metrics=Metrics(), count_each=counter.count_each)
    marks = Marks(lambda: settler.exchanges, counter.count_each, metrics=Metrics())
    exchange = an_exchange(settler)
    speak(exchange, "Hello, you there! ")
    found: Sequence[Mark] = await marks.gather()
    assert len(found) == 1
    settler._open.discard(exchange)
    assert await marks.gather() == []
