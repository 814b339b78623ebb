"""What an answer had said at some moment, while its meter goes on: counted as the meter itself would have been then."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.core.growing import GrowingText
from proxy.core.meter import Meter

__all__ = ["Excerpt", "Said"]


class Said(Protocol):
    """What can be counted: a Meter, or an Excerpt of one."""

    @property
    def choices(self) -> int: ...
    @property
    def calls(self) -> int: ...
    def texts(self) -> list[str]: ...
    def scaled(self, counted: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Made in microseconds: where each text ended, not what stood in it."""

    ends: tuple[tuple[int, GrowingText, int], ...]
    """Choice, text, and its characters so far."""
    text_chars: int
    text_bytes: int
    calls: int
    report: dict[str, Any] | None
    """The last usage report that had come."""

    @classmethod
    def of(cls, meter: Meter) -> "Excerpt":
        """All that the meter has seen by now."""
        ends = tuple([(choice, text, text.chars) for choice, text in meter.growing()])
        return cls(ends, meter.text_chars, meter.text_bytes, meter.calls, meter.usage_raw)

    @property
    def choices(self) -> int:
        """Choices that had said something."""
        return len({choice for choice, _, chars in self.ends if chars})

    def texts(self) -> list[str]:
        """As ``Meter.texts``."""
        return [text.getvalue()[:chars] for _, text, chars in self.ends if chars]

    def scaled(self, counted: int) -> int:
        """As ``Meter.scaled``."""
        kept = sum(chars for _, _, chars in self.ends)
        return counted if not kept else math.ceil(counted * self.text_chars / kept)
