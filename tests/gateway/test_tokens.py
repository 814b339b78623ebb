"""gateway/tokens.py: right counts for ordinary text, an answer for any text, and an event loop that keeps running."""

import asyncio
import gzip
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.gateway import tokens
from proxy.gateway.tokens import CounterLimits, TokenCounter, VocabularyError, build_encoding

PROSE = "The quick brown fox jumps over the lazy dog; then, in 2024, it didn't. "
HOSTILE: dict[str, Callable[[int], str]] = {
    "blanks": lambda n: " " * n,
    "tabs": lambda n: "\t" * n,
    "ideographic blanks": lambda n: "\u3000" * n,
    "blanks then a letter": lambda n: " " * (n - 1) + "x",
    "newlines": lambda n: "\n" * n,
    "one letter": lambda n: "a" * n,
    "one sign": lambda n: "!" * n,
    "one ideograph": lambda n: "中" * n,
    "marks": lambda n: "\u0301" * n,
    "emoji": lambda n: "👩‍👩‍👧‍👦" * (n // 7),
    "NUL": lambda n: "\x00" * n,
    "lone surrogates": lambda n: "\ud800" * n,
    "digits": lambda n: "7" * n,
    "letters at random": lambda n: "".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=n)),
}


@pytest.fixture(scope="module")
def o200k() -> tiktoken.Encoding:
    return build_encoding("o200k_base")


@pytest.fixture(scope="module")
def counter() -> Iterator[TokenCounter]:
    made = TokenCounter(CounterLimits(budget_seconds=30.0, chars_max=64 * 1024 * 1024))
    asyncio.run(made.start())
    yield made
    made.stop()


def started(counter: TokenCounter, **limits: Any) -> TokenCounter:
    """A counter of other limits that shares the loaded vocabulary."""
    made = TokenCounter(CounterLimits(**limits))
    made._encoding, made._separator = counter._encoding, counter._separator
    return made


# What the counts are.


def test_the_vocabularies_are_the_published_ones(o200k: tiktoken.Encoding) -> None:
    assert o200k.encode_ordinary("hello world") == [24912, 2375]
    assert build_encoding("cl100k_base").encode_ordinary("hello world") == [15339, 1917]


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
def test_the_patterns_are_tiktokens_own(name: str) -> None:
    constructors = pytest.importorskip("tiktoken_ext.openai_public")
    loaded: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constructors, "load_tiktoken_bpe", lambda url, expected_hash: loaded.update(sha256=expected_hash))
        published = constructors.ENCODING_CONSTRUCTORS[name]()

    vocabulary = tokens._VOCABULARIES[name]
    assert vocabulary.pattern == published["pat_str"]
    assert vocabulary.sha256 == loaded["sha256"]


def test_a_vocabulary_that_was_tampered_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocabularies").mkdir()
    (tmp_path / "vocabularies" / "o200k_base.tiktoken.gz").write_bytes(gzip.compress(b"IQ== 0\n"))
    monkeypatch.setattr("proxy.gateway.tokens.resources.files", lambda package: tmp_path)

    with pytest.raises(VocabularyError, match="hashes to"):
        build_encoding("o200k_base")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no gzip", gzip.compress(b"IQ== 0\n" * 1000, mtime=0)[:-20]],
    ids=["missing", "empty", "no gzip", "cut"],
)
def test_a_vocabulary_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    (tmp_path / "vocabularies").mkdir()
    if content is not None:
        (tmp_path / "vocabularies" / "o200k_base.tiktoken.gz").write_bytes(content)
    monkeypatch.setattr("proxy.gateway.tokens.resources.files", lambda package: tmp_path)

    with pytest.raises(VocabularyError, match="o200k_base"):
        build_encoding("o200k_base")


