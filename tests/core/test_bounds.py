"""Bounds before a call and estimates after it."""

import base64
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import families
from proxy.core.bounds import (
    FAMILIES,
    byte_bound,
    input_bound,
    input_estimate,
    output_bound,
    output_estimate,
)
from proxy.core.catalog import Quirks
from proxy.core.chat import ChatRequest
from proxy.core.images import image_rule
from proxy.core.media import Image
from proxy.core.meter import Meter
from proxy.core.pricing import Bounds, Price, charge, quote
from proxy.core.reckon import needs_count, reckon
from proxy.core.usage import Usage
from tests.core.limits import Limits
from tests.core.test_chat import body


def ask(**fields: Any) -> ChatRequest:
    return ChatRequest.parse(body(**fields), Limits())


def image(width: int, height: int) -> dict[str, Any]:
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02\x00\x00\x00"
    url = f"data:image/png;base64,{base64.b64encode(header).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def test_every_family_has_its_row() -> None:
    assert set(FAMILIES) == set(families.FAMILIES)


def test_an_unknown_family_has_the_loosest_row() -> None:
    request = ask(tools=[{"type": "function"}])
    bounds = {family: input_bound(family, 1_000, request) for family in FAMILIES}
    assert input_bound("nobody", 1_000, request) == bounds["unknown"]
    assert bounds["unknown"] == max(bound for family, bound in bounds.items() if not family.startswith("claude-5"))


def test_the_bound_grows_with_what_the_request_holds() -> None:
    plain = input_bound("gpt-4", 100, ask())
    assert plain == 129  # 1.05 * (100 + 4 + 3), and 16
    schema = ask(response_format={"type": "json_schema", "json_schema": {}})
    assert input_bound("gpt-4", 100, schema) == plain + 24
    both = ask(response_format={"type": "json_schema"}, tools=[{"type": "function"}])
    assert input_bound("gpt-4", 100, both) == plain - 16 + 40 + 60
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 10}
    assert input_bound("gpt-4", 100, ask(messages=[call])) == 213  # 8 more for each call


def test_bytes_bound_what_cannot_be_counted_and_media_are_not_text() -> None:
    request = ask(messages=[{"role": "user", "content": "x" * 10_000}])
    assert byte_bound("gpt-4", request) == len(request.body) // 2 + 1_500
    picture = ask(messages=[image(512, 512)])
    assert byte_bound("gpt-4", picture, "gpt-4o") < 1_500 + 200 + 255 + 85


@pytest.mark.parametrize(
    ("family", "model", "size", "tokens"),
    [
        ("gpt-4", "gpt-4o", (512, 512), 255),
        ("gpt-4", "gpt-4o", (2048, 4096), 1_105),
        ("gpt-4", "gpt-4o", None, 1_445),
        ("gpt-4", "gpt-4o-mini", (32, 32), 8_500),
        ("gpt-4", "gpt-4o-mini", (2560, 1669), 36_835),
        ("gpt-4", "gpt-4o-mini-2024-07-18", None, 48_169),
        ("gpt-4", "a-deployment", None, 48_169),
        ("gpt-4", "gpt-4.1-mini", None, 2_489),
        ("gpt-5", "gpt-5", None, 1_190),
        ("gpt-5", "gpt-5-mini", (320, 320), 121),
        ("claude-4", "claude-haiku-4.5", None, 1_600),
        ("claude-4", "claude-haiku-4.5", (750, 100), 116),
        ("claude-5", "claude-opus-4.7", (1800, 1200), 2_896),
        ("gemini", "gemini-2.5-flash", None, 1_120),
        ("nobody", "x", (10, 10), 5_000),
    ],
)
def test_pictures_by_each_models_rule(family: str, model: str, size: tuple[int, int] | None, tokens: int) -> None:
    picture = Image(None) if size is None else Image(100, *size)
    assert image_rule(family, model)(picture) == tokens


