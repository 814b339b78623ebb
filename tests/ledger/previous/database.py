"""A database as the release before left it, to be migrated, or not."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxy.ledger import migrate as migrations
from proxy.ledger.migrate import known_migrations, migrate
from proxy.local.postgres import APP, OWNER, SUPERUSER, ClusterAddress
from tests.postgres import Database, in_thread, run_as_superuser

__all__ = ["PREVIOUS", "migrated", "previous_database"]

PREVIOUS = 1
"""The last migration that the release before knows."""


@contextmanager
def previous_database(cluster: ClusterAddress) -> Iterator[Database]:
    """A database on the schema of the release before."""
    name = f"t_{secrets.token_hex(6)}"
    in_thread(run_as_superuser(cluster, f"CREATE DATABASE {name} OWNER {OWNER}"))
    database = Database(name, cluster.dsn(OWNER, name), cluster.dsn(APP, name), cluster.dsn(SUPERUSER, name))
    try:
        first = known_migrations()[:PREVIOUS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(migrations, "known_migrations", lambda: first)
            in_thread(migrated(database))
        yield database
    finally:
        in_thread(run_as_superuser(cluster, f"DROP DATABASE {name} WITH (FORCE)"))


async def migrated(database: Database) -> None:
    """Bring it up to this release's schema."""
    await migrate(database.owner, grant_to=APP)
