"""Usage: how many tokens of each class an answer used, and who said so.

The classes are *disjoint*: a cached token is not also an input token. Their order is fixed, since the ledger stores
usage and rates as arrays in this order.
"""

from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["TOKEN_CLASSES", "Usage", "UsageSource"]

UsageSource = Literal["reported", "partly_counted", "counted", "none"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens by disjoint class, each >= 0. ``output`` is visible text; ``reasoning`` is beside it, not inside it."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    audio_input: int = 0
    output: int = 0
    reasoning: int = 0
    audio_output: int = 0

    def __post_init__(self) -> None:
        if min(self.as_tuple()) < 0:
            raise ValueError(f"a token count is negative: {self}")

    def as_tuple(self) -> tuple[int, ...]:
        """The counts in the order of TOKEN_CLASSES."""
        return (
            self.input,
            self.cached_input,
            self.cache_write,
            self.audio_input,
            self.output,
            self.reasoning,
            self.audio_output,
        )


TOKEN_CLASSES: tuple[str, ...] = tuple(f.name for f in fields(Usage))
