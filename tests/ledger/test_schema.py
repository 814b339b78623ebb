"""The snapshot in the repository is what the migrations make."""

from tests.ledger.snapshot import SNAPSHOT, dump
from tests.postgres import Database


def test_the_snapshot_is_what_the_migrations_make(module_database: Database) -> None:
    assert dump(module_database) == SNAPSHOT.read_text(encoding="utf-8"), "run `make schema` and look at what changed"