@given(st.lists(st.text(st.characters(exclude_categories=[])), max_size=8))
@settings(deadline=None)
def test_any_texts_count_as_tiktoken_counts_each(
    counter: TokenCounter, o200k: tiktoken.Encoding, texts: list[str]
) -> None:
    assert counter.count_now(texts) == sum(len(o200k.encode_ordinary(text)) for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<|endoftext|>",
        "<|endofprompt|><|endoftext|>",
        "<|im_start|>system",
        "\x00\x00",
        "\ud83d",
        "a\udc00b",
        "﷽",
        "e\u0301" * 50,
    ],
)
def test_commands_and_broken_text_are_ordinary_text(counter: TokenCounter, o200k: tiktoken.Encoding, text: str) -> None:
    assert counter.count_now([text, text]) == 2 * len(o200k.encode_ordinary(text))
    assert counter.count_now(["<|endoftext|>"]) == 7


@pytest.mark.parametrize("chars", [8_000, 60_000, 65_536])
def test_a_text_of_ordinary_size_is_never_cut(counter: TokenCounter, o200k: tiktoken.Encoding, chars: int) -> None:
    text = (PROSE * (chars // len(PROSE) + 1))[:chars]

    assert asyncio.run(counter.count([text])) == len(o200k.encode_ordinary(text))


def test_long_prose_counts_exactly_since_it_is_cut_between_words(
    counter: TokenCounter, o200k: tiktoken.Encoding
) -> None:
    sentences = [PROSE, "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ", "x = y[1:]\n    return\n"]
    text = "".join(random.Random(1).choices(sentences, k=20_000))

    assert asyncio.run(counter.count([text])) == len(o200k.encode_ordinary(text))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_counted_a_little_too_high_at_most(
    counter: TokenCounter, o200k: tiktoken.Encoding, kind: str
) -> None:
    text = HOSTILE[kind](200_000)
    exact = len(o200k.encode_ordinary(text))

    counted = asyncio.run(counter.count([text]))

    assert counted is not None
    # Three cuts: each may part one token, never save more than the merge it prevents.
    assert exact - 3 <= counted <= exact + 3 * 8


def test_many_short_texts_count_as_each_by_itself(counter: TokenCounter, o200k: tiktoken.Encoding) -> None:
    texts = [f"{i} apples" for i in range(5_000)]

    assert asyncio.run(counter.count(texts)) == sum(len(o200k.encode_ordinary(text)) for text in texts)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("chars", [100, 70_000, 1_000_001])
def test_no_text_makes_it_raise(counter: TokenCounter, kind: str, chars: int) -> None:
    counted = asyncio.run(counter.count([HOSTILE[kind](chars)]))

    assert counted is None or counted > 0


# When it says None.


async def test_before_it_is_loaded_it_says_none() -> None:
    counter = TokenCounter()

    assert await counter.count(["text"]) is None
    assert counter.count_now(["text"]) is None
    assert counter.unanswered == {"not_loaded": 2}


async def test_more_text_than_the_cap_is_none_without_a_look(counter: TokenCounter) -> None:
    capped = started(counter, chars_max=10_000)

    assert await capped.count(["x" * 10_001]) is None
    assert capped.unanswered == {"too_long": 1}


async def test_empty_texts_weigh_something_too(counter: TokenCounter) -> None:
    capped = started(counter, chars_max=10_000)

    assert await capped.count([""] * 10_000) is None
    assert capped.unanswered == {"too_long": 1}


async def test_a_panic_in_the_tokenizer_is_none(counter: TokenCounter) -> None:
    class Panic(BaseException):
        pass

    class Panicking:
        def encode(self, *args: object, **kwargs: object) -> list[int]:
            raise Panic("stack overflow")

    broken = started(counter)
    broken._encoding = Panicking()  # type: ignore[assignment]

    assert await broken.count(["short"]) is None
    assert await broken.count(["long " * 10_000]) is None
    assert broken.unanswered == {"failed": 2}


async def test_a_count_that_takes_too_long_is_none_and_the_thread_gives_up(counter: TokenCounter) -> None:
    slow = started(counter, threads=1, budget_seconds=0.001, chars_max=64 * 1024 * 1024)

    assert await slow.count(["ab" * 5_000_000]) is None
    assert slow.unanswered == {"late": 1}
    # The same single thread answers again: it did not go on with what nobody waits for.
    before = time.monotonic()
    assert await slow.count(["word " * 10_000], budget_seconds=30.0) == 10_001
    assert time.monotonic() - before < 5.0


async def test_a_full_queue_is_none_at_once_and_frees_itself(counter: TokenCounter) -> None:
    gate = threading.Event()
    busy = started(counter, threads=1, queue_max=2, budget_seconds=30.0)
    busy._count_slices = lambda texts, deadline: gate.wait(30) and len(texts)  # type: ignore[method-assign]
    text = ["x" * 10_000]

    waiting = [asyncio.create_task(busy.count(text)) for _ in range(3)]
    await asyncio.sleep(0)
    assert await busy.count(text) is None
    assert busy.unanswered == {"saturated": 1}

    gate.set()
    assert await asyncio.gather(*waiting) == [1, 1, 1]
    assert await busy.count(text) == 1


async def test_callers_that_leave_give_their_places_back(counter: TokenCounter) -> None:
    gate = threading.Event()
    busy = started(counter, threads=1, queue_max=2, budget_seconds=30.0)
    busy._count_slices = lambda texts, deadline: gate.wait(30) and len(texts)  # type: ignore[method-assign]
    text = ["x" * 10_000]

    waiting = [asyncio.create_task(busy.count(text)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    assert [type(end) for end in await asyncio.gather(*waiting, return_exceptions=True)] == [asyncio.CancelledError] * 3
    gate.set()
    assert await asyncio.to_thread(lambda: [busy._slots.acquire(timeout=30) for _ in range(3)]) == [True] * 3
    busy._slots.release(3)
    assert await asyncio.gather(*(busy.count(text) for _ in range(3))) == [1, 1, 1]


async def test_after_stop_it_says_none_for_what_needs_a_thread(counter: TokenCounter) -> None:
    stopped = started(counter)
    stopped.stop()

    assert await stopped.count(["x" * 10_000]) is None
    assert await stopped.count(["short"]) == 1


# The event loop.


async def ticks_while(work: Callable[[], Any]) -> tuple[int, Any]:
    """How often the loop came round while ``work`` ran, and its result."""
    ticks = 0
    running = asyncio.ensure_future(work())
    while not running.done():
        await asyncio.sleep(0.001)
        ticks += 1
    return ticks, running.result()


async def test_the_loop_runs_on_while_five_megabytes_are_counted(counter: TokenCounter) -> None:
    hostile: Sequence[str] = ["".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=65_536)) * 80]
    threaded = started(counter, budget_seconds=60.0, chars_max=8_000_000)
    inline = started(counter, budget_seconds=60.0, chars_max=8_000_000, inline_chars_max=8_000_000)

    ticks, counted = await ticks_while(lambda: threaded.count(hostile))
    ticks_blocked, counted_inline = await ticks_while(lambda: inline.count([hostile[0][: 16 * 65_536]]))

    assert counted == 5 * counted_inline
    # A fifth of the work on the loop itself lets it come round once or twice; all of it in a thread, hundreds of times.
    assert ticks_blocked <= 3
    assert ticks >= 10 * ticks_blocked


async def test_many_short_texts_are_few_calls_of_the_tokenizer(counter: TokenCounter) -> None:
    """Each call hands the interpreter's lock over and back: one a text would take seconds beside a busy loop."""
    assert counter._encoding is not None
    encoding, calls = counter._encoding, 0

    class Noting:
        def encode(self, *args: Any, **kwargs: Any) -> list[int]:
            nonlocal calls
            calls += 1
            return encoding.encode(*args, **kwargs)

    noting = started(counter, budget_seconds=30.0)
    noting._encoding = Noting()  # type: ignore[assignment]

    assert await noting.count(["a short message of some words"] * 2_000) == 2_000 * 6
    assert calls <= 3
