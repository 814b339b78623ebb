"""The scripts behind make: what they say where something is missing, and what they leave alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a clone as the installer looks at, and a directory `bin` that comes first in PATH."""
    (tmp_path / "bin").mkdir()
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "requirements.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def program(clone: Path, name: str, text: str) -> Path:
    path = clone / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(clone: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": f"{clone}/bin:/usr/bin:/bin", "HOME": str(clone), **variables}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)


def test_no_python_that_fits_is_said(clone: Path) -> None:
    old = program(clone, "oldpython", "exit 1")
    done = run(clone, "scripts/install", "requirements.lock", PYTHON=str(old))
    assert done.returncode == 1
    assert "Farebox needs Python 3.11, 3.12, 3.13 or 3.14" in done.stderr
    assert not (clone / ".venv").exists()


def without_ensurepip(clone: Path) -> str:
    """A Python as Debian ships it: the module venv is a package of its own."""
    text = f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"'
    python = program(clone, "debianpython", text)
    # It must say its own name, or the installer would go round it.
    python.write_text(
        python.read_text().replace("case", f'case "$*" in *sys.executable*) echo {python}; exit;; esac\ncase', 1)
    )
    return str(python)


def test_a_missing_venv_module_gets_the_line_to_type(clone: Path) -> None:
    for tool in ("sh", "cat", "cmp", "dirname", "id", "rm", "env"):
        (clone / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    environment = {"PATH": f"{clone}/bin", "PYTHON": without_ensurepip(clone)}
    done = subprocess.run(
        ["scripts/install", "requirements.lock"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in done.stderr


def test_uv_is_used_where_venv_is_missing(clone: Path) -> None:
    program(clone, "uv", f'echo "$@" >>{clone}/uv.log; [ "$1" != venv ] || mkdir -p .venv/bin')
    done = run(clone, "scripts/install", "requirements.lock", PYTHON=without_ensurepip(clone))
    assert done.returncode == 0, done.stderr
    made, locked, project = (clone / "uv.log").read_text().splitlines()
    assert made.startswith("venv")
    assert "--require-hashes -r requirements.lock" in locked
    assert "--no-deps --no-build-isolation --editable ." in project


def test_what_is_installed_is_left_alone(clone: Path) -> None:
    program(clone, "uv", f'echo "$1" >>{clone}/uv.log; [ "$1" != venv ] || mkdir -p .venv/bin')
    python = without_ensurepip(clone)
    for _ in range(2):
        run(clone, "scripts/install", "requirements.lock", PYTHON=python)
        if not (clone / ".venv/bin/python").exists():
            (clone / ".venv/bin/python").symlink_to(sys.executable)
            program(clone, "../.venv/bin/farebox", "")
    assert (clone / "uv.log").read_text().split() == ["venv", "pip", "pip"]
    (clone / "requirements.lock").write_text("# changed\n")
    run(clone, "scripts/install", "requirements.lock", PYTHON=python)
    assert (clone / "uv.log").read_text().split() == ["venv", "pip", "pip", "pip", "pip"]


def test_checks_run_without_the_shells_accounts_and_databases(clone: Path) -> None:
    unwanted = ["OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "STRIPE_SECRET_KEY", "DATABASE_URL", "PGHOST", "FAREBOX_PORT"]
    unwanted += ["https_proxy", "HTTP_PROXY", "ALL_PROXY", "MISTRAL_API_KEY", "REDIS_URL"]
    done = run(clone, "scripts/clean-env", "env", KEPT="yes", **dict.fromkeys(unwanted, "x y\nz"))
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert names.isdisjoint(unwanted)
    assert {"KEPT", "PATH", "HOME"} <= names


def test_make_test_clears_them(clone: Path) -> None:
    shutil.copy(ROOT / "Makefile", clone)
    done = run(clone, "make", "--dry-run", "test")
    assert "scripts/clean-env .venv/bin/python -m pytest" in done.stdout
    for check in ("ruff format --check", "ruff check", "mypy", "lint-imports"):
        assert check in done.stdout


def test_make_run_starts_the_demo_and_real_upstreams_only_when_told(clone: Path) -> None:
    shutil.copy(ROOT / "Makefile", clone)
    assert "--real-upstreams" not in run(clone, "make", "--dry-run", "run", OPENAI_API_KEY="sk-x").stdout
    assert "demo --with-parent --real-upstreams" in run(clone, "make", "--dry-run", "run", "FAREBOX_DEMO=0").stdout


def test_ci_runs_make_test() -> None:
    assert "exec make test" in (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
