"""The catalog: every route that is for sale, made from pricing.yaml and config/upstreams.yaml, swapped whole on reload.

Values, and the one holder that a reload swaps. Reading the two files is ``core/catalog_files.py``'s work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from types import MappingProxyType

from proxy.core.errors import InvalidRequest, NotFound
from proxy.core.key_path import key_path, shorten
from proxy.core.packs import Offers
from proxy.core.pricing import Price

__all__ = [
    "EXCHANGE_SECONDS_MAX",
    "STANDARD",
    "STANDARD_TIERS",
    "Catalog",
    "CatalogHolder",
    "CreditValue",
    "OnDisconnect",
    "PricedOptions",
    "Quirks",
    "Route",
    "Upstream",
    "Variant",
    "variant_name",
]

# The variant that a call without a priced option is charged at.
STANDARD = "standard"

# What a client may send as `service_tier` without asking for anything but the standard price.
STANDARD_TIERS = frozenset({None, "auto", "default"})


# How long an answer is read on after its client left, where no file says it.
DRAIN_SECONDS = 120.0
# No provider's answer takes longer; one that does is stuck.
EXCHANGE_SECONDS_MAX = 7_200.0


class OnDisconnect(StrEnum):
    """What becomes of a streamed answer whose client leaves. One that isn't streamed is always read on."""

    CANCEL = "cancel"
    """The upstream's connection is closed; the prompt and what was counted of the answer are charged."""
    DRAIN = "drain"
    """It is read on to the upstream's report, within limits; what was reported is charged."""


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
    """A configured endpoint. ``base_url`` includes the version path and has no trailing slash. Times are seconds.

    At most one of ``api_key_env`` and ``api_key_file`` is set; neither means that the upstream wants no key.
    """

    name: str
    dialect: str
    base_url: str
    api_key_env: str | None = None
    api_key_file: str | None = None
    connect_seconds: float = 10.0
    read_seconds: float = 600.0
    """The longest silence between two reads, the wait for the first byte included."""
    on_disconnect: OnDisconnect | None = None
    """For every route to here that says nothing itself. None: each model's own default."""
    drain_seconds: float = DRAIN_SECONDS
    drain_tokens: int | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Sent with every request; names in lower case."""
    quirks: Quirks = Quirks()


@dataclass(frozen=True, slots=True)
class Variant:
    """A price of a route under a priced option (a service tier, web search...); ``STANDARD`` is the plain one."""

    name: str
    price: Price
    extra_input_tokens: int = 0
    """Added to the input bound: what a hosted tool may put into the prompt."""
    audio: bool = False
    """Whether both audio classes are priced, so that a call with audio may be served."""


@dataclass(frozen=True, slots=True)
class PricedOptions:
    """What a request asks for beyond plain text: each of these can raise the provider's price."""

    service_tier: str | None = None
    web_search: bool = False
    hosted_tools: bool = False
    audio: bool = False
    """Audio in the prompt or in the answer."""
    store: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """model -> upstream, the upstream's own name for the model, prices and limits."""

    model: str
    upstream: Upstream
    upstream_model: str
    family: str
    """A row of METERING's family table (``core/families.py``, ``core/bounds.py``)."""
    output_tokens_max: int
    variants: Mapping[str, Variant]
    """By ``variant_name``: STANDARD always, and every combination of the tiers and tools that are priced."""
    service_tiers: frozenset[str] = frozenset()
    web_search: bool = False
    hosted_tools: bool = False
    audio: bool = False
    """Whether both audio classes are priced in the standard variant."""
    allow_store: bool = False
    on_disconnect: OnDisconnect = OnDisconnect.DRAIN
    """For a streamed call: as the files state it, else by the model (``families.counts_exactly``)."""
    on_disconnect_stated: bool = False
    """Whether a file states it: it then holds also for a call whose own options would have it drained."""
    drain_seconds: float = DRAIN_SECONDS
    """How long an answer is read on after its client left."""
    drain_tokens: int | None = None
    """The most output tokens of one answer that are read after its client left; None: what its hold carries."""
    hidden_reasoning: bool = False
    """Whether the model may write tokens that are billed and not shown."""
    reasoning_tokens_per_second: int = 0
    """What such a model is taken to write while it shows nothing; 0: nothing is charged for that time."""
    seconds_max: float = EXCHANGE_SECONDS_MAX
    """The longest that one answer may take, however lively it is; then it is ended, and charged as far as it came."""
    cost: Price | None = None
    """What the upstream charges the operator, in microcredits of worth, rounded up; for margins."""

    @property
    def standard(self) -> Variant:
        return self.variants[STANDARD]

    def variant_for(self, options: PricedOptions) -> Variant:
        """The price that the options are charged at.

        Raises InvalidRequest ``unpriced_option``, naming the key that pricing.yaml lacks, for an option that the route
        doesn't price: served at the standard price, it would be the operator who pays the difference.
        """
        tier = None if options.service_tier in STANDARD_TIERS else options.service_tier
        if tier is not None and tier not in self.service_tiers:
            raise self._unpriced("service_tier", f'service_tier "{shorten(tier)}"', "service_tiers", tier)
        if options.web_search and not self.web_search:
            raise self._unpriced("web_search_options", "web search", "web_search")
        if options.hosted_tools and not self.hosted_tools:
            raise self._unpriced("tools", "tools that the provider runs", "hosted_tools")
        if options.store and not self.allow_store:
            raise self._unpriced("store", "store: true", "allow_store")
        variant = self.variants[variant_name(tier, web_search=options.web_search, hosted_tools=options.hosted_tools)]
        if options.audio and not variant.audio:
            raise self._unpriced("modalities", "audio", *(("service_tiers", tier) if tier else ()), "audio_output")
        return variant

    def _unpriced(self, param: str, option: str, *keys: str) -> InvalidRequest:
        key = key_path("models", self.model, *keys)
        also = " (and audio_input beside it)" if keys[-1] == "audio_output" else ""
        return InvalidRequest(
            f"The model {self.model} isn't sold with {option} here: leave it out, or ask the operator to add"
            f" {key}{also} to pricing.yaml.",
            code="unpriced_option",
            param=param,
        )


