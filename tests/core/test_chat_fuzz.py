"""Whatever a client sends is a request or a refusal; a rewritten request says what the old one did, and no more."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.chat import ChatRequest
from proxy.core.errors import Refusal
from proxy.core.spans import read_object
from tests.core.limits import Limits

LIMITS = Limits(messages_max=20)

FIELDS = [
    "model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "tools", "functions",
    "store", "service_tier", "response_format", "modalities", "audio", "prediction", "web_search_options", "best_of",
    "usage", "models", "plugins", "documents", "é", "",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["https://x", "data:image/png;base64,iVBORw0KGgo", "data:,", "\ud800", "\x00", "web_search"])
)
KEYS = st.sampled_from(
    [
        "type",
        "text",
        "content",
        "role",
        "image_url",
        "url",
        "file",
        "input_audio",
        "data",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "audio",
        "images",
        "reasoning_details",
        "include_usage",
        "cache_control",
        "x",
    ]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MESSAGES = st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=3)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Requests that mostly parse: right types in the fields that are judged, anything in the others."""
    fields: dict[str, Any] = {"model": draw(st.sampled_from(["m", "gpt-4o", "ü"])), "messages": draw(MESSAGES)}
    optional = {
        "stream": st.booleans() | st.none(),
        "n": st.integers(1, 8) | st.none(),
        "max_tokens": st.integers(1, 5000) | st.none(),
        "max_completion_tokens": st.integers(1, 5000) | st.none(),
        "stream_options": st.none() | st.dictionaries(st.sampled_from(["include_usage", "é"]), st.booleans()),
        "other": VALUES,
        "zulu": SCALARS,
    }
    for name in draw(st.sets(st.sampled_from(sorted(optional)))):
        fields[name] = draw(optional[name])
    return {name: fields[name] for name in draw(st.permutations(sorted(fields)))}


def encode(value: Any, *, indent: int | None, ascii_only: bool) -> bytes:
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    parse_or_refuse(raw)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES), st.booleans())
def test_any_fields(fields: dict[str, Any], ascii_only: bool) -> None:
    parse_or_refuse(encode(fields, indent=None, ascii_only=ascii_only))


@given(requests(), st.data())
def test_any_damage_to_a_request(fields: dict[str, Any], data: st.DataObject) -> None:
    raw = encode(fields, indent=None, ascii_only=True)
    at = data.draw(st.integers(0, len(raw) - 1))
    parse_or_refuse(raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + 1 :])


def parse_or_refuse(raw: bytes) -> None:
    refusal: Refusal | None = None
    try:
        assert ChatRequest.parse(raw, LIMITS).rewritten() is raw
    except Refusal as refused:
        refusal = refused
    if refusal is not None:
        assert 400 <= refusal.status < 500
        json.dumps(refusal.body()).encode()


@given(
    requests(),
    st.sampled_from([None, 1]),
    st.none() | st.text(min_size=1),
    st.booleans(),
    st.none() | st.integers(1, 9000),
)
def test_a_rewritten_request_says_what_was_meant(
    fields: dict[str, Any], indent: int | None, model: str | None, include_usage: bool, cap: int | None
) -> None:
    raw = encode(fields, indent=indent, ascii_only=True)
    try:
        request = ChatRequest.parse(raw, LIMITS)
    except Refusal:
        return  # NaN in a free field
    sent = request.rewritten(model, include_usage, cap, cap_key="max_tokens")
    wanted = dict(fields)
    if model is not None:
        wanted["model"] = model
    if include_usage and request.stream:
        wanted["stream_options"] = {**(fields.get("stream_options") or {}), "include_usage": True}
    if cap is not None:
        stated = [key for key in ("max_tokens", "max_completion_tokens") if fields.get(key) is not None]
        for key in stated or ["max_tokens"]:
            wanted[key] = min(cap, fields.get(key) or cap)
    assert json.loads(sent) == wanted
    assert same_bytes_elsewhere(raw, sent)


def same_bytes_elsewhere(raw: bytes, sent: bytes) -> bool:
    """Every member that wasn't meant to change has its very text, in the old order; new ones stand at the end."""
    touched = {"model", "stream_options", "max_tokens", "max_completion_tokens"}
    before, after = (
        [(m.key, text[m.value_start : m.value_end]) for m in read_object(text, 0, json.JSONDecoder())[0]]
        for text in (raw.decode(), sent.decode())
    )
    order = [key for key, _ in before]
    kept = dict(after)
    return [key for key, _ in after][: len(order)] == order and all(
        kept[key] == text for key, text in before if key not in touched
    )
