"""Usage objects in the shapes of their providers, brought to classes that don't overlap."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.catalog import Quirks
from proxy.core.usage import Usage
from proxy.core.usage_report import TOKENS_MAX, Reported, is_absent, normalise

PLAIN = Quirks()


def usage(raw: dict[str, Any], quirks: Quirks = PLAIN) -> Usage:
    reported = normalise(raw, quirks)
    assert reported is not None
    return reported.usage


def report(prompt: int, completion: int, total: int | None = None, **parts: int) -> dict[str, Any]:
    details: dict[str, dict[str, int]] = {"prompt_tokens_details": {}, "completion_tokens_details": {}}
    for name, count in parts.items():
        side = "completion" if name in ("reasoning_tokens", "audio_out") else "prompt"
        details[f"{side}_tokens_details"]["audio_tokens" if name == "audio_out" else name] = count
    total = prompt + completion if total is None else total
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, **details}


@pytest.mark.parametrize(
    ("raw", "classes"),
    [
        # Inside on both sides, as at OpenAI.
        (report(100, 50), Usage(input=100, output=50)),
        (
            report(100, 50, cached_tokens=60, cache_write_tokens=10, audio_tokens=5, reasoning_tokens=30, audio_out=8),
            Usage(input=25, cached_input=60, cache_write=10, audio_input=5, output=12, reasoning=30, audio_output=8),
        ),
        # Names of other houses.
        ({"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 4}, Usage(input=5, cached_input=4, output=2)),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 1},
            Usage(input=1, cached_input=8, output=2),
        ),
        ({"input_tokens": 9, "output_tokens": 2}, Usage(input=9, output=2)),
        ({"prompt_tokens": 9, "completion_tokens": 7, "reasoning_tokens": 5}, Usage(input=9, output=2, reasoning=5)),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 1,
                "cache_read_input_tokens": 3,
                "cache_creation_input_tokens": 4,
            },
            Usage(input=2, cached_input=3, cache_write=4, output=1),
        ),
        # A gap in the total that one part fills: that part is beside.
        (report(20, 1, 221, reasoning_tokens=200), Usage(input=20, output=1, reasoning=200)),
        (
            report(11, 15, 401, audio_tokens=375, cached_tokens=9),
            Usage(input=2, cached_input=9, audio_input=375, output=15),
        ),
        (report(200, 10, 310, cached_tokens=100), Usage(input=200, cached_input=100, output=10)),
        # A gap that nobody claims is output that wasn't shown.
        (report(35, 12, 109), Usage(input=35, output=12, reasoning=62)),
        (report(35, 12, 109, reasoning_tokens=10), Usage(input=35, output=12, reasoning=62)),
        # Cache reads above the prompt can only be beside it.
        (report(10, 5, cached_tokens=161), Usage(input=10, cached_input=161, output=5)),
        # Parts larger than what they are in are cut to it.
        (report(2168, 5, cached_tokens=2161, cache_write_tokens=2161), Usage(7 - 7, 2161, 7, 0, 5)),
        (report(10, 5, reasoning_tokens=9), Usage(input=10, reasoning=5)),
        # A total below its parts is no total.
        (report(10, 5, 3), Usage(input=10, output=5)),
        (report(10, 5, 0), Usage(input=10, output=5)),
        # Predictions are billed inside the completion, rejected ones too.
        (
            {
                "prompt_tokens": 40,
                "completion_tokens": 139,
                "completion_tokens_details": {"accepted_prediction_tokens": 20, "rejected_prediction_tokens": 37},
            },
            Usage(input=40, output=139),
        ),
        # Floats that are counts.
        ({"prompt_tokens": 4.0, "completion_tokens": 2.0}, Usage(input=4, output=2)),
    ],
)
def test_the_classes_of_each_shape(raw: dict[str, Any], classes: Usage) -> None:
    assert usage(raw) == classes


def test_quirks_say_what_the_figures_dont() -> None:
    hidden = report(20, 10, reasoning_tokens=96)
    assert usage(hidden) == Usage(input=20, output=0, reasoning=10)
    assert usage(hidden, Quirks(reasoning_outside=True)) == Usage(input=20, output=10, reasoning=96)
    assert usage(report(20, 1, 221, reasoning_tokens=200), Quirks(reasoning_outside=True)) == Usage(
        input=20, output=1, reasoning=200
    )
    cached = report(205, 18, cached_tokens=159)
    assert usage(cached) == Usage(input=46, cached_input=159, output=18)
    assert usage(cached, Quirks(cached_outside=True)) == Usage(input=205, cached_input=159, output=18)


@pytest.mark.parametrize("value", [-1, True, "12", 1.5, float("inf"), TOKENS_MAX + 1, [], {}])
def test_what_is_no_count_is_absent_and_flagged(value: Any) -> None:
    reported = normalise({"prompt_tokens": 7, "completion_tokens": value}, PLAIN)
    assert reported == Reported(Usage(input=7), True, False, ("insane:completion_tokens",))
    assert normalise({"prompt_tokens": value, "completion_tokens": value}, PLAIN) is None
    details = {"prompt_tokens_details": {"cached_tokens": value}}
    odd = normalise({"prompt_tokens": 7, "completion_tokens": 1, **details}, PLAIN)
    assert odd is not None
    assert odd.usage == Usage(input=7, output=1)
    assert "insane:cached_tokens" in odd.flags


def test_null_and_details_of_any_type_are_nothing() -> None:
    raw: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": None, "prompt_tokens_details": []}
    assert normalise(raw, PLAIN) == Reported(Usage(input=7), True, False)
    assert normalise({}, PLAIN) is None


@pytest.mark.parametrize(
    ("value", "absent"),
    [
        (None, True),
        ({}, True),
        ([], True),
        (5, True),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, True),
        ({"prompt_tokens": None}, True),
        ({"queue_time": 0.1}, True),
        ({"prompt_tokens": 0, "completion_tokens": 1}, False),
        ({"prompt_tokens": 3, "completion_tokens": None}, False),
        ({"total_tokens": 3}, False),
    ],
)
def test_a_report_that_says_nothing_is_none(value: Any, absent: bool) -> None:
    assert is_absent(value) is absent


COUNTS = st.integers(0, 50) | st.none() | st.integers()
DETAILS = st.dictionaries(
    st.sampled_from(["cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens"]), COUNTS
)


QUIRKS = st.builds(Quirks, reasoning_outside=st.booleans(), cached_outside=st.booleans())


@given(COUNTS, COUNTS, COUNTS, DETAILS, DETAILS, QUIRKS)
def test_no_class_is_negative_and_nothing_reported_is_lost(
    prompt: int | None,
    completion: int | None,
    total: int | None,
    into: dict[str, int],
    out: dict[str, int],
    quirks: Quirks,
) -> None:
    raw = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "prompt_tokens_details": into,
        "completion_tokens_details": out,
    }
    reported = normalise(raw, quirks)
    if reported is None:
        return
    # Usage refuses negatives itself; both sides cover at least what was said.
    classes = reported.usage
    tokens_in = classes.input + classes.cached_input + classes.cache_write + classes.audio_input
    tokens_out = classes.output + classes.reasoning + classes.audio_output
    sane = [count if count is not None and 0 <= count <= TOKENS_MAX else 0 for count in (prompt, completion, total)]
    assert tokens_in >= sane[0]
    assert tokens_out >= sane[1]
    if reported.prompt_known and reported.completion_known:
        assert tokens_in + tokens_out >= sane[2]
