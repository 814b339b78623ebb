"""JSON with places: the members of an object, each with its value and where in the text it stands.

It lets a body be changed in one spot while everything else keeps its bytes: number text, key order, blanks, unknown
fields, escapes. Values are read by json's C scanner; only the members of this one object are walked in Python.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from typing import Any, Literal

__all__ = [
    "Edit",
    "Member",
    "TooManyMembers",
    "apply_edits",
    "read_object",
    "skip_blanks",
    "too_much",
    "without_members",
]

_BLANKS = re.compile(r"[ \t\n\r]*")
_PLAIN_KEY = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')


@dataclass(frozen=True, slots=True)
class Member:
    """One ``"key": value`` of an object. Offsets are characters in the text that was read."""

    key: str
    value: Any
    key_start: int
    value_start: int
    value_end: int


class TooManyMembers(ValueError):
    """The object has more members than may be walked."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Put ``text`` in place of the bytes ``[start, end)``."""

    start: int
    end: int
    text: bytes


def skip_blanks(text: str, at: int) -> int:
    """The first offset from ``at`` on that is no JSON blank."""
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def read_object(
    text: str, start: int, decoder: JSONDecoder, *, members_max: int | None = None
) -> tuple[list[Member], int]:
    """The members of the object that begins at ``start`` (its brace, or blanks before it) and the offset of its ``}``.

    Duplicate keys are all listed. Raises JSONDecodeError, TooManyMembers, and whatever the decoder's hooks raise.
    """
    at = skip_blanks(text, start)
    if text[at : at + 1] != "{":
        raise JSONDecodeError("Expecting an object", text, at)
    members: list[Member] = []
    at = skip_blanks(text, at + 1)
    if text[at : at + 1] == "}":
        return members, at
    while True:
        member = _read_member(text, at, decoder)
        members.append(member)
        if members_max is not None and len(members) > members_max:
            raise TooManyMembers
        at = skip_blanks(text, member.value_end)
        after = text[at : at + 1]
        if after == "}":
            return members, at
        if after != ",":
            raise JSONDecodeError("Expecting ',' delimiter", text, at)
        at = skip_blanks(text, at + 1)


def _read_member(text: str, at: int, decoder: JSONDecoder) -> Member:
    plain = _PLAIN_KEY.match(text, at)
    if plain:
        key, start = plain[1], plain.end()
    else:
        key, start = _read_odd_key(text, at, decoder)
    value, end = decoder.raw_decode(text, start)
    return Member(key, value, at, start, end)


def _read_odd_key(text: str, at: int, decoder: JSONDecoder) -> tuple[str, int]:
    """A key with escapes in it, and where its value begins; or the error that says what stands there instead."""
    if text[at : at + 1] != '"':
        raise JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, colon = decoder.raw_decode(text, at)
    colon = skip_blanks(text, colon)
    if text[colon : colon + 1] != ":":
        raise JSONDecodeError("Expecting ':' delimiter", text, colon)
    return key, skip_blanks(text, colon + 1)


def without_members(text: str, members: Sequence[Member], keys: Container[str]) -> str:
    """The text without the members of these keys; every kept member keeps the blanks and the comma before it."""
    kept = [i for i, member in enumerate(members) if member.key not in keys]
    pieces = [text[: members[0].key_start]] if members else [text]
    for place, i in enumerate(kept):
        if place:
            pieces.append(text[members[i - 1].value_end : members[i].key_start])
        pieces.append(text[members[i].key_start : members[i].value_end])
    if members:
        pieces.append(text[members[-1].value_end :])
    return "".join(pieces)


def apply_edits(body: bytes, edits: Iterable[Edit]) -> bytes:
    """The body after all edits, which must not overlap; the very same object where there is none."""
    pieces: list[bytes] = []
    at = 0
    for edit in sorted(edits, key=lambda e: e.start):
        pieces.append(body[at : edit.start])
        pieces.append(edit.text)
        at = edit.end
    if not pieces:
        return body
    pieces.append(body[at:])
    return b"".join(pieces)


def too_much(body: bytes, *, depth_max: int, values_max: int) -> Literal["depth", "values"] | None:
    """Whether JSON nests deeper, or holds more values, than may be read; None where it may.

    Reading JSON keeps the event loop for as long as it takes, and ten megabytes of ``{},{},`` take a second. Cheap on
    hostile bodies itself: no step in Python per byte. A body that isn't JSON gives any answer, but no error.
    """
    if b"\\" in body:
        # Escapes go first, so that every quote left opens or closes a string.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = body.translate(None, _NO_MARKS)
    # A value has at most a key and itself in quotes.
    if marks.count(b'"') > 4 * values_max:
        return "values"
    outside = b"".join(marks.split(b'"')[::2])
    brackets = outside.translate(_AS_SQUARE, b",")
    # An object's or array's values are one more than its commas.
    if 1 + outside.count(b",") + brackets.count(b"[") > values_max:
        return "values"
    return "depth" if _nests_deeper(brackets, depth_max) else None


def _nests_deeper(brackets: bytes, depth: int) -> bool:
    for _ in range(depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")  # peels the innermost level everywhere at once
    return b"[]" in brackets or brackets.count(b"[") > depth


_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_MARKS = bytes(set(range(256)) - set(b'[]{},"'))
