"""`farebox journal`: what waits on this machine's disk for the ledger, and what it has been told."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import EXIT_FAILED, CommandFailed, reporting
from proxy.cli.serve import configure_logs
from proxy.cli.session import Access, database_access, require_schema
from proxy.control.views import View
from proxy.ledger.batch import BatchedLedger
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.errors import JournalError
from proxy.ledger.holds import HoldLedger
from proxy.ledger.journal_files import DAMAGED, DONE, OPEN, REJECTED, JournalDirectory, KnownFile
from proxy.ledger.journal_records import read_journal
from proxy.ledger.lines import lines_to
from proxy.ledger.takeover import Replayed, repeat
from proxy.settings import Settings, load

__all__ = ["app"]

app = typer.Typer(help="Journals: charges as they were written down before the ledger heard.", no_args_is_help=True)

STATES = {OPEN: "waiting", DONE: "done", REJECTED: "rejected", DAMAGED: "damaged"}
ANSWER_SECONDS = 60.0

Directory = Annotated[
    Path | None,
    typer.Option("--directory", metavar="DIR", help="Another directory than this machine's, as FAREBOX_JOURNAL_DIR."),
]


@app.command("list")
def list_(directory: Directory = None, as_json: AsJson = False) -> None:
    """List this machine's journals: whose they are, and how many of their rows wait. Asks no database."""
    with reporting(as_json=as_json) as out:
        found = _directory(load(), directory)
        views = [_view(found, file) for file in found.files()] if found.path.is_dir() else []
        columns = ("file", "state", "rows", "waiting", "rejected", "bytes", "modified_at", "ledger", "problem")
        out.show_table(
            {"object": "list", "data": views, "has_more": False},
            columns,
            right=("rows", "waiting", "rejected", "bytes"),
            empty=f"No journals in {found.path}.",
        )


@app.command("replay")
def replay_(
    directory: Directory = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Tell the ledger once more all that the journals say: after a restore, or a failover that lost commits.

    What it knows already changes nothing. It may be run while Farebox serves, and as often as one likes.
    """
    with reporting(as_json=as_json) as out:
        settings = load(database_url=database_url)
        found = _directory(settings, directory)
        if not found.path.is_dir():
            raise CommandFailed(f"There is no directory {found.path}.", code="journal")
        with database_access(settings, purpose="farebox journal replay") as access:
            # Which rows are rejected, and why: on standard error.
            configure_logs(access.settings)
            outcomes = asyncio.run(_replay(access, found))
        views = [{"file": o.path.name, "rows": o.rows, "rejected": o.rejected, "left": o.left} for o in outcomes]
        out.show_table(
            {"object": "list", "data": views, "has_more": False},
            ("file", "rows", "rejected", "left"),
            right=("rows", "rejected"),
            empty=f"No journals to replay in {found.path}.",
        )
        if any(outcome.left or outcome.rejected for outcome in outcomes):
            raise typer.Exit(EXIT_FAILED)


def _directory(settings: Settings, named: Path | None) -> JournalDirectory:
    path = named or settings.journal_path()
    if path is None:
        raise CommandFailed("There is no journal: FAREBOX_JOURNAL_DIR is off. Name one by --directory.", code="journal")
    return JournalDirectory(path)


def _view(directory: JournalDirectory, known: KnownFile) -> View:
    view: View = {
        "file": known.path.name,
        "state": STATES[known.ending],
        "rows": None,
        "waiting": None,
        "rejected": None,
        "bytes": known.bytes,
        "modified_at": datetime.fromtimestamp(known.modified, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ledger": None,
        "problem": None,
    }
    if known.ending == OPEN and directory.is_held(known.path):
        view["state"] = "live"
    try:
        contents = read_journal(known.path.read_bytes())
    except (OSError, JournalError) as error:
        return view | {"problem": str(error)}
    ledgers = sorted({str(row.ledger_id) for row in contents.rows})
    damage = ", ".join(f"bytes {begin}-{end} can't be read" for begin, end in contents.damaged)
    return view | {
        "rows": len(contents.rows),
        "waiting": len(contents.waiting),
        "rejected": len(contents.rejected),
        "ledger": ", ".join(ledgers) or (None if contents.head is None else str(contents.head.ledger_id)),
        "problem": damage or None,
    }


async def _replay(access: Access, directory: JournalDirectory) -> list[Replayed]:
    login = access.login_of("gateway")
    await require_schema(login, Role.GATEWAY)
    pool = await create_pool(login, Role.GATEWAY, size=1)
    ledger = BatchedLedger(lines_to(login))
    await ledger.start()
    outcomes = []
    try:
        for known in directory.files():
            async with asyncio.timeout(ANSWER_SECONDS):
                outcomes.append(await repeat(directory, known.path, ledger, HoldLedger(pool), _Silent()))
    finally:
        await ledger.stop()
        await pool.close()
    return outcomes


class _Silent:
    """A command's figures go nowhere: what it prints has them."""

    def journal_replayed(self, rows: int) -> None:
        """Not counted."""

    def journal_rejected(self) -> None:
        """Not counted."""

    def journal_damaged(self) -> None:
        """Not counted."""
