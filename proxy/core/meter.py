"""The meter: what an answer said about itself, gathered while it passes.

It is fed the decoded chunks of a chat completion, streamed or whole, and keeps three things: the last usage report,
how far the answer came, and its text, joined per choice, for the case that no report comes. The rules:

- Reports are never added up: the last one counts. Null, ``{}`` and all-zero reports are no reports; that zeros were
  told is kept beside, for an answer that says nothing.
- Text is counted joined, since the tokens of single deltas add up to several times the tokens of the text.
- Memory is bounded: text beyond ``text_chars_max`` is only measured, and the count of the kept part is scaled up.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from proxy.core.catalog import Quirks
from proxy.core.growing import GrowingText
from proxy.core.usage import Usage
from proxy.core.usage_report import Reported, is_absent, normalise, says_zero

__all__ = ["Ending", "Meter", "storable_json"]

_CHOICES_MAX = 256
_CALLS_MAX = 1_024
_RAW_CHARS_MAX = 8_192


class Ending(StrEnum):
    """How an answer ended, as far as its own bytes tell."""

    COMPLETE = "complete"
    """``[DONE]``, a finish reason for every choice that was begun, or a whole JSON answer."""
    ERROR = "error"
    """The upstream sent an error object, alone or after some text."""
    TRUNCATED = "truncated"
    """Something came, but not its end. It must never be passed on as a clean end."""
    EMPTY = "empty"
    """Nothing readable came."""


class Meter:
    """Feed it chunks in order; read it at any time."""

    def __init__(self, choices: int = 1, text_chars_max: int = 4 * 1024 * 1024) -> None:
        """``choices``: how many the request asked for (n)."""
        self.usage_raw: dict[str, Any] | None = None
        """The last usage report, as the provider sent it."""
        self.zeros_reported = False
        """A usage object that counts zero on both sides was seen. It is no report, unless nothing was said."""
        self.usage_reports = 0
        self.done = False
        """The stream's own end mark was seen."""
        self.error: Any = None
        """The last error object that the upstream sent inside its answer."""
        self.delivered = False
        """Some text, reasoning, tool call or medium has come."""
        self.service_tier: str | None = None
        """The tier that the provider says it served."""
        self.chunks = 0
        self.unreadable = 0
        """Events whose data was no JSON."""
        self.text_chars = 0
        """All text that came, kept or not."""
        self.text_bytes = 0
        """The same as UTF-8: no text has more tokens than bytes."""
        self.usage_text_bytes = 0
        """How much of that had come when the last report did."""
        self._choices_asked = choices
        self._finished: dict[int, str] = {}
        self._text_chars_max = text_chars_max
        self._kept_chars = 0
        self._usage_at_end = False
        self._usage_chars = 0  # how much text had come when the last report did
        self._choices: dict[int, _Choice] = {}
        self._calls = 0

    # -- feeding ------------------------------------------------------------------------------------------------------

    def observe(self, chunk: Mapping[str, Any]) -> None:
        """One chunk of a stream, or a whole JSON answer."""
        self.chunks += 1
        choices = chunk.get("choices")
        if choices and isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    self._observe_choice(choice)
        usage = chunk.get("usage")
        if usage is not None:
            self._observe_usage(usage, at_end=not choices or bool(self._finished))
        self._observe_extras(chunk)

    def observe_body(self, body: Mapping[str, Any]) -> None:
        """A whole JSON answer: complete as it stands, if it is an answer at all."""
        self.observe(body)
        if isinstance(body.get("choices"), list) and self.error is None:
            self.done = True
        elif self.error is None:
            # Not a completion: some providers' errors have no "error" member.
            self.error = body

    def observe_error(self, error: Any) -> None:
        """An error that isn't in an ``error`` member, such as the data of an ``event: error``."""
        self.error = error

    def observe_done(self) -> None:
        """The stream's own end mark."""
        self.done = True

    def observe_unreadable(self) -> None:
        """An event whose data is no JSON object."""
        self.unreadable += 1

    def _observe_extras(self, chunk: Mapping[str, Any]) -> None:
        tier = chunk.get("service_tier")
        if isinstance(tier, str):
            self.service_tier = tier[:64]
        if chunk.get("error"):
            self.error = chunk["error"]
        if chunk.get("object") == "chat.completion.done":
            self.done = True
        groq = chunk.get("x_groq")
        if isinstance(groq, dict):
            if groq.get("usage") is not None and chunk.get("usage") is None:
                self._observe_usage(groq["usage"], at_end=True)
            if groq.get("error"):
                self.error = groq["error"]

    def _observe_usage(self, usage: Any, *, at_end: bool) -> None:
        if is_absent(usage):
            self.zeros_reported |= says_zero(usage)
            return
        self.usage_raw = usage
        self.usage_reports += 1
        self._usage_at_end = at_end
        self._usage_chars = self.text_chars
        self.usage_text_bytes = self.text_bytes

    def _observe_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index")
        kept = self._choice(index if type(index) is int else 0)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice.get("message")
        if isinstance(delta, dict):
            for key, value in delta.items():
                if value:
                    read = _DELTA.get(key)
                    if read is not None:
                        read(self, kept, value, delta)
        reason = choice.get("finish_reason")
        if reason is not None:
            self._finished[kept.index] = str(reason)[:64]
            if reason == "error":
                self.error = choice.get("error") or {"finish_reason": reason}
        if choice.get("error"):
            self.error = choice["error"]
        if choice.get("usage") is not None:  # Moonshot's place for it
            self._observe_usage(choice["usage"], at_end=reason is not None)

    def _choice(self, index: int) -> "_Choice":
        kept = self._choices.get(index)
        if kept is None:
            if len(self._choices) >= _CHOICES_MAX:
                return next(reversed(self._choices.values()))
            kept = self._choices[index] = _Choice(index)
        return kept

    def _write(self, into: GrowingText, text: str) -> None:
        self.delivered = True
        self.text_chars += len(text)
        self.text_bytes += len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
        room = self._text_chars_max - self._kept_chars
        if len(text) > room:
            text = text[:room]
        self._kept_chars += len(text)
        into.fresh.write(text)

    def _call(self, kept: "_Choice", key: int | str | None, *, named: bool) -> GrowingText:
        """Where the text of a tool call is kept. Without an index or id, a name begins a new call."""
        if key is None:
            key = f"#{len(kept.calls)}" if named or not kept.calls else next(reversed(kept.calls))
        text = kept.calls.get(key)
        if text is None:
            if self._calls >= _CALLS_MAX:
                return kept.content
            self._calls += 1
            text = kept.calls[key] = GrowingText()
        return text

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def ending(self) -> Ending:
        """How the answer ended, were this its end."""
        if self.error is not None:
            return Ending.ERROR
        finished = self._finished.keys()
        if self.done or (len(finished) >= self._choices_asked and finished >= self._choices.keys()):
            return Ending.COMPLETE
        return Ending.TRUNCATED if self.chunks else Ending.EMPTY

    @property
    def usage_final(self) -> bool:
        """Whether the last report covers the whole answer, not just what had come when it was sent (a running one)."""
        if self.usage_raw is None or self._usage_chars != self.text_chars:
            return False
        return self._usage_at_end or self.ending is Ending.COMPLETE

    @property
    def finish_reasons(self) -> list[str]:
        """The finish reasons seen, in the order of the choices' numbers."""
        return [reason for _, reason in sorted(self._finished.items())]

    @property
    def calls(self) -> int:
        """Tool calls in the answer, over all choices."""
        return self._calls

    @property
    def choices(self) -> int:
        """Choices that have said something."""
        return len({choice for choice, text in self.growing() if text.chars})

    def reported(self, quirks: Quirks) -> Reported | None:
        """The last report brought to disjoint classes, one-sided reports included; None where there is none."""
        return None if self.usage_raw is None else normalise(self.usage_raw, quirks)

    def usage(self, quirks: Quirks) -> Usage | None:
        """The whole answer's usage as reported; None where no report covers both sides of all of it."""
        reported = self.reported(quirks) if self.usage_final else None
        return reported.usage if reported and reported.prompt_known and reported.completion_known else None

    def usage_json(self) -> str | None:
        """The last report as JSON text that any database takes."""
        return None if self.usage_raw is None else storable_json(self.usage_raw)

    @property
    def begun(self) -> int:
        """Choices that have begun, whether or not they have said something: no fewer than ``choices``."""
        return len(self._choices)

    def growing(self) -> Iterator[tuple[int, GrowingText]]:
        """Each choice's number and each of its texts, to be counted while they grow."""
        for kept in self._choices.values():
            for part in kept.parts():
                yield kept.index, part

    def texts(self) -> list[str]:
        """What was said, each to be counted for itself: per choice its text, its visible reasoning, each tool call."""
        return [text for texts in self._texts_by_choice() for text in texts]

    def scaled(self, counted: int) -> int:
        """Tokens of all text, from the tokens counted in ``texts()``: more where text was not kept."""
        if not self._kept_chars or self._kept_chars >= self.text_chars:
            return counted
        return math.ceil(counted * self.text_chars / self._kept_chars)

    def _texts_by_choice(self) -> Iterator[list[str]]:
        for kept in self._choices.values():
            texts = [text for text in (part.getvalue() for part in kept.parts()) if text]
            if texts:
                yield texts


