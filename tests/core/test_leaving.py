"""What becomes of an answer whose client leaves: a model's word, its upstream's, or the default of its family."""

import pytest

from proxy.core.catalog import OnDisconnect, Route
from proxy.core.catalog_files import load_catalog
from proxy.core.families import FAMILIES
from proxy.core.yaml_reader import ConfigError


def route_of(model: str = "gpt-4o", said: str = "", upstream: str = "") -> Route:
    """The route of a model, with what its section and its upstream's say beside what they must."""
    pricing = f"models:\n  {model}: {{upstream: up, input: 1, output: 3, max_output_tokens: 100{said}}}\n"
    upstreams = f"upstreams:\n  up: {{dialect: openai, base_url: 'https://h/v1', api_key: none{upstream}}}\n"
    return load_catalog(pricing, upstreams).routes[model]


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini"])
def test_a_model_whose_tokens_are_counted_exactly_is_cancelled(model: str) -> None:
    route = route_of(model)
    assert (route.on_disconnect, route.on_disconnect_stated) == (OnDisconnect.CANCEL, False)


@pytest.mark.parametrize("model", ["gpt-5", "o3", "claude-sonnet-5-5", "gemini-2.5-flash", "grok-4", "my-model"])
def test_a_model_that_reasons_unseen_is_drained(model: str) -> None:
    route = route_of(model)
    assert (route.on_disconnect, route.hidden_reasoning) == (OnDisconnect.DRAIN, True)
    assert route.reasoning_tokens_per_second == (57 if model in ("gpt-5", "o3") else 50)


@pytest.mark.parametrize("model", ["gpt-3.5-turbo", "gpt-4-turbo", "mistral-large", "llama3.2", "deepseek-chat"])
def test_a_model_with_another_tokenizer_is_drained(model: str) -> None:
    route = route_of(model)
    assert (route.on_disconnect, route.hidden_reasoning) == (OnDisconnect.DRAIN, False)
    assert route.reasoning_tokens_per_second == 0


def test_a_family_that_is_stated_decides() -> None:
    assert route_of("my-model", ", family: gpt-4").on_disconnect is OnDisconnect.CANCEL
    assert route_of("gpt-4o", ", family: gpt-5").on_disconnect is OnDisconnect.DRAIN


def test_reasoning_that_is_stated_decides() -> None:
    hidden = route_of("gpt-4o", ", hidden_reasoning: true")
    assert (hidden.on_disconnect, hidden.reasoning_tokens_per_second) == (OnDisconnect.DRAIN, 50)
    shown = route_of("gpt-5", ", hidden_reasoning: false")
    # Its vocabulary isn't counted with, whatever it shows.
    assert (shown.on_disconnect, shown.reasoning_tokens_per_second) == (OnDisconnect.DRAIN, 0)
    assert route_of("gpt-5", ", reasoning_tokens_per_second: 118").reasoning_tokens_per_second == 118
    assert route_of("gpt-5", ", reasoning_tokens_per_second: 0").reasoning_tokens_per_second == 0
    assert route_of("gpt-4o", ", reasoning_tokens_per_second: 118").reasoning_tokens_per_second == 0


@pytest.mark.parametrize("policy", OnDisconnect)
def test_an_upstream_decides_for_its_models_and_a_model_for_itself(policy: OnDisconnect) -> None:
    other = OnDisconnect.DRAIN if policy is OnDisconnect.CANCEL else OnDisconnect.CANCEL
    for model in ("gpt-4o", "gpt-5"):
        by_upstream = route_of(model, upstream=f", on_disconnect: {policy}")
        assert (by_upstream.on_disconnect, by_upstream.on_disconnect_stated) == (policy, True)
        by_model = route_of(model, f", on_disconnect: {policy}", f", on_disconnect: {other}")
        assert (by_model.on_disconnect, by_model.on_disconnect_stated) == (policy, True)


def test_the_limits_of_a_drain() -> None:
    default = route_of()
    assert (default.drain_seconds, default.drain_tokens) == (120.0, None)
    upstream = ", drain_seconds: 7.5, drain_tokens: 10"
    by_upstream = route_of(upstream=upstream)
    assert (by_upstream.drain_seconds, by_upstream.drain_tokens) == (7.5, 10)
    by_model = route_of(said=", drain_seconds: 0, drain_tokens: 0", upstream=upstream)
    assert (by_model.drain_seconds, by_model.drain_tokens) == (0.0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_reasons_unseen_is_drained(family: str) -> None:
    route = route_of("gpt-4o", f", family: {family}")
    assert route.on_disconnect is OnDisconnect.DRAIN or not route.hidden_reasoning


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (", on_disconnect: stop", 'on_disconnect: expected one of cancel, drain; found "stop"'),
        (", on_disconnect: true", "on_disconnect: expected one of cancel, drain; found true"),
        (", drain_seconds: 3600.001", "drain_seconds: expected seconds, at most 3600; found 3600.001"),
        (", drain_seconds: -1", "drain_seconds: expected seconds, at most 3600; found -1, which is negative"),
        (", drain_tokens: 1.5", "drain_tokens: expected the most tokens of an answer"),
        (", hidden_reasoning: 1", "hidden_reasoning: expected true or false; found 1"),
        (", reasoning_tokens_per_second: 1001", "above the largest value, 1,000"),
    ],
)
def test_what_is_no_policy_is_refused(said: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.gpt-4o") as error:
        route_of(said=said)
    assert message in str(error.value)
    if "reasoning" not in said:
        with pytest.raises(ConfigError, match=r"upstreams\.up"):
            route_of(upstream=said)
