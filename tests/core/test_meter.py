"""The meter: last report wins, text is joined per choice, an end is only an end where the answer says so."""

import json
from typing import Any

import pytest

from proxy.core.catalog import Quirks
from proxy.core.meter import Ending, Meter, storable_json
from proxy.core.usage import Usage

Chunk = dict[str, Any]

PLAIN = Quirks()
REPORT = {"prompt_tokens": 10, "completion_tokens": 4}


def chunk(delta: Chunk | None = None, finish: str | None = None, index: Any = 0, **extra: Any) -> Chunk:
    return {"choices": [{"index": index, "delta": delta or {}, "finish_reason": finish}], **extra}


def meter_of(*chunks: dict[str, Any], choices: int = 1) -> Meter:
    meter = Meter(choices)
    for one in chunks:
        meter.observe(one)
    return meter


class TestUsage:
    def test_the_last_report_counts_and_none_is_added(self) -> None:
        later = {"prompt_tokens": 11, "completion_tokens": 6}
        meter = meter_of(chunk(usage=REPORT), chunk(finish="stop", usage=later), {"choices": [], "usage": later})
        assert meter.usage_raw is later
        assert meter.usage(PLAIN) == Usage(input=11, output=6)
        assert meter.usage_reports == 3

    @pytest.mark.parametrize("nothing", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, 5, []])
    def test_a_report_of_nothing_takes_no_reports_place(self, nothing: Any) -> None:
        meter = meter_of(chunk(finish="stop", usage=REPORT), {"choices": [], "usage": nothing})
        assert meter.usage_raw is REPORT
        assert meter.zeros_reported == (isinstance(nothing, dict) and nothing != {})

    def test_a_report_that_text_came_after_is_not_the_whole_answers(self) -> None:
        """Some report the prompt at the beginning, and the rest only if nothing goes wrong."""
        first = chunk({"content": "a"}, usage={"prompt_tokens": 10, "completion_tokens": 1})
        meter = meter_of(first, chunk({"content": "bcd"}), chunk(finish="stop"))
        assert meter.ending is Ending.COMPLETE
        assert meter.usage(PLAIN) is None
        assert not meter.usage_final

    def test_groq_reports_in_a_place_of_its_own(self) -> None:
        meter = meter_of(chunk({"content": "a"}), chunk(finish="stop", x_groq={"usage": REPORT}))
        assert meter.usage(PLAIN) == Usage(input=10, output=4)

    def test_a_report_inside_a_choice(self) -> None:
        inside = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": REPORT}]}
        assert meter_of(chunk({"content": "a"}), inside).usage(PLAIN) == Usage(input=10, output=4)

    def test_a_running_report_is_not_the_whole_answers(self) -> None:
        running = [chunk({"content": "a"}, usage=REPORT), chunk({"content": "b"}, usage=REPORT)]
        assert meter_of(*running).usage(PLAIN) is None
        assert not meter_of(*running).usage_final
        partial = meter_of(*running).reported(PLAIN)
        assert partial is not None
        assert partial.usage == Usage(input=10, output=4)
        whole = meter_of(*running, chunk(finish="stop"))
        assert whole.usage(PLAIN) == Usage(input=10, output=4)

    def test_a_report_at_the_start_is_not_the_whole_answers_either(self) -> None:
        meter = meter_of({"choices": [], "usage": REPORT}, chunk({"content": "a"}))
        assert not meter.usage_final

    def test_a_report_that_leaves_out_a_side_is_no_usage(self) -> None:
        meter = meter_of(chunk(finish="stop", usage={"prompt_tokens": 5, "completion_tokens": None}))
        assert meter.usage(PLAIN) is None

    def test_a_report_is_kept_as_text_that_a_database_takes(self) -> None:
        odd = {"prompt_tokens": 1, "a": float("nan"), "b": "x\x00\ud800", "c": {"d": [float("inf")]}, "e": 10**64}
        text = meter_of(chunk(finish="stop", usage=odd)).usage_json()
        assert text is not None
        wanted = {"prompt_tokens": 1, "a": None, "b": "x\N{REPLACEMENT CHARACTER}?", "c": {"d": [None]}, "e": 10**64}
        assert json.loads(text) == wanted
        assert storable_json({"a": "x" * 10_000}) == '{"unstorable":true}'
        assert storable_json({"a": 10**5000}) == '{"unstorable":true}'


