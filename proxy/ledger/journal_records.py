"""What stands in a journal: rows that end a hold, each in a frame with its length and its checksum. No file, no clock.

    magic (3 bytes)  kind (1)  payload's length (4)  CRC-32 of kind, length and payload (4)  payload

- HEAD      JSON: whose journal it is, for a person; nothing depends on it
- PRICE     a price version's name, a line feed, and its body compressed: what a restored older database may lack
- ROW       JSON: a number, the ledger it belongs to, and the finalize or release in full
- DONE      JSON: numbers of rows that the ledger has carried out; lost marks cost a repetition, no more
- REJECTED  JSON: the number of a row that the ledger will never carry out, and why

Whatever a crash leaves can be read: what doesn't check is *torn* where nothing valid follows it (it was never said to
be durable), and *damage* where something does. Then the valid frames on both sides count, and the damage is reported.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any
from uuid import UUID

from proxy.core.usage import Usage
from proxy.ledger.errors import JournalError
from proxy.ledger.records import Finalize, Release

__all__ = [
    "Contents",
    "Head",
    "JournalRow",
    "Row",
    "done_frame",
    "head_frame",
    "price_frame",
    "read_journal",
    "rejected_frame",
    "row_frame",
]

FORMAT = 1
MAGIC = b"\xfaFB"
HEAD, PRICE, ROW, DONE, REJECTED = b"H", b"P", b"S", b"D", b"R"

_FRAME = struct.Struct(">3scII")
_CHECKED = struct.Struct(">cI")

Row = Finalize | Release
"""What ends a hold."""


@dataclass(frozen=True, slots=True)
class Head:
    """Whose journal it is. ``opened_at``: UTC, ISO 8601."""

    ledger_id: UUID
    worker_id: UUID
    hostname: str
    release: str
    opened_at: str


@dataclass(frozen=True, slots=True)
class JournalRow:
    """A row as it stands in a journal. ``number`` is unique in what one worker writes."""

    number: int
    ledger_id: UUID
    row: Row


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal says. ``damaged``: ranges of bytes that can't be read although something valid follows them.

    ``torn_bytes``: what stands behind the last valid frame, which ends at ``end``. ``prices``: bodies by version.
    """

    head: Head | None
    rows: tuple[JournalRow, ...]
    done: frozenset[int]
    rejected: Mapping[int, str]
    prices: Mapping[str, str]
    damaged: tuple[tuple[int, int], ...]
    torn_bytes: int
    end: int

    @property
    def waiting(self) -> list[JournalRow]:
        """The rows that the ledger may not have carried out yet."""
        return [row for row in self.rows if row.number not in self.done and row.number not in self.rejected]


def head_frame(head: Head) -> bytes:
    """The first frame of a journal."""
    return _frame(HEAD, _json({"format": FORMAT} | {f.name: getattr(head, f.name) for f in fields(Head)}))


def price_frame(version: str, body: str) -> bytes:
    """A price version; ``version`` is its SHA-256 in hexadecimal digits."""
    return _frame(PRICE, version.encode() + b"\n" + zlib.compress(body.encode()))


def row_frame(number: int, ledger_id: UUID, row: Row) -> bytes:
    """A row that ends a hold, with all that the ledger needs."""
    names, values_of, kind = _SHAPES[type(row)]
    members = dict(zip(names, values_of(row), strict=True))
    return _frame(ROW, _json({"n": number, "ledger": ledger_id, kind: members}))


def done_frame(numbers: Iterable[int]) -> bytes:
    """The ledger has carried out these rows."""
    return _frame(DONE, _json(list(numbers)))


def rejected_frame(number: int, reason: str) -> bytes:
    """The ledger will never carry out this row."""
    return _frame(REJECTED, _json([number, reason]))


def read_journal(data: bytes) -> Contents:
    """What the bytes of a journal say, however they end. Raises JournalError where a newer release has written them."""
    found = _Reading()
    end, damaged = 0, []
    for begin, finish, kind, payload in _frames(data):
        if begin > end:
            damaged.append((end, begin))
        end = finish
        found.take(kind, payload)
    return Contents(
        found.head,
        tuple(found.rows.values()),
        frozenset(found.done),
        found.rejected,
        found.prices,
        tuple(damaged),
        # A file's room is taken before it is needed: zeros are no record.
        len(data[end:].rstrip(b"\0")),
        end,
    )


