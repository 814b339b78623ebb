"""What is sold for money: packs of credits, amounts that a customer chooses, and subscriptions' plans.

They stand in pricing.yaml beside the models, and are no part of the price version: an order copies what it sells.
Credits are microcredits, prices are minor units of their currency, before tax.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from proxy.core.config_fields import Section
from proxy.core.currencies import decimals_of, format_money, step_of
from proxy.core.money import AMOUNT_MAX, format_credits
from proxy.core.yaml_reader import Node

__all__ = ["OFFER_KEYS", "CustomAmounts", "Offers", "Pack", "Plan", "read_offers"]

OFFER_KEYS = ("packs", "custom_amounts", "plans")

PACKS_MAX = 200
CURRENCIES_MAX = 50
PLANS_MAX = 500
NAME_CHARS_MAX = 100
DAYS_MAX = 3_650
GRACE_DAYS = 3
GRACE_DAYS_MAX = 90
# In whole units of money (dollars, yen). Stripe's own limits are lower for most currencies.
MONEY_IN_FILE_MAX = 100_000_000
CREDITS_PER_UNIT_MAX = 1_000_000

_CREDIT_DECIMALS = 6
_DAY_SECONDS = 86_400

_PACK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PRICE_ID = re.compile(r"price_[A-Za-z0-9]{1,250}")
_CURRENCY = re.compile(r"[A-Z]{3}")
_LABEL = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,100}")

_MEANT = {"amount": "price", "cost": "price", "promo": "bonus", "expires": "expires_days", "title": "name"}


@dataclass(frozen=True, slots=True)
class Pack:
    """So many credits for one price, and maybe a bonus.

    ``credits_seconds``, ``bonus_seconds``: how long they last from the payment on; None: for ever, a bonus as long as
    the credits.
    """

    id: str
    name: str
    credits: int
    price: int
    currency: str
    """In lower case, as Stripe writes it."""
    bonus: int = 0
    credits_seconds: int | None = None
    bonus_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class CustomAmounts:
    """Any amount of one currency from ``least`` to ``most`` (minor units), at one rate.

    ``credits_per_minor``: microcredits for each minor unit, a whole number.
    """

    currency: str
    least: int
    most: int
    credits_per_minor: int
    credits_seconds: int | None = None

    def credits_for(self, amount: int) -> int:
        """Microcredits for so many minor units. Raises ValueError outside the limits or between the steps."""
        if not self.least <= amount <= self.most:
            low, high = format_money(self.least, self.currency), format_money(self.most, self.currency)
            raise ValueError(f"must be from {low} to {high}")
        if amount % step_of(self.currency):
            raise ValueError(f"must be a multiple of {format_money(step_of(self.currency), self.currency)}")
        return amount * self.credits_per_minor


@dataclass(frozen=True, slots=True)
class Plan:
    """The credits that each paid invoice of a subscription brings for one of Stripe's prices.

    They last until the invoice's period ends and ``grace_seconds`` more; with ``rollover`` they don't expire.
    """

    price_id: str
    name: str
    credits: int
    price: int
    currency: str
    grace_seconds: int
    rollover: bool = False


@dataclass(frozen=True, slots=True)
class Offers:
    """All that is sold for money: packs by id, amounts by currency (lower case), plans by Stripe's price id."""

    packs: Mapping[str, Pack] = field(default_factory=lambda: MappingProxyType({}))
    custom_amounts: Mapping[str, CustomAmounts] = field(default_factory=lambda: MappingProxyType({}))
    plans: Mapping[str, Plan] = field(default_factory=lambda: MappingProxyType({}))


def read_offers(top: Section) -> Offers:
    """What pricing.yaml sells for money; what is wrong is noted among the section's problems."""
    packs: dict[str, Pack] = {}
    for id, (at, node) in top.table_of("packs", what="pack", count_max=PACKS_MAX).items():
        if not _PACK.fullmatch(id):
            expected = "expected a pack's id: letters, digits, - and _, at most 64 characters"
            top.problems.add(at, ("packs", id), expected)
        if (pack := _pack(top, id, node)) is not None:
            packs[id] = pack
    amounts: dict[str, CustomAmounts] = {}
    for code, (at, node) in top.table_of("custom_amounts", what="currency", count_max=CURRENCIES_MAX).items():
        if not _CURRENCY.fullmatch(code):
            top.problems.add(at, ("custom_amounts", code), "expected a currency's three letters, such as USD")
        elif (custom := _custom_amounts(top, code, node)) is not None:
            amounts[custom.currency] = custom
    plans: dict[str, Plan] = {}
    for price_id, (at, node) in top.table_of("plans", what="plan", count_max=PLANS_MAX).items():
        if not _PRICE_ID.fullmatch(price_id):
            top.problems.add(at, ("plans", price_id), "expected the id of one of Stripe's prices, such as price_1Abc")
        if (plan := _plan(top, price_id, node)) is not None:
            plans[price_id] = plan
    return Offers(MappingProxyType(packs), MappingProxyType(amounts), MappingProxyType(plans))


