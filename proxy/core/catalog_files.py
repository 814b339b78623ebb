"""The rules of pricing.yaml and config/upstreams.yaml: two texts in, one Catalog or every problem out.

The same rules stand, as far as JSON Schema can say them, in config/pricing.schema.json and config/upstreams.schema.json
for editors; a test holds the two equal. What no schema can say is decided here alone: duplicate keys, how a number is
spelt, prices in whole microcredits per million tokens, and that an upstream named in one file exists in the other.
"""

import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import product
from types import MappingProxyType

from proxy.core.catalog import (
    EXCHANGE_SECONDS_MAX,
    STANDARD,
    STANDARD_TIERS,
    Catalog,
    CreditValue,
    Quirks,
    Route,
    Upstream,
    Variant,
    variant_name,
)
from proxy.core.config_fields import Section
from proxy.core.families import FAMILIES, UNKNOWN, family_of
from proxy.core.key_path import shorten
from proxy.core.leaving import LEAVING_KEYS, REASONING_KEYS, read_leaving
from proxy.core.money import MICROCREDITS_PER_CREDIT
from proxy.core.packs import OFFER_KEYS, Offers, read_offers
from proxy.core.pricing import TOKENS_PER_RATE, Price
from proxy.core.usage import TOKEN_CLASSES
from proxy.core.yaml_reader import Node, Problems, near_miss, read_yaml

__all__ = ["DIALECTS", "PRICE_IN_FILE_MAX", "load_catalog"]

DIALECTS = ("openai",)

MODELS_MAX = 2_000
UPSTREAMS_MAX = 200
TIERS_MAX = 8
HEADERS_MAX = 32
OUTPUT_TOKENS_MAX = 10_000_000
EXTRA_INPUT_TOKENS_MAX = 10_000_000
# METERING, rule 7: nothing bounds what a provider's own search puts into the prompt; this covers what was seen.
EXTRA_INPUT_TOKENS = 20_000

# The largest number that may stand for a price in the file, whatever its unit. At credits per 1,000 tokens that is
# 10**15 microcredits per million tokens: an answer of OUTPUT_TOKENS_MAX tokens still costs less than money.AMOUNT_MAX.
PRICE_IN_FILE_MAX = 1_000_000

_CREDIT_DECIMALS = 6
_MONEY_DECIMALS = 12
_SECONDS_MAX = 3_600
_LIFE_SECONDS_MAX = 86_400

_INPUT_CLASSES = ("cached_input", "cache_write", "audio_input")
_OUTPUT_CLASSES = ("reasoning", "audio_output")
_PRICE_KEYS = (*TOKEN_CLASSES, "per_request")
_TOOLS = ("web_search", "hosted_tools")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MODEL = re.compile(r"[A-Za-z0-9@][A-Za-z0-9._:/@+-]{0,127}")
_UPSTREAM_MODEL = re.compile(r"[!-~]{1,256}")
_TIER = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_CURRENCY = re.compile(r"[A-Z]{3}")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_PATH = re.compile(r"[!-~]([ -~]{0,4094}[!-~])?")
_NO_KEY = re.compile(r"none")
_HEADER = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_HEADER_VALUE = re.compile(r"[!-~]([ -~]{0,4094}[!-~])?")
_URL = re.compile(
    r"https?://(?P<host>[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
    r"(/[A-Za-z0-9._~:-]{1,128}){0,16}/?"
)

# Farebox writes these itself, or they carry a credential, which has its own key.
_HEADERS_REFUSED = (
    *("accept-encoding", "api-key", "authorization", "connection", "content-encoding", "content-length"),
    *("content-type", "cookie", "host", "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding"),
    *("upgrade", "x-api-key"),
)

# Words of other products and of providers' price lists, and the key that they mean here.
_MEANT = {
    "prompt": "input",
    "completion": "output",
    "cache_read": "cached_input",
    "cached": "cached_input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "output_limit": "max_output_tokens",
    "model": "upstream_model",
    "provider": "upstream",
    "tiers": "service_tiers",
    "url": "base_url",
    "endpoint": "base_url",
    "key": "api_key_env",
    "env": "api_key_env",
    "timeout": "read_seconds",
}