class _Reading:
    """Collects what the frames say. A row that stands there twice is one, and of two marks the later counts."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.rows: dict[int, JournalRow] = {}
        self.done: set[int] = set()
        self.rejected: dict[int, str] = {}
        self.prices: dict[str, str] = {}

    def take(self, kind: bytes, payload: bytes) -> None:
        reader = {
            HEAD: self._head,
            PRICE: self._price,
            ROW: self._row,
            DONE: self._done,
            REJECTED: self._rejected,
        }.get(kind)
        if reader is None:
            raise JournalError(f"it holds a record of kind {kind!r}, which this release doesn't know: upgrade Farebox")
        reader(payload)

    def _head(self, payload: bytes) -> None:
        said = json.loads(payload)
        if said.pop("format") > FORMAT:
            raise JournalError("a newer release has written it: upgrade Farebox")
        ids = UUID(said["ledger_id"]), UUID(said["worker_id"])
        self.head = Head(*ids, said["hostname"], said["release"], said["opened_at"])

    def _price(self, payload: bytes) -> None:
        version, _, body = payload.partition(b"\n")
        self.prices[version.decode()] = zlib.decompress(body).decode()

    def _row(self, payload: bytes) -> None:
        said = json.loads(payload)
        for make, (_, _, kind) in _SHAPES.items():
            if kind in said:
                number = said["n"]
                try:
                    self.rows[number] = JournalRow(number, UUID(said["ledger"]), _row_of(make, said[kind]))
                except (ValueError, TypeError) as error:
                    # Written as it was, but no ledger would take it: that may not stop the others.
                    self.rejected[number] = str(error)
                return
        raise JournalError("it holds a row of a kind that this release doesn't know: upgrade Farebox")

    def _done(self, payload: bytes) -> None:
        for number in json.loads(payload):
            self.done.add(number)
            self.rejected.pop(number, None)

    def _rejected(self, payload: bytes) -> None:
        number, reason = json.loads(payload)
        self.rejected[number] = reason
        self.done.discard(number)


def _frames(data: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Every valid frame: where it begins and ends, its kind and its payload."""
    at = data.find(MAGIC)
    while at >= 0:
        frame = _frame_at(data, at)
        if frame is None:
            at = data.find(MAGIC, at + 1)
            continue
        kind, payload, end = frame
        yield at, end, kind, payload
        at = data.find(MAGIC, end)


def _frame_at(data: bytes, at: int) -> tuple[bytes, bytes, int] | None:
    begin = at + _FRAME.size
    if begin > len(data):
        return None
    _, kind, length, checksum = _FRAME.unpack_from(data, at)
    payload = data[begin : begin + length]
    if len(payload) < length or _checksum(kind, payload) != checksum:
        return None
    return kind, payload, begin + length


def _frame(kind: bytes, payload: bytes) -> bytes:
    return _FRAME.pack(MAGIC, kind, len(payload), _checksum(kind, payload)) + payload


def _checksum(kind: bytes, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(kind, len(payload))))


def _plain(value: object) -> object:
    """What JSON has no form of its own for."""
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Usage):
        return value.as_tuple()
    raise TypeError(f"a journal has no form for {type(value).__name__}")


_encode = json.JSONEncoder(separators=(",", ":"), default=_plain).encode


def _json(value: object) -> bytes:
    return _encode(value).encode("ascii")


def _names(row: type[Row]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(row))


# Every field of a row, whatever they are: one that is added later needs no word here, unless it is of a new type.
_SHAPES: dict[type[Row], tuple[tuple[str, ...], Any, str]] = {
    Finalize: (_names(Finalize), attrgetter(*_names(Finalize)), "finalize"),
    Release: (_names(Release), attrgetter(*_names(Release)), "release"),
}
_FROM_JSON: dict[str, Any] = {
    "hold_id": UUID,
    "account_id": UUID,
    "worker_id": UUID,
    "fingerprint": bytes.fromhex,
    "usage": lambda counts: Usage(*counts),
}


def _row_of(make: type[Row], members: dict[str, Any]) -> Row:
    """The row; fields that an older release didn't know have their defaults."""
    unknown = members.keys() - set(_SHAPES[make][0])
    if unknown:
        raise JournalError(f"a newer release has written it ({', '.join(sorted(unknown))}): upgrade Farebox")
    return make(**{name: _FROM_JSON.get(name, _same)(value) for name, value in members.items()})


def _same(value: Any) -> Any:
    return value