def _pack(top: Section, id: str, node: Node) -> Pack | None:
    section = Section(
        node,
        ("packs", id),
        top.problems,
        known=("name", "credits", "price", "currency", "bonus", "expires_days", "bonus_expires_days"),
        required=("credits", "price", "currency"),
        meant=_MEANT,
    )
    name, credits = _name(section), _credits(section, "credits")
    price, currency = _price(section)
    bonus = _credits(section, "bonus")
    credits_seconds, bonus_seconds = _days(section, "expires_days"), _days(section, "bonus_expires_days")
    if bonus_seconds is not None and not section.has("bonus"):
        section.problems.add(
            section.node("bonus_expires_days"), (*section.path, "bonus_expires_days"), "there is no bonus to expire"
        )
    if credits is None or price is None or currency is None:
        return None
    return Pack(
        id=id,
        name=name or f"{format_credits(credits)} credits",
        credits=credits,
        price=price,
        currency=currency,
        bonus=bonus or 0,
        credits_seconds=credits_seconds,
        bonus_seconds=bonus_seconds,
    )


def _custom_amounts(top: Section, code: str, node: Node) -> CustomAmounts | None:
    section = Section(
        node,
        ("custom_amounts", code),
        top.problems,
        known=("least", "most", "credits_per_unit", "expires_days"),
        required=("least", "most", "credits_per_unit"),
        meant={"min": "least", "max": "most", "minimum": "least", "maximum": "most", "rate": "credits_per_unit"},
    )
    least, most = _money(section, "least", code), _money(section, "most", code)
    decimals = _CREDIT_DECIMALS - decimals_of(code)
    rate = section.decimal(
        "credits_per_unit",
        decimals=decimals,
        least=1,
        most=CREDITS_PER_UNIT_MAX * 10**decimals,
        expected=f"the credits that 1 {code} buys, such as 100",
        finer=f"which isn't a whole number of microcredits for the smallest amount of {code}: it has at most {decimals}"
        " decimals",
    )
    seconds = _days(section, "expires_days")
    if least is not None and most is not None and least > most:
        section.problems.add(section.node("most"), (*section.path, "most"), "expected no less than least")
    if least is None or most is None or rate is None:
        return None
    return CustomAmounts(code.lower(), least, most, rate, seconds)


def _plan(top: Section, price_id: str, node: Node) -> Plan | None:
    section = Section(
        node,
        ("plans", price_id),
        top.problems,
        known=("name", "credits", "price", "currency", "grace_days", "rollover"),
        required=("credits", "price", "currency"),
        meant=_MEANT,
    )
    name, credits = _name(section), _credits(section, "credits")
    price, currency = _price(section)
    expected = f"whole days, at most {GRACE_DAYS_MAX}"
    grace = section.whole("grace_days", least=0, most=GRACE_DAYS_MAX, expected=expected, default=GRACE_DAYS)
    rollover = section.flag("rollover")
    if credits is None or price is None or currency is None:
        return None
    return Plan(
        price_id=price_id,
        name=name or price_id,
        credits=credits,
        price=price,
        currency=currency,
        grace_seconds=(grace or 0) * _DAY_SECONDS,
        rollover=rollover,
    )


def _name(section: Section) -> str | None:
    return section.text("name", _LABEL, expected=f"a name that customers see, at most {NAME_CHARS_MAX} characters")


def _credits(section: Section, key: str) -> int | None:
    """Microcredits."""
    return section.decimal(
        key,
        decimals=_CREDIT_DECIMALS,
        least=1,
        most=AMOUNT_MAX,
        expected="credits, such as 1000",
        finer=f"which isn't a whole number of microcredits: it has at most {_CREDIT_DECIMALS} decimals",
    )


def _price(section: Section) -> tuple[int | None, str | None]:
    """Minor units, and their currency in lower case."""
    code = section.text("currency", _CURRENCY, expected="a currency's three letters, such as USD")
    price = _money(section, "price", code or "USD")
    return price, None if code is None else code.lower()


def _money(section: Section, key: str, code: str) -> int | None:
    """Minor units of an amount that Stripe takes in this currency."""
    decimals, step = decimals_of(code), step_of(code)
    amount = section.decimal(
        key,
        decimals=decimals,
        least=1,
        most=MONEY_IN_FILE_MAX * 10**decimals,
        expected=f"money, such as {format_money(10 * 10**decimals, code)} without its currency",
        finer=f"finer than {code} goes",
    )
    if amount is not None and amount % step:
        path = (*section.path, key)
        section.problems.add(section.node(key), path, f"expected a multiple of {format_money(step, code)}")
        return None
    return amount


def _days(section: Section, key: str) -> int | None:
    """Seconds."""
    days = section.whole(key, least=1, most=DAYS_MAX, expected=f"whole days, at most {DAYS_MAX}")
    return None if days is None else days * _DAY_SECONDS
