"""spans.too_much and what core/chat.py makes of it: JSON that would keep the event loop busy is refused unread."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.chat import ChatRequest
from proxy.core.errors import InvalidRequest
from proxy.core.spans import too_much
from proxy.gateway.limits import DEFAULT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('[]{},:"\\ a\n\u2028é', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\,[a', max_size=3), inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def count_of(value: Any) -> int:
    """Values in it; an empty array or object counts twice, being a value and a bracket."""
    if isinstance(value, dict | list):
        return 1 + (sum(map(count_of, value.values() if isinstance(value, dict) else value)) or 1)
    return 1


@given(VALUES, st.booleans())
def test_depth_and_values_are_seen_exactly(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth, values = depth_of(value), count_of(value)

    assert too_much(body, depth_max=depth, values_max=values) is None
    assert too_much(body, depth_max=depth, values_max=values - 1) == "values"
    if depth:
        assert too_much(body, depth_max=depth - 1, values_max=values) == "depth"


@given(st.binary() | st.text('[]{},:"\\').map(str.encode))
def test_what_is_no_json_raises_nothing(body: bytes) -> None:
    too_much(body, depth_max=3, values_max=5)


def chat(member: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"x"}],' + member + b"}"


@pytest.mark.parametrize(
    ("member", "code"),
    [
        (b'"x":[' + b"0," * 200_000 + b"0]", "json_too_many_values"),
        (b'"x":[' + b"{}," * 200_000 + b"0]", "json_too_many_values"),
        (b'"x":' + b"[" * 200_000, "json_too_many_values"),
        (b",".join(b'"%d":0' % n for n in range(200_000)), "json_too_many_values"),
        (b",".join(b'"%d":0' % n for n in range(1_000)), "json_too_many_values"),
        (b'"x":' + b"[" * 64 + b"]" * 64, "json_too_deep"),
    ],
    ids=["numbers", "objects", "brackets", "members", "members at the top", "depth"],
)
def test_hostile_json_is_400_by_name(member: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatRequest.parse(chat(member), DEFAULT)

    assert refused.value.code == code


def test_a_large_request_of_real_kind_is_read() -> None:
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"f{n}",
                "parameters": {"type": "object", "properties": {f"p{m}": {"type": "string"} for m in range(50)}},
            },
        }
        for n in range(128)
    ]
    messages = [{"role": "user", "content": 'a, b, [c], {d}, \\ "e" ' * 100}] * 2_000

    parsed = ChatRequest.parse(json.dumps({"model": "m", "messages": messages, "tools": tools}).encode(), DEFAULT)

    assert parsed.messages_count == 2_000
