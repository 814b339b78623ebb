"""What the two files say of clients that leave before their answer's end, and what holds where they say nothing.

A model's word stands above its upstream's, and that above the default. The default follows METERING's rule 8: where a
cut answer can be charged to the token by counting it, the upstream is cancelled; where it can't, since the model
reasons unseen or another tokenizer is billed, the answer is read on to the upstream's own report.
"""

import re
from dataclasses import dataclass, replace

from proxy.core.bounds import FAMILIES
from proxy.core.catalog import OnDisconnect, Route, Upstream
from proxy.core.config_fields import Section
from proxy.core.families import counts_exactly

__all__ = ["LEAVING_KEYS", "REASONING_KEYS", "Leaving", "read_leaving"]

LEAVING_KEYS = ("on_disconnect", "drain_seconds", "drain_tokens")
REASONING_KEYS = ("hidden_reasoning", "reasoning_tokens_per_second")

DRAIN_SECONDS_MAX = 3_600
DRAIN_TOKENS_MAX = 10_000_000
# Several times the fastest model that was measured.
TOKENS_PER_SECOND_MAX = 1_000

_POLICIES = re.compile("|".join(OnDisconnect))


@dataclass(frozen=True, slots=True)
class Leaving:
    """What one section says; None where it leaves that to the next."""

    on_disconnect: OnDisconnect | None = None
    drain_seconds: float | None = None
    drain_tokens: int | None = None
    hidden_reasoning: bool | None = None
    tokens_per_second: int | None = None

    def on_upstream(self, upstream: Upstream) -> Upstream:
        """The upstream with what its section says."""
        return replace(
            upstream,
            on_disconnect=self.on_disconnect,
            drain_seconds=upstream.drain_seconds if self.drain_seconds is None else self.drain_seconds,
            drain_tokens=self.drain_tokens,
        )

    def on_route(self, route: Route) -> Route:
        """The route with all of this decided."""
        upstream, family = route.upstream, FAMILIES[route.family]
        hidden = family.hidden if self.hidden_reasoning is None else self.hidden_reasoning
        exact = counts_exactly(route.family, route.upstream_model) and not hidden
        stated = self.on_disconnect or upstream.on_disconnect
        rate = family.silent_rate if self.tokens_per_second is None else self.tokens_per_second
        return replace(
            route,
            on_disconnect=stated or (OnDisconnect.CANCEL if exact else OnDisconnect.DRAIN),
            on_disconnect_stated=stated is not None,
            drain_seconds=upstream.drain_seconds if self.drain_seconds is None else self.drain_seconds,
            drain_tokens=upstream.drain_tokens if self.drain_tokens is None else self.drain_tokens,
            hidden_reasoning=hidden,
            reasoning_tokens_per_second=rate if hidden else 0,
        )


def read_leaving(section: Section, *, reasoning: bool = False) -> Leaving:
    """What a section says. ``reasoning``: it is a model's, which may say how it reasons, too."""
    policy = section.text("on_disconnect", _POLICIES, expected=f"one of {', '.join(OnDisconnect)}")
    milliseconds = section.decimal(
        "drain_seconds",
        decimals=3,
        most=DRAIN_SECONDS_MAX * 1000,
        expected=f"seconds, at most {DRAIN_SECONDS_MAX}",
    )
    return Leaving(
        on_disconnect=OnDisconnect(policy) if policy else None,
        drain_seconds=None if milliseconds is None else milliseconds / 1000,
        drain_tokens=section.whole(
            "drain_tokens",
            least=0,
            most=DRAIN_TOKENS_MAX,
            expected="the most tokens of an answer that are read after its client left, such as 4096",
        ),
        hidden_reasoning=section.flag_or_none("hidden_reasoning") if reasoning else None,
        tokens_per_second=_tokens_per_second(section) if reasoning else None,
    )


def _tokens_per_second(section: Section) -> int | None:
    return section.whole(
        "reasoning_tokens_per_second",
        least=0,
        most=TOKENS_PER_SECOND_MAX,
        expected=f"the tokens that the model writes in a second, such as 57, at most {TOKENS_PER_SECOND_MAX}",
    )
