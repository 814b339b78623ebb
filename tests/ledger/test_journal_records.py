"""What stands in a journal can be read back, whatever a crash or a bad disk has made of it."""

import random
from dataclasses import fields
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.money import AMOUNT_MAX
from proxy.core.usage import Usage
from proxy.ledger import journal_records
from proxy.ledger.errors import JournalError
from proxy.ledger.journal_records import (
    Head,
    Row,
    done_frame,
    head_frame,
    price_frame,
    read_journal,
    rejected_frame,
    row_frame,
)
from proxy.ledger.records import Finalize, Release

LEDGER = UUID(int=7)
HEAD = Head(LEDGER, UUID(int=8), "host", "0.1", "2026-11-22T20:00:00Z")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
counts = st.integers(0, 2**40)
finalizes = st.builds(
    Finalize,
    hold_id=st.uuids(),
    account_id=st.uuids(),
    worker_id=st.uuids(),
    charge=st.integers(0, AMOUNT_MAX),
    usage=st.builds(Usage, counts, counts, counts, counts, counts, counts, counts),
    fingerprint=st.binary(min_size=32, max_size=32),
    capped=st.none() | texts,
    **dict.fromkeys(("key_id", "usage_source", "price_version", "model", "variant", "ending", "receipt"), texts),
)
releases = st.builds(Release, st.uuids(), st.uuids(), st.uuids())


def a_release() -> Release:
    return Release(uuid4(), uuid4(), uuid4())


def frames(rows: list[Row]) -> list[bytes]:
    return [head_frame(HEAD), *(row_frame(number, LEDGER, row) for number, row in enumerate(rows, 1))]


@given(st.lists(finalizes | releases, max_size=5))
def test_every_field_of_a_row_comes_back(rows: list[Row]) -> None:
    contents = read_journal(b"".join(frames(rows)))
    assert [row.row for row in contents.rows] == rows
    assert {row.ledger_id for row in contents.rows} <= {LEDGER}
    assert (contents.head, contents.damaged, contents.torn_bytes) == (HEAD, (), 0)


def test_the_strategy_above_fills_every_field() -> None:
    """A field that somebody adds must be in the round trip, and not only its default."""
    given_fields = {"hold_id", "account_id", "worker_id", "charge", "usage", "fingerprint", "capped"}
    given_fields |= {"key_id", "usage_source", "price_version", "model", "variant", "ending", "receipt"}
    assert {f.name for f in fields(Finalize)} == given_fields


def test_marks_say_what_waits_and_the_later_one_counts() -> None:
    rows: list[Row] = [a_release() for _ in range(5)]
    data = b"".join([*frames(rows), done_frame([1, 3]), rejected_frame(4, "no such account")])
    contents = read_journal(data)
    assert [row.number for row in contents.waiting] == [2, 5]
    assert contents.rejected == {4: "no such account"}
    again = read_journal(data + done_frame([4]) + rejected_frame(1, "why"))
    assert set(again.done) == {3, 4}
    assert again.rejected == {1: "why"}


def test_prices_come_back_whole() -> None:
    body = '{"routes": "ü"}' * 1_000
    frame = price_frame("a" * 64, body)
    assert len(frame) < len(body) / 10
    assert read_journal(frame).prices == {"a" * 64: body}


def test_the_room_that_was_taken_ahead_is_no_record() -> None:
    data = b"".join(frames([a_release()]))
    contents = read_journal(data + bytes(100_000))
    assert (len(contents.rows), contents.end, contents.torn_bytes, contents.damaged) == (1, len(data), 0, ())


def test_a_tail_torn_at_any_byte_costs_the_torn_row_alone() -> None:
    rows: list[Row] = [a_release() for _ in range(3)]
    parts = frames(rows)
    whole, last = b"".join(parts[:-1]), parts[-1]
    for cut in range(1, len(last)):
        for rest in (b"", bytes(64)):
            contents = read_journal(whole + last[:cut] + rest)
            assert [row.row for row in contents.rows] == rows[:2]
            assert (contents.damaged, contents.end) == ((), len(whole))
            assert 0 < contents.torn_bytes <= cut


def test_any_one_byte_damaged_costs_one_row_and_is_reported() -> None:
    rows: list[Row] = [a_release() for _ in range(4)]
    parts = frames(rows)
    data = b"".join(parts)
    begin = len(parts[0]) + len(parts[1])
    end = begin + len(parts[2])
    for place in range(begin, end):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        contents = read_journal(bytes(damaged))
        assert [row.row for row in contents.rows] == [rows[0], *rows[2:]]
        assert contents.damaged == ((begin, end),)


def test_a_damaged_head_loses_no_row() -> None:
    rows: list[Row] = [a_release()]
    data = bytearray(b"".join(frames(rows)))
    data[5] ^= 1
    contents = read_journal(bytes(data))
    assert ([row.row for row in contents.rows], contents.head) == (rows, None)
    assert [row.ledger_id for row in contents.rows] == [LEDGER]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happened_to_a_file_reading_it_ends_and_invents_nothing(seed: int) -> None:
    chance = random.Random(seed)
    rows: list[Row] = [a_release() for _ in range(chance.randrange(1, 12))]
    data = bytearray(b"".join(frames(rows)))
    for _ in range(chance.randrange(1, 4)):
        at, length = chance.randrange(len(data)), chance.randrange(1, 200)
        match chance.randrange(3):
            case 0:
                data[at : at + length] = chance.randbytes(length)
            case 1:
                data[at : at + length] = bytes(length)
            case _:
                del data[at : at + length]
    found = [row.row for row in read_journal(bytes(data)).rows]
    assert found == [row for row in rows if row in found]


def test_what_a_newer_release_wrote_is_left_to_it() -> None:
    newer = row_frame(1, LEDGER, a_release()).replace(b'"release"', b'"unknown"')
    # Framed anew, as that release would have.
    from_newer = _reframed(newer)
    with pytest.raises(JournalError, match="upgrade Farebox"):
        read_journal(from_newer)
    head = _reframed(head_frame(HEAD).replace(b'"format":1', b'"format":2'))
    with pytest.raises(JournalError, match="upgrade Farebox"):
        read_journal(head)


def _reframed(frame: bytes) -> bytes:
    return journal_records._frame(frame[3:4], frame[12:])
