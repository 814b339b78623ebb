"""What another catalog would change: for ``farebox pricing check``, so that an edit can be read before it is saved."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from proxy.core.catalog import Catalog, Route, Upstream, variant_name
from proxy.core.currencies import decimals_of, format_money
from proxy.core.key_path import key_path
from proxy.core.money import format_credits
from proxy.core.packs import CustomAmounts, Offers, Pack, Plan
from proxy.core.pricing import Price, format_rate
from proxy.core.usage import TOKEN_CLASSES

__all__ = ["CatalogDiff", "Change", "Entry", "Margin", "compare"]

_PRICES = (*TOKEN_CLASSES, "per_request")

# A price that more than doubles, or falls below half, is more often a slip of the keyboard than a decision.
_JUMP = 2

_PER_TOKENS = "credits per 1,000 tokens"
_PER_REQUEST = "credits per request"
_CREDITS = "credits"
_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Change:
    """One value that is another afterwards, as text. None: there was, or will be, no such thing."""

    key: str
    before: str | None
    after: str | None
    unit: str = ""
    warning: str | None = None

    def __str__(self) -> str:
        values = [value for value in (self.before, self.after or "none") if value is not None]
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.key}: {' -> '.join(values)}{unit}{_marked(self.warning)}"


@dataclass(frozen=True, slots=True)
class Margin:
    """What is left of a price when the upstream is paid: ``percent`` of the price, rounded down; None where it is 0."""

    key: str
    price: str
    cost: str
    percent: int | None
    unit: str = _PER_TOKENS
    warning: str | None = None

    def __str__(self) -> str:
        margin = "free" if self.percent is None else f"margin {self.percent} %"
        return f"{self.key}: {margin} (sold at {self.price}, costs {self.cost} {self.unit}){_marked(self.warning)}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A model, an upstream or something that is sold for money: new (+), gone (-), changed (~) or as it was (=, listed
    where it has a margin to show)."""

    kind: Literal["model", "upstream", "pack", "custom amounts", "plan"]
    name: str
    sign: Literal["+", "-", "~", "="]
    changes: tuple[Change, ...] = ()
    margins: tuple[Margin, ...] = ()

    def lines(self) -> list[str]:
        title = self.name if self.kind == "model" else f"{self.kind} {self.name}"
        return [f"{self.sign} {title}", *(f"    {one}" for one in (*self.changes, *self.margins))]


