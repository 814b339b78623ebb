"""How many tokens a call can use at most, before it is made, and how many it did use where no report came.

Prompts are counted with one vocabulary (o200k_base) for every model; a family's row says how far another tokenizer and
the hidden parts of its prompts can be from that count. The figures are METERING's, fitted to 10,960 recorded prompts
of which the rows cover 99.4 %: a report above its bound is rare, and is charged as reported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from proxy.core.chat import ChatRequest
from proxy.core.families import UNKNOWN
from proxy.core.images import ImageRule, image_rule
from proxy.core.media import Attachment

__all__ = [
    "FAMILIES",
    "OUTPUT_FLOOR",
    "Family",
    "byte_bound",
    "input_bound",
    "input_estimate",
    "output_bound",
    "output_estimate",
]

# Some providers raise a smaller cap to this.
OUTPUT_FLOOR = 16
# No model takes a longer prompt, so no file can cost more.
_CONTEXT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table. All numbers but the factors are tokens.

    ``factor`` on the counted prompt, ``plain`` beside it, ``schema`` / ``tools`` instead where the request has them
    (their sum where it has both). ``said_factor`` is the tokenizer's true factor on visible text, ``said`` and
    ``per_call`` what an answer and a tool call cost beside their text. ``hidden``: it may reason without showing it.
    ``silent_rate``: the tokens a second that it then writes; METERING's for gpt-5, the slowest seen for all others.
    """

    factor: float
    plain: int
    schema: int
    tools: int
    said_factor: float
    said: int
    per_call: int
    hidden: bool = False
    silent_rate: int = 50
    cap_key: str = "max_tokens"


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt-4": Family(1.05, 16, 40, 60, 1.0, 1, 8),
        "gpt-5": Family(1.05, 16, 40, 110, 1.0, 9, 8, hidden=True, silent_rate=57, cap_key="max_completion_tokens"),
        "claude-4": Family(1.25, 60, 400, 900, 1.15, 4, 45),
        "claude-5": Family(1.9, 60, 500, 900, 1.5, 6, 55, hidden=True),
        "gemini": Family(1.3, 30, 60, 120, 1.05, 1, 0, hidden=True),
        "mistral": Family(1.35, 30, 60, 60, 1.03, 2, 4),
        "deepseek": Family(1.35, 90, 120, 400, 1.04, 2, 33),
        "llama": Family(1.35, 60, 100, 700, 1.06, 2, 18),
        "grok": Family(1.35, 200, 250, 550, 1.06, 2, 18, hidden=True),
        "qwen": Family(1.35, 40, 80, 350, 1.06, 2, 18),
        "glm": Family(1.35, 40, 80, 200, 1.04, 8, 20),
        "kimi": Family(1.35, 40, 80, 200, 1.04, 8, 20),
        UNKNOWN: Family(1.35, 250, 400, 1_000, 1.15, 8, 45, hidden=True),
    }
)


def input_bound(family: str, counted: int, request: ChatRequest, model: str = "") -> int:
    """The most input tokens of this request. ``counted``: o200k tokens of ``request.texts``, each for itself.

    ``model`` is the upstream's name for the model, for its rule on pictures.
    """
    row = _row(family)
    return (
        math.ceil(row.factor * _counted_prompt(counted, request))
        + _beside(row, request)
        + _media(family, model, request)
    )


def byte_bound(family: str, request: ChatRequest, model: str = "") -> int:
    """The bound where the text can't be counted: half the bytes of the body, and 1,500 for what is hidden."""
    return request.text_bytes // 2 + 1_500 + _media(family, model, request)


def output_bound(cap: int, choices: int, prediction_bytes: int = 0) -> int:
    """The most output tokens, over all choices, under a cap per choice. Rejected predictions are billed beside it."""
    return (max(OUTPUT_FLOOR, cap) + prediction_bytes) * choices


def input_estimate(family: str, counted: int, request: ChatRequest, model: str = "") -> int:
    """About what a provider would report for this prompt, where it reported nothing. Never above ``input_bound``."""
    row = _row(family)
    likely = math.ceil(row.said_factor * _counted_prompt(counted, request)) + _media(family, model, request)
    return min(likely, input_bound(family, counted, request, model))


def output_estimate(family: str, counted: int, *, choices: int, calls: int) -> int:
    """About what a provider would report for what was said; 0 if nothing was.

    ``counted``: o200k tokens of the joined texts. Reasoning that wasn't shown isn't in it.
    """
    if not choices:
        return 0
    row = _row(family)
    return math.ceil(row.said_factor * counted) + row.said * choices + row.per_call * calls


def _row(family: str) -> Family:
    return FAMILIES.get(family) or FAMILIES[UNKNOWN]


def _counted_prompt(counted: int, request: ChatRequest) -> int:
    return counted + 4 * request.messages_count + 3 + 8 * request.calls_count


def _beside(row: Family, request: ChatRequest) -> int:
    schema = row.schema if request.response_format == "json_schema" else 0
    tools = row.tools if request.tools else 0
    return (schema + tools) or row.plain


def _media(family: str, model: str, request: ChatRequest) -> int:
    if not request.images and not request.attachments:
        return 0
    rule: ImageRule = image_rule(family, model)
    return sum(rule(image) for image in request.images) + sum(_attachment(item) for item in request.attachments)


# Per kind: tokens where nothing is known (a URL, an id), tokens at least, bytes of content per token.
_ATTACHMENTS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        # A page of a PDF costs its text and a picture of it; compressed text has several characters a byte.
        "file": (50_000, 6_000, 1),
        # Ten to 32 tokens a second, rounded up to half a minute by some; speech may be coded at 1,000 bytes a second.
        "audio": (50_000, 800, 16),
        "video": (100_000, 2_000, 16),
    }
)


def _attachment(item: Attachment) -> int:
    unknown, least, bytes_per_token = _ATTACHMENTS[item.kind]
    return unknown if item.bytes is None else min(_CONTEXT_MAX, least + item.bytes // bytes_per_token)
