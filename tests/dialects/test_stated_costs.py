"""Usage by class, judged by money: what a provider says it charged is its prices times our classes.

A provider's price per million tokens is a round figure. So where stated money divided by the tokens of a class is
round, call after call, the class holds what the provider bills; a class that left out reasoning tokens, or counted
cache reads twice, would give a different odd figure each time.
"""

from collections import defaultdict
from decimal import Decimal
from fractions import Fraction
from typing import Any

from proxy.core.catalog import Quirks
from proxy.core.usage import Usage
from proxy.dialects.openai import OpenAI
from tests.recordings import Recording, chat_recordings, needs_recordings

pytestmark = needs_recordings

# USD. The stated figures are decimals of at most that many places.
EXACT = Fraction(1, 10**9)
MILLION = 1_000_000

# What a cache read costs beside plain input at the hosts that are recorded; a write costs 1.25 or 2 times.
CACHE_READ_RATIOS = (Fraction(1, 10), Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(1, 5))
CACHE_WRITE_RATIOS = (Fraction(0), Fraction(1), Fraction(5, 4), Fraction(2))
# Gemini sells sound at another price than text.
AUDIO_USD_PER_MILLION = Fraction(1)


def usage_of(recording: Recording) -> Usage:
    usage = OpenAI().decode_body(recording.body).usage(Quirks())
    assert usage is not None
    return usage


def money(value: Any) -> Fraction:
    return Fraction(Decimal(repr(value)))


def tokens_out(usage: Usage) -> int:
    return usage.output + usage.reasoning + usage.audio_output


def openrouter() -> list[tuple[Recording, dict[str, Any], Usage]]:
    found = []
    for recording in chat_recordings():
        raw = recording.usage or {}
        if recording.provider == "openrouter" and isinstance(raw.get("cost_details"), dict) and not raw.get("is_byok"):
            found.append((recording, raw, usage_of(recording)))
    return found


def test_openrouter_output_is_billed_as_output_and_reasoning_together() -> None:
    rates: dict[str, dict[Fraction, int]] = defaultdict(lambda: defaultdict(int))
    odd = []
    for recording, raw, usage in openrouter():
        cost = raw["cost_details"].get("upstream_inference_completions_cost")
        if cost and tokens_out(usage):
            rate = money(cost) * MILLION / tokens_out(usage)
            rounded = Fraction(round(rate * 10_000), 10_000)
            if abs(rounded * tokens_out(usage) / MILLION - money(cost)) > EXACT:
                odd.append((recording.id, float(rate)))
            rates[str(recording.model)][rounded] += 1
    assert sum(sum(r.values()) for r in rates.values()) > 300
    # The odd ones hold a search fee in the completion's cost.
    assert len(odd) <= 2, odd
    # Three hosts at most behind one model, each with one price.
    assert {model: set(r) for model, r in rates.items() if len(r) > 3} == {}


def test_openrouter_input_is_billed_by_our_input_classes() -> None:
    plain: dict[str, set[Fraction]] = defaultdict(set)
    for recording, raw, usage in openrouter():
        cost = raw["cost_details"].get("upstream_inference_prompt_cost")
        if cost and usage.input and not (usage.cached_input or usage.cache_write or usage.audio_input):
            rate = Fraction(round(money(cost) * MILLION / usage.input * 10_000), 10_000)
            assert abs(rate * usage.input / MILLION - money(cost)) <= EXACT, recording.id
            plain[str(recording.model)].add(rate)
    assert max(len(rates) for rates in plain.values()) <= 3
    mixed = 0
    for recording, raw, usage in openrouter():
        cost = raw["cost_details"].get("upstream_inference_prompt_cost")
        if cost and (usage.cached_input or usage.cache_write or usage.audio_input):
            mixed += 1
            assert explained(usage, money(cost), plain[str(recording.model)]), (recording.id, raw)
    assert mixed > 5


def explained(usage: Usage, cost: Fraction, rates: set[Fraction]) -> bool:
    """Whether some plain price, with the usual ratios for cache reads and writes, gives this cost exactly."""
    return any(
        abs(
            rate * (usage.input + read * usage.cached_input + write * usage.cache_write)
            + AUDIO_USD_PER_MILLION * usage.audio_input
            - cost * MILLION
        )
        <= EXACT * MILLION
        for rate in rates
        for read in CACHE_READ_RATIOS
        for write in CACHE_WRITE_RATIOS
    )


def test_openrouter_totals_are_the_sum_of_both_sides() -> None:
    for recording, raw, usage in openrouter():
        if isinstance(raw.get("total_tokens"), int):
            assert sum(usage.as_tuple()) == raw["total_tokens"], recording.id


# USD per million tokens, input and output.
PERPLEXITY = {"sonar": (1, 1), "sonar-pro": (3, 15), "sonar-reasoning-pro": (2, 8)}


def test_perplexity_states_costs_that_are_its_prices_times_our_classes() -> None:
    checked = 0
    for recording in chat_recordings():
        stated = (recording.usage or {}).get("cost")
        if recording.provider == "perplexity" and isinstance(stated, dict):
            usage = usage_of(recording)
            prices = PERPLEXITY[recording.model or "sonar"]
            costs = [money(stated[name]) for name in ("input_tokens_cost", "output_tokens_cost")]
            # Rounded to five decimals; in its early days, to three.
            early = all((cost * 1_000).denominator == 1 for cost in costs) and usage.output > 50
            slack = Fraction(1, 2_000) if early else Fraction(1, 200_000)
            for price, tokens, cost in zip(prices, (usage.input, tokens_out(usage)), costs, strict=True):
                assert abs(Fraction(price * tokens, MILLION) - cost) <= slack, (recording.id, stated)
            checked += 1
    assert checked > 20


def test_classes_sum_to_the_total_wherever_a_provider_states_one() -> None:
    """Where the total isn't prompt + completion, the gap is somebody's: it must not be lost, nor billed twice."""
    beside = 0
    for recording in chat_recordings():
        raw = recording.usage or {}
        prompt, completion, total = (
            raw.get(key) or 0 for key in ("prompt_tokens", "completion_tokens", "total_tokens")
        )
        if not (prompt and completion and total):
            continue
        usage = usage_of(recording)
        cached = (raw.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if cached > prompt:  # cache reads beside the prompt and outside of the total, too
            beside += 1
            assert sum(usage.as_tuple()) == prompt + cached + completion, recording.id
        else:
            assert sum(usage.as_tuple()) == max(total, prompt + completion), recording.id
            assert tokens_out(usage) >= completion, recording.id
    assert beside > 0