def load_catalog(
    pricing: str | bytes,
    upstreams: str | bytes,
    names: tuple[str, str] = ("pricing.yaml", "config/upstreams.yaml"),
) -> Catalog:
    """The catalog that the two texts describe. ``names`` are the files' names for messages.

    Raises yaml_reader.ConfigError, which names every problem of both files.
    """
    pricing_problems, upstream_problems = Problems(names[0]), Problems(names[1])
    configured = _read_upstreams(read_yaml(upstreams, upstream_problems), upstream_problems)
    pricing_node = read_yaml(pricing, pricing_problems)
    offer = _Offer(pricing_node, pricing_problems, configured, upstreams_file=names[1])
    pricing_problems.raise_if_any(upstream_problems)
    return _catalog(offer, configured.upstreams)


@dataclass(frozen=True, slots=True)
class _Configured:
    """Upstreams that could be read, and the names that stand in the file (None: the file itself couldn't be read)."""

    upstreams: Mapping[str, Upstream]
    declared: frozenset[str] | None


def _read_upstreams(node: Node | None, problems: Problems) -> _Configured:
    if node is None:
        return _Configured({}, None)
    top = Section(node, (), problems, known=("upstreams",), required=("upstreams",))
    entries = top.table_of("upstreams", what="upstream", count_max=UPSTREAMS_MAX)
    upstreams: dict[str, Upstream] = {}
    for name, (at, value) in entries.items():
        path = ("upstreams", name)
        if not _NAME.fullmatch(name):
            problems.add(at, path, "expected a name of letters, digits, - and _, at most 64 characters")
        upstream = _read_upstream(value, name, path, problems)
        if upstream is not None:
            upstreams[name] = upstream
    return _Configured(upstreams, frozenset(entries) if top.table is not None else None)


def _read_upstream(node: Node, name: str, path: tuple[str, ...], problems: Problems) -> Upstream | None:
    section = Section(
        node,
        path,
        problems,
        known=(
            *("dialect", "base_url", "api_key_env", "api_key_file", "api_key"),
            *("connect_seconds", "read_seconds", *LEAVING_KEYS, "headers", "quirks"),
        ),
        required=("dialect", "base_url"),
        meant=_MEANT,
    )
    if section.table is None:
        return None
    dialect = section.text("dialect", _either(DIALECTS), expected=f"one of {', '.join(DIALECTS)}")
    url = _base_url(section)
    key_env, key_file = _key_source(section)
    default = Upstream(name="", dialect="", base_url="")
    upstream = Upstream(
        name=name,
        dialect=dialect or "",
        base_url=url or "",
        api_key_env=key_env,
        api_key_file=key_file,
        connect_seconds=_seconds(section, "connect_seconds", default.connect_seconds),
        read_seconds=_seconds(section, "read_seconds", default.read_seconds),
        headers=_headers(section),
        quirks=_quirks(section),
    )
    upstream = read_leaving(section).on_upstream(upstream)
    return upstream if dialect and url else None


def _base_url(section: Section) -> str | None:
    url = section.text(
        "base_url",
        _URL,
        expected="http:// or https://, a host and the version path (such as https://api.openai.com/v1),"
        " without user, query or fragment",
        secret=True,  # a URL that doesn't fit may carry a password
    )
    match = _URL.fullmatch(url) if url else None
    if url is None or match is None:
        return None
    if not _is_host(match["host"]):
        section.problems.add(section.node("base_url"), (*section.path, "base_url"), f"{match['host']} isn't an address")
        return None
    return url.rstrip("/")


def _is_host(host: str) -> bool:
    """Whether a host that looks like an IP address is one."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host.strip("[]"))
        elif re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _key_source(section: Section) -> tuple[str | None, str | None]:
    """Where the upstream's key comes from: exactly one of three keys says it."""
    environment = section.text(
        "api_key_env",
        _ENVIRONMENT,
        expected="the name of an environment variable that holds the key (never the key itself)",
        secret=True,
    )
    file = section.text("api_key_file", _PATH, expected="the path of a file that holds the key", secret=True)
    section.text(
        "api_key",
        _NO_KEY,
        expected="none, for an upstream that wants no key; a key never stands in this file:"
        " name its variable in api_key_env or its file in api_key_file",
        secret=True,
    )
    given = [key for key in ("api_key_env", "api_key_file", "api_key") if section.has(key)]
    if section.table is not None and len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none of them"
        expected = "expected one of api_key_env, api_key_file, or api_key: none"
        section.problems.add(section.node(given[-1]) if given else section.table, section.path, f"{expected}; {found}")
    return environment, file


