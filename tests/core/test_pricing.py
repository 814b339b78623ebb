"""Pricing: one rounding, never negative, and no charge within the bounds above the quote."""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.core.pricing import TOKENS_PER_RATE, Bounds, Price, affordable_output, charge, format_rate, quote
from proxy.core.usage import TOKEN_CLASSES, Usage

RATE_MAX = 10**15
TOKENS_MAX = 10**7

# Small rates make the rounding visible, large ones the size of the numbers.
rates = st.one_of(st.integers(0, 3), st.integers(0, 2 * TOKENS_PER_RATE), st.integers(0, RATE_MAX))
prices = st.builds(Price, **dict.fromkeys(TOKEN_CLASSES, rates), per_request=st.integers(0, 10**12))
counts = st.one_of(st.integers(0, 5), st.integers(0, TOKENS_MAX))
usages = st.builds(Usage, **dict.fromkeys(TOKEN_CLASSES, counts))
bounds = st.builds(Bounds, input=counts, output=counts, audio_in=st.booleans(), audio_out=st.booleans())


def plain(input_: int, output: int, per_request: int = 0) -> Price:
    """A price with one rate a side."""
    return Price(input_, input_, input_, input_, output, output, output, per_request)


def exact(price: Price, usage: Usage) -> Fraction:
    parts = (Fraction(getattr(price, name) * getattr(usage, name), TOKENS_PER_RATE) for name in TOKEN_CLASSES)
    return price.per_request + sum(parts, Fraction(0))


@st.composite
def within(draw: st.DrawFn, limits: Bounds) -> Usage:
    """A usage that the bounds allow: any split over the classes that the call can trigger."""
    usage = Usage()
    for side, classes, audio in (
        (limits.input, ("input", "cached_input", "cache_write"), limits.audio_in and "audio_input"),
        (limits.output, ("output", "reasoning"), limits.audio_out and "audio_output"),
    ):
        left = side
        for name in (*classes, *((audio,) if audio else ())):
            tokens = draw(st.integers(0, left))
            usage = replace(usage, **{name: tokens})
            left -= tokens
    return usage


def test_an_example_to_be_checked_by_hand() -> None:
    gpt_4o = plain(10**9, 3 * 10**9)  # 1 and 3 credits per 1,000 tokens
    assert charge(gpt_4o, Usage(input=12, output=7)) == 12_000 + 21_000
    assert quote(gpt_4o, Bounds(input=100, output=1000)) == 100_000 + 3_000_000
    assert affordable_output(gpt_4o, Bounds(input=100, output=1000), 103_000) == 1


def test_rounding_is_done_once_over_all_classes() -> None:
    thirds = Price(*[333_333] * 7)
    assert charge(thirds, Usage(*[1] * 7)) == ceil(Fraction(7 * 333_333, 10**6)) == 3
    assert charge(thirds, Usage(input=1)) == 1, "up: a used token is never free"
    assert charge(thirds, Usage()) == 0, "and an unused call is"


@given(prices, usages)
def test_a_charge_is_the_exact_sum_rounded_up_once(price: Price, usage: Usage) -> None:
    assert charge(price, usage) == ceil(exact(price, usage))


@given(prices, usages)
def test_a_charge_is_never_negative_and_only_free_where_it_is_worth_nothing(price: Price, usage: Usage) -> None:
    assert charge(price, usage) >= price.per_request
    assert (charge(price, usage) == 0) == (exact(price, usage) == 0)


@given(prices, usages, st.sampled_from(TOKEN_CLASSES), counts)
def test_more_tokens_never_cost_less(price: Price, usage: Usage, name: str, more: int) -> None:
    assert charge(price, replace(usage, **{name: getattr(usage, name) + more})) >= charge(price, usage)


@given(st.data(), prices, bounds)
def test_no_charge_within_the_bounds_is_above_the_quote(data: st.DataObject, price: Price, limits: Bounds) -> None:
    assert charge(price, data.draw(within(limits))) <= quote(price, limits)


@given(prices, bounds)
def test_a_quote_is_no_looser_than_it_must_be(price: Price, limits: Bounds) -> None:
    """Some usage within the bounds costs exactly the quote."""
    inputs = ("input", "cached_input", "cache_write", *(("audio_input",) if limits.audio_in else ()))
    outputs = ("output", "reasoning", *(("audio_output",) if limits.audio_out else ()))
    dearest_in = max(inputs, key=lambda name: getattr(price, name))
    dearest_out = max(outputs, key=lambda name: getattr(price, name))
    usage = replace(Usage(), **{dearest_in: limits.input, dearest_out: limits.output})
    assert charge(price, usage) == quote(price, limits)


@given(prices, bounds, st.one_of(st.integers(0, 10**6), st.integers(0, 10**17)))
def test_affordable_output_is_affordable_and_no_token_more_is(price: Price, limits: Bounds, available: int) -> None:
    tokens = affordable_output(price, limits, available)
    assert 0 <= tokens <= limits.output
    if tokens:
        assert quote(price, replace(limits, output=tokens)) <= available
    if tokens < limits.output:
        assert quote(price, replace(limits, output=tokens + 1)) > available


@given(prices, bounds)
def test_whoever_has_the_quote_can_afford_the_whole_answer(price: Price, limits: Bounds) -> None:
    assume(limits.output > 0)
    assert affordable_output(price, limits, quote(price, limits)) == limits.output


def test_where_the_prompt_is_too_dear_nothing_is_affordable_even_if_answers_are_free() -> None:
    price = plain(10**9, 0)
    assert affordable_output(price, Bounds(input=1000, output=50), 999_999) == 0
    assert affordable_output(price, Bounds(input=1000, output=50), 1_000_000) == 50


@pytest.mark.parametrize("name", [*TOKEN_CLASSES, "per_request"])
def test_a_negative_price_can_not_be_made(name: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        replace(plain(1, 1), **{name: -1})


@pytest.mark.parametrize("name", TOKEN_CLASSES)
def test_a_negative_usage_can_not_be_made(name: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        Usage(**{name: -1})


def test_rates_and_counts_stand_in_the_order_that_the_ledger_stores() -> None:
    order = "input cached_input cache_write audio_input output reasoning audio_output"
    assert " ".join(TOKEN_CLASSES) == order
    numbers = dict(zip(TOKEN_CLASSES, range(7), strict=True))
    assert Price(**numbers).rates() == Usage(**numbers).as_tuple() == tuple(range(7))


@given(st.integers(0, RATE_MAX))
def test_a_rate_is_shown_exactly(rate: int) -> None:
    shown = format_rate(rate)
    assert Fraction(shown) * 10**9 == rate
    assert "e" not in shown.lower()
    assert not (shown.endswith("0") and "." in shown)
