"""Minor units as Stripe counts them."""

import pytest

from proxy.core.currencies import CurrencyError, format_amount, format_money, is_currency, parse_money


@pytest.mark.parametrize(
    ("text", "code", "minor"),
    [
        ("10", "USD", 1_000),
        ("10.5", "usd", 1_050),
        ("0.01", "EUR", 1),
        ("10.500", "EUR", 1_050),
        ("500", "JPY", 500),
        ("500.0", "JPY", 500),
        ("5.12", "KWD", 5_120),
        ("5", "KWD", 5_000),
        ("5", "ISK", 500),
        ("7", "UGX", 700),
        ("10.45", "HUF", 1_045),
        ("10.45", "TWD", 1_045),
        ("0", "USD", 0),
        ("10000000000", "USD", 10**12),
    ],
)
def test_decimal_money_is_minor_units(text: str, code: str, minor: int) -> None:
    assert parse_money(text, code) == minor
    assert parse_money(format_amount(minor, code), code) == minor


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("10.005", "USD", "such as 10.50"),
        ("10.5", "JPY", "such as 10"),
        ("5.124", "KWD", "such as 10.50"),
        ("5.5", "ISK", "such as 10"),
        ("-1", "USD", "such as 10.50"),
        ("1e3", "USD", "such as"),
        ("1,000", "USD", "such as"),
        ("", "USD", "such as"),
        ("01", "USD", "such as"),
        ("٣", "USD", "such as"),
        ("10000000000.01", "USD", "above the largest amount, 10000000000.00 USD"),
        ("1" * 30, "USD", "such as"),
    ],
)
def test_anything_else_says_what_was_expected(text: str, code: str, expected: str) -> None:
    with pytest.raises(CurrencyError, match=expected):
        parse_money(text, code)


@pytest.mark.parametrize(
    ("minor", "code", "text"),
    [
        (1_050, "usd", "10.50 USD"),
        (5, "USD", "0.05 USD"),
        (500, "jpy", "500 JPY"),
        (5_120, "KWD", "5.120 KWD"),
        (-1_050, "EUR", "-10.50 EUR"),
        (0, "EUR", "0.00 EUR"),
    ],
)
def test_money_is_written_with_all_its_decimals(minor: int, code: str, text: str) -> None:
    assert format_money(minor, code) == text


def test_a_code_is_three_letters() -> None:
    assert is_currency("usd")
    assert not any(map(is_currency, ["", "us", "usdt", "u5d", "ußd", "usd\n"]))
