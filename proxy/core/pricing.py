"""Pricing: what a call can cost before it (quote) and what it did cost after it (charge).

Prices are whole microcredits per million tokens, by token class. A request is rounded once, up to the next microcredit.
"""

from dataclasses import dataclass

from proxy.core.usage import Usage

__all__ = ["TOKENS_PER_RATE", "Bounds", "Price", "affordable_output", "charge", "format_rate", "quote"]

TOKENS_PER_RATE = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Microcredits per million tokens by class, and ``per_request`` in microcredits. Every number is >= 0."""

    input: int
    cached_input: int
    cache_write: int
    audio_input: int
    output: int
    reasoning: int
    audio_output: int
    per_request: int = 0

    def __post_init__(self) -> None:
        if min(self.rates()) < 0 or self.per_request < 0:
            raise ValueError(f"a price is negative: {self}")

    def rates(self) -> tuple[int, ...]:
        """The rates in the order of ``usage.TOKEN_CLASSES``."""
        return (
            self.input,
            self.cached_input,
            self.cache_write,
            self.audio_input,
            self.output,
            self.reasoning,
            self.audio_output,
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most tokens a call can use. ``output`` is over all choices. ``audio`` says whether audio rates can apply."""

    input: int
    output: int
    audio_in: bool = False
    audio_out: bool = False


def charge(price: Price, usage: Usage) -> int:
    """Microcredits for the usage: exact sum over the classes, then one rounding up to the next microcredit."""
    total = sum(rate * tokens for rate, tokens in zip(price.rates(), usage.as_tuple(), strict=True))
    return price.per_request + -(-total // TOKENS_PER_RATE)


def quote(price: Price, bounds: Bounds) -> int:
    """Microcredits that no charge within the bounds exceeds: each side at the dearest class the call can trigger."""
    total = _input_rate(price, bounds) * bounds.input + _output_rate(price, bounds) * bounds.output
    return price.per_request + -(-total // TOKENS_PER_RATE)


def affordable_output(price: Price, bounds: Bounds, available: int) -> int:
    """The most output tokens, over all choices and up to ``bounds.output``, whose quote ``available`` can carry.

    0 where not one is affordable; whether none is worth sending is the caller's to say.
    """
    rate = _output_rate(price, bounds)
    left = (available - price.per_request) * TOKENS_PER_RATE - _input_rate(price, bounds) * bounds.input
    if left < 0:
        return 0
    return bounds.output if rate == 0 else min(bounds.output, left // rate)


def format_rate(rate: int) -> str:
    """Decimal credits per 1,000 tokens for a rate, exact: 500_000_000 -> ``"0.5"``."""
    whole, rest = divmod(rate, 1_000_000_000)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".")


def _input_rate(price: Price, bounds: Bounds) -> int:
    # A provider caches on its own, so any text token may turn out to be a cache read or a cache write.
    dearest = max(price.input, price.cached_input, price.cache_write)
    return max(dearest, price.audio_input) if bounds.audio_in else dearest


def _output_rate(price: Price, bounds: Bounds) -> int:
    dearest = max(price.output, price.reasoning)
    return max(dearest, price.audio_output) if bounds.audio_out else dearest
