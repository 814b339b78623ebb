"""JSON with places: the members of an object, each with its value and where in the text it stands.

It lets a body be changed in one spot while everything else keeps its bytes: number text, key order, blanks, unknown
fields, escapes. Values are read by json's C scanner; only the members of this one object are walked in Python.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from typing import Any

__all__ = ["Edit", "Member", "apply_edits", "nested_deeper", "read_object", "skip_blanks", "without_members"]

_BLANKS = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Member:
    """One ``"key": value`` of an object. Offsets are characters in the text that was read."""

    key: str
    value: Any
    key_start: int
    value_start: int
    value_end: int


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


def read_object(text: str, start: int, decoder: JSONDecoder) -> tuple[list[Member], int]:
    """The members of the object that begins at ``start`` (its brace, or blanks before it) and the offset of its ``}``.

    Duplicate keys are all listed. Raises JSONDecodeError, and whatever the decoder's hooks raise.
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
        at = skip_blanks(text, member.value_end)
        after = text[at : at + 1]
        if after == "}":
            return members, at
        if after != ",":
            raise JSONDecodeError("Expecting ',' delimiter", text, at)
        at = skip_blanks(text, at + 1)


def _read_member(text: str, at: int, decoder: JSONDecoder) -> Member:
    if text[at : at + 1] != '"':
        raise JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, colon = decoder.raw_decode(text, at)
    colon = skip_blanks(text, colon)
    if text[colon : colon + 1] != ":":
        raise JSONDecodeError("Expecting ':' delimiter", text, colon)
    start = skip_blanks(text, colon + 1)
    value, end = decoder.raw_decode(text, start)
    return Member(key, value, at, start, end)


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


def nested_deeper(body: bytes, depth: int) -> bool:
    """Whether arrays and objects stand more than ``depth`` deep in each other; brackets in strings don't count.

    Cheap on hostile bodies, too: no step in Python per byte. A body that isn't JSON gives either answer, no error.
    """
    if body.count(b"{") + body.count(b"[") <= depth:
        return False
    # Escapes go first, so that every quote left opens or closes a string; each second piece is outside of them.
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(_AS_SQUARE, _NO_BRACKETS)
    for _ in range(depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")  # peels the innermost level everywhere at once
    return b"[]" in brackets or brackets.count(b"[") > depth


_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