@dataclass(frozen=True, slots=True)
class CatalogDiff:
    """Models first, then upstreams, packs, amounts and plans, by name.

    ``version_before`` is None where there was no catalog to compare with.
    """

    version_before: str | None
    version_after: str
    entries: tuple[Entry, ...]

    @property
    def changes_anything(self) -> bool:
        return any(entry.sign != "=" for entry in self.entries)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What deserves a second look, each with the name of its model."""
        changes = [(entry, str(one)) for entry in self.entries for one in entry.changes if one.warning]
        margins = [(entry, str(one)) for entry in self.entries for one in entry.margins if one.warning]
        return tuple(f"{entry.name}: {line}" for entry, line in changes + margins)

    def render(self) -> str:
        """Lines for a terminal."""
        lines = [line for entry in self.entries for line in entry.lines()]
        return "\n".join(lines if self.changes_anything else ["Nothing would change.", *lines])


def compare(before: Catalog | None, after: Catalog) -> CatalogDiff:
    """What would change if ``after`` took the place of ``before``, and the margins afterwards where costs are given."""
    routes = before.routes if before else {}
    upstreams = before.upstreams if before else {}
    entries = [_model(name, routes.get(name), after.routes.get(name)) for name in _names(routes, after.routes)]
    entries += [
        _upstream(name, upstreams.get(name), after.upstreams.get(name)) for name in _names(upstreams, after.upstreams)
    ]
    entries += _offers(before.offers if before else Offers(), after.offers)
    return CatalogDiff(
        version_before=before.version if before else None,
        version_after=after.version,
        entries=tuple(entry for entry in entries if entry.sign != "=" or entry.margins),
    )


@dataclass(frozen=True, slots=True)
class _Fact:
    """A value to compare: an amount (microcredits, or a rate), or text."""

    value: int | str
    unit: str = ""

    def __str__(self) -> str:
        if isinstance(self.value, str):
            return self.value
        return _SHOWN[self.unit](self.value)


_SHOWN = {
    _PER_TOKENS: format_rate,
    _PER_REQUEST: format_credits,
    _CREDITS: format_credits,
    **dict.fromkeys(("tokens", "a second", "days"), "{:,}".format),
}


def _model(name: str, before: Route | None, after: Route | None) -> Entry:
    changes = tuple(_changes(_route_facts(before, after), _route_facts(after, before))) if after else ()
    margins = tuple(_margins(after)) if after else ()
    return Entry("model", name, _sign(before, after, changes), changes, margins)


def _upstream(name: str, before: Upstream | None, after: Upstream | None) -> Entry:
    changes = tuple(_changes(_upstream_facts(before), _upstream_facts(after))) if after else ()
    return Entry("upstream", name, _sign(before, after, changes), changes)


def _offers(before: Offers, after: Offers) -> Iterator[Entry]:
    """What is sold for money, in the words of pricing.yaml."""
    for name in _names(before.packs, after.packs):
        yield _sold("pack", name, *(_pack_facts(offers.packs.get(name)) for offers in (before, after)))
    for name in _names(before.custom_amounts, after.custom_amounts):
        facts = (_amounts_facts(offers.custom_amounts.get(name)) for offers in (before, after))
        yield _sold("custom amounts", name.upper(), *facts)
    for name in _names(before.plans, after.plans):
        yield _sold("plan", name, *(_plan_facts(offers.plans.get(name)) for offers in (before, after)))


def _sold(
    kind: Literal["pack", "custom amounts", "plan"], name: str, before: dict[str, _Fact], after: dict[str, _Fact]
) -> Entry:
    changes = tuple(_changes(before, after)) if after else ()
    return Entry(kind, name, _sign(before or None, after or None, changes), changes)


def _pack_facts(pack: Pack | None) -> dict[str, _Fact]:
    if pack is None:
        return {}
    facts = {
        "name": _Fact(pack.name),
        "credits": _Fact(pack.credits, _CREDITS),
        "price": _Fact(format_money(pack.price, pack.currency)),
        f"credits for 1 {pack.currency.upper()}": _Fact(_for_one(pack.credits, pack.price, pack.currency), _CREDITS),
    }
    if pack.bonus:
        facts["bonus"] = _Fact(pack.bonus, _CREDITS)
    for key, seconds in (("expires_days", pack.credits_seconds), ("bonus_expires_days", pack.bonus_seconds)):
        if seconds is not None:
            facts[key] = _Fact(seconds // _DAY_SECONDS, "days")
    return facts


def _amounts_facts(amounts: CustomAmounts | None) -> dict[str, _Fact]:
    if amounts is None:
        return {}
    code = amounts.currency
    facts = {
        "least": _Fact(format_money(amounts.least, code)),
        "most": _Fact(format_money(amounts.most, code)),
        "credits_per_unit": _Fact(amounts.credits_per_minor * 10 ** decimals_of(code), _CREDITS),
    }
    if amounts.credits_seconds is not None:
        facts["expires_days"] = _Fact(amounts.credits_seconds // _DAY_SECONDS, "days")
    return facts


def _plan_facts(plan: Plan | None) -> dict[str, _Fact]:
    if plan is None:
        return {}
    return {
        "name": _Fact(plan.name),
        "credits": _Fact(plan.credits, _CREDITS),
        "price": _Fact(format_money(plan.price, plan.currency)),
        "grace_days": _Fact(plan.grace_seconds // _DAY_SECONDS, "days"),
        "rollover": _Fact(str(plan.rollover).lower()),
    }


def _for_one(credits: int, price: int, currency: str) -> int:
    """Microcredits for one unit of money, rounded down: a slip in either of the two shows in it."""
    unit: int = 10 ** decimals_of(currency)
    return credits * unit // price


def _sign(before: object, after: object, changes: tuple[Change, ...]) -> Literal["+", "-", "~", "="]:
    if before is None:
        return "+"
    if after is None:
        return "-"
    return "~" if changes else "="


def _changes(before: Mapping[str, _Fact], after: Mapping[str, _Fact]) -> Iterator[Change]:
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = before.get(key), after.get(key)
        if old != new:
            unit = new.unit if new else ""
            yield Change(
                key, None if old is None else str(old), None if new is None else str(new), unit, _warning(old, new)
            )


def _warning(old: _Fact | None, new: _Fact | None) -> str | None:
    """A warning where a price jumps."""
    if old is None or new is None or isinstance(old.value, str) or isinstance(new.value, str):
        return None
    if new.unit not in (_PER_TOKENS, _PER_REQUEST, _CREDITS):
        return None
    if not new.value:
        return "is free of charge afterwards"
    if not old.value:
        return "was free of charge"
    if new.value > _JUMP * old.value:
        return "more than doubles"
    return "falls below half" if old.value > _JUMP * new.value else None


def _route_facts(route: Route | None, beside: Route | None) -> dict[str, _Fact]:
    """What a route says, in the words of pricing.yaml, to be compared with the one ``beside`` it."""
    if route is None:
        return {}
    facts = {
        "upstream": _Fact(route.upstream.name),
        "upstream_model": _Fact(route.upstream_model),
        **_price_facts(route.standard.price, beside.standard.price if beside else None),
        "max_output_tokens": _Fact(route.output_tokens_max, "tokens"),
        "family": _Fact(route.family),
        "audio": _Fact("served" if route.audio else "refused"),
        "allow_store": _Fact(str(route.allow_store).lower()),
        "read_seconds": _Fact(f"{route.upstream.read_seconds:g}"),
        "max_seconds": _Fact(f"{route.seconds_max:g}"),
        **_leaving_facts(route),
    }
    for tier in sorted(route.service_tiers):
        variant = route.variants[tier]
        other = beside.variants.get(tier) if beside else None
        prices = _price_facts(variant.price, other.price if other else None)
        facts |= {key_path("service_tiers", tier, key): fact for key, fact in prices.items()}
        facts[key_path("service_tiers", tier, "audio")] = _Fact("served" if variant.audio else "refused")
    for tool in ("web_search", "hosted_tools"):
        name = variant_name(None, web_search=tool == "web_search", hosted_tools=tool == "hosted_tools")
        if name in route.variants:
            variant = route.variants[name]
            fee = variant.price.per_request - route.standard.price.per_request
            facts[f"{tool}.per_request"] = _Fact(fee, _PER_REQUEST)
            facts[f"{tool}.input_tokens"] = _Fact(variant.extra_input_tokens, "tokens")
    if route.cost is not None:
        costs = _price_facts(route.cost, beside.cost if beside else None)
        facts |= {f"cost.{key}": fact for key, fact in costs.items()}
    return facts


def _leaving_facts(route: Route) -> dict[str, _Fact]:
    facts = {
        "on_disconnect": _Fact(route.on_disconnect),
        "drain_seconds": _Fact(f"{route.drain_seconds:g}"),
    }
    if route.drain_tokens is not None:
        facts["drain_tokens"] = _Fact(route.drain_tokens, "tokens")
    if route.hidden_reasoning:
        facts["reasoning_tokens_per_second"] = _Fact(route.reasoning_tokens_per_second, "a second")
    return facts


def _price_facts(price: Price, beside: Price | None) -> dict[str, _Fact]:
    """The prices that say something: what costs as usual, here and in the one ``beside`` it, is left out."""
    facts = {}
    for name in _PRICES:
        one, other = (getattr(each, name) - _usual(each, name) for each in (price, beside or price))
        if name in ("input", "output") or one or other:
            facts[name] = _Fact(getattr(price, name), _unit(name))
    return facts


def _usual(price: Price, name: str) -> int:
    """What pricing.yaml makes of a price that it doesn't give."""
    if name == "per_request":
        return 0
    return price.output if name in ("output", "reasoning", "audio_output") else price.input


