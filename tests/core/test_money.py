"""Credits: decimal text at the edges, whole microcredits inside, nothing lost between them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.money import AMOUNT_MAX, MoneyError, format_credits, parse_credits


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1", 1_000_000), ("12.5", 12_500_000), ("0.000001", 1), ("0", 0), ("007.50", 7_500_000), ("1.0", 1_000_000)],
)
def test_decimal_text_becomes_microcredits(text: str, amount: int) -> None:
    assert parse_credits(text) == amount


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "1 ",
            " 1",
            "-1",
            "+1",
            ".5",
            "5.",
            "1e3",
            "1_000",
            "1,5",
            "0x10",
            "NaN",
            "inf",
            "1.0000001",
            "1.5.5",
        ),
        *("٣", "1\n", "½", "one", "\x00", "1\x00", "\ud800", "9" * 13, "9" * 5000, "1." + "0" * 5000),
    ],
)
def test_anything_else_is_refused_with_a_short_message(text: str) -> None:
    with pytest.raises(MoneyError) as error:
        parse_credits(text)
    assert len(str(error.value)) < 300


def test_amounts_are_bounded() -> None:
    assert parse_credits(format_credits(AMOUNT_MAX)) == AMOUNT_MAX
    with pytest.raises(MoneyError, match="above the largest amount, 100000000000 credits"):
        parse_credits("100000000000.000001")


def test_ninety_of_the_largest_amount_fit_a_signed_64_bit_column() -> None:
    assert 90 * AMOUNT_MAX < 2**63


@given(st.integers(0, AMOUNT_MAX))
def test_an_amount_goes_out_and_comes_back(amount: int) -> None:
    assert parse_credits(format_credits(amount)) == amount


@given(st.integers(-AMOUNT_MAX, AMOUNT_MAX))
def test_what_is_shown_is_exact_plain_and_short(amount: int) -> None:
    shown = format_credits(amount)
    assert Decimal(shown) * 1_000_000 == amount
    assert "E" not in shown
    assert shown != "-0"
    assert not (shown.endswith("0") and "." in shown)


@pytest.mark.parametrize(("amount", "shown"), [(1_500_000, "1.5"), (0, "0"), (-1, "-0.000001"), (10_000_000, "10")])
def test_examples_of_what_is_shown(amount: int, shown: str) -> None:
    assert format_credits(amount) == shown
