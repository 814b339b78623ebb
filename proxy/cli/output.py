"""What a command writes, and how it ends.

- Without ``--json``: aligned text for a person on standard output.
- With ``--json``: one JSON value on standard output and nothing else; of a failure ``{"error": {"code", "message"}}``.
- A failure is one line on standard error in either case, never a stack trace.
- Exit codes: 0 done; 1 it failed, or an audit or check found something; 2 the command line is wrong; 130 interrupted.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from proxy.control.fields import storable
from proxy.control.views import View
from proxy.core.errors import Refusal
from proxy.core.yaml_reader import ConfigError
from proxy.ledger.errors import LedgerError
from proxy.local.state import LocalError
from proxy.settings import SettingsError

__all__ = ["EXIT_FAILED", "CommandFailed", "Output", "members", "reporting", "table_of"]

EXIT_FAILED = 1
COLUMN_CHARS_MAX = 80


class CommandFailed(Exception):
    """The command can't do what it was asked; the message is the one line that says why."""

    def __init__(self, message: str, *, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code


class Output:
    """Standard output of one command, in one of the two ways."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def show(self, view: Any, lines: Iterable[str]) -> None:
        """``view`` as JSON, or else the lines."""
        if self.as_json:
            typer.echo(json.dumps(view, indent=2, ensure_ascii=False))
            return
        for line in lines:
            typer.echo(line)

    def show_members(self, view: View) -> None:
        """An object: as JSON, or else one aligned line a member."""
        self.show(view, members(view))

    def show_table(self, view: View, columns: Sequence[str], *, right: Sequence[str] = (), empty: str) -> None:
        """A list view: as JSON, or else a table of these members, ``right`` flush right; ``empty`` without rows."""
        lines = table_of(view["data"], columns, right=right) or [empty]
        if view.get("has_more"):
            lines.append(f"There is more: --after {view['last_id']}")
        self.show(view, lines)


def members(view: View, *, leave_out: Sequence[str] = ("object",)) -> list[str]:
    """One aligned line a member."""
    cells = [(name.replace("_", " "), _cell(value)) for name, value in view.items() if name not in leave_out]
    width = max((len(name) for name, _ in cells), default=0)
    return [f"{name:<{width}}  {text}" for name, text in cells]


def table_of(items: Sequence[View], columns: Sequence[str], *, right: Sequence[str] = ()) -> list[str]:
    """Aligned lines, headings first; none where there are no items."""
    if not items:
        return []
    rows = [
        [name.replace("_", " ") for name in columns],
        *([_cell(item.get(name)) for name in columns] for item in items),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = [">" if name in right else "<" for name in columns]
    return ["  ".join(f"{cell:{m}{w}}" for cell, m, w in zip(row, marks, widths, strict=True)).rstrip() for row in rows]


@contextmanager
def reporting(*, as_json: bool) -> Iterator[Output]:
    """The frame of every command: what is raised in it becomes one line and exit code 1."""
    try:
        yield Output(as_json=as_json)
    except CommandFailed as error:
        fail(str(error), code=error.code, as_json=as_json)
    except Refusal as error:
        fail(error.message, code=error.code, as_json=as_json)
    except ConfigError as error:
        fail(str(error), code="pricing", as_json=as_json)
    except SettingsError as error:
        fail(str(error), code="settings", as_json=as_json)
    except LedgerError as error:
        fail(str(error), code="ledger", as_json=as_json)
    except LocalError as error:
        fail(str(error), code="local", as_json=as_json)
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"Unexpected {said} (python -X dev -m proxy.cli shows where)", code="unexpected", as_json=as_json)


def fail(message: str, *, code: str, as_json: bool) -> None:
    """Say why, and end with exit code 1."""
    if as_json:
        typer.echo(json.dumps({"error": {"code": code, "message": message}}, ensure_ascii=False))
    for line in message.splitlines() or [code]:
        typer.echo(f"farebox: {storable(line)}", err=True)
    sys.stdout.flush()
    raise typer.Exit(EXIT_FAILED)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value) or "-"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    # A name in the ledger must not be able to steer somebody's terminal.
    text = storable(text)
    return text if len(text) <= COLUMN_CHARS_MAX else f"{text[: COLUMN_CHARS_MAX - 1]}…"
