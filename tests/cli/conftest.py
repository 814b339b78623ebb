"""The command's tests run it in this process, on a database of their module's own."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from proxy.cli import app
from tests.postgres import Database

PEPPER = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended. Standard output is kept apart from standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Farebox = Callable[..., Ran]


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """A command may set up its process's logs; this process has others."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    structlog.configure(**before)
    root.handlers, root.level, root.propagate = handlers, level, True


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing of Farebox's is set."""
    for name in ("DATABASE_URL", "FAREBOX_DATABASE_URL", "FAREBOX_KEY_PEPPER", "FAREBOX_PRICING", "FAREBOX_UPSTREAMS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def bare(environment: pytest.MonkeyPatch) -> Farebox:
    """The command, told nothing about a database."""

    def run(*arguments: str) -> Ran:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.stderr
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def farebox(bare: Farebox, environment: pytest.MonkeyPatch, module_database: Database) -> Farebox:
    """The command, on the module's database, as the login that serves."""
    environment.setenv("DATABASE_URL", module_database.app)
    environment.setenv("FAREBOX_KEY_PEPPER", PEPPER)
    return bare
