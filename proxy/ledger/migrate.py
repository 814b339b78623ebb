"""Migrations: numbered, forward only, each in one transaction, one migrating process at a time.

Migration NNNN is ``sql/migrations/NNNN_name.sql`` and then every file of ``sql/functions/NNNN/`` in the order of their
names. What has been applied is remembered with its checksum; a file that a release has shipped is never edited, but
replaced by a later migration. A line ``-- serves code from: N`` in a migration says which code may still run on the
schema it makes: code whose last migration is N or later.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Literal

import asyncpg

from proxy.ledger.connect import Connection, Pool, Role, connect, translated
from proxy.ledger.errors import MissingRole, SchemaMismatch
from proxy.ledger.reports import SQL

__all__ = [
    "Migration",
    "SchemaState",
    "create_roles_sql",
    "ensure_roles",
    "known_migrations",
    "migrate",
    "schema_state",
]

_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql\Z")
_SERVES_FROM = re.compile(r"^-- serves code from: (\d+)$", re.MULTILINE)

# Any number, as long as it is always the same: one migrating process at a time.
_LOCK = 0x6661_7265_626F_7801

_RECORD = "INSERT INTO farebox.schema_migrations (number, name, checksum, serves_from) VALUES ($1, $2, $3, $4)"
_BOOKKEEPING = """
    CREATE SCHEMA IF NOT EXISTS farebox;
    CREATE TABLE IF NOT EXISTS farebox.schema_migrations (
        number integer PRIMARY KEY,
        name text NOT NULL,
        checksum text NOT NULL,
        serves_from integer NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema. ``serves_from``: the oldest migration whose code still runs after it."""

    number: int
    name: str
    sql: str
    serves_from: int

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SchemaState:
    """How far the database is (``applied``, 0: not at all) against this code (``known``)."""

    known: int
    applied: int
    serves_from: int

    @property
    def word(self) -> Literal["current", "behind", "ahead"]:
        if self.applied == self.known:
            return "current"
        return "behind" if self.applied < self.known else "ahead"

    @property
    def serves(self) -> bool:
        """Whether this code may run on it: not if it is behind, nor if it is too far ahead."""
        return self.serves_from <= self.known <= self.applied

    def require(self) -> None:
        """Raises SchemaMismatch, which says what to do, unless ``serves``."""
        if self.serves:
            return
        if self.word == "behind":
            raise SchemaMismatch(
                f"the database's schema is at {self.applied} and this release needs {self.known}: run `farebox migrate`"
            )
        raise SchemaMismatch(
            f"the database's schema is at {self.applied}, which serves releases from schema {self.serves_from} on; "
            f"this release knows {self.known}: upgrade Farebox"
        )


def known_migrations() -> list[Migration]:
    """This code's migrations, in order."""
    found = [_read(entry) for entry in (SQL / "migrations").iterdir() if entry.name.endswith(".sql")]
    found.sort(key=lambda migration: migration.number)
    assert [m.number for m in found] == list(range(1, len(found) + 1)), "migrations are numbered 1..n"
    return found


async def migrate(dsn: str, *, grant_to: str | None = None, roles: Sequence[Role] | None = None) -> list[int]:
    """Bring the database up to this code's schema, as its owner (who need not be a superuser); the numbers applied.

    ``grant_to``: a login that may then act as each of ``roles`` (None: all), for serving; on its own it gets no right.
    Raises MissingRole, SchemaMismatch (a migration was edited, or the database is ahead), LedgerUnavailable, and what
    asyncpg raises where a statement fails: nothing of that migration is left, and those before it stay.
    """
    connection = await connect(dsn, lock_ms=60_000, statement_seconds=0)
    try:
        await _ensure_roles(connection)
        applied = await _apply(connection, known_migrations())
        if grant_to is not None:
            await _grant_roles(connection, grant_to, roles)
        return applied
    finally:
        await connection.close()


async def ensure_roles(dsn: str) -> None:
    """Make the group roles that aren't there, as ``migrate`` does. Raises MissingRole, LedgerUnavailable."""
    connection = await connect(dsn)
    try:
        await _ensure_roles(connection)
    finally:
        await connection.close()


async def schema_state(database: "Connection | Pool") -> SchemaState:
    """How far the database is. For connections that act as any of the group roles, or as the owner.

    Raises LedgerUnavailable.
    """
    known = len(known_migrations())
    try:
        with translated():
            row = await database.fetchrow("SELECT number, serves_from FROM farebox.schema_version()")
    except (asyncpg.InvalidSchemaNameError, asyncpg.UndefinedFunctionError):
        return SchemaState(known, 0, 0)
    if row is None or row["number"] is None:
        return SchemaState(known, 0, 0)
    return SchemaState(known, row["number"], row["serves_from"])


def create_roles_sql(roles: list[str]) -> str:
    """What somebody with the right to must run where the owner may not make the group roles."""
    return "\n".join(f"CREATE ROLE {role} NOLOGIN;" for role in roles)


async def _ensure_roles(connection: Connection) -> None:
    # Roles belong to the whole cluster: another database's migration may be making the same ones at this moment.
    missing = [role.value for role in Role if not await _role_exists(connection, role.value)]
    for name in missing:
        try:
            await connection.execute(create_roles_sql([name]))
        except (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
            continue
        except asyncpg.InsufficientPrivilegeError as error:
            raise MissingRole(
                "the owner of the schema may not create roles: give it CREATEROLE, or run as a superuser\n"
                + create_roles_sql(missing)
            ) from error


async def _role_exists(connection: Connection, name: str) -> bool:
    return await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name) is True


async def _ensure_schema(connection: Connection) -> None:
    try:
        await connection.execute(_BOOKKEEPING)
    except asyncpg.InsufficientPrivilegeError as error:
        statement = await connection.fetchval(
            "SELECT format('GRANT CREATE ON DATABASE %I TO %I;', current_database(), current_user)"
        )
        raise MissingRole(
            f"this login may not make or change the schema: run as its owner, or let a superuser run\n{statement}"
        ) from error


async def _apply(connection: Connection, migrations: list[Migration]) -> list[int]:
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
    try:
        await _ensure_schema(connection)
        rows = await connection.fetch("SELECT number, name, checksum FROM farebox.schema_migrations ORDER BY number")
        _check_history(migrations, rows)
        pending = migrations[len(rows) :]
        for m in pending:
            async with connection.transaction():
                await connection.execute(m.sql)
                await connection.execute(_RECORD, m.number, m.name, m.checksum, m.serves_from)
        return [migration.number for migration in pending]
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


def _check_history(migrations: list[Migration], rows: list[asyncpg.Record]) -> None:
    if len(rows) > len(migrations):
        raise SchemaMismatch(
            f"the database's schema is at {len(rows)}, ahead of this release, which knows {len(migrations)}"
        )
    for migration, row in zip(migrations, rows, strict=False):
        if (row["number"], row["checksum"]) != (migration.number, migration.checksum):
            raise SchemaMismatch(
                f"migration {row['number']:04} ({row['name']}) was applied from a text other than this release has: "
                "a migration is never edited once it was applied"
            )


async def _grant_roles(connection: Connection, login: str, roles: Sequence[Role] | None = None) -> None:
    # SET without INHERIT: the login has to say as which role it acts, and has no right before it does.
    quoted = await connection.fetchval("SELECT quote_ident($1)", login)
    statements = [f"GRANT {role.value} TO {quoted} WITH INHERIT FALSE, SET TRUE;" for role in roles or Role]
    try:
        for statement in statements:
            await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError as error:
        raise MissingRole(
            "the owner may not grant the group roles; run as a superuser\n" + "\n".join(statements)
        ) from error


def _read(entry: Traversable) -> Migration:
    matched = _FILE.match(entry.name)
    assert matched, f"{entry.name} is not named NNNN_name.sql"
    number = int(matched[1])
    text = entry.read_text(encoding="utf-8")
    serves_from = _SERVES_FROM.search(text)
    assert serves_from, f"{entry.name} doesn't say which code it serves"
    functions = SQL / "functions" / matched[1]
    parts = sorted(functions.iterdir(), key=lambda part: part.name) if functions.is_dir() else []
    sql = "\n".join([text, *(part.read_text(encoding="utf-8") for part in parts)])
    return Migration(number, matched[2], sql, int(serves_from[1]))
