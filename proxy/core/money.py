"""Credits: the unit, and its only ways in from text and out to text.

One credit is 1,000,000 microcredits. Inside Farebox every amount is an ``int`` of microcredits; decimal text exists
only at the edges (pricing.yaml, the CLI, JSON). No float ever holds money.
"""

import re
from decimal import Decimal

__all__ = ["AMOUNT_MAX", "MICROCREDITS_PER_CREDIT", "MoneyError", "format_credits", "parse_credits"]

MICROCREDITS_PER_CREDIT = 1_000_000

# A hundred billion credits. It leaves room in a signed 64-bit column to add ninety such amounts without overflow.
AMOUNT_MAX = 100_000_000_000 * MICROCREDITS_PER_CREDIT

_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?\Z", re.ASCII)


class MoneyError(ValueError):
    """The text is not an amount of credits; the message says what was expected."""


def parse_credits(text: str) -> int:
    """Microcredits for decimal credits such as ``"12.5"``.

    At most six decimals, no sign, no exponent, at most ``AMOUNT_MAX``. Raises MoneyError.
    """
    if not _DECIMAL.match(text):
        raise MoneyError(
            f"{text[:40]!r} is not an amount of credits: expected a decimal such as 12.5, with at most 6 decimals"
        )
    amount = int(Decimal(text) * MICROCREDITS_PER_CREDIT)
    if amount > AMOUNT_MAX:
        raise MoneyError(f"{text[:40]!r} is above the largest amount, {format_credits(AMOUNT_MAX)} credits")
    return amount


def format_credits(amount: int) -> str:
    """Decimal credits for microcredits, exact, without trailing zeros: 1_500_000 -> ``"1.5"``, 0 -> ``"0"``."""
    whole, rest = divmod(abs(amount), MICROCREDITS_PER_CREDIT)
    sign = "-" if amount < 0 else ""
    if not rest:
        return f"{sign}{whole}"
    return f"{sign}{whole}.{rest:06d}".rstrip("0")
