"""Nodes to values: a section with known keys, whose values are checked where they stand.

Every reader method returns None (or the default) where the value is no good, after noting why; the caller builds
nothing from a file with a problem, so it needn't look.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from proxy.core.key_path import shorten
from proxy.core.yaml_reader import Listing, Node, Problems, Scalar, Table, near_miss

__all__ = ["Section"]

_T = TypeVar("_T")

_NUMBER = re.compile(r"(0|[1-9][0-9]*)(?:\.([0-9]+))?\Z", re.ASCII)
_NUMBER_CHARACTERS_MAX = 40

# What YAML 1.2's core schema takes for something other than text, where it stands without quotes.
_NOTHING = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_NUMERIC = re.compile(
    r"[-+]?[0-9]+\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"
    r"|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z",
    re.ASCII,
)

# Spellings of a number that readers of YAML disagree about, or that aren't exact, and what to write.
_MISSPELT: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), complaint)
    for pattern, complaint in (
        (r"-\.?[0-9]", "is negative"),
        (r"\+\.?[0-9]", "has a sign; write it without"),
        (r"0[0-9xobXOB_]", "starts with 0, which some readers take for octal or hexadecimal; write a plain decimal"),
        (r"[0-9][0-9_]*_", "has an underscore; write the digits without"),
        (r"[0-9]+(:[0-9]+)+", "has a colon, which some readers take for base 60; write a plain decimal"),
        (r"[0-9]+,[0-9]", "has a comma; write a decimal point, and no separator of thousands"),
        (r"[0-9.]+[eE][-+0-9]", "has an exponent; write it in full"),
        (r"\.[0-9]|[0-9]+\.\Z", "needs digits on both sides of the point"),
    )
)


class Section:
    """A mapping whose keys are known. Unknown and missing keys are noted when it is made.

    ``table`` is None where the node isn't a mapping; every reader then returns its default.
    ``meant`` maps words that people write instead to the key that they mean.
    """

    def __init__(
        self,
        node: Node | None,
        path: tuple[str, ...],
        problems: Problems,
        *,
        known: Sequence[str],
        required: Sequence[str] = (),
        meant: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.problems = problems
        self.table = _as_table(node, path, problems)
        if self.table is not None:
            self._check_keys(self.table, known, required, meant or {})

    def _check_keys(
        self, table: Table, known: Sequence[str], required: Sequence[str], meant: Mapping[str, str]
    ) -> None:
        misspelt: set[str] = set()
        for key, (at, _) in table.entries.items():
            if key in known:
                continue
            guess = meant.get(key) or near_miss(key, known)
            if guess is not None and guess not in table.entries:
                misspelt.add(guess)
                self.problems.add(at, (*self.path, key), f'unknown key; did you mean "{guess}"?')
            else:
                self.problems.add(at, (*self.path, key), f"unknown key; the keys here are {', '.join(known)}")
        for key in required:
            if key not in table.entries and key not in misspelt:
                self.problems.add(table, (*self.path, key), "is missing")

    def has(self, key: str) -> bool:
        return self.table is not None and key in self.table.entries

    def node(self, key: str) -> Node | None:
        return self.table.entries[key][1] if self.table is not None and key in self.table.entries else None

    def section(self, key: str, *, known: Sequence[str], required: Sequence[str] = ()) -> "Section | None":
        """The mapping under ``key``; None where the key is absent."""
        if not self.has(key):
            return None
        return Section(self.node(key), (*self.path, key), self.problems, known=known, required=required)

    def table_of(self, key: str, *, what: str, count_max: int) -> dict[str, tuple[Scalar, Node]]:
        """The entries under ``key``, whose keys are names: at least one, at most ``count_max``."""
        if not self.has(key):
            return {}
        path = (*self.path, key)
        table = _as_table(self.node(key), path, self.problems)
        if table is None:
            return {}
        if not table.entries:
            self.problems.add(table, path, f"is empty; expected at least one {what}")
        elif len(table.entries) > count_max:
            self.problems.add(table, path, f"holds {len(table.entries):,} entries; at most {count_max:,} are read")
            return {}
        return table.entries

    def text(self, key: str, pattern: re.Pattern[str], *, expected: str, secret: bool = False) -> str | None:
        """Text that matches ``pattern``. ``secret``: what was found is never repeated in the message."""
        return self._value(key, expected, lambda node: _text(node, pattern, secret=secret))

    def flag(self, key: str, *, default: bool = False) -> bool:
        """``true`` or ``false``."""
        found = self.flag_or_none(key)
        return default if found is None else found

    def flag_or_none(self, key: str) -> bool | None:
        """``true``, ``false``, or None where the key is absent."""
        return self._value(key, "true or false", _flag)

    def decimal(
        self, key: str, *, decimals: int, most: int, expected: str, least: int = 0, finer: str | None = None
    ) -> int | None:
        """A number in units of 10**-decimals, exact, from its text. ``least`` and ``most`` are in those units.

        ``finer`` is what to say of a number with more decimals than that.
        """
        limits = _Limits(decimals, least, most, finer or f"which has more than {decimals} decimals")
        return self._value(key, expected, lambda node: _decimal(node, limits))

    def whole(self, key: str, *, least: int, most: int, expected: str, default: int | None = None) -> int | None:
        """A whole number from ``least`` to ``most``; ``default`` where the key is absent."""
        if not self.has(key):
            return default
        return self.decimal(key, decimals=0, least=least, most=most, expected=expected, finer="which isn't whole")

    def _value(self, key: str, expected: str, read: Callable[[Node], _T]) -> _T | None:
        node = self.node(key)
        if node is None:
            return None
        try:
            return read(node)
        except _Unfit as unfit:
            self.problems.add(node, (*self.path, key), f"expected {expected}; found {unfit}")
            return None


class _Unfit(ValueError):
    """What was found instead of what was expected."""


@dataclass(frozen=True, slots=True)
class _Limits:
    decimals: int
    least: int
    most: int
    finer: str


def _text(node: Node, pattern: re.Pattern[str], *, secret: bool) -> str:
    if not isinstance(node, Scalar):
        raise _Unfit(_describe(node))
    if node.plain and node.text in _NOTHING:
        raise _Unfit("nothing")
    if node.plain and _isnt_text(node.text):
        raise _Unfit(f"{'a number' if secret else _describe(node)}; if that is the text, put it in quotes")
    if not pattern.fullmatch(node.text):
        raise _Unfit("something else" if secret else _describe(node))
    return node.text


def _flag(node: Node) -> bool:
    if isinstance(node, Scalar) and node.plain and node.text in _TRUE | _FALSE:
        return node.text in _TRUE
    raise _Unfit(_describe(node))


def _decimal(node: Node, limits: _Limits) -> int:
    whole, fraction = _digits(node)
    fraction = fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    if len(fraction) > limits.decimals:
        raise _Unfit(f"{number}, {limits.finer}")
    value = int(whole + fraction.ljust(limits.decimals, "0"))
    if value > limits.most:
        raise _Unfit(f"{number}, above the largest value, {_plain(limits.most, limits.decimals)}")
    if value < limits.least:
        raise _Unfit(f"{number}, below the smallest value, {_plain(limits.least, limits.decimals)}")
    return value


def _digits(node: Node) -> tuple[str, str]:
    """The digits before and after the decimal point."""
    if not isinstance(node, Scalar):
        raise _Unfit(_describe(node))
    number = _NUMBER.match(node.text)
    if number and len(node.text) > _NUMBER_CHARACTERS_MAX:
        raise _Unfit(f"a number of {len(node.text)} characters")
    if number and node.plain:
        return number[1], number[2] or ""
    if number:
        raise _Unfit("the number in quotes; write it without")
    for pattern, complaint in _MISSPELT:
        if pattern.match(node.text):
            raise _Unfit(f"{shorten(node.text)}, which {complaint}")
    raise _Unfit(_describe(node))


def _as_table(node: Node | None, path: tuple[str, ...], problems: Problems) -> Table | None:
    if node is None or isinstance(node, Table):
        return node
    problems.add(node, path, f"expected a mapping (key: value lines), found {_describe(node)}")
    return None


def _describe(node: Node) -> str:
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Listing):
        return "a list"
    if node.plain and node.text in _NOTHING:
        return "nothing"
    if node.plain and _isnt_text(node.text):
        return shorten(node.text)
    return f'"{shorten(node.text)}"'


def _isnt_text(plain: str) -> bool:
    return plain in _TRUE | _FALSE or _NUMERIC.match(plain) is not None


def _plain(value: int, decimals: int) -> str:
    digits = str(value).rjust(decimals + 1, "0")
    cut = len(digits) - decimals
    return (f"{int(digits[:cut]):,}" + "." + digits[cut:]).rstrip("0").rstrip(".") if decimals else f"{value:,}"
