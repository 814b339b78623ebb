"""Answers of our own in the shapes of real providers, and what should be made of each.

The files in ``tests/fixtures`` hold the bytes; this table says what a meter must find in them.
"""

from dataclasses import dataclass
from pathlib import Path

from proxy.core.catalog import Quirks
from proxy.core.meter import Ending
from proxy.core.usage import Usage

__all__ = ["ANSWERS", "Answer"]

AS_OPENAI = Quirks()
FOLDER = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Answer:
    """``usage``: of the whole answer, None where no report covers it. ``dropped``: events kept from a client that
    hadn't asked. ``nulls``: null usages cut for it."""

    name: str
    ending: Ending
    usage: Usage | None
    texts: tuple[str, ...]
    dropped: int = 0
    nulls: int = 0
    calls: int = 0
    choices: int = 1
    quirks: Quirks = AS_OPENAI

    @property
    def body(self) -> bytes:
        return (FOLDER / self.name).read_bytes()

    @property
    def streamed(self) -> bool:
        return self.name.endswith(".sse")


_DUNES = "Dünen wandern 🏜 im Wind"
_SMALL = Usage(input=19, output=5)
C = Ending.COMPLETE

ANSWERS: tuple[Answer, ...] = (
    Answer("openai_usage_asked.sse", C, _SMALL, (_DUNES,), dropped=1, nulls=7),
    Answer("openai_usage_not_sent.sse", C, None, (_DUNES,)),
    Answer(
        "openai_two_choices_tools.sse",
        C,
        Usage(input=71, output=29),
        ("Sunny", 'weather{"city":"Ulm"}', "clock{}"),
        dropped=1,
        nulls=7,
        calls=2,
        choices=2,
    ),
    Answer(
        "openai_moderation_and_lookalikes.sse",
        C,
        _SMALL,
        ('say ,"usage":null} and data: [DONE]\n\n \u2028\u0085\u000b end',),
        dropped=1,
        nulls=3,
    ),
    Answer("azure_prompt_filter.sse", C, _SMALL, (_DUNES,), dropped=1, nulls=6),
    Answer("azure_prompt_filter_null.sse", C, _SMALL, ("ok",), nulls=3),
    Answer("openrouter_comments.sse", C, Usage(input=8, cached_input=4, output=5, reasoning=35), ("Four.", "Let me")),
    Answer("mistral_finish_chunk.sse", C, Usage(input=30, output=25), ("Yes", "Hm.", "a{}", "b{}"), calls=2),
    Answer(
        "deepseek_null_usage.sse",
        C,
        Usage(input=36, cached_input=64, output=3, reasoning=6),
        ("42", "Erst denken"),
        nulls=3,
    ),
    Answer("groq_x_groq.sse", C, Usage(input=40, output=3), ("Hi!",)),
    Answer("groq_usage_three_times.sse", C, Usage(input=40, output=3), ("Hi!",), dropped=1),
    Answer("groq_error_midway.sse", Ending.ERROR, None, ("Let me",)),
    Answer("perplexity_running_usage.sse", C, Usage(input=8, output=3), ("One two three",)),
    Answer("perplexity_cut.sse", Ending.TRUNCATED, None, ("One two and much more",)),
    Answer("databricks_null_completion.sse", C, Usage(input=15, output=2), ("Bricks.",)),
    Answer(
        "xai_reasoning_outside.sse",
        C,
        Usage(input=15, cached_input=5, output=1, reasoning=200),
        ("7", "Thinking"),
        dropped=1,
        quirks=Quirks(reasoning_outside=True),
    ),
    Answer("google_gap.sse", C, Usage(input=35, output=12, reasoning=62), ("f{}",), calls=1),
    Answer("llamacpp_timings.sse", C, Usage(input=1, cached_input=8, output=1), ("ok",), dropped=1),
    Answer("framing_cr_only.sse", C, _SMALL, ("cr",), dropped=1, nulls=2),
    Answer("framing_multi_line_bom.sse", C, _SMALL, ("multi",), dropped=1),
    Answer("cut_before_finish.sse", Ending.TRUNCATED, None, ("Half a sentence",), nulls=2),
    Answer("cut_inside_event.sse", Ending.TRUNCATED, None, ("Half",), nulls=1),
    Answer("end_without_mark.sse", C, None, ("Whole",)),
    Answer("usage_empty_and_zero.sse", C, None, ("word",)),
    Answer("json_answer.json", C, Usage(input=9, output=2), ("Hello there",)),
    Answer(
        "json_two_choices.json",
        C,
        Usage(input=35, cached_input=10, cache_write=5, output=20),
        ('f{"a":1}', "No"),
        calls=1,
        choices=2,
    ),
    Answer("json_error_with_200.json", Ending.ERROR, None, ()),
    Answer("json_audio_beside.json", C, Usage(input=2, cached_input=9, audio_input=375, output=15), ("A song",)),
)
