"""Reading YAML with positions: bytes in, nodes that know their line out, every problem named and none guessed over.

PyYAML finds the events; the nodes are made here, for four reasons: a number stays the text that stands in the file (no
float ever holds a price), every value keeps its line, a duplicate key is an error, and what YAML would do on its own is
refused: anchors and aliases (copies that a reader doesn't see, and bombs), tags, more than one document.

Plain text means what YAML 1.2's core schema says: ``true`` and ``false`` are booleans, ``null`` and ``~`` are nothing,
the rest is text or a number as the reader of the value decides. ``yes``, ``on``, ``010`` and ``1:30`` have no second
meaning here.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import yaml

from proxy.core.key_path import key_path, shorten

__all__ = [
    "FILE_BYTES_MAX",
    "PROBLEMS_MAX",
    "ConfigError",
    "Listing",
    "Node",
    "Problem",
    "Problems",
    "Scalar",
    "Table",
    "near_miss",
    "read_yaml",
]

FILE_BYTES_MAX = 1024 * 1024
DEPTH_MAX = 16
PROBLEMS_MAX = 20

# libyaml's parser where PyYAML was built with it (a hundred times faster), else the pure one; a test holds them equal.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Mark(Protocol):
    """A position as either parser of PyYAML gives it, from 0."""

    @property
    def line(self) -> int: ...
    @property
    def column(self) -> int: ...


# What no hand-written file holds: control characters, a second byte order mark, and the line breaks that YAML 1.1 knows
# but editors don't show (they would shift every line number).
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend: where it stands (line and column from 1) and what was expected there."""

    file: str
    line: int
    column: int
    key: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.key}: {self.message}"
            if self.key
            else f"{self.file}:{self.line}: {self.message}"
        )


class ConfigError(ValueError):
    """The files can't be used. ``problems`` names what to mend, at most PROBLEMS_MAX; ``more`` counts the rest."""

    def __init__(self, problems: tuple[Problem, ...], more: int = 0) -> None:
        rest = [f"... and {more} more"] if more else []
        super().__init__("\n".join([*map(str, problems), *rest]))
        self.problems = problems
        self.more = more


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value. ``plain``: it stood without quotes. ``text`` is as in the file, escapes in quotes resolved."""

    text: str
    plain: bool
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Listing:
    """A sequence; nothing in Farebox's files takes one, so its items aren't kept."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping: value and key by key's text, in the file's order."""

    entries: dict[str, tuple[Scalar, "Node"]]
    line: int
    column: int


Node = Scalar | Listing | Table


class Problems:
    """Collects what is wrong in one file, so that an operator sees all of it at once."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[Problem] = []
        self.count = 0

    def add(self, at: "Node | None", path: tuple[str, ...], message: str) -> None:
        """Note a problem at a node; None is the file's first line."""
        self.add_at(at.line if at else 1, at.column if at else 1, path, message)

    def add_at(self, line: int, column: int, path: tuple[str, ...], message: str) -> None:
        self.count += 1
        if len(self.found) < PROBLEMS_MAX:
            self.found.append(Problem(self.file, line, column, key_path(*path), message))

    def raise_if_any(self, *others: "Problems") -> None:
        """Raise ConfigError for the problems of this file and of ``others``, in the order of the lines."""
        every = (self, *others)
        found = [problem for one in every for problem in sorted(one.found, key=lambda p: (p.line, p.column))]
        if found:
            shown = tuple(found[:PROBLEMS_MAX])
            raise ConfigError(shown, sum(one.count for one in every) - len(shown))


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    candidates = {_fold(one): one for one in known}
    close = difflib.get_close_matches(_fold(word[:64]), list(candidates), n=1, cutoff=0.7)
    return candidates[close[0]] if close else None


def read_yaml(source: str | bytes, problems: Problems) -> Node | None:
    """The file's one document. None where it can't be read at all; ``problems`` then says why."""
    text = _decode(source, problems)
    if text is None:
        return None
    loader = LOADER(text)
    try:
        return _Builder(_events(loader), problems).document()
    except _Unreadable:
        return None
    except yaml.MarkedYAMLError as error:
        _note_syntax(error, text, problems)
    except yaml.YAMLError as error:
        problems.add_at(1, 1, (), f"this isn't YAML: {shorten(str(error), 200)}")
    finally:
        loader.dispose()
    return None


