"""Objects read with places, and edits by bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.spans import Edit, apply_edits, read_object, without_members

DECODER = json.JSONDecoder()

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=6), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_members_are_the_objects_own_and_their_places_hold_them(
    value: dict[str, object], indent: int | str | None, ascii_only: bool
) -> None:
    text = " \n" + json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    members, close = read_object(text, 0, DECODER)
    assert [(m.key, m.value) for m in members] == list(value.items())
    assert text[close] == "}"
    for member in members:
        assert json.loads(text[member.value_start : member.value_end]) == member.value
        assert DECODER.raw_decode(text, member.key_start)[0] == member.key


@given(st.lists(st.tuples(st.sampled_from("abc"), VALUES), max_size=6), st.sets(st.sampled_from("abc")))
def test_members_taken_out_leave_the_rest_as_it_was(pairs: list[tuple[str, object]], gone: set[str]) -> None:
    text = "{ " + " , ".join(f"{json.dumps(k)} : {json.dumps(v)}" for k, v in pairs) + " }"
    members, _ = read_object(text, 0, DECODER)
    left = without_members(text, members, gone)
    assert json.loads(left, object_pairs_hook=list) == json.loads(
        "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs if k not in gone) + "}",
        object_pairs_hook=list,
    )
    if not gone & {k for k, _ in pairs}:
        assert left == text


@pytest.mark.parametrize("text", ["", "[]", '{"a"}', '{"a":1,}', "{a:1}", '{"a":1', '{"a":1 "b":2}', '{"a":}', "{,}"])
def test_what_is_no_object_says_where(text: str) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        read_object(text, 0, DECODER)
    assert 0 <= caught.value.pos <= len(text)


def test_edits_put_bytes_in_place_and_nothing_else() -> None:
    body = b"0123456789"
    assert apply_edits(body, [Edit(8, 9, b"EIGHT"), Edit(2, 4, b""), Edit(5, 5, b"<>")]) == b"014<>567EIGHT9"
    assert apply_edits(body, []) is body
