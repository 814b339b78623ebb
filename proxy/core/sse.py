"""Server-sent events as bytes: where an event begins and ends, whatever way the stream was cut.

Lines end at CR, LF or CRLF and nowhere else (``str.splitlines`` also cuts at U+2028 and others, which are content). An
event ends at its blank line. Every byte that goes in comes out in exactly one piece, so a relay can pass a piece or
drop it whole:

    event     its lines and its blank line; ``data`` is what it says
    comment   a line of its own, outside any event: passed on at once
    blank     a blank line that ends nothing, or the LF of a CRLF whose CR has already ended an event
    tail      what stood unfinished when the stream ended

Text is never decoded here, so a character may be cut anywhere.
"""

from typing import NamedTuple

__all__ = ["AnswerTooLarge", "EventTooLarge", "Piece", "Splitter"]

_BOM = b"\xef\xbb\xbf"


class AnswerTooLarge(ValueError):
    """What must be kept of an answer to meter it is above its limit."""


class EventTooLarge(AnswerTooLarge):
    """One event of a stream is larger than ``event_bytes_max``."""


class Piece(NamedTuple):
    """Consecutive bytes of the stream. ``data`` None: no event with data, so nothing to read.

    ``places``: for each data line, where its value lies in ``raw``. ``joins``: this piece belongs to the one before it
    (the LF that completes a CRLF) and shares its fate.
    """

    raw: bytes
    data: bytes | None = None
    event: bytes = b""
    places: tuple[tuple[int, int], ...] = ()
    joins: bool = False


_LF = Piece(b"\n", joins=True)


class Splitter:
    """Feed it chunks, take pieces. ``event_bytes_max`` bounds one event, its line ends included."""

    def __init__(self, event_bytes_max: int = 16 * 1024 * 1024) -> None:
        self._event_bytes_max = event_bytes_max
        self._line = bytearray()  # an unfinished line
        self._raw = bytearray()  # finished lines of an unfinished event
        self._places: list[tuple[int, int]] = []
        self._event = b""
        self._after_cr = False
        self._first_line = True

    @property
    def between_events(self) -> bool:
        """Whether nothing is held back: a new event could begin here."""
        return not self._line and not self._raw

    def feed(self, chunk: bytes) -> list[Piece]:
        """The pieces that this chunk completes. Raises EventTooLarge."""
        pieces: list[Piece] = []
        if not chunk:
            return pieces
        if self._after_cr:
            self._after_cr = False
            if chunk[:1] == b"\n":
                self._line_feed_after_cr(pieces)
                chunk = chunk[1:]
        if self._line:
            chunk = self._with_held(chunk)
        self._split(chunk, pieces)
        if len(self._raw) + len(self._line) > self._event_bytes_max:
            raise EventTooLarge(f"an event of the stream is larger than {self._event_bytes_max} bytes")
        return pieces

    def finish(self) -> list[Piece]:
        """What is left when the stream has ended: an event without its blank line, a line without its end."""
        if self._line:
            self._take_line(bytes(self._line), b"")
            self._line.clear()
        return [self._dispatch(b"")] if self._raw else []

    def _line_feed_after_cr(self, pieces: list[Piece]) -> None:
        # The CR has ended its line already. In an unfinished event the LF is part of that event's bytes.
        if self._raw:
            self._raw += b"\n"
        else:
            pieces.append(_LF)

    def _with_held(self, chunk: bytes) -> bytes:
        """The unfinished line and the chunk, once the chunk ends that line; else nothing: the chunk is held, too."""
        self._line += chunk
        if b"\n" not in chunk and b"\r" not in chunk:
            return b""
        whole = bytes(self._line)
        self._line.clear()
        return whole

    def _split(self, buffer: bytes, pieces: list[Piece]) -> None:
        at, end = 0, len(buffer)
        has_cr = b"\r" in buffer
        while at < end:
            lf = buffer.find(b"\n", at)
            stop, after = lf, lf + 1
            if has_cr:
                cr = buffer.find(b"\r", at, lf if lf >= 0 else end)
                if cr >= 0:
                    stop = cr
                    after = cr + 2 if buffer[cr + 1 : cr + 2] == b"\n" else cr + 1
                    self._after_cr = after == end and after == cr + 1
            if stop < 0:
                self._line += buffer[at:]
                return
            # The shape of nearly all events: one data line, one blank line, both ended by LF.
            if not self._raw and buffer[stop : stop + 2] == b"\n\n" and buffer.startswith(b"data: ", at):
                raw = buffer[at : stop + 2]
                pieces.append(Piece(raw, raw[6:-2], b"", ((6, len(raw) - 2),)))
                at = stop + 2
                self._first_line = False
                continue
            self._one_line(buffer[at:stop], buffer[stop:after], pieces)
            at = after

    def _one_line(self, line: bytes, line_end: bytes, pieces: list[Piece]) -> None:
        if not line:
            pieces.append(self._dispatch(line_end) if self._raw else Piece(line_end))
        elif line.startswith(b":") and not self._raw:
            pieces.append(Piece(line + line_end))
        else:
            self._take_line(line, line_end)
            if len(self._raw) > self._event_bytes_max:
                raise EventTooLarge(f"an event of the stream is larger than {self._event_bytes_max} bytes")
            return
        self._first_line = False

    def _take_line(self, line: bytes, line_end: bytes) -> None:
        start = len(self._raw)
        self._raw += line
        self._raw += line_end
        skipped = len(_BOM) if self._first_line and line.startswith(_BOM) else 0
        self._first_line = False
        name, colon, value = line[skipped:].partition(b":")
        blank = 1 if value.startswith(b" ") else 0
        if name == b"data":
            offset = start + skipped + len(name) + len(colon) + blank
            self._places.append((offset, start + len(line)))
        elif name == b"event":
            self._event = value[blank:]

    def _dispatch(self, line_end: bytes) -> Piece:
        self._raw += line_end
        raw = bytes(self._raw)
        data = b"\n".join(raw[a:b] for a, b in self._places) if self._places else None
        piece = Piece(raw, data, self._event, tuple(self._places))
        self._raw.clear()
        self._places.clear()
        self._event = b""
        return piece
