"""The event splitter: every byte comes out once, in order, whatever the cut; lines end where the standard says."""

import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.sse import EventTooLarge, Piece, Splitter

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.one_of(
    st.sampled_from(
        [b"", b"data: x", b"data:y", b"data", b": note", b"event: error", b"id: 7", b"retry:1", b"data:  z "]
    ),
    st.binary(max_size=6).map(lambda b: b.replace(b"\r", b"").replace(b"\n", b"")),
    st.sampled_from(["data: é\u2028\u2029\x85\x0b\x0c\x1c", "data: 🏜"]).map(str.encode),
)
BODIES = st.lists(st.tuples(LINES, LINE_ENDS), max_size=20).map(lambda ls: b"".join(a + b for a, b in ls)) | st.binary(
    max_size=40
)


def split(pieces: list[bytes]) -> list[Piece]:
    splitter = Splitter()
    return [piece for chunk in pieces for piece in splitter.feed(chunk)] + splitter.finish()


def cut(body: bytes, places: list[int]) -> list[bytes]:
    places = sorted(min(place, len(body)) for place in places)
    return [body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)]


def events(pieces: list[Piece]) -> list[tuple[bytes, bytes]]:
    return [(piece.event, piece.data) for piece in pieces if piece.data is not None]


def by_the_standard(body: bytes) -> list[tuple[bytes, bytes]]:
    """The events of a body, read line by line; the last one counts without its blank line, too."""
    found = []
    data: list[bytes] = []
    name = b""
    for line in [*re.split(rb"\r\n|\r|\n", body.removeprefix(b"\xef\xbb\xbf")), b""]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                found.append((name, b"\n".join(data)))
            data, name = [], b""
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return found


@given(BODIES, st.lists(st.integers(0, 300), max_size=10), st.booleans())
def test_cut_anywhere_the_events_are_the_same_and_no_byte_is_lost(body: bytes, places: list[int], bom: bool) -> None:
    body = b"\xef\xbb\xbf" * bom + body
    pieces = split(cut(body, places))
    assert b"".join(piece.raw for piece in pieces) == body
    assert events(pieces) == by_the_standard(body)
    assert events(split([body[i : i + 1] for i in range(len(body))])) == by_the_standard(body)


@given(BODIES)
def test_the_data_lies_where_the_places_say(body: bytes) -> None:
    for piece in split([body]):
        if piece.data is not None:
            assert b"\n".join(piece.raw[a:b] for a, b in piece.places) == piece.data


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_comes_out_with_its_blank_line_and_not_later(end: bytes) -> None:
    splitter = Splitter()
    body = b"data: 1" + end + end
    held = [splitter.feed(body[i : i + 1]) for i in range(len(body))]
    # With CRLF the blank line ends at its CR; the LF belongs to the event and follows by itself.
    first = 2 if end == b"\r\n" else 1
    assert [len(pieces) for pieces in held[-first:]] == [1] * first
    assert not any(held[:-first])
    assert splitter.between_events
    assert held[-1][0].joins == (end == b"\r\n")


def test_comments_and_blank_lines_outside_of_events_come_out_at_once() -> None:
    splitter = Splitter()
    assert splitter.feed(b": ping\n\n\r\n") == [Piece(b": ping\n"), Piece(b"\n"), Piece(b"\r\n")]
    assert splitter.feed(b"data: a\n") == []
    assert not splitter.between_events
    assert splitter.feed(b": inside\n") == []
    assert [piece.raw for piece in splitter.feed(b"\n")] == [b"data: a\n: inside\n\n"]


def test_what_never_ended_comes_out_at_the_end() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: a\nda") == []
    (piece,) = splitter.finish()
    assert (piece.raw, piece.data) == (b"data: a\nda", b"a")
    assert splitter.finish() == []


def test_one_event_is_bounded_by_its_lines_together() -> None:
    splitter = Splitter(event_bytes_max=100)
    splitter.feed(b"data: " + b"x" * 60 + b"\n")
    with pytest.raises(EventTooLarge, match="100 bytes"):
        splitter.feed(b"data: " + b"x" * 60 + b"\n")
    with pytest.raises(EventTooLarge):
        Splitter(event_bytes_max=100).feed(b"x" * 101)
    many = Splitter(event_bytes_max=100)
    for _ in range(50):
        assert len(many.feed(b"data: 1\n\n")) == 1


def test_a_long_line_in_small_cuts_costs_no_square_of_its_length() -> None:
    line = b"data: " + b"y" * 2_000_000 + b"\n\n"
    rng = random.Random(7)
    splitter = Splitter()
    began = time.perf_counter()
    out = []
    at = 0
    while at < len(line):
        step = rng.randrange(1, 60)
        out += splitter.feed(line[at : at + step])
        at += step
    assert [piece.raw for piece in out] == [line]
    assert time.perf_counter() - began < 3
