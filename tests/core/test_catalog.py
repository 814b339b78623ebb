"""The catalog answers what a request may use: its route, and the price of what it asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.catalog import STANDARD, Catalog, PricedOptions, Route, Variant
from proxy.core.catalog_files import load_catalog
from proxy.core.errors import InvalidRequest, NotFound

UPSTREAMS = "upstreams: {openai: {dialect: openai, base_url: 'https://h/v1', api_key: none}}"
PRICING = """\
models:
  bare: {upstream: openai, input: 1, output: 3, max_output_tokens: 100}
  gpt-4.1:
    upstream: openai
    input: 1
    output: 3
    audio_input: 40
    audio_output: 80
    max_output_tokens: 100
    service_tiers:
      flex: {input: 0.5, output: 1.5}
      priority: {input: 2, output: 6, audio_input: 80, audio_output: 160}
    web_search: {per_request: 10, input_tokens: 7000}
    hosted_tools: {per_request: 5, input_tokens: 300}
    allow_store: true
"""


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog(PRICING, UPSTREAMS)


@pytest.fixture(scope="module")
def bare(catalog: Catalog) -> Route:
    return catalog.route("bare")


@pytest.fixture(scope="module")
def full(catalog: Catalog) -> Route:
    return catalog.route("gpt-4.1")


@pytest.mark.parametrize("model", ["gpt-5", "", "BARE", "bare ", "x" * 1_000_000, "\ud800", "a\nb", "\x00"])
def test_a_model_without_a_price_does_not_exist(catalog: Catalog, model: str) -> None:
    with pytest.raises(NotFound) as refusal:
        catalog.route(model)
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (404, "model_not_found", "model")
    assert len(refusal.value.message) < 400
    refusal.value.message.encode()


@pytest.mark.parametrize("tier", [None, "auto", "default"])
def test_the_usual_tiers_are_the_standard_price(bare: Route, full: Route, tier: str | None) -> None:
    for route in (bare, full):
        assert route.variant_for(PricedOptions(service_tier=tier)) is route.standard
        assert route.standard.name == STANDARD


@pytest.mark.parametrize(
    ("options", "param", "key"),
    [
        (PricedOptions(service_tier="flex"), "service_tier", "models.bare.service_tiers.flex"),
        (PricedOptions(web_search=True), "web_search_options", "models.bare.web_search"),
        (PricedOptions(hosted_tools=True), "tools", "models.bare.hosted_tools"),
        (PricedOptions(audio=True), "modalities", "models.bare.audio_output (and audio_input beside it)"),
        (PricedOptions(store=True), "store", "models.bare.allow_store"),
    ],
)
def test_an_unpriced_option_is_refused_and_names_the_key_to_add(
    bare: Route, options: PricedOptions, param: str, key: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        bare.variant_for(options)
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (400, "unpriced_option", param)
    assert f"add {key} to pricing.yaml" in refusal.value.message


def test_the_named_key_is_one_that_can_be_added(bare: Route) -> None:
    """What the refusal asks for, written as it says, makes the option a priced one."""
    added = """\
    service_tiers: {flex: {input: 1, output: 1}}
    web_search: {per_request: 1}
    hosted_tools: {per_request: 1}
    audio_output: 1
    audio_input: 1
    allow_store: true
"""
    pricing = "models:\n  bare:\n    upstream: openai\n    input: 1\n    output: 3\n    max_output_tokens: 100\n"
    route = load_catalog(pricing + added, UPSTREAMS).route("bare")
    for options in (
        PricedOptions(service_tier="flex"),
        PricedOptions(web_search=True),
        PricedOptions(hosted_tools=True),
        PricedOptions(audio=True),
        PricedOptions(store=True),
    ):
        route.variant_for(options)


def test_every_priced_combination_has_its_price(full: Route) -> None:
    variant = full.variant_for(PricedOptions(service_tier="flex", web_search=True, hosted_tools=True, store=True))
    assert variant.name == "flex+web_search+hosted_tools"
    assert (variant.price.input, variant.price.per_request) == (500_000_000, 15_000_000)
    assert variant.extra_input_tokens == 7_300


def test_audio_is_priced_tier_by_tier(full: Route) -> None:
    assert full.variant_for(PricedOptions(audio=True)).price.audio_output == 80 * 10**9
    assert full.variant_for(PricedOptions(audio=True, service_tier="priority")).price.audio_output == 160 * 10**9
    with pytest.raises(InvalidRequest) as refusal:
        full.variant_for(PricedOptions(audio=True, service_tier="flex"))
    assert 'models."gpt-4.1".service_tiers.flex.audio_output' in refusal.value.message


@given(
    st.builds(
        PricedOptions,
        service_tier=st.one_of(st.none(), st.sampled_from(["auto", "default", "flex", "priority"]), st.text()),
        web_search=st.booleans(),
        hosted_tools=st.booleans(),
        audio=st.booleans(),
        store=st.booleans(),
    ),
    st.sampled_from(["bare", "gpt-4.1"]),
)
def test_any_options_have_a_price_or_a_short_refusal(options: PricedOptions, model: str) -> None:
    route = load_catalog(PRICING, UPSTREAMS).route(model)
    answer: Variant | InvalidRequest
    try:
        answer = route.variant_for(options)
    except InvalidRequest as refusal:
        answer = refusal
    if isinstance(answer, Variant):
        assert route.variants[answer.name] is answer
    else:
        assert answer.code == "unpriced_option"
        assert len(answer.message) < 400
        answer.message.encode()
