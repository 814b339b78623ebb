"""`farebox serve` as a process: it says when it is ready, why it won't start, and ends cleanly."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import PEPPER
from tests.postgres import Database

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "proxy.cli", "serve"]


def variables(database_url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAREBOX_", "DATABASE_"))}
    return kept | {
        "DATABASE_URL": database_url,
        "FAREBOX_KEY_PEPPER": PEPPER,
        "FAREBOX_METRICS_PORT": "0",
        "FAREBOX_PORT": "0",
    }


def refused(environment: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([*COMMAND, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    assert PEPPER not in ran.stderr + ran.stdout
    return ran


@contextmanager
def started(environment: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [*COMMAND, "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)["base_url"]
    finally:
        process.kill()
        process.communicate()


def test_it_says_when_it_is_ready_and_ends_at_sigterm(module_database: Database) -> None:
    with started(variables(module_database.app)) as (process, url):
        try:
            urllib.request.urlopen(f"{url}/models", timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert out == ""
        assert PEPPER not in err
        for line in err.splitlines():
            json.loads(line)


def test_a_busy_port_is_said_so(module_database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = refused(variables(module_database.app), "--port", str(port))
    assert f"Port {port}" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_a_schema_that_is_behind_names_the_command(module_database: Database) -> None:
    # The database that every cluster has, and that holds no schema of ours.
    url = module_database.superuser.replace(f"/{module_database.name}?", "/postgres?")
    ran = refused(variables(url))
    assert "farebox migrate" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--pricing", "--upstreams"])
def test_a_file_that_is_not_there_is_named(module_database: Database, option: str) -> None:
    ran = refused(variables(module_database.app), option, "nowhere.yaml", "--json")
    assert "nowhere.yaml" in json.loads(ran.stdout)["error"]["message"]


def test_a_database_of_one_s_own_needs_a_pepper(module_database: Database) -> None:
    environment = variables(module_database.app)
    del environment["FAREBOX_KEY_PEPPER"]
    assert "FAREBOX_KEY_PEPPER" in refused(environment).stderr
