"""What a provider's usage object says, brought to disjoint classes.

Providers agree on the names and not on what is a part of what: cached tokens inside or beside the prompt, reasoning
inside or beside the completion (METERING, section 1b). The classes that come out sum to what the provider bills:

- inside is the rule, as at OpenAI. An upstream's quirks say where that is known to be wrong.
- ``total - prompt - completion`` is a gap that somebody fills. If one part alone has its size (reasoning, sound, cache
  reads), that part is beside; what nobody claims is output that was billed without being shown: reasoning.
- A part larger than the whole it should be in is cut to it. A number that is no count is taken as absent, and flagged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.core.catalog import Quirks
from proxy.core.usage import Usage

__all__ = ["TOKENS_MAX", "Reported", "is_absent", "normalise", "says_zero"]

# Above this a count is a mistake: no context is as long, and a sum of such counts still fits 64 bits.
TOKENS_MAX = 10**12


@dataclass(frozen=True, slots=True)
class Reported:
    """A usage object's meaning. ``prompt_known`` / ``completion_known``: whether it counted that side at all.

    ``flags`` names what was odd about it (``insane:NAME``, ``reasoning_above_completion``, ``cached_above_prompt``...).
    """

    usage: Usage
    prompt_known: bool
    completion_known: bool
    flags: tuple[str, ...] = ()


def is_absent(raw: Any) -> bool:
    """Whether a usage value says nothing: null, no object, an empty one, or one whose counts are all zero or null."""
    if not isinstance(raw, dict):
        return True
    return not any(raw.get(name) for name in (*_PROMPT, *_COMPLETION, "total_tokens"))


def says_zero(raw: Any) -> bool:
    """Whether a usage value counts nothing in so many words: zero, not null, on both sides."""
    if not isinstance(raw, dict) or not is_absent(raw):
        return False
    counts = _Counts(raw)
    return counts.first(*_PROMPT) == counts.first(*_COMPLETION) == 0


def normalise(raw: Mapping[str, Any], quirks: Quirks) -> Reported | None:
    """Usage by disjoint class, or None where the object counts neither side."""
    counts = _Counts(raw)
    prompt, completion, total = counts.first(*_PROMPT), counts.first(*_COMPLETION), counts.first("total_tokens")
    if prompt is None and completion is None:
        return None
    parts = _parts(counts)
    gap = (total or 0) - (prompt or 0) - (completion or 0) if prompt is not None and completion is not None else 0
    beside = _beside(parts, quirks, prompt=prompt or 0, completion=completion or 0, gap=gap)
    prompt_whole = (prompt or 0) + beside.prompt
    completion_whole = max((completion or 0) + beside.completion, (total or 0) - prompt_whole if gap > 0 else 0)
    usage = _share_out(parts, prompt_whole, completion_whole, completion or 0)
    flags = [f"insane:{name}" for name in counts.insane]
    if parts.cached + parts.cache_write > prompt_whole:
        flags.append("cached_above_prompt")
    if parts.reasoning > completion_whole:
        flags.append("reasoning_above_completion")
    return Reported(usage, prompt is not None, completion is not None, tuple(flags))


@dataclass(frozen=True, slots=True)
class _Parts:
    cached: int
    cache_write: int
    audio_in: int
    reasoning: int
    audio_out: int


@dataclass(frozen=True, slots=True)
class _Beside:
    """Tokens that are billed beside ``prompt_tokens`` and beside ``completion_tokens``."""

    prompt: int
    completion: int


_PROMPT = ("prompt_tokens", "input_tokens")
_COMPLETION = ("completion_tokens", "output_tokens")
_PROMPT_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_COMPLETION_DETAILS = ("completion_tokens_details", "output_tokens_details")


class _Counts:
    """Reads counts by name, and remembers the names whose value was no count."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self.insane: list[str] = []

    def first(self, *names: str) -> int | None:
        """The first of these that is a count."""
        return next((n for n in (self._count(self._raw, name) for name in names) if n is not None), None)

    def part(self, details: tuple[str, ...], *names: str) -> int:
        """The first non-zero count of these names in a details object."""
        for holder in (self._raw.get(key) for key in details):
            if isinstance(holder, Mapping):
                for name in names:
                    if count := self._count(holder, name):
                        return count
        return 0

    def top(self, *names: str) -> int:
        """The first non-zero count of these names beside the totals."""
        return next((n for n in (self._count(self._raw, name) for name in names) if n), 0)

    def _count(self, holder: Mapping[str, Any], name: str) -> int | None:
        value = holder.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 <= value <= TOKENS_MAX:
            return value
        self.insane.append(name)
        return None


def _parts(counts: _Counts) -> _Parts:
    return _Parts(
        cached=counts.part(_PROMPT_DETAILS, "cached_tokens")
        or counts.top("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens"),
        cache_write=counts.part(_PROMPT_DETAILS, "cache_write_tokens", "cache_creation_tokens")
        or counts.top("cache_creation_input_tokens"),
        audio_in=counts.part(_PROMPT_DETAILS, "audio_tokens") or counts.top("audio_prompt_tokens"),
        reasoning=counts.part(_COMPLETION_DETAILS, "reasoning_tokens") or counts.top("reasoning_tokens"),
        audio_out=counts.part(_COMPLETION_DETAILS, "audio_tokens"),
    )


def _beside(parts: _Parts, quirks: Quirks, *, prompt: int, completion: int, gap: int) -> _Beside:
    cache = parts.cached + parts.cache_write
    reasoning_beside = parts.reasoning if quirks.reasoning_outside else 0
    if quirks.cached_outside or parts.cached > prompt:
        return _Beside(cache, reasoning_beside)
    if gap <= 0 or reasoning_beside:
        return _Beside(0, reasoning_beside)
    if gap == parts.reasoning:
        return _Beside(0, parts.reasoning)
    if gap in (parts.audio_in, cache):
        return _Beside(gap, 0)
    return _Beside(0, 0)  # unclaimed: the caller bills total - prompt as output


def _share_out(parts: _Parts, prompt: int, completion: int, shown: int) -> Usage:
    cached = min(parts.cached, prompt)
    cache_write = min(parts.cache_write, prompt - cached)
    audio_in = min(parts.audio_in, prompt - cached - cache_write)
    audio_out = min(parts.audio_out, completion)
    # Output beyond what completion_tokens counted was never shown, so it is reasoning whether or not it is named.
    reasoning = min(max(parts.reasoning, completion - shown), completion - audio_out)
    return Usage(
        input=prompt - cached - cache_write - audio_in,
        cached_input=cached,
        cache_write=cache_write,
        audio_input=audio_in,
        output=completion - reasoning - audio_out,
        reasoning=reasoning,
        audio_output=audio_out,
    )