def _unit(name: str) -> str:
    return _PER_REQUEST if name == "per_request" else _PER_TOKENS


def _upstream_facts(upstream: Upstream | None) -> dict[str, _Fact]:
    """Headers are compared but not shown: one may carry a credential."""
    if upstream is None:
        return {}
    facts = {}
    for field in fields(upstream):
        value = getattr(upstream, field.name)
        if isinstance(value, float):
            facts[field.name] = _Fact(f"{value:g}")
        elif isinstance(value, int | str) and field.name != "name":
            facts[field.name] = _Fact(str(value))
    for field in fields(upstream.quirks):
        facts[f"quirks.{field.name}"] = _Fact(str(getattr(upstream.quirks, field.name)).lower())
    if upstream.headers:
        digest = hashlib.sha256(repr(sorted(upstream.headers.items())).encode()).hexdigest()
        facts["headers"] = _Fact(f"{', '.join(sorted(upstream.headers))} (values {digest[:8]})")
    return facts


def _margins(route: Route) -> Iterator[Margin]:
    if route.cost is None:
        return
    costs = _price_facts(route.cost, route.standard.price)
    for key, price in _price_facts(route.standard.price, route.cost).items():
        yield _margin(key, price, costs[key])


def _margin(key: str, price: _Fact, cost: _Fact) -> Margin:
    sold, paid = int(price.value), int(cost.value)
    percent = 100 * (sold - paid) // sold if sold else None
    return Margin(key, str(price), str(cost), percent, price.unit, "sold below cost" if paid > sold else None)


def _names(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return sorted(before.keys() | after.keys())


def _marked(warning: str | None) -> str:
    return f"  ! {warning}" if warning else ""
