"""Where a command looks for its database, and what it says where it can't be used."""

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from proxy.local.postgres import ClusterAddress
from tests.cli.conftest import PEPPER, Farebox
from tests.postgres import Database

NOBODY = "postgresql://farebox:CanaryPassword@127.0.0.1:1/farebox"
OWNER = "farebox_owner"


async def run_sql(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
def empty_database(cluster: ClusterAddress) -> Iterator[str]:
    """The owner's DSN of a database without a schema."""
    name = f"t_{secrets.token_hex(6)}"
    asyncio.run(run_sql(cluster.superuser, f"CREATE DATABASE {name} OWNER {OWNER}"))
    yield cluster.dsn(OWNER, name)
    asyncio.run(run_sql(cluster.superuser, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def login(cluster: ClusterAddress) -> Iterator[str]:
    """A login that nobody has given any right."""
    name = f"login_{secrets.token_hex(4)}"
    asyncio.run(run_sql(cluster.superuser, f"CREATE ROLE {name} LOGIN PASSWORD 'pw'"))
    yield name
    revoke = f"REVOKE farebox_gateway, farebox_control, farebox_reader FROM {name} GRANTED BY {OWNER} CASCADE"
    asyncio.run(run_sql(cluster.superuser, revoke, f"DROP ROLE {name}"))


def dsn_of(cluster: ClusterAddress, login: str, database: str) -> str:
    return f"postgresql://{login}:pw@/{database}?host={cluster.socket_directory}"


@pytest.mark.parametrize("command", [["accounts", "list"], ["migrate"]])
def test_a_database_that_is_away(bare: Farebox, environment: pytest.MonkeyPatch, command: list[str]) -> None:
    environment.setenv("DATABASE_URL", NOBODY)
    ran = bare(*command, "--json")
    assert ran.code == 1
    assert ran.json["error"]["code"] == "ledger"
    assert len(ran.err.splitlines()) == 1
    assert "CanaryPassword" not in ran.out + ran.err


@pytest.mark.parametrize(
    "url", ["nonsense", "http://example.org", "postgresql://[", "postgresql://u:CanaryPassword@h:x/d"]
)
def test_a_database_url_that_is_none(bare: Farebox, url: str) -> None:
    ran = bare("accounts", "list", "--database-url", url, "--json")
    assert ran.code == 1
    assert ran.json["error"]["message"]
    assert "CanaryPassword" not in ran.out + ran.err


def test_a_schema_that_is_behind_names_the_command(bare: Farebox, empty_database: str) -> None:
    for command in (["accounts", "list"], ["keys", "list", "x"]):
        ran = bare(*command, "--database-url", empty_database)
        assert ran.code == 1
        assert "farebox migrate" in ran.err


def test_migrate_makes_the_schema_once(bare: Farebox, empty_database: str) -> None:
    first = bare("migrate", "--database-url", empty_database, "--json")
    assert first.code == 0, first.err
    assert first.json["applied"] == list(range(1, first.json["schema"] + 1))
    again = bare("migrate", "--database-url", empty_database)
    assert again.code == 0
    assert "already" in again.out


def test_migrate_lets_a_login_serve(bare: Farebox, empty_database: str, login: str, cluster: ClusterAddress) -> None:
    ran = bare("migrate", "--grant-to", login, "--database-url", empty_database, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["granted_to"] == login
    name = empty_database.rsplit("/", 1)[1].split("?")[0]
    assert bare("accounts", "create", "x", "--database-url", dsn_of(cluster, login, name)).code == 0


def test_a_login_that_may_not_serve(
    bare: Farebox, cluster: ClusterAddress, login: str, module_database: Database
) -> None:
    ran = bare("accounts", "list", "--database-url", dsn_of(cluster, login, module_database.name))
    assert ran.code == 1
    assert ran.err.startswith("farebox: ")


def test_a_key_needs_a_pepper_and_nothing_else_does(
    bare: Farebox, environment: pytest.MonkeyPatch, module_database: Database
) -> None:
    environment.setenv("DATABASE_URL", module_database.app)
    account = bare("accounts", "create", "no pepper", "--json")
    assert account.code == 0
    ran = bare("keys", "create", account.json["id"], "--json")
    assert ran.code == 1
    assert "FAREBOX_KEY_PEPPER" in ran.json["error"]["message"]
    assert bare("keys", "list", account.json["id"], "--json").json["data"] == []


def test_a_wrong_setting_is_one_line(bare: Farebox, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FAREBOX_PORT", "99999")
    ran = bare("accounts", "list")
    assert ran.code == 1
    assert "FAREBOX_PORT" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_without_a_url_the_embedded_database_is_started_and_kept(
    bare: Farebox, environment: pytest.MonkeyPatch, state_path: Path
) -> None:
    environment.setenv("FAREBOX_STATE_DIR", str(state_path))
    made = bare("accounts", "create", "at home", "--json")
    assert made.code == 0, made.err
    # A second start finds the data; the pepper for keys is kept beside them.
    key = bare("keys", "create", "at home", "--json")
    assert key.code == 0, key.err
    assert key.json["account"] == made.json["id"]
    assert (state_path / "pepper").stat().st_mode & 0o777 == 0o600


def test_the_pepper_is_never_shown(bare: Farebox, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DATABASE_URL", NOBODY)
    environment.setenv("FAREBOX_KEY_PEPPER", PEPPER[:5])
    ran = bare("keys", "create", "x")
    assert ran.code == 1
    assert PEPPER[:5] not in ran.err
