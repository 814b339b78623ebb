"""Progress: how far an open answer has come, in tokens, while it comes.

Two figures, for two needs:

- ``metered`` costs nothing and is never too low: what was counted last, and a token for each byte since.
- ``count`` is exact, and counts only what is new. Text is joined for each choice and cut where the tokenizer splits it
  anyway (``cuts.py``), so that the counts of the pieces add up to the count of the whole.

A third, the *mark*, is what a crash of this process would leave to be charged: it is never above what the client was
given. So it goes to the last *checkpoint* whose bytes have all left this process, not to what has been read from the
upstream; the prompt is in it only once something was delivered; and where its end isn't at such a cut, a few tokens are
left out, since a text's tokens can become fewer by what follows.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.core.bounds import output_estimate
from proxy.core.catalog import Route
from proxy.core.growing import GrowingText
from proxy.core.meter import Meter
from proxy.core.pricing import Bounds
from proxy.core.reckon import completed, reckon
from proxy.core.usage import Usage
from proxy.core.usage_report import normalise
from proxy.gateway.channel import Channel
from proxy.gateway.cuts import last_cut

__all__ = ["CountEach", "Counting", "Progress"]

CountEach = Callable[[Sequence[str]], Awaitable[list[int] | None]]
"""Counts each text's tokens off the event loop, unless they are short; None where that can't be done now."""

# By how much the count of a text may lie above that of a longer one, or of its pieces above that of the whole.
MARGIN_TOKENS = 8
# Text without a place to cut is cut here all the same.
OPEN_CHARS_MAX = 4_096
# Bytes of UTF-8 for a token, about, where it can't be counted.
BYTES_PER_TOKEN = 3
# How far apart checkpoints are that wait for a client which is behind; the buffers between take a fraction of so many.
CHECKPOINT_BYTES = 4_096
CHECKPOINTS_MAX = 256
# Of one text, for one mark: what is more is counted for the next.
MARK_CHARS_MAX = 65_536


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """How far the answer was when ``produced`` bytes of it had been put into the channel."""

    produced: int
    chars: Mapping[GrowingText, int]
    text_bytes: int
    choices: int
    calls: int
    report: dict[str, Any] | None
    report_final: bool


class _Tally:
    """One text's count so far. ``rest`` is what hasn't been counted for good."""

    __slots__ = ("chars", "forced", "rest", "text", "tokens")

    def __init__(self, text: GrowingText) -> None:
        self.text = text
        self.chars = 0
        self.tokens = 0
        self.forced = 0
        self.rest = ""


@dataclass(frozen=True, slots=True)
class _Part:
    """One text's share in a counting: ``cut`` characters behind ``start`` are counted for good, ``open`` behind those
    for now."""

    tally: _Tally
    start: int
    tokens: int
    forced: int
    cut: int
    cut_forced: bool
    open: str

    @property
    def texts(self) -> tuple[str, str]:
        return self.tally.rest[: self.cut], self.open


@dataclass(frozen=True, slots=True)
class Counting:
    """What is to be counted for one answer: ``texts``, to be given back with each one's tokens."""

    texts: list[str]
    parts: list[_Part]
    whole_bytes: int | None
    """The UTF-8 bytes of the answer's text, where all of it is counted."""
    complete: bool
    """Whether it goes as far as it was asked to."""
    checkpoint: _Checkpoint | None