class _Choice:
    """The text of one choice. Content and refusal are one text, as they are to the tokenizer."""

    __slots__ = ("calls", "content", "index", "reasoning")

    def __init__(self, index: int) -> None:
        self.index = index
        self.content = GrowingText()
        self.reasoning = GrowingText()
        self.calls: dict[int | str, GrowingText] = {}

    def parts(self) -> Iterator[GrowingText]:
        yield self.content
        yield self.reasoning
        yield from self.calls.values()


def _content(meter: Meter, kept: _Choice, value: Any, _delta: Mapping[str, Any]) -> None:
    if isinstance(value, str):
        meter._write(kept.content, value)
    else:
        _parts(meter, kept, value)


def _parts(meter: Meter, kept: _Choice, value: Any) -> None:
    """Content as a list of parts: text, or reasoning where a part says so (Mistral's ``thinking``)."""
    stack: list[tuple[Any, GrowingText]] = [(value, kept.content)]
    while stack:
        item, into = stack.pop()
        if isinstance(item, str):
            meter._write(into, item)
        elif isinstance(item, list):
            stack.extend((part, into) for part in reversed(item))
        elif isinstance(item, dict):
            meter.delivered = True
            for key in ("text", "thinking", "refusal", "summary"):
                if item.get(key):
                    stack.append((item[key], kept.reasoning if key == "thinking" else into))


