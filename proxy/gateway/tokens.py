"""Counting tokens, where the text is a stranger's and the event loop is everybody's.

Rules it keeps:

- A counter never decides whether a call is paid for: where it can't or shouldn't count, the answer is None and the
  caller takes its byte bound. Nothing a text contains makes it raise.
- Texts above ``inline_chars_max`` in all are counted in a small thread pool, in slices, under a time budget; a pool
  that is full says None at once, and nothing waits in an unbounded queue.
- Every text is counted as ordinary text (``<|endoftext|>`` in a prompt is seven tokens, no command), each by itself.

One vocabulary, o200k_base, serves every model: METERING's table of families is fitted to it. cl100k_base is vendored
beside it for those who need that exact count. Both are built from files in this package, checked by SHA-256: tiktoken's
own loader would fetch them from the network.
"""

import asyncio
import base64
import gzip
import hashlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Literal

import structlog
import tiktoken

__all__ = ["CounterLimits", "TokenCounter", "Vocabulary", "VocabularyError", "build_encoding"]

log = structlog.get_logger("farebox.tokens")

Reason = Literal["not_loaded", "too_long", "saturated", "late", "failed"]


class VocabularyError(Exception):
    """A vendored vocabulary is missing or isn't the file it should be."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A published vocabulary: its file's name here, what it must hash to, how text is cut before it is merged."""

    name: str
    sha256: str
    tokens: int
    pattern: str


@dataclass(frozen=True, slots=True)
class CounterLimits:
    """What one count, and all of them together, may take. Times are seconds."""

    threads: int = 2
    queue_max: int = 16
    """Counts that wait for a thread; one more is answered None."""
    inline_chars_max: int = 8_192
    """Up to here the event loop counts by itself: 0.3 ms for prose, 2 ms for hostile letters, 7 ms for lone surrogates
    alone. A thread costs 0.2 ms of work and a wait for its turn, which is ten times what a short prompt needs."""
    chars_max: int = 4 * 1024 * 1024
    """In all texts of one count; above it the answer is None at once."""
    budget_seconds: float = 0.1


# A run of a million blanks overflows tiktoken's stack, and its time per character grows with a run's length.
_SLICE_CHARS = 65_536
_BATCH_CHARS = _SLICE_CHARS + 1_024
# What a text weighs beside its characters: a hundred thousand empty ones are work, too.
_TEXT_CHARS = 36
# How far back from a slice's end a safe place to cut is looked for, and how many blanks are tried.
_CUT_WINDOW_CHARS = 2_048
_CUT_TRIES = 32


