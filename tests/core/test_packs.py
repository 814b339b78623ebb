"""What pricing.yaml sells for money: amounts in minor units, exact, and every mistake named where it stands."""

import pytest

from proxy.core.catalog import Catalog
from proxy.core.catalog_diff import compare
from proxy.core.catalog_files import load_catalog
from proxy.core.packs import CustomAmounts, Pack, Plan
from proxy.core.yaml_reader import ConfigError

MODELS = "models:\n  m: {upstream: up, input: 1, output: 1, max_output_tokens: 1}\n"
UPSTREAMS = "upstreams: {up: {dialect: openai, base_url: 'http://127.0.0.1/v1', api_key: none}}"
PACK = "packs:\n  starter: {name: Small, credits: 1000, price: 10.50, currency: USD, bonus: 0.5, expires_days: 365}\n"


def catalog(text: str) -> Catalog:
    return load_catalog(MODELS + text, UPSTREAMS)


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        catalog(text)
    return [f"{problem.key}: {problem.message}" for problem in error.value.problems]


def test_a_pack() -> None:
    assert catalog(PACK).offers.packs == {
        "starter": Pack("starter", "Small", 1_000_000_000, 1_050, "usd", 500_000, 365 * 86_400)
    }


def test_a_pack_without_a_name_is_called_by_its_credits() -> None:
    found = catalog("packs: {p: {credits: 2500.5, price: 500, currency: JPY}}").offers.packs["p"]
    assert (found.name, found.price, found.bonus, found.credits_seconds) == ("2500.5 credits", 500, 0, None)


def test_custom_amounts_and_plans() -> None:
    offers = catalog(
        "custom_amounts: {USD: {least: 5, most: 500, credits_per_unit: 100}}\n"
        "plans: {price_1: {name: Pro, credits: 5000, price: 29, currency: EUR, rollover: true}}\n"
    ).offers
    assert offers.custom_amounts == {"usd": CustomAmounts("usd", 500, 50_000, 1_000_000)}
    assert offers.plans == {"price_1": Plan("price_1", "Pro", 5_000_000_000, 2_900, "eur", 3 * 86_400, True)}


def test_packs_are_no_part_of_the_price_version() -> None:
    assert catalog("").version == catalog(PACK).version


@pytest.mark.parametrize(
    ("amount", "credits"), [(500, 500_000_000), (501, 501_000_000), (50_000, 50_000_000_000)], ids=str
)
def test_an_amount_buys_at_its_rate(amount: int, credits: int) -> None:
    assert CustomAmounts("usd", 500, 50_000, 1_000_000).credits_for(amount) == credits


@pytest.mark.parametrize(
    ("currency", "amount", "expected"),
    [
        ("usd", 499, "must be from 5.00 USD to 500.00 USD"),
        ("usd", 50_001, "must be from 5.00 USD"),
        ("isk", 550, "must be a multiple of 1.00 ISK"),
        ("kwd", 5_001, "must be a multiple of 0.010 KWD"),
    ],
)
def test_an_amount_outside_its_limits_says_them(currency: str, amount: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CustomAmounts(currency, 500, 50_000, 1).credits_for(amount)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("packs: {p: {credits: 1, price: 10.505, currency: USD}}", "packs.p.price: expected money, such as 10.00 USD"),
        ("packs: {p: {credits: 1, price: 10.5, currency: JPY}}", "found 10.5, finer than JPY goes"),
        ("packs: {p: {credits: 1, price: 10.5, currency: ISK}}", "packs.p.price: expected a multiple of 1.00 ISK"),
        ("packs: {p: {credits: 1, price: 0, currency: USD}}", "below the smallest value, 0.01"),
        ("packs: {p: {credits: 0, price: 1, currency: USD}}", "below the smallest value, 0.000001"),
        ("packs: {p: {credits: 1, price: 1, currency: usd}}", "packs.p.currency: expected a currency's three letters"),
        ("packs: {p: {credits: 1, price: 1}}", "packs.p.currency: is missing"),
        ("packs: {p: {credits: 1, amount: 1, currency: USD}}", 'packs.p.amount: unknown key; did you mean "price"?'),
        ("packs: {'a b': {credits: 1, price: 1, currency: USD}}", "expected a pack's id"),
        ("packs: {p: {credits: 1, price: 1, currency: USD, bonus_expires_days: 1}}", "there is no bonus to expire"),
        ("custom_amounts: {USD: {least: 5, most: 4, credits_per_unit: 1}}", "expected no less than least"),
        ("custom_amounts: {USD: {least: 5, most: 9, credits_per_unit: 0.00001}}", "isn't a whole number of micro"),
        ("custom_amounts: {usd: {least: 5, most: 9, credits_per_unit: 1}}", "expected a currency's three letters"),
        ("plans: {prod_1: {credits: 1, price: 1, currency: USD}}", "expected the id of one of Stripe's prices"),
    ],
)
def test_a_mistake_is_named_where_it_stands(text: str, expected: str) -> None:
    [problem] = problems(text)
    assert expected in problem


def test_a_check_shows_what_would_be_sold_otherwise() -> None:
    before = catalog(PACK + "custom_amounts: {USD: {least: 5, most: 500, credits_per_unit: 100}}")
    after = catalog(PACK.replace("10.50", "1.05") + "plans: {price_1: {credits: 1, price: 29, currency: EUR}}")
    assert compare(before, after).render().splitlines() == [
        "~ pack starter",
        "    price: 10.50 USD -> 1.05 USD",
        "    credits for 1 USD: 95.238095 -> 952.380952 credits  ! more than doubles",
        "- custom amounts USD",
        "+ plan price_1",
        "    name: price_1",
        "    credits: 1 credits",
        "    price: 29.00 EUR",
        "    grace_days: 3 days",
        "    rollover: false",
    ]
