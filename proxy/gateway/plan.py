"""What a call may cost, before it is made: how much is held at first, and the output cap that a short balance forces.

- A stream of a key that takes shortened answers holds in steps (``steps.py``): at first a slice of its output, however
  much its whole maximum would cost. No cap is sent for it as long as its account may yet carry the whole.
- All else holds its whole maximum at once; or, where the balance doesn't carry that and the client gave no cap of its
  own, what there is, and the upstream is sent the cap that follows from it.
"""

from dataclasses import dataclass, replace

from proxy.core.bounds import output_bound
from proxy.core.catalog import Route, Variant
from proxy.core.chat import ChatRequest
from proxy.core.money import AMOUNT_MAX, format_credits
from proxy.core.pricing import Bounds, affordable_output, quote
from proxy.ledger.records import ApiKey, Reserved

__all__ = ["Cap", "Plan"]


@dataclass(frozen=True, slots=True)
class Cap:
    """The output cap, a choice, that is sent because the balance is short (None: none is), and the bounds under it."""

    tokens: int | None
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Plan:
    """Amounts are microcredits; ``bounds`` are those of the whole answer, under the client's cap if it gave one."""

    request: ChatRequest
    route: Route
    variant: Variant
    price_version: str
    counted: int | None
    """The prompt's tokens as counted; None where it couldn't be."""
    bounds: Bounds
    first_tokens: int | None
    """A choice's first slice of output, for a stream that holds in steps; None: all is held at once."""
    least_tokens: int
    """The least output cap, a choice, that is worth sending, and the least slice that is worth holding."""

    @property
    def whole(self) -> int:
        """The quote of the whole answer. No account owns AMOUNT_MAX, so what costs more is refused as too dear."""
        return min(quote(self.variant.price, self.bounds), AMOUNT_MAX)

    def in_steps(self, key: ApiKey) -> bool:
        """Whether the hold grows while the answer runs. Some want no answer rather than a cut one."""
        return key.affordable_cap and self.first_tokens is not None

    def want(self, key: ApiKey) -> int:
        """What is held at first, if there is so much."""
        if self.first_tokens is None or not key.affordable_cap:
            return self.whole
        return max(self._quote(self.first_tokens), self.at_least(key))

    def at_least(self, key: ApiKey) -> int:
        """What must be granted."""
        if key.affordable_cap and (self.request.output_cap is None or self.first_tokens is not None):
            return self._quote(self.least_tokens)
        return self.whole

    def cap(self, key: ApiKey, reserved: Reserved) -> Cap:
        """The cap that follows from what was granted. Only where that is less than the whole is one sent."""
        available = reserved.granted
        if self.in_steps(key):
            # Others hold some of the account's credits, and may give them back while this one runs; or the cap is the
            # client's own, which is never lowered.
            if reserved.held > reserved.granted or self.request.output_cap is not None:
                return Cap(None, self.bounds)
            free = reserved.balance - reserved.held
            limit = reserved.spend_limit_left
            available += free if limit is None else min(free, limit)
        if available >= self.whole:
            return Cap(None, self.bounds)
        output = affordable_output(self.variant.price, self.bounds, available)
        tokens = output // self.request.choices - self.request.options.prediction_bytes
        return Cap(tokens, replace(self.bounds, output=self.most_out(tokens)))

    @property
    def output_possible(self) -> int:
        """The most output tokens, over all choices, were the client's own cap ignored."""
        return max(self.bounds.output, self.most_out(self.route.output_tokens_max))

    @property
    def output_beside(self) -> int:
        """Output tokens, over all choices, that may be billed beside what is said: predictions that were rejected."""
        return self.request.options.prediction_bytes * self.request.choices

    def most_out(self, cap: int) -> int:
        """The most output tokens, over all choices, under that cap on each."""
        return output_bound(cap, self.request.choices, self.request.options.prediction_bytes)

    def note(self, key: ApiKey) -> dict[str, object]:
        """What the receipt tells of the quote."""
        return {
            "quote": format_credits(self.whole),
            "held_at_first": format_credits(self.want(key)),
            "at_least": format_credits(self.at_least(key)),
            "input_tokens_max": self.bounds.input,
            "output_tokens_max": self.bounds.output,
            "input_counted": self.counted,
            "choices": self.request.choices,
            "cap_of_client": self.request.output_cap,
            "cap_of_route": self.route.output_tokens_max,
        }

    def _quote(self, cap: int) -> int:
        """The quote under that cap on each choice, and never above the whole."""
        output = min(self.most_out(cap), self.bounds.output)
        return min(quote(self.variant.price, replace(self.bounds, output=output)), self.whole)