def _decode(source: str | bytes, problems: Problems) -> str | None:
    if len(source) > FILE_BYTES_MAX:
        message = f"the file is larger than {FILE_BYTES_MAX:,} bytes, the most that is read"
        problems.add(None, (), message)
        return None
    text = source if isinstance(source, str) else _utf8(source, problems)
    if text is None:
        return None
    text = text.removeprefix("\ufeff")
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        message = f"the character U+{ord(forbidden[0]):04X} has no place in this file; delete it"
        problems.add_at(*_position(text, forbidden.start()), (), message)
        return None
    return text


def _utf8(source: bytes, problems: Problems) -> str | None:
    try:
        return source.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _position(source[: error.start].decode("utf-8"), error.start)
        message = f"byte 0x{source[error.start]:02x} isn't UTF-8; save the file as UTF-8"
        problems.add_at(*place, (), message)
        return None


def _position(text: str, index: int) -> tuple[int, int]:
    before = text[:index]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _note_syntax(error: yaml.MarkedYAMLError, text: str, problems: Problems) -> None:
    line, column = _place(error.problem_mark or error.context_mark)
    lines = text.split("\n")
    here = lines[line - 1] if line <= len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())]:
        problems.add_at(line, column, (), "a tab at the start of the line: YAML is indented with spaces")
        return
    what = ", ".join(part for part in (error.context, error.problem) if part)
    problems.add_at(line, column, (), f"this isn't YAML: {shorten(what, 200)}")


class _Unreadable(Exception):
    """Something whose meaning would be a guess; noted already."""


class _Builder:
    """Events to nodes."""

    def __init__(self, events: Iterator[yaml.Event], problems: Problems) -> None:
        self._events = events
        self._problems = problems

    def document(self) -> Node | None:
        """The one document's node; None, noted, where there is none."""
        node: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent) and node is not None:
                self._refuse(event, (), "a second document starts here; everything belongs into one")
            if isinstance(event, yaml.NodeEvent):
                node = self._node(event, ())
        if node is None:
            self._problems.add(None, (), "the file is empty")
        return node

    def _node(self, event: yaml.Event, path: tuple[str, ...]) -> Node:
        line, column = _place(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._refuse(event, path, "anchors and aliases (&name, *name) aren't read here; write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(event, path, f"the tag {shorten(str(tag))} isn't read here; leave it out")
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, bool(event.implicit[0]), line, column)
        if len(path) >= DEPTH_MAX:
            self._refuse(event, path, f"nested more than {DEPTH_MAX} levels deep")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._listing(path, line, column)
        return self._table(path, line, column)

    def _listing(self, path: tuple[str, ...], line: int, column: int) -> Listing:
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            self._node(event, (*path, "-"))
        return Listing(line, column)

    def _table(self, path: tuple[str, ...], line: int, column: int) -> Table:
        entries: dict[str, tuple[Scalar, Node]] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                self._refuse(event, path, "a key must be a word, not a list or a mapping")
            key = self._node(event, path)
            assert isinstance(key, Scalar)
            if key.plain and key.text == "<<":
                self._refuse(event, path, "merge keys (<<) aren't read here; write the values out")
            value = self._node(next(self._events), (*path, key.text))
            first, _ = entries.setdefault(key.text, (key, value))
            if first is not key:
                message = f"this key stands here twice (first on line {first.line})"
                self._problems.add(key, (*path, key.text), message)
        return Table(entries, line, column)

    def _refuse(self, event: yaml.Event, path: tuple[str, ...], message: str) -> NoReturn:
        self._problems.add_at(*_place(event.start_mark), path, message)
        raise _Unreadable


def _events(loader: yaml.SafeLoader) -> Iterator[yaml.Event]:
    while loader.check_event():
        yield loader.get_event()  # type: ignore[no-untyped-call]


def _place(mark: _Mark | None) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _fold(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")
