"""The schema snapshot: what the migrations make, as pg_dump tells it, for reading and for seeing what a change changes.

``python -m tests.ledger.snapshot`` (``make schema``) writes it anew.
"""

import re
import secrets
import subprocess
from pathlib import Path

from proxy.local.binaries import find_binaries
from tests.postgres import Database, fresh_database, remove_cluster, running_cluster

__all__ = ["SNAPSHOT", "dump"]

SNAPSHOT = Path(__file__).parents[2] / "proxy" / "ledger" / "sql" / "schema.sql"
HEADER = """\
-- What the migrations make, for reading. Written by `make schema` from a migrated database; a test proves it equal.
-- Nothing runs this file.
"""
# Session settings, a random word of pg_dump's own, and its comments: its version, and a line above each object.
_NOISE = re.compile(r"^(--.*|SET .*;|SELECT pg_catalog\.set_config.*|\\(un)?restrict .*)\n", re.MULTILINE)


def dump(database: Database) -> str:
    """The schema of a migrated database: tables, functions, triggers, policies and privileges."""
    command = [str(find_binaries() / "pg_dump"), "--schema-only", "--schema=farebox", "--no-owner", database.owner]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return HEADER + "\n" + re.sub(r"\n{3,}", "\n\n", _outside_bodies(text)).strip() + "\n"


def _outside_bodies(text: str) -> str:
    """``text`` without pg_dump's noise, which looks like what a function's body may well contain."""
    parts = re.split(r"(\$\$.*?\$\$)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("$$") else _NOISE.sub("", part) for part in parts)


def main() -> None:
    run_id = secrets.token_hex(6)
    with running_cluster(run_id) as address, fresh_database(address) as database:
        SNAPSHOT.write_text(dump(database), encoding="utf-8")
    remove_cluster(run_id)


if __name__ == "__main__":
    main()
