"""Progress: what an open answer has come to, whatever its language and however it is cut into deltas."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from proxy.core.bounds import output_estimate
from proxy.core.catalog import STANDARD, Route, Upstream, Variant
from proxy.core.meter import Meter
from proxy.core.pricing import Bounds, Price
from proxy.core.usage import Usage
from proxy.gateway.channel import Channel
from proxy.gateway.progress import Progress
from proxy.gateway.tokens import TokenCounter

PRICE = Price(*([1_000_000] * 4), *([3_000_000] * 3))
PROMPT = 7
RATE = 60

SCRIPTS = (
    "the quick brown fox can't jump over it's lazy dogs, can it? ",
    "Größe, Straße — «naïve» façade; ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
    "我能吞下玻璃而不伤身体。但是，你不能！",
    "ひらがなとカタカナと漢字が混ざった文、です。",
    "한국어 문장도 있습니다. ",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ",
    "हिन्दी में भी लिखा जाता है। ",
    "النص العربي يُكتب من اليمين. ",
    "עברית נכתבת מימין לשמאל. ",
    "👍🏽 👩‍👩‍👧‍👦 ❤️🇩🇪 ",
    "def f(x1, y2):\n\treturn x1**2 + y2 // 3  # 12345.678\n\n",
    '{"name": "get_weather", "arguments": "{\\"city\\": 1}"}',
    "0123456789abcdef" * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u00a0\u2003\u3000 \r\n\r\n \t \u0301\u0302 \x00\ud800",
)


@pytest.fixture(scope="module")
def counter() -> Iterator[TokenCounter]:
    made = TokenCounter()
    asyncio.run(made.start())
    yield made
    made.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def count_prompt(_meter: Meter | None) -> tuple[int, int]:
    return PROMPT, 0


def progress_of(
    counter: TokenCounter, *, family: str = "gpt-4", bounds: Bounds | None = None, clock: Clock | None = None
) -> Progress:
    upstream = Upstream("up", "openai", "http://127.0.0.1/v1")
    route = Route("m", upstream, "up-m", family, 10**9, MappingProxyType({STANDARD: Variant(STANDARD, PRICE)}))
    route = replace(route, hidden_reasoning=family == "gpt-5", reasoning_tokens_per_second=RATE)
    progress = Progress(
        route=route,
        bounds=bounds or Bounds(input=100, output=10**9),
        count_answer=count_prompt,
        count_each=counter.count_each,
        clock=clock or Clock(),
    )
    progress.channel = Channel()
    progress.meter = Meter()
    return progress


def text(value: str, choice: int = 0, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": choice, "delta": {"content": value} | delta}]}


def called(value: str, index: int = 0, name: str | None = None) -> dict[str, Any]:
    function = {"arguments": value} | ({"name": name} if name else {})
    return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": index, "function": function}]}}]}


def random_text(rng: random.Random, chars: int) -> str:
    parts: list[str] = []
    while sum(map(len, parts)) < chars:
        script = rng.choice(SCRIPTS)
        start = rng.randrange(len(script))
        parts.append(script[start : start + rng.randint(1, 60)])
    return "".join(parts)[:chars]


def deltas(rng: random.Random, whole: str) -> list[str]:
    cuts = sorted(rng.sample(range(len(whole) + 1), k=min(len(whole), rng.randint(1, 40))))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def whole_count(counter: TokenCounter, meter: Meter, family: str = "gpt-4") -> int:
    counted = counter.count_now(meter.texts())
    assert counted is not None
    return output_estimate(family, counted, choices=meter.choices, calls=meter.calls)


@pytest.mark.parametrize("seed", range(60))
async def test_counting_on_the_way_is_counting_the_whole(counter: TokenCounter, seed: int) -> None:
    rng = random.Random(seed)
    progress = progress_of(counter)
    meter, channel = progress.meter, progress.channel
    assert meter is not None
    assert channel is not None
    for delta in deltas(rng, random_text(rng, rng.randint(1, 3_000))):
        meter.observe(text(delta, rng.randrange(3)))
        channel.put_at_once(b"data")
        if rng.random() < 0.5:
            channel.sent_bytes = rng.randint(channel.sent_bytes, channel.produced_bytes)
        if meter.delivered and rng.random() < 0.5:
            usage = await progress.count()
            assert usage == Usage(input=PROMPT, output=whole_count(counter, meter)), f"seed {seed}"
        assert progress.metered >= whole_count(counter, meter), f"seed {seed}"


async def test_every_kind_of_text_is_counted_by_itself(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter = progress.meter
    assert meter is not None
    said: Sequence[dict[str, Any]] = (
        text("Hel", 0),
        text("Bon", 1),
        text("lo there", 0),
        text("jour", 1),
        text("", 0, reasoning_content="think"),
        text("", 0, reasoning_content="ing of it"),
        text("", 1, refusal="No."),
        called('{"ci', 0, "weather"),
        called('ty":"P', 0),
        called("{}", 1, "time"),
        called('aris"}', 0),
    )
    for chunk in said:
        meter.observe(chunk)
        usage = await progress.count()
        assert usage.output == whole_count(counter, meter)
        assert progress.metered >= usage.output
    assert meter.calls == 2


async def test_nothing_costs_nothing(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    assert await progress.count() == Usage()
    progress.meter = None
    assert (await progress.count(), progress.metered) == (Usage(), 0)


async def test_a_running_report_counts_and_what_came_since_is_added_to_what_is_metered(counter: TokenCounter) -> None:
    progress = progress_of(counter)
    meter = progress.meter
    assert meter is not None
    meter.observe(text("Hello") | {"usage": {"prompt_tokens": 11, "completion_tokens": 500}})
    assert await progress.count() == Usage(input=11, output=500)
    assert progress.metered == 500
    meter.observe(text(" there"))
    assert await progress.count() == Usage(input=11, output=500)
    assert progress.metered == 506
    meter.observe({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 3}})
    assert await progress.count() == Usage(input=11, output=3)
    assert progress.metered >= 3


async def test_hidden_reasoning_is_metered_by_the_time_and_counted_not_at_all(counter: TokenCounter) -> None:
    clock = Clock()
    progress = progress_of(counter, family="gpt-5", bounds=Bounds(input=10, output=5_000), clock=clock)
    progress.sent_at = clock.now
    assert progress.metered == 0
    clock.now += 10
    assert progress.metered == 10 * RATE
    progress.meter = None
    assert progress.metered == 10 * RATE
    assert await progress.count() == Usage()
    clock.now += 3_600
    assert progress.metered == 5_000


async def test_what_cant_be_counted_is_taken_by_its_bytes(counter: TokenCounter) -> None:
    progress = progress_of(TokenCounter())  # not started: it can't count
    meter = progress.meter
    assert meter is not None
    meter.observe(text("a" * 300))
    assert (await progress.count()).output == 100 + 1
    assert progress.metered >= 300


async def test_sound_is_metered_as_all_that_it_may_be(counter: TokenCounter) -> None:
    progress = progress_of(counter, bounds=Bounds(input=10, output=900, audio_out=True))
    meter = progress.meter
    assert meter is not None
    assert progress.metered == 0
    meter.observe({"choices": [{"index": 0, "delta": {"audio": {"data": "AAAA"}}}]})
    assert progress.metered == 900