@dataclass(frozen=True, slots=True)
class CreditValue:
    """What one credit is sold for, in money; it turns an upstream's cost into credits."""

    amount: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """Routes by model. ``version`` is the SHA-256 (hex) of ``body``, the canonical JSON kept in the ledger for ever.

    The body's shape, which the ledger's audit reads::

        {"classes": [TOKEN_CLASSES],
         "routes": {MODEL: {"variants": {VARIANT: {"rates": [7 integers in that order], "per_request": N}, ...}, ...}}}

    ``rates`` are microcredits per million tokens, ``per_request`` is microcredits. Where an upstream lives is not in
    the body: moving it changes no price.
    """

    version: str
    body: str
    routes: Mapping[str, Route]
    upstreams: Mapping[str, Upstream] = field(default_factory=lambda: MappingProxyType({}))
    """Every configured upstream, also one that no route uses."""
    credit_value: CreditValue | None = None
    offers: Offers = field(default_factory=Offers)
    """What is sold for money. Not in the body either: an order copies what it sells."""

    def route(self, model: str) -> Route:
        """The route that sells ``model``. Raises NotFound ``model_not_found``: what has no price is not served."""
        route = self.routes.get(model)
        if route is None:
            raise NotFound(
                f'The model "{shorten(model)}" does not exist here. GET /v1/models lists what does.',
                code="model_not_found",
                param="model",
            )
        return route


class CatalogHolder:
    """The one place where the current catalog stands. A request takes ``current`` once and keeps what it took."""

    __slots__ = ("current",)

    def __init__(self, current: Catalog) -> None:
        self.current = current


def variant_name(tier: str | None, *, web_search: bool, hosted_tools: bool) -> str:
    """``standard``, ``flex``, ``standard+web_search``, ``flex+web_search+hosted_tools``..."""
    tools = (("web_search", web_search), ("hosted_tools", hosted_tools))
    return "+".join([tier or STANDARD, *(name for name, used in tools if used)])