class TestEnding:
    def test_nothing_a_part_and_the_whole(self) -> None:
        assert Meter().ending is Ending.EMPTY
        assert meter_of(chunk({"content": "a"})).ending is Ending.TRUNCATED
        assert meter_of(chunk({"content": "a"}), chunk(finish="length")).ending is Ending.COMPLETE

    def test_the_mark_ends_it_whatever_came(self) -> None:
        meter = meter_of(chunk({"content": "a"}))
        meter.observe_done()
        assert meter.ending is Ending.COMPLETE

    def test_every_choice_needs_its_reason_and_as_many_as_were_asked_for(self) -> None:
        first = [chunk({"content": "a"}, index=0), chunk({"content": "b"}, index=1), chunk(finish="stop", index=0)]
        assert meter_of(*first).ending is Ending.TRUNCATED
        assert meter_of(*first, chunk(finish="stop", index=1)).ending is Ending.COMPLETE
        assert meter_of(first[0], first[2], choices=2).ending is Ending.TRUNCATED

    def test_an_error_is_an_error_even_with_a_mark(self) -> None:
        for bad in (
            {"error": {"message": "x"}},
            chunk(x_groq={"error": "x"}),
            {"choices": [{"index": 0, "error": {"code": 1}}]},
            chunk(finish="error"),
        ):
            meter = meter_of(chunk({"content": "a"}), bad)
            meter.observe_done()
            assert meter.ending is Ending.ERROR

    def test_an_error_that_is_null_is_none(self) -> None:
        assert meter_of(chunk({"content": "a"}, "stop", error=None)).ending is Ending.COMPLETE

    def test_a_json_answer_is_complete_and_a_json_error_is_not(self) -> None:
        meter = Meter()
        meter.observe_body({"choices": [{"message": {"content": "a"}}], "usage": REPORT})
        assert (meter.ending, meter.usage(PLAIN)) == (Ending.COMPLETE, Usage(input=10, output=4))
        error = Meter()
        error.observe_body({"detail": "no"})
        assert (error.ending, error.error) == (Ending.ERROR, {"detail": "no"})


class TestTexts:
    def test_text_is_joined_per_choice(self) -> None:
        meter = meter_of(
            chunk({"content": "a"}, index=1),
            chunk({"content": "x"}),
            chunk({"content": "b"}, index=1),
            chunk({"refusal": "y"}),
        )
        assert meter.texts() == ["ab", "xy"]
        assert meter.choices == 2
        assert meter.text_chars == 4

    def test_reasoning_under_two_names_counts_once(self) -> None:
        twice = chunk({"reasoning": "why", "reasoning_content": "why", "reasoning_details": [{"text": "why"}]})
        assert meter_of(twice).texts() == ["why"]
        assert meter_of(chunk({"reasoning_details": [{"text": "a"}, {"summary": "b"}, 5]})).texts() == ["ab"]

    def test_parts_of_content(self) -> None:
        parts = [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "yes"}, {"image": 1}]
        assert meter_of(chunk({"content": parts})).texts() == ["yes", "hm"]

    def test_tool_calls_with_index_without_and_with_an_empty_id(self) -> None:
        def call(name: str | None, arguments: str, **ids: Any) -> dict[str, Any]:
            return chunk({"tool_calls": [{**ids, "function": {"name": name, "arguments": arguments}}]})

        indexed = meter_of(call("f", "", index=0), call(None, "{}", index=0), call("g", "1", index=1))
        assert (indexed.texts(), indexed.calls) == (["f{}", "g1"], 2)
        bare = meter_of(call("f", "{", id=""), call(None, "}"), call("g", "{}", id=""))
        assert (bare.texts(), bare.calls) == (["f{}", "g{}"], 2)
        named = meter_of(call("f", "1", id="a"), call("g", "2", id="b"), call(None, "3", id="a"))
        assert (named.texts(), named.calls) == (["f13", "g2"], 2)

    def test_other_kinds_of_calls(self) -> None:
        custom = chunk({"tool_calls": [{"index": 0, "custom": {"name": "c", "input": "in"}}]})
        legacy = chunk({"function_call": {"name": "l", "arguments": {"a": 1}}})
        assert meter_of(custom, legacy).texts() == ["cin", 'l{"a": 1}']

    def test_whole_messages_and_running_ones(self) -> None:
        whole = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "all"}}]}
        running = {"choices": [{"index": 0, "message": {"content": "all of it"}, "delta": {"content": " it"}}]}
        assert meter_of(whole, running).texts() == ["all it"]

    def test_what_counts_as_delivered(self) -> None:
        assert not meter_of(chunk({"role": "assistant", "content": ""}), chunk(finish="stop")).delivered
        for delta in (
            {"content": "a"},
            {"reasoning": "a"},
            {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
            {"audio": {"data": "AAAA"}},
            {"images": [{"url": "data:"}]},
        ):
            assert meter_of(chunk(delta)).delivered

    def test_memory_is_bounded_and_the_count_is_scaled(self) -> None:
        meter = Meter(text_chars_max=1_000)
        for _ in range(40):
            meter.observe(chunk({"content": "x" * 100}))
        assert [len(text) for text in meter.texts()] == [1_000]
        assert meter.text_chars == 4_000
        assert meter.scaled(250) == 1_000
        assert meter_of(chunk({"content": "abc"})).scaled(7) == 7

    def test_choices_and_calls_without_end_are_kept_in_bounds(self) -> None:
        meter = Meter()
        for i in range(3_000):
            meter.observe(chunk({"content": "x", "tool_calls": [{"index": i, "function": {"name": "f"}}]}, index=i))
        assert meter.choices <= 256
        assert meter.calls <= 1_024
        assert meter.text_chars == sum(len(text) for text in meter.texts()) == 6_000
