"""What is undocumented fails the suite."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from proxy.cli import app
from proxy.control.admin import AdminToken, admin_routes
from proxy.control.operations import Operations
from proxy.settings import PREFIX, Settings

DOCS = Path(__file__).parents[1] / "docs"


def commands(command: Any, path: tuple[str, ...] = ("farebox",)) -> Iterator[tuple[str, Any]]:
    """Every command with its words, groups left out."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), command
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(get_command(app)))


def test_every_setting_is_documented_and_nothing_else() -> None:
    page = (DOCS / "settings.md").read_text()
    documented = set(re.findall(rf"`({PREFIX}[A-Z_]+)`", page))
    assert documented == {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_and_option_explains_itself(words: str) -> None:
    command = COMMANDS[words]
    assert command.help, "a command's docstring is its help"
    without = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert without == []


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_and_option_is_in_the_page(words: str) -> None:
    page = (DOCS / "cli.md").read_text()
    assert f"{words} " in page or f"{words}\n" in page or f"{words}`" in page
    options = [option for parameter in COMMANDS[words].params for option in parameter.opts if option.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", page)] == []


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_a_json_form(words: str) -> None:
    options = {option for parameter in COMMANDS[words].params for option in parameter.opts}
    assert "--json" in options


def test_the_page_names_no_command_that_is_not_there() -> None:
    page = (DOCS / "cli.md").read_text()
    for line in re.findall(r"^(?:DATABASE_URL=\S+ )?farebox (.+)$", page, flags=re.MULTILINE):
        words = line.split()
        assert any(" ".join(["farebox", *words[:count]]) in COMMANDS for count in (1, 2)), line


def test_every_admin_route_is_in_the_page() -> None:
    page = (DOCS / "admin.md").read_text()
    operations: Operations = None  # type: ignore[assignment]  # routes are made, none is called
    for route in admin_routes(AdminToken("x" * 32), operations):
        path = getattr(route, "path", "").removeprefix("/admin/v1")
        for method in getattr(route, "methods", set()) - {"HEAD"}:
            assert f"| {method} | `{path}` |" in page


def test_every_test_that_the_guarantees_name_is_there() -> None:
    root = DOCS.parent
    named = set(re.findall(r"`(tests/[^`]+)`", (DOCS / "guarantees.md").read_text()))
    assert len(named) > 10
    assert [path for path in sorted(named) if not (root / path).exists()] == []
