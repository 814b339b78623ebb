"""The catalog: every route that is for sale, made from pricing.yaml and config/upstreams.yaml, swapped whole on reload.

Values only. Reading the two files is ``core/catalog_files.py``'s work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from proxy.core.pricing import Price

__all__ = ["STANDARD", "Catalog", "Quirks", "Route", "Upstream", "Variant"]

# The variant that a call without a priced option is charged at.
STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class Quirks:
    """How an upstream's usage report departs from OpenAI's (METERING: what is a part of what)."""

    include_usage: bool = True
    """Whether ``stream_options.include_usage`` is sent to the upstream."""
    reasoning_outside: bool = False
    """Reasoning tokens are beside ``completion_tokens``, not inside."""
    cached_outside: bool = False
    """Cached tokens are beside ``prompt_tokens``, not inside."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A configured endpoint. ``base_url`` includes the version path and has no trailing slash. Times are seconds."""

    name: str
    dialect: str
    base_url: str
    api_key_env: str | None = None
    api_key_file: str | None = None
    connect_seconds: float = 10.0
    read_seconds: float = 600.0
    """The longest silence between two reads, the wait for the first byte included."""
    drain_seconds: float = 120.0
    """How long an answer is read on after its client left."""
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    quirks: Quirks = Quirks()


@dataclass(frozen=True, slots=True)
class Variant:
    """A price of a route under a priced option (a service tier, web search...); ``STANDARD`` is the plain one."""

    name: str
    price: Price
    extra_input_tokens: int = 0
    """Added to the input bound: what a hosted tool may put into the prompt."""


@dataclass(frozen=True, slots=True)
class Route:
    """model -> upstream, the upstream's own name for the model, prices and limits."""

    model: str
    upstream: Upstream
    upstream_model: str
    family: str
    """A row of METERING's family table (``core/bounds.py``)."""
    output_tokens_max: int
    variants: Mapping[str, Variant]
    service_tiers: frozenset[str] = frozenset()
    web_search: bool = False
    hosted_tools: bool = False
    audio: bool = False
    """Whether both audio classes are priced."""
    allow_store: bool = False
    cost: Price | None = None
    """What the upstream charges the operator, in microcredits of worth, for margins."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Routes by model. ``version`` is the SHA-256 (hex) of ``body``, the canonical JSON kept in the ledger for ever.

    The body's shape, which the ledger's audit reads:
    ``{"routes": {MODEL: {"variants": {VARIANT: {"rates": [7 integers in TOKEN_CLASSES order], "per_request": N}}, ...}}}``
    """

    version: str
    body: str
    routes: Mapping[str, Route]
