"""Money in minor units: how many decimals a currency has at Stripe, and what amounts it takes.

Stripe's API takes amounts as integers of a currency's minor unit, with these exceptions (docs.stripe.com/currencies,
"zero-decimal currencies", "three-decimal currencies" and "special cases"): sixteen currencies have no minor unit; five
have three decimals, of which the last must be 0; two that have none any more are still written with two, which must be
00. HUF and TWD have two in payments, and are whole in payouts alone, which Farebox doesn't make.
"""

import re
from decimal import Decimal

__all__ = [
    "MONEY_MAX",
    "CurrencyError",
    "decimals_of",
    "format_amount",
    "format_money",
    "is_currency",
    "parse_money",
    "step_of",
]

# 99,999,999 is the most that Stripe takes in most currencies; some (IDR, VND) go higher. It is Stripe that refuses.
MONEY_MAX = 10**12

_ZERO = frozenset(
    ["BIF", "CLP", "DJF", "GNF", "JPY", "KMF", "KRW", "MGA", "PYG", "RWF", "VND", "VUV", "XAF", "XOF", "XPF"]
)
_THREE = frozenset(("BHD", "JOD", "KWD", "OMR", "TND"))
# Written with two decimals for the sake of older programs, though their money has none.
_WHOLE = frozenset(("ISK", "UGX"))

_CODE = re.compile(r"[A-Za-z]{3}\Z", re.ASCII)
_AMOUNT = re.compile(r"(0|[1-9][0-9]{0,12})(?:\.([0-9]{1,3}))?\Z", re.ASCII)


class CurrencyError(ValueError):
    """The text is no amount of that currency; the message says what was expected."""


def is_currency(code: str) -> bool:
    """Whether it has the form of a currency's code, in whatever case. Which ones there are is Stripe's to say."""
    return _CODE.match(code) is not None


def decimals_of(code: str) -> int:
    """How many decimals the amounts of the currency have at Stripe: its minor unit is 10**-decimals."""
    upper = code.upper()
    return 0 if upper in _ZERO else 3 if upper in _THREE else 2


def step_of(code: str) -> int:
    """Of what number, in minor units, every amount has to be a multiple."""
    upper = code.upper()
    return 100 if upper in _WHOLE else 10 if upper in _THREE else 1


def parse_money(text: str, code: str) -> int:
    """Minor units for decimal money such as ``"10.00"``: JPY "500" -> 500, USD "5" -> 500, KWD "5.12" -> 5120.

    No sign, no exponent, no more decimals than the currency's money has. Raises CurrencyError.
    """
    match = _AMOUNT.match(text)
    decimals, step = decimals_of(code), step_of(code)
    if match is None or len((match[2] or "").rstrip("0")) > decimals:
        raise CurrencyError(f"{text[:40]!r} is not an amount of {code.upper()}: expected a decimal {_such_as(code)}")
    amount = int(Decimal(text).scaleb(decimals))
    if amount % step:
        raise CurrencyError(f"{text[:40]!r} is finer than {code.upper()} goes: expected a decimal {_such_as(code)}")
    if amount > MONEY_MAX:
        raise CurrencyError(f"{text[:40]!r} is above the largest amount, {format_money(MONEY_MAX, code)}")
    return amount


def format_money(amount: int, code: str) -> str:
    """Decimal money with all its decimals, and the code: 1050 -> ``"10.50 USD"``, 500 -> ``"500 JPY"``."""
    return f"{format_amount(amount, code)} {code.upper()}"


def format_amount(amount: int, code: str) -> str:
    """As ``format_money``, without the code."""
    decimals = decimals_of(code)
    if not decimals:
        return str(amount)
    whole, rest = divmod(abs(amount), 10**decimals)
    return f"{'-' if amount < 0 else ''}{whole}.{rest:0{decimals}d}"


def _such_as(code: str) -> str:
    step, decimals = step_of(code), decimals_of(code)
    places = decimals - (len(str(step)) - 1)
    return f"such as {'10.5' if places == 1 else f'10.{5 * 10 ** (places - 1)}' if places else '10'}"