def _reasoning(meter: Meter, kept: _Choice, value: Any) -> None:
    if isinstance(value, str):
        meter._write(kept.reasoning, value)
    elif isinstance(value, list):
        meter.delivered = True
        for detail in value:
            for key in ("text", "summary"):
                if isinstance(detail, dict) and isinstance(detail.get(key), str):
                    meter._write(kept.reasoning, detail[key])


def _reasoning_unless(*others: str) -> "_Reader":
    """Some gateways send the same reasoning under several names: the first of them counts."""

    def read(meter: Meter, kept: _Choice, value: Any, delta: Mapping[str, Any]) -> None:
        if not any(delta.get(name) for name in others):
            _reasoning(meter, kept, value)

    return read


def _tool_calls(meter: Meter, kept: _Choice, value: Any, _delta: Mapping[str, Any]) -> None:
    for call in value if isinstance(value, list) else ():
        if isinstance(call, dict):
            index, identity = call.get("index"), call.get("id")
            key = index if type(index) is int else identity if identity and isinstance(identity, str) else None
            _one_call(meter, kept, call.get("function") or call.get("custom"), key)


def _function_call(meter: Meter, kept: _Choice, value: Any, _delta: Mapping[str, Any]) -> None:
    _one_call(meter, kept, value, "function_call")


def _one_call(meter: Meter, kept: _Choice, function: Any, key: int | str | None) -> None:
    if not isinstance(function, dict):
        return
    into = meter._call(kept, key, named=bool(function.get("name")))
    for name in ("name", "arguments", "input"):
        value = function.get(name)
        if value:
            meter._write(into, value if isinstance(value, str) else json.dumps(_storable(value, 0)))


def _audio(meter: Meter, kept: _Choice, value: Any, _delta: Mapping[str, Any]) -> None:
    if isinstance(value, dict) and (value.get("data") or value.get("transcript")):
        meter.delivered = True
        if isinstance(value.get("transcript"), str):
            meter._write(kept.content, value["transcript"])


def _medium(meter: Meter, _kept: _Choice, _value: Any, _delta: Mapping[str, Any]) -> None:
    meter.delivered = True


_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "thinking", "reasoning_details")

_Reader = Callable[[Meter, _Choice, Any, Mapping[str, Any]], None]

_DELTA: Mapping[str, _Reader] = {
    "content": _content,
    "refusal": _content,
    **{name: _reasoning_unless(*_REASONING[:place]) for place, name in enumerate(_REASONING)},
    "tool_calls": _tool_calls,
    "function_call": _function_call,
    "audio": _audio,
    "images": _medium,
}


def storable_json(value: Any) -> str:
    """JSON text of a value from outside that any database takes: no NaN, no NUL, no lone surrogate, bounded in size."""
    try:
        text = json.dumps(_storable(value, 0), allow_nan=False, separators=(",", ":"))
    except ValueError:  # an integer of thousands of digits
        return '{"unstorable":true}'
    return text if len(text) <= _RAW_CHARS_MAX else '{"unstorable":true}'


def _storable(value: Any, depth: int) -> Any:
    if depth > 16:
        return None
    if isinstance(value, str):
        return value.encode(errors="replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(_storable(str(k), depth)): _storable(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item, depth + 1) for item in value]
    return value