def _seconds(section: Section, key: str, default: float, *, most: int = _SECONDS_MAX) -> float:
    thousandths = section.decimal(key, decimals=3, least=1, most=most * 1000, expected=f"seconds, at most {most}")
    return default if thousandths is None else thousandths / 1000


def _headers(section: Section) -> Mapping[str, str]:
    path = (*section.path, "headers")
    headers: dict[str, str] = {}
    entries = section.table_of("headers", what="header", count_max=HEADERS_MAX)
    values = Section(section.node("headers") if entries else None, path, section.problems, known=tuple(entries))
    for name, (at, _) in entries.items():
        if not _HEADER.fullmatch(name):
            section.problems.add(at, (*path, name), "expected a header's name in lower case")
        elif name in _HEADERS_REFUSED:
            section.problems.add(at, (*path, name), "is set by Farebox itself; it can't stand here")
        value = values.text(name, _HEADER_VALUE, expected="printable ASCII text on one line", secret=True)
        if value is not None:
            headers[name] = value
    return MappingProxyType(headers)


def _quirks(section: Section) -> Quirks:
    default = Quirks()
    quirks = section.section("quirks", known=("include_usage", "reasoning_outside", "cached_outside"))
    if quirks is None:
        return default
    return Quirks(
        include_usage=quirks.flag("include_usage", default=default.include_usage),
        reasoning_outside=quirks.flag("reasoning_outside"),
        cached_outside=quirks.flag("cached_outside"),
    )