class Progress:
    """One exchange's. ``meter``, ``sent_at``, ``first_said_at`` and ``channel`` are put here by the pump, as they come.

    ``count_answer`` is the exchange's own count of its prompt; ``clock`` is the loop's time.
    """

    def __init__(
        self,
        *,
        route: Route,
        bounds: Bounds,
        count_answer: Callable[[Meter | None], Awaitable[tuple[int, int]]],
        count_each: CountEach,
        clock: Callable[[], float],
    ) -> None:
        self.meter: Meter | None = None
        self.sent_at: float | None = None
        self.first_said_at: float | None = None
        self.channel: Channel | None = None
        self.holding = False
        """What the meter has seen isn't all in the channel yet. ``hold_back`` says so; the pump takes it back."""
        self._route = route
        self._bounds = bounds
        self._count_answer = count_answer
        self._count_each = count_each
        self._clock = clock
        self._tallies: dict[GrowingText, _Tally] = {}
        self._reached: _Checkpoint | None = None
        self._noted_bytes = 0
        self._ahead: deque[_Checkpoint] = deque(maxlen=CHECKPOINTS_MAX)
        self.marked: Usage | None = None
        """The last mark that was made."""
        self.stored: Usage | None = None
        """The last one that the ledger has."""
        self.marked_at = 0.0
        """When it was made, by the loop's clock."""
        self._marked_to: _Checkpoint | None = None
        self._prompt: asyncio.Task[int] | None = None
        self._said = 0
        self._said_bytes = 0
        self._report: object = None
        self._report_output = 0

    # What others ask.

    @property
    def metered(self) -> int:
        """The most output tokens that the answer can have come to by now, the hidden ones included. Never waits."""
        meter, bounds = self.meter, self._bounds
        hidden = self._hidden_tokens()
        if meter is None:
            return min(hidden, bounds.output)
        if bounds.audio_out and meter.delivered:
            return max(bounds.output, self._reported_tokens(meter))
        new_bytes = meter.text_bytes - self._said_bytes
        said = self._said + (new_bytes + MARGIN_TOKENS if new_bytes else 0)
        likely = output_estimate(self._route.family, said, choices=meter.begun, calls=meter.calls)
        reported = self._reported_tokens(meter)
        # A report has the hidden ones in it.
        return max(min(likely + (0 if self._report_output else hidden), bounds.output), reported)

    async def count(self) -> Usage:
        """What the answer would be charged for if it ended now: reported so far, or counted exactly."""
        meter = self.meter
        if meter is None or not (meter.delivered or meter.usage_raw is not None):
            return Usage()
        # Shielded: whoever stops waiting must not take the count away from the others who need it.
        prompt = await asyncio.shield(self.prompt())
        self.note()
        counting = self.counting()
        counts = await self._count_each(counting.texts)
        said = meter.scaled(self.counted(counting, counts))
        route = self._route
        return reckon(
            meter,
            route.upstream.quirks,
            counted_input=prompt,
            counted_output=output_estimate(route.family, said, choices=meter.choices, calls=meter.calls),
            bounds=self._bounds,
        ).usage

    def prompt(self) -> "asyncio.Task[int]":
        """The prompt's tokens; counted once, by a task that goes on if nobody waits for it.

        One that failed is begun anew.
        """
        if self._prompt is None or _failed(self._prompt):
            self._prompt = asyncio.get_running_loop().create_task(self._count_prompt())
        return self._prompt

    # Marks.

    @property
    def to_mark(self) -> bool:
        """Whether more was delivered than the last mark says."""
        return self._reached is not None and self._reached is not self._marked_to

    @property
    def uncounted_chars(self) -> int:
        """How much text hasn't been counted for good."""
        meter = self.meter
        return 0 if meter is None else meter.text_chars - sum(tally.chars for tally in self._tallies.values())

    def hold_back(self) -> None:
        """The meter is about to see more than is in the channel. Often enough, it is noted how far the answer was."""
        channel = self.channel
        if channel is not None and channel.produced_bytes - self._noted_bytes >= CHECKPOINT_BYTES:
            self.note()
        self.holding = True

    def note(self) -> None:
        """Remember how far the answer is, and see how far its bytes have got."""
        meter, channel = self.meter, self.channel
        if meter is None or channel is None:
            return
        produced = channel.produced_bytes
        last = self._ahead[-1] if self._ahead else self._reached
        far = not self._ahead or produced - self._noted_bytes >= CHECKPOINT_BYTES
        if far and meter.delivered and not self.holding and (last is None or _is_news(meter, last)):
            self._ahead.append(_checkpoint(meter, produced))
            self._noted_bytes = produced
        delivered = channel.delivered_bytes
        while self._ahead and self._ahead[0].produced <= delivered:
            self._reached = self._ahead.popleft()

    def counting(self, *, for_mark: bool = False) -> Counting:
        """What to count: all that came, or, for a mark, what was delivered of it."""
        meter, reached = self.meter, self._reached
        assert meter is not None
        parts: list[_Part] = []
        complete = True
        chars = {} if reached is None else reached.chars
        for _, text in meter.growing():
            tally = self._tallies.get(text)
            if tally is None:
                tally = self._tallies[text] = _Tally(text)
            tally.rest += text.take()
            delivered = chars.get(text, 0)
            if for_mark and delivered - tally.chars > MARK_CHARS_MAX:
                delivered, complete = tally.chars + MARK_CHARS_MAX, False
            parts.append(_part(tally, delivered=delivered, whole=not for_mark))
        texts = [text for part in parts for text in part.texts]
        whole = complete and (not for_mark or (reached is not None and reached.text_bytes == meter.text_bytes))
        return Counting(texts, parts, meter.text_bytes if whole else None, complete, reached)

    def counted(self, counting: Counting, counts: Sequence[int] | None) -> int:
        """The tokens of all its texts; what was counted for good isn't counted again.

        Without ``counts`` the new text is taken by its bytes, and counted the next time.
        """
        if counts is None:
            size = sum(len(text.encode(errors="surrogatepass")) for text in counting.texts)
            return sum(part.tokens for part in counting.parts) + size // BYTES_PER_TOKEN
        said = 0
        for number, part in enumerate(counting.parts):
            closed, rest = counts[2 * number], counts[2 * number + 1]
            said += part.tokens + closed + rest
            tally = part.tally
            if part.cut and tally.chars == part.start:
                tally.rest = tally.rest[part.cut :]
                tally.chars += part.cut
                tally.tokens += closed
                tally.forced += part.cut_forced
        if counting.whole_bytes is not None and counting.whole_bytes >= self._said_bytes:
            self._said, self._said_bytes = said, counting.whole_bytes
        return said

    def mark(self, counting: Counting, counts: Sequence[int] | None) -> None:
        """Set ``marked`` to what the client has surely been given; not where it can't be counted."""
        reached = counting.checkpoint
        if reached is None or counts is None:
            return
        known = self._prompt is not None and self._prompt.done() and not _failed(self._prompt)
        prompt = self._prompt.result() if self._prompt is not None and known else None
        self.marked = self._usage_at(reached, self._surely_said(counting, counts), prompt or 0)
        self.marked_at = self._clock()
        if prompt is not None and counting.complete:
            self._marked_to = reached

    def _surely_said(self, counting: Counting, counts: Sequence[int]) -> int:
        """Tokens that no more text can take away again."""
        self.counted(counting, counts)
        said = 0
        for number, part in enumerate(counting.parts):
            closed, rest = counts[2 * number], counts[2 * number + 1]
            closed += part.tokens - MARGIN_TOKENS * (part.forced + part.cut_forced)
            said += max(closed, 0) + max(rest - MARGIN_TOKENS, 0)
        return said

    def _usage_at(self, reached: _Checkpoint, said: int, prompt: int) -> Usage:
        route, bounds = self._route, self._bounds
        output = output_estimate(route.family, said, choices=reached.choices, calls=reached.calls)
        reported = None if reached.report is None else normalise(reached.report, route.upstream.quirks)
        if reported is None:
            return Usage(input=min(prompt, bounds.input), output=min(output, bounds.output))
        if reached.report_final and reported.prompt_known and reported.completion_known:
            return reported.usage
        return completed(reported, min(prompt, bounds.input), min(output, bounds.output))

    # Its parts.

    async def _count_prompt(self) -> int:
        prompt, _ = await self._count_answer(None)
        return prompt

    def _hidden_tokens(self) -> int:
        if self.sent_at is None or not self._route.hidden_reasoning:
            return 0
        # As much as would be charged for it: what is shown is counted, however slowly it comes.
        until = self._clock() if self.first_said_at is None else self.first_said_at
        return math.ceil((until - self.sent_at) * self._route.reasoning_tokens_per_second)

    def _reported_tokens(self, meter: Meter) -> int:
        """What a running report says of the output, and a token for each byte since."""
        if meter.usage_raw is None:
            return 0
        if meter.usage_raw is not self._report:
            self._report = meter.usage_raw
            reported = normalise(meter.usage_raw, self._route.upstream.quirks)
            usage = Usage() if reported is None else reported.usage
            self._report_output = usage.output + usage.reasoning + usage.audio_output
        return self._report_output + meter.text_bytes - meter.usage_text_bytes


def _failed(task: "asyncio.Task[int]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _part(tally: _Tally, *, delivered: int, whole: bool) -> _Part:
    """What to count of one text: for good up to the last cut in what was delivered, for now the rest."""
    room = max(delivered - tally.chars, 0)
    cut = last_cut(tally.rest, room)
    forced = not cut and room > OPEN_CHARS_MAX
    if forced:
        cut = OPEN_CHARS_MAX
    rest = tally.rest[cut:] if whole else tally.rest[cut:room]
    return _Part(tally, tally.chars, tally.tokens, tally.forced, cut, forced, rest)


def _is_news(meter: Meter, last: _Checkpoint) -> bool:
    return meter.text_bytes != last.text_bytes or meter.usage_raw is not last.report or meter.calls != last.calls


def _checkpoint(meter: Meter, produced: int) -> _Checkpoint:
    texts = [(choice, text, text.chars) for choice, text in meter.growing()]
    return _Checkpoint(
        produced=produced,
        chars={text: chars for _, text, chars in texts},
        text_bytes=meter.text_bytes,
        choices=len({choice for choice, _, chars in texts if chars}),
        calls=meter.calls,
        report=meter.usage_raw,
        report_final=meter.usage_final,
    )