def test_little_detail_is_one_tile() -> None:
    assert image_rule("gpt-4", "gpt-4o")(Image(1, 4000, 4000, "low")) == 85
    assert image_rule("gpt-4", "gpt-4o")(Image(None, detail="low")) == 85


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 2**31), st.integers(1, 2**31))
def test_a_known_size_never_costs_more_than_an_unknown_one(family: str, width: int, height: int) -> None:
    for model in ("gpt-4o", "gpt-4o-mini", "gpt-5", "gpt-5-nano", "o4-mini", "x"):
        rule = image_rule(family, model)
        assert 0 < rule(Image(1, width, height)) <= rule(Image(None))


def test_the_output_bound() -> None:
    assert output_bound(1, 1) == 16
    assert output_bound(100, 3) == 300
    assert output_bound(100, 1, prediction_bytes=50) == 150


def test_output_is_estimated_by_family() -> None:
    assert output_estimate("gpt-4", 100, choices=1, calls=0) == 101
    assert output_estimate("claude-4", 100, choices=2, calls=1) == 168
    assert output_estimate("gpt-4", 0, choices=0, calls=0) == 0


@given(st.sampled_from([*FAMILIES, "nobody"]), st.integers(0, 10**7), st.booleans())
def test_an_estimate_never_exceeds_the_bound(family: str, counted: int, tools: bool) -> None:
    request = ask(tools=[{"type": "function"}] * tools, messages=[image(600, 600)])
    assert 0 < input_estimate(family, counted, request) <= input_bound(family, counted, request)


PRICES = st.builds(Price, **{name: st.integers(0, 10**9) for name in Price.__dataclass_fields__})
REPORT = {"prompt_tokens": 50, "completion_tokens": 7}


class TestReckon:
    BOUNDS = Bounds(input=100, output=40)

    def meter(self, *chunks: dict[str, Any]) -> Meter:
        meter = Meter()
        for chunk in chunks:
            meter.observe(chunk)
        return meter

    def reckon(self, meter: Meter, counted_input: int = 60, counted_output: int = 30) -> tuple[Usage, str]:
        found = reckon(meter, Quirks(), bounds=self.BOUNDS, counted_input=counted_input, counted_output=counted_output)
        return found.usage, found.source

    def said(self, text: str, finish: str | None = None, **extra: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **extra}

    def test_a_report_of_the_whole_is_charged(self) -> None:
        meter = self.meter(self.said("a", "stop", usage=REPORT))
        assert self.reckon(meter) == (Usage(input=50, output=7), "reported")
        assert not needs_count(meter, Quirks())

    def test_a_running_report_is_completed_by_counting(self) -> None:
        meter = self.meter(self.said("a", usage=REPORT), self.said("b"))
        assert needs_count(meter, Quirks())
        assert self.reckon(meter) == (Usage(input=50, output=30), "partly_counted")
        assert self.reckon(meter, counted_output=3) == (Usage(input=50, output=7), "partly_counted")

    def test_a_report_without_a_prompt_is_completed_too(self) -> None:
        meter = self.meter(self.said("a", "stop", usage={"completion_tokens": 9}))
        assert self.reckon(meter, counted_output=3) == (Usage(input=60, output=9), "partly_counted")

    def test_what_was_delivered_is_counted(self) -> None:
        meter = self.meter(self.said("a"))
        assert self.reckon(meter) == (Usage(input=60, output=30), "counted")

    def test_nothing_is_nothing(self) -> None:
        assert self.reckon(self.meter()) == (Usage(), "none")
        assert not needs_count(self.meter(), Quirks())

    @given(PRICES, st.integers(0, 10**9), st.integers(0, 10**9))
    def test_a_counted_charge_never_exceeds_the_quote(self, price: Price, counted_in: int, counted_out: int) -> None:
        usage, source = self.reckon(self.meter(self.said("a")), counted_in, counted_out)
        assert source == "counted"
        assert charge(price, usage) <= quote(price, self.BOUNDS)
