"""A server of the release before works on this release's schema as it did on its own: that is what an upgrade needs."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.migrate import SchemaState, schema_state
from proxy.local.postgres import APP, SUPERUSER, ClusterAddress
from tests.ledger.previous.database import PREVIOUS, migrated, previous_database
from tests.ledger.previous.script import Conversation, converse
from tests.postgres import in_thread

# What belongs to the previous schema, and how: functions with their arguments, results and callers; columns; grants.
FUNCTIONS = """
    SELECT p.oid::regprocedure::text AS function, pg_get_function_result(p.oid) AS result,
           pg_get_function_arguments(p.oid) AS arguments, p.prosecdef, p.proretset,
           ARRAY(SELECT DISTINCT a.grantee::regrole::text FROM aclexplode(p.proacl) AS a
                  WHERE a.grantee <> p.proowner ORDER BY 1) AS callers
      FROM pg_proc p WHERE p.pronamespace = 'farebox'::regnamespace ORDER BY 1
"""
COLUMNS = """
    SELECT c.relname || '.' || a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type
      FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
     WHERE c.relnamespace = 'farebox'::regnamespace AND c.relkind IN ('r', 'v', 'c') AND a.attnum > 0
       AND NOT a.attisdropped
"""
READERS = """
    SELECT c.relname || ' ' || a.grantee::regrole::text || ' ' || a.privilege_type AS right
      FROM pg_class c, aclexplode(c.relacl) AS a
     WHERE c.relnamespace = 'farebox'::regnamespace AND a.grantee <> c.relowner
"""


@pytest.fixture(scope="module")
def previous(cluster: ClusterAddress) -> Iterator[str]:
    """A database on the schema of the release before."""
    with previous_database(cluster) as database:
        yield database.name


@pytest.fixture(scope="module")
def newest(cluster: ClusterAddress) -> Iterator[str]:
    """A database that was on the previous schema, and has been migrated."""
    with previous_database(cluster) as database:
        in_thread(migrated(database))
        yield database.name


@asynccontextmanager
async def talking(cluster: ClusterAddress, name: str) -> AsyncIterator[Conversation]:
    """A conversation in that database, by a connection for each role."""
    dsn = cluster.dsn(APP, name)
    connections: list[Connection] = [await connect(dsn, role) for role in Role]
    try:
        yield Conversation(*connections)
    finally:
        for connection in connections:
            await connection.close()


async def catalog(cluster: ClusterAddress, name: str, query: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(cluster.dsn(SUPERUSER, name))
    try:
        return [dict(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def test_this_schema_says_that_it_serves_the_release_before(cluster: ClusterAddress, newest: str) -> None:
    connection = await connect(cluster.dsn(APP, newest), Role.GATEWAY)
    state = await schema_state(connection)
    await connection.close()
    SchemaState(PREVIOUS, state.applied, state.serves_from).require()


async def test_every_function_is_there_with_its_arguments_its_result_and_its_callers(
    cluster: ClusterAddress, previous: str, newest: str
) -> None:
    now = {row["function"]: row for row in await catalog(cluster, newest, FUNCTIONS)}
    before = await catalog(cluster, previous, FUNCTIONS)
    # Those without callers are the functions' own; the code of a release can't see them.
    called = [row for row in before if row["callers"]]
    assert len(called) > 15
    for row in called:
        found = now[row["function"]]
        assert set(found.pop("callers")) >= set(row.pop("callers"))
        assert found == row


async def test_every_column_and_every_right_to_read_is_there(
    cluster: ClusterAddress, previous: str, newest: str
) -> None:
    for query in (COLUMNS, READERS):
        before, now = [
            {tuple(row.values()) for row in await catalog(cluster, name, query)} for name in (previous, newest)
        ]
        assert before - now == set()


async def test_the_same_conversation_has_the_same_answers(cluster: ClusterAddress, previous: str, newest: str) -> None:
    async with talking(cluster, previous) as before, talking(cluster, newest) as now:
        await converse(before)
        await converse(now)
        assert len(before.answers) == len(now.answers) > 100
        for old, new in zip(before.answers, now.answers, strict=True):
            assert extended(old, new) == old, old[0]
        said = {
            row["outcome"] for _, rows in before.answers if isinstance(rows, list) for row in rows if "outcome" in row
        }
    assert said >= {
        "granted", "insufficient", "credits_held", "spend_limit", "key_changed", "worker_lapsed", "conflict", "ended",
        "unknown", "final", "released", "done", "above_charge", "not_final",
    }  # fmt: skip


def extended(old: tuple[str, Any], new: tuple[str, Any]) -> tuple[str, Any]:
    """``new`` without the columns that ``old`` hasn't: a table may have more by now, and old code doesn't look."""
    label, answer = new
    if isinstance(old[1], list) and isinstance(answer, list) and len(old[1]) == len(answer):
        answer = [
            {name: value for name, value in row.items() if name in known}
            for row, known in zip(answer, old[1], strict=True)
        ]
    return label, answer