class _Offer:
    """pricing.yaml, read against the upstreams that are configured."""

    def __init__(self, node: Node | None, problems: Problems, configured: _Configured, *, upstreams_file: str) -> None:
        self.routes: dict[str, Route] = {}
        self.credit_value: CreditValue | None = None
        self.offers = Offers()
        self._problems = problems
        self._configured = configured
        self._upstreams_file = upstreams_file
        self._per = 1_000
        if node is not None:
            self._read(node)

    def _read(self, node: Node) -> None:
        top = Section(
            node, (), self._problems, known=("per", "credit_value", "models", *OFFER_KEYS), required=("models",)
        )
        self._per = self._read_per(top)
        self.credit_value = self._read_credit_value(top)
        self.offers = read_offers(top)
        for model, (at, value) in top.table_of("models", what="model", count_max=MODELS_MAX).items():
            path = ("models", model)
            if not _MODEL.fullmatch(model):
                message = "expected a model's name: letters, digits and . _ : / @ + -, at most 128 characters"
                self._problems.add(at, path, message)
            self._read_model(value, model, path)

    def _read_per(self, top: Section) -> int:
        expected = "1000 or 1000000: the number of tokens that a price is for"
        per = top.whole("per", least=0, most=10**12, expected=expected, default=1_000)
        if per is not None and per not in (1_000, 1_000_000):
            self._problems.add(top.node("per"), ("per",), f"expected {expected}, found {per}")
        return per if per in (1_000, 1_000_000) else 1_000

    def _read_credit_value(self, top: Section) -> CreditValue | None:
        section = top.section("credit_value", known=("amount", "currency"), required=("amount", "currency"))
        if section is None:
            return None
        amount = section.decimal(
            "amount", decimals=6, least=1, most=10**12, expected="the money that one credit is sold for, such as 0.01"
        )
        currency = section.text("currency", _CURRENCY, expected="a currency's three letters, such as USD")
        return CreditValue(Decimal(amount or 1).scaleb(-6), currency or "")

    def _read_model(self, node: Node, model: str, path: tuple[str, ...]) -> None:
        section = Section(
            node,
            path,
            self._problems,
            known=(
                *("upstream", "upstream_model", "family", "max_output_tokens", *_PRICE_KEYS),
                *("cost", "service_tiers", *_TOOLS, "allow_store", *LEAVING_KEYS, *REASONING_KEYS),
                *("read_seconds", "max_seconds"),
            ),
            required=("upstream", "input", "output", "max_output_tokens"),
            meant=_MEANT,
        )
        if section.table is None:
            return
        upstream = self._upstream(section)
        upstream_model = section.text(
            "upstream_model",
            _UPSTREAM_MODEL,
            expected="the upstream's name for the model, at most 256 visible characters",
        )
        family = section.text("family", _either(FAMILIES), expected=f"one of {', '.join(FAMILIES)}")
        output_tokens_max = section.whole(
            "max_output_tokens",
            least=1,
            most=OUTPUT_TOKENS_MAX,
            expected="the most tokens of one answer, such as 16384",
        )
        allow_store = section.flag("allow_store")
        cost = self._cost(section)
        prices = self._prices(section)
        leaving = read_leaving(section, reasoning=True)
        read_seconds = _seconds(section, "read_seconds", upstream.read_seconds if upstream else 0.0)
        seconds_max = _seconds(section, "max_seconds", EXCHANGE_SECONDS_MAX, most=_LIFE_SECONDS_MAX)
        tools = {tool: extra for tool in _TOOLS if (extra := self._tool(section, tool)) is not None}
        if self._problems.count or upstream is None or output_tokens_max is None:
            return
        variants = _variants(prices, tools)
        route = Route(
            model=model,
            upstream=replace(upstream, read_seconds=read_seconds),
            upstream_model=upstream_model or model,
            family=family or _family(upstream_model or model, model),
            output_tokens_max=output_tokens_max,
            variants=MappingProxyType(variants),
            service_tiers=frozenset(tier for tier in prices if tier is not None),
            web_search="web_search" in tools,
            hosted_tools="hosted_tools" in tools,
            audio=variants[STANDARD].audio,
            allow_store=allow_store,
            seconds_max=seconds_max,
            cost=cost,
        )
        self.routes[model] = leaving.on_route(route)

    def _upstream(self, section: Section) -> Upstream | None:
        name = section.text("upstream", _NAME, expected=f"the name of an upstream in {self._upstreams_file}")
        declared = self._configured.declared
        if name is not None and declared is not None and name not in declared:
            guess = near_miss(name, sorted(declared))
            hint = (
                f'did you mean "{guess}"?' if guess else f"it has {shorten(', '.join(sorted(declared)) or 'none', 200)}"
            )
            message = f'{self._upstreams_file} has no upstream "{name}"; {hint}'
            self._problems.add(section.node("upstream"), (*section.path, "upstream"), message)
        return self._configured.upstreams.get(name) if name else None

    def _prices(self, section: Section) -> "dict[str | None, _PriceList]":
        """The price list of the standard tier (None) and of each further service tier."""
        standard = self._price_list(section, per_request=0)
        prices: dict[str | None, _PriceList] = {None: standard}
        for tier, (at, node) in section.table_of("service_tiers", what="service tier", count_max=TIERS_MAX).items():
            path = (*section.path, "service_tiers", tier)
            if tier in STANDARD_TIERS or tier == STANDARD:
                self._problems.add(at, path, "is the standard price, which stands at the model itself")
            elif not _TIER.fullmatch(tier):
                self._problems.add(at, path, "expected a service tier's name in lower case, such as flex or priority")
            prices[tier] = self._price_list(
                Section(node, path, self._problems, known=_PRICE_KEYS, required=("input", "output"), meant=_MEANT),
                per_request=standard.price.per_request,
            )
        return prices

    def _price_list(self, section: Section, *, per_request: int) -> "_PriceList":
        rates = {name: self._rate(section, name) for name in TOKEN_CLASSES}
        fee = self._fee(section)
        return _PriceList(
            price=_with_fallbacks(rates, per_request if fee is None else fee),
            audio=rates["audio_input"] is not None and rates["audio_output"] is not None,
        )

    def _rate(self, section: Section, key: str) -> int | None:
        """Microcredits per million tokens."""
        decimals = len(str(MICROCREDITS_PER_CREDIT * TOKENS_PER_RATE // self._per)) - 1
        return section.decimal(
            key,
            decimals=decimals,
            most=PRICE_IN_FILE_MAX * 10**decimals,
            expected=f"credits per {self._per:,} tokens, such as 0.5",
            finer="which isn't a whole number of microcredits per million tokens:"
            f" with per: {self._per} a price has at most {decimals} decimals",
        )

    def _fee(self, section: Section) -> int | None:
        """Microcredits per request."""
        return section.decimal(
            "per_request",
            decimals=_CREDIT_DECIMALS,
            most=PRICE_IN_FILE_MAX * MICROCREDITS_PER_CREDIT,
            expected="credits per request, such as 0.5",
            finer=f"which isn't a whole number of microcredits: it has at most {_CREDIT_DECIMALS} decimals",
        )

    def _tool(self, section: Section, key: str) -> "_Tool | None":
        tool = section.section(key, known=("per_request", "input_tokens"), required=("per_request",))
        if tool is None:
            return None
        tokens = tool.whole(
            "input_tokens",
            least=0,
            most=EXTRA_INPUT_TOKENS_MAX,
            expected="the most tokens that the tool may add to the prompt",
            default=EXTRA_INPUT_TOKENS,
        )
        return _Tool(per_request=self._fee(tool) or 0, input_tokens=tokens or 0)

    def _cost(self, section: Section) -> Price | None:
        """What the upstream charges, turned into microcredits by the credit's value and rounded up."""
        cost = section.section("cost", known=_PRICE_KEYS, required=("input", "output"))
        if cost is None:
            return None
        if self.credit_value is None:
            self._problems.add(
                section.node("cost"),
                cost.path,
                "needs credit_value at the top of the file, to compare money with credits",
            )
        worth = Fraction(self.credit_value.amount) if self.credit_value else Fraction(1)
        rates = {name: self._money(cost, name, Fraction(TOKENS_PER_RATE, self._per) / worth) for name in TOKEN_CLASSES}
        return _with_fallbacks(rates, self._money(cost, "per_request", 1 / worth) or 0)

    def _money(self, section: Section, key: str, credits_per_money: Fraction) -> int | None:
        unit = "request" if key == "per_request" else f"{self._per:,} tokens"
        amount = section.decimal(
            key,
            decimals=_MONEY_DECIMALS,
            most=PRICE_IN_FILE_MAX * 10**_MONEY_DECIMALS,
            expected=f"money per {unit}, such as 0.0025",
        )
        if amount is None:
            return None
        exact = Fraction(amount, 10**_MONEY_DECIMALS) * credits_per_money * MICROCREDITS_PER_CREDIT
        return -(-exact.numerator // exact.denominator)


@dataclass(frozen=True, slots=True)
class _PriceList:
    price: Price
    audio: bool


@dataclass(frozen=True, slots=True)
class _Tool:
    per_request: int
    input_tokens: int


def _with_fallbacks(rates: Mapping[str, int | None], per_request: int) -> Price:
    given = {name: rate for name, rate in rates.items() if rate is not None}
    fallback = {
        **dict.fromkeys(("input", *_INPUT_CLASSES), given.get("input", 0)),
        **dict.fromkeys(("output", *_OUTPUT_CLASSES), given.get("output", 0)),
    }
    return Price(**{**fallback, **given}, per_request=per_request)


def _variants(prices: Mapping[str | None, _PriceList], tools: Mapping[str, _Tool]) -> dict[str, Variant]:
    """Every combination of a tier and the priced tools: the ledger's audit recomputes charges from these alone."""
    variants: dict[str, Variant] = {}
    searching, hosting = ((False, True) if tool in tools else (False,) for tool in _TOOLS)
    for (tier, listed), web_search, hosted_tools in product(prices.items(), searching, hosting):
        used = [tools[tool] for tool, taken in zip(_TOOLS, (web_search, hosted_tools), strict=True) if taken]
        name = variant_name(tier, web_search=web_search, hosted_tools=hosted_tools)
        variants[name] = Variant(
            name=name,
            price=replace(listed.price, per_request=listed.price.per_request + sum(tool.per_request for tool in used)),
            extra_input_tokens=sum(tool.input_tokens for tool in used),
            audio=listed.audio,
        )
    return variants


def _family(upstream_model: str, model: str) -> str:
    family = family_of(upstream_model)
    return family_of(model) if family == UNKNOWN else family


def _catalog(offer: _Offer, upstreams: Mapping[str, Upstream]) -> Catalog:
    content = {"classes": TOKEN_CLASSES, "routes": {model: _priced(route) for model, route in offer.routes.items()}}
    body = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Catalog(
        version=hashlib.sha256(body.encode("ascii")).hexdigest(),
        body=body,
        routes=MappingProxyType(dict(offer.routes)),
        upstreams=MappingProxyType(dict(upstreams)),
        credit_value=offer.credit_value,
        offers=offer.offers,
    )


def _priced(route: Route) -> dict[str, object]:
    """What the ledger keeps of a route: all that a charge is computed from, and what a receipt or a margin names."""
    variants = {
        name: {"rates": variant.price.rates(), "per_request": variant.price.per_request}
        for name, variant in route.variants.items()
    }
    cost = {"rates": route.cost.rates(), "per_request": route.cost.per_request} if route.cost else None
    return {
        "upstream": route.upstream.name,
        "upstream_model": route.upstream_model,
        "output_tokens_max": route.output_tokens_max,
        "variants": variants,
        **({"cost": cost} if cost else {}),
    }


def _either(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)))