class TokenCounter:
    """Counts tokens under ``CounterLimits``. ``await start()`` before use; ``stop()`` drops what still waits."""

    def __init__(self, limits: CounterLimits | None = None) -> None:
        self.limits = limits or CounterLimits()
        self.unanswered: Counter[Reason] = Counter()
        """How often the answer was None, and why."""
        self._pool = ThreadPoolExecutor(self.limits.threads, thread_name_prefix="tokens")
        # Of its own, so that answers are counted however many prompts wait, and never two batches of them at once.
        self._answers_pool = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._slots = threading.BoundedSemaphore(self.limits.threads + self.limits.queue_max)
        self._encoding: tiktoken.Encoding | None = None
        # Texts are counted joined by a token that only this process knows, which no text can therefore contain.
        self._separator = f"<|{secrets.token_hex(16)}|>"
        self._separator_token = -1

    async def start(self) -> None:
        """Load the vocabulary: 0.35 s and 80 MB. To be awaited before serving, since tiktoken's constructor keeps the
        interpreter's lock, and with it the event loop, for 0.13 s of it. Raises VocabularyError."""
        loop = asyncio.get_running_loop()
        self._encoding = await loop.run_in_executor(self._pool, build_encoding, "o200k_base", self._separator)
        [self._separator_token] = self._encoding.encode(self._separator, allowed_special={self._separator})

    def stop(self) -> None:
        """Take no more work and drop what waits; a running slice ends by itself within some 30 ms."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._answers_pool.shutdown(wait=False, cancel_futures=True)

    async def count(self, texts: Sequence[str], *, budget_seconds: float | None = None) -> int | None:
        """The tokens of all texts, each counted by itself; None where that can't be said within the limits.

        Exact for texts of up to 65,536 characters. A longer one is cut, where that changes nothing if it has such
        places, and may else count some tokens too many. ``budget_seconds`` None takes the limits' own.
        """
        chars = sum(map(len, texts)) + len(texts) * _TEXT_CHARS
        if self._encoding is None or chars > self.limits.chars_max:
            return self._answer("not_loaded" if self._encoding is None else "too_long")
        if chars <= self.limits.inline_chars_max:
            return self._answer(self._attempt(texts, None))
        budget = self.limits.budget_seconds if budget_seconds is None else budget_seconds
        return await self._count_in_thread(texts, budget)

    def count_now(self, texts: Sequence[str]) -> int | None:
        """``count`` in the calling thread, without a budget, for tools and tests."""
        if self._encoding is None:
            return self._answer("not_loaded")
        return self._answer(self._attempt(texts, None))

    async def count_each(self, texts: Sequence[str]) -> list[int] | None:
        """The tokens of each text; None where that can't be said. For answers on their way, which grow between calls.

        Without a budget: whoever can't wait stops waiting, and the count goes on to its end. So callers bound what
        they give.
        """
        chars = sum(map(len, texts)) + len(texts) * _TEXT_CHARS
        if chars <= self.limits.inline_chars_max:
            return self.count_each_now(texts)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._answers_pool, self.count_each_now, texts)
        except RuntimeError:
            # The pool was stopped.
            return None

    def count_each_now(self, texts: Sequence[str]) -> list[int] | None:
        """``count_each`` in the calling thread."""
        if self._encoding is None:
            self._answer("not_loaded")
            return None
        try:
            return self._count_each(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001
            # As in _attempt.
            log.warning("tokens can't be counted", error=type(error).__name__)
            self._answer("failed")
            return None

    async def _count_in_thread(self, texts: Sequence[str], budget_seconds: float) -> int | None:
        if not self._slots.acquire(blocking=False):
            return self._answer("saturated")
        deadline = time.monotonic() + budget_seconds
        try:
            job = self._pool.submit(self._attempt, texts, deadline)
        except RuntimeError:
            # The pool was stopped while this request was on its way.
            self._slots.release()
            return self._answer("failed")
        job.add_done_callback(self._free_slot)
        try:
            async with asyncio.timeout(budget_seconds):
                return self._answer(await asyncio.wrap_future(job))
        except TimeoutError:
            return self._answer("late")

    def _free_slot(self, _job: "Future[int | Reason]") -> None:
        self._slots.release()

    def _attempt(self, texts: Sequence[str], deadline: float | None) -> "int | Reason":
        """The count, or the reason why there is none."""
        try:
            return self._count_slices(texts, deadline)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001
            # A panic in tiktoken is a BaseException that is no Exception, and must not become a free call.
            log.warning("tokens can't be counted", error=type(error).__name__)
            return "failed"

    def _count_slices(self, texts: Sequence[str], deadline: float | None) -> "int | Reason":
        total = 0
        for batch in _batches(texts):
            if deadline is not None and time.monotonic() > deadline:
                return "late"
            total += len(self._encode(batch)) - (len(batch) - 1)
        return total

    def _count_each(self, texts: Sequence[str]) -> list[int]:
        counts = [0] * len(texts)
        for batch in _batches(texts):
            tokens = self._encode(batch)
            start = 0
            for number, _ in batch[:-1]:
                end = tokens.index(self._separator_token, start)
                counts[number] += end - start
                start = end + 1
            counts[batch[-1][0]] += len(tokens) - start
        return counts

    def _encode(self, batch: "_Batch") -> list[int]:
        """The tokens of all pieces in one call of the tokenizer, with the separator's between them.

        One call a piece would hand the interpreter's lock over and back each time: beside a thread that never rests,
        2,000 short messages took 5.9 s that way and 12 ms joined.
        """
        assert self._encoding is not None
        joined = self._separator.join([piece for _, piece in batch])
        return self._encoding.encode(joined, allowed_special={self._separator}, disallowed_special=())

    def _answer(self, outcome: "int | Reason") -> int | None:
        if isinstance(outcome, int):
            return outcome
        self.unanswered[outcome] += 1
        return None


def build_encoding(name: str, separator: str | None = None) -> tiktoken.Encoding:
    """The encoding of that name, from this package's files. Its only special token is ``separator``, if there is one.

    Raises VocabularyError.
    """
    vocabulary = _VOCABULARIES[name]
    ranks = _load_ranks(vocabulary)
    special = {} if separator is None else {separator: vocabulary.tokens + 1_000}
    return tiktoken.Encoding(name, pat_str=vocabulary.pattern, mergeable_ranks=ranks, special_tokens=special)


def _load_ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    file = resources.files("proxy.gateway") / "vocabularies" / f"{vocabulary.name}.tiktoken.gz"
    try:
        raw = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise VocabularyError(f"the vocabulary {vocabulary.name} can't be read: {error}") from error
    found = hashlib.sha256(raw).hexdigest()
    if found != vocabulary.sha256:
        raise VocabularyError(f"the vocabulary {vocabulary.name} hashes to {found}, not to {vocabulary.sha256}")
    rows = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in rows}


_Batch = list[tuple[int, str]]


def _batches(texts: Sequence[str]) -> "Iterator[_Batch]":
    """The texts with their numbers, long ones cut, in lists that weigh at most about ``_BATCH_CHARS``."""
    batch: _Batch = []
    chars = 0
    for number, text in enumerate(texts):
        for piece in _slices(text):
            if batch and chars + len(piece) > _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
            batch.append((number, piece))
            chars += len(piece) + _TEXT_CHARS
    if batch:
        yield batch


def _slices(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _SLICE_CHARS:
        end = _cut(text, start + _SLICE_CHARS)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _cut(text: str, end: int) -> int:
    """Where to cut at or before ``end``: before a blank that follows a letter or digit, if one is near.

    No pattern of either vocabulary spans those two, so the tokens on both sides are the same as without the cut.
    """
    lowest = end - _CUT_WINDOW_CHARS
    at = end
    for _ in range(_CUT_TRIES):
        at = text.rfind(" ", lowest, at)
        if at <= lowest:
            break
        if text[at - 1].isalnum():
            return at
    return end


_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

_VOCABULARIES: Mapping[str, Vocabulary] = MappingProxyType(
    {
        vocabulary.name: vocabulary
        for vocabulary in (
            Vocabulary(
                "o200k_base",
                "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
                199_998,
                _O200K_PATTERN,
            ),
            Vocabulary(
                "cl100k_base",
                "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
                100_256,
                _CL100K_PATTERN,
            ),
        )
    }
)
