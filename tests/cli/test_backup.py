"""`farebox backup` and `farebox restore`: what was there is there again, proved; and nothing is ever overwritten."""

import asyncio
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from proxy.local import dumping
from proxy.local.dumping import program
from proxy.local.postgres import ClusterAddress
from proxy.local.state import LocalError
from tests.cli.conftest import PEPPER, Farebox
from tests.ledger.bank import open_bank
from tests.ledger.test_audit import lively
from tests.postgres import Database

OWNER = "farebox_owner"
APP = "farebox_app"
OTHER_PEPPER = PEPPER[::-1]


async def run_sql(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def rows_of(dsn: str) -> dict[str, str]:
    """Every table's rows, as text."""
    connection = await asyncpg.connect(dsn)
    try:
        names = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'farebox'")
        return {
            name: await connection.fetchval(
                f"SELECT string_agg(t::text, E'\\n' ORDER BY t::text) FROM farebox.{name} t"
            )
            for name in sorted(row["tablename"] for row in names)
        }
    finally:
        await connection.close()


@pytest.fixture
def target(cluster: ClusterAddress) -> Iterator[str]:
    """The owner's DSN of an empty database."""
    name = f"t_{secrets.token_hex(6)}"
    asyncio.run(run_sql(cluster.superuser, f"CREATE DATABASE {name} OWNER {OWNER}"))
    yield cluster.dsn(OWNER, name)
    asyncio.run(run_sql(cluster.superuser, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def source(
    bare: Farebox, environment: pytest.MonkeyPatch, database: Database, tmp_path: Path
) -> tuple[Farebox, Database]:
    """A ledger in which everything has happened, and the command, told its pepper and journal."""

    async def live() -> None:
        async with open_bank(database) as bank:
            await lively(bank)
            control = await asyncpg.connect(database.app, server_settings={"role": "farebox_control"})
            await control.fetchval("SELECT farebox.seal(1000, '0')")
            await control.close()

    asyncio.run(live())
    (tmp_path / "journal").mkdir()
    environment.setenv("FAREBOX_JOURNAL_DIR", str(tmp_path / "journal"))
    environment.setenv("FAREBOX_KEY_PEPPER", PEPPER)
    return bare, database


def test_what_was_backed_up_is_restored_to_the_row_and_audited(
    source: tuple[Farebox, Database], target: str, tmp_path: Path
) -> None:
    farebox, database = source
    (tmp_path / "journal" / "one.done").write_bytes(b"journal")
    made = farebox("backup", str(tmp_path / "kept"), "--database-url", database.owner, "--json")
    assert made.code == 0, made.err
    assert made.json["transfers"] > 20
    assert made.json["journals"] == 1
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    before = asyncio.run(rows_of(database.superuser))
    # And after it the world goes on.
    asyncio.run(run_sql(database.superuser, "INSERT INTO farebox.accounts (id, name) VALUES (gen_random_uuid(), 'x')"))
    (tmp_path / "journal" / "one.done").unlink()

    ran = farebox("restore", str(tmp_path / "kept"), "--grant-to", APP, "--database-url", target, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["ok"]
    checks = {check["name"]: check["rows"] for check in ran.json["checks"]}
    assert checks["seals_are_those_kept_elsewhere"] == 4
    superuser = database.superuser.replace(database.name, target.rsplit("/", 1)[1].split("?")[0])
    assert asyncio.run(rows_of(superuser)) == before
    assert (tmp_path / "journal" / "one.done").read_bytes() == b"journal"
    app = database.app.replace(database.name, target.rsplit("/", 1)[1].split("?")[0])
    assert farebox("audit", "--database-url", app).code == 0


def test_the_restored_database_has_the_privileges_and_guards_of_a_new_one(
    source: tuple[Farebox, Database], target: str, tmp_path: Path
) -> None:
    farebox, database = source
    assert farebox("backup", str(tmp_path / "kept"), "--database-url", database.owner).code == 0
    assert farebox("restore", str(tmp_path / "kept"), "--database-url", target).code == 0

    async def catalog(dsn: str) -> list[tuple[str, ...]]:
        connection = await asyncpg.connect(dsn)
        try:
            rows = await connection.fetch(
                """
                SELECT 'relation', c.relname, coalesce(c.relacl, acldefault('r', c.relowner))::text,
                       c.relrowsecurity::text
                  FROM pg_class c
                 WHERE c.relnamespace = 'farebox'::regnamespace AND c.relkind = 'r'
                UNION ALL
                SELECT 'function', p.oid::regprocedure::text, coalesce(p.proacl, acldefault('f', p.proowner))::text,
                       md5(p.prosrc)
                  FROM pg_proc p WHERE p.pronamespace = 'farebox'::regnamespace
                UNION ALL
                SELECT 'trigger', t.tgname, t.tgrelid::regclass::text, t.tgenabled::text FROM pg_trigger t
                 WHERE NOT t.tgisinternal
                UNION ALL
                SELECT 'policy', p.polname, p.polrelid::regclass::text, p.polroles::regrole[]::text FROM pg_policy p
                UNION ALL
                SELECT 'schema', n.nspname, n.nspacl::text, '' FROM pg_namespace n WHERE n.nspname = 'farebox'
                ORDER BY 1, 2, 3, 4
                """
            )
            return [tuple(row) for row in rows]
        finally:
            await connection.close()

    assert asyncio.run(catalog(target)) == asyncio.run(catalog(database.owner))


def test_nothing_is_overwritten(source: tuple[Farebox, Database], target: str, tmp_path: Path) -> None:
    farebox, database = source
    kept, journal = tmp_path / "kept", tmp_path / "journal" / "mine.done"
    journal.write_bytes(b"journal")
    assert farebox("backup", str(kept), "--database-url", database.owner).code == 0
    again = farebox("backup", str(kept), "--database-url", database.owner, "--json")
    assert (again.code, "is there already" in again.json["error"]["message"]) == (1, True)
    journal.write_bytes(b"journal, and more")
    assert farebox("restore", str(kept), "--database-url", target).code == 0
    assert journal.read_bytes() == b"journal, and more"
    second = farebox("restore", str(kept), "--database-url", target, "--json")
    assert (second.code, second.json["error"]["code"]) == (1, "not_empty")


@pytest.mark.parametrize("damage", ["ledger.dump", "seals.json", "manifest.json", "config/pricing.yaml"])
def test_a_damaged_backup_is_refused_before_anything_is_made(
    source: tuple[Farebox, Database], target: str, tmp_path: Path, damage: str
) -> None:
    farebox, database = source
    kept = tmp_path / "kept"
    assert farebox("backup", str(kept), "--database-url", database.owner).code == 0
    content = bytearray((kept / damage).read_bytes())
    content[len(content) // 2] ^= 1
    (kept / damage).write_bytes(content if damage != "manifest.json" else content[:-20])
    ran = farebox("restore", str(kept), "--database-url", target, "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "local")
    assert damage in ran.json["error"]["message"]
    (kept / damage).unlink()
    missing = farebox("restore", str(kept), "--database-url", target, "--json")
    assert (missing.code, damage in missing.json["error"]["message"]) == (1, True)
    assert farebox("migrate", "--database-url", target, "--json").json["applied"], "nothing was made there"


def test_a_backup_whose_book_was_altered_is_restored_and_found_out(
    source: tuple[Farebox, Database], target: str, tmp_path: Path
) -> None:
    """The dump was taken apart and put together again, hashes and all."""
    farebox, database = source
    kept = tmp_path / "kept"
    assert farebox("backup", str(kept), "--database-url", database.owner).code == 0
    heads = json.loads((kept / "seals.json").read_text())
    heads["data"][0]["head"] = "0" * 64
    (kept / "seals.json").write_text(json.dumps(heads))
    manifest = json.loads((kept / "manifest.json").read_text())
    manifest["files"]["seals.json"] = hashlib.sha256((kept / "seals.json").read_bytes()).hexdigest()
    (kept / "manifest.json").write_text(json.dumps(manifest))
    ran = farebox("restore", str(kept), "--database-url", target, "--json")
    assert ran.code == 1
    assert [check["name"] for check in ran.json["checks"] if not check["ok"]] == ["seals_are_those_kept_elsewhere"]


def test_another_pepper_is_told_before_every_key_is_dead(
    source: tuple[Farebox, Database], environment: pytest.MonkeyPatch, target: str, tmp_path: Path
) -> None:
    farebox, database = source
    kept = tmp_path / "kept"
    assert farebox("backup", str(kept), "--database-url", database.owner).code == 0
    for name in kept.rglob("*"):
        assert not name.is_file() or PEPPER.encode() not in name.read_bytes()
    for pepper in (OTHER_PEPPER, f"2:{PEPPER}"):
        environment.setenv("FAREBOX_KEY_PEPPER", pepper)
        ran = farebox("restore", str(kept), "--database-url", target, "--json")
        assert (ran.code, ran.json["error"]["code"]) == (1, "pepper")
    environment.setenv("FAREBOX_KEY_PEPPER", f"1:{PEPPER},2:{OTHER_PEPPER}")
    assert farebox("restore", str(kept), "--database-url", target).code == 0


def test_a_login_that_may_not_read_everything_makes_no_backup(source: tuple[Farebox, Database], tmp_path: Path) -> None:
    farebox, database = source
    ran = farebox("backup", str(tmp_path / "kept"), "--database-url", database.app, "--json")
    assert ran.code == 1
    assert list(tmp_path.glob("kept*")) == [], "nothing half made stays"
    password = database.app.split(":")[2].split("@")[0]
    assert password not in ran.out + ran.err


def test_the_embedded_database_goes_into_another_state_directory(
    bare: Farebox, environment: pytest.MonkeyPatch, state_path: Path, tmp_path: Path
) -> None:
    environment.setenv("FAREBOX_STATE_DIR", str(state_path))
    assert bare("accounts", "create", "at home").code == 0
    assert bare("credits", "grant", "at home", "100", "--ref", "first").code == 0
    key = bare("keys", "create", "at home", "--json").json
    made = bare("backup", str(tmp_path / "kept"), "--json")
    assert made.code == 0, made.err
    refused = bare("restore", str(tmp_path / "kept"), "--json")
    assert refused.json["error"]["code"] == "not_empty"

    other = state_path.with_name("other")
    environment.setenv("FAREBOX_STATE_DIR", str(other))
    without = bare("restore", str(tmp_path / "kept"), "--json")
    assert (without.code, without.json["error"]["code"]) == (1, "pepper")
    assert not (other / "pepper").exists()
    shutil.copy(state_path / "pepper", other / "pepper")
    ran = bare("restore", str(tmp_path / "kept"), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["ok"]
    assert bare("accounts", "show", "at home", "--json").json["balance"] == "100"
    assert bare("keys", "list", "at home", "--json").json["data"][0]["id"] == key["id"]


def test_tools_older_than_the_server_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = tmp_path / "old" / "pg_dump"
    old.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 14.9'\n")
    old.chmod(0o755)
    assert program("pg_dump", 14, directories=[tmp_path, old.parent]) == old
    with pytest.raises(LocalError, match=r"of PostgreSQL 18 or newer is needed, and .*old/pg_dump is of version 14"):
        program("pg_dump", 18, directories=[old.parent])
    with pytest.raises(LocalError, match="none on the PATH"):
        program("pg_dump", 18, directories=[tmp_path])
    assert program("pg_restore", 18).name == "pg_restore"


@pytest.mark.parametrize(
    ("dsn", "shown", "secret"),
    [
        ("postgresql://u:p%40ss@h:5/d?sslmode=require", "postgresql://u@h:5/d?sslmode=require", {"PGPASSWORD": "p@ss"}),
        ("postgresql://u:a:b@/d?host=/s", "postgresql://u@/d?host=/s", {"PGPASSWORD": "a:b"}),
        ("postgresql://u:p@h1:1,h2:2/d", "postgresql://u@h1:1,h2:2/d", {"PGPASSWORD": "p"}),
        ("postgresql://u@h/d", "postgresql://u@h/d", {}),
        ("postgresql:///d", "postgresql:///d", {}),
    ],
)
def test_a_password_is_no_argument(dsn: str, shown: str, secret: dict[str, str]) -> None:
    assert dumping._without_password(dsn) == (shown, secret)
