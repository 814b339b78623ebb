"""`farebox migrate`: bring a database's schema up to this release."""

import asyncio
from typing import Annotated

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import reporting
from proxy.cli.session import database_access
from proxy.ledger import migrate as migrations
from proxy.settings import load

__all__ = ["migrate"]


def migrate(
    grant_to: Annotated[
        str | None,
        typer.Option(metavar="LOGIN", help="A login that may then run `farebox serve` and the other commands."),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Bring the schema up to this release. Run it as the owner of the schema, before the new release serves."""
    with (
        reporting(as_json=as_json) as out,
        database_access(load(database_url=database_url), purpose="farebox migrate") as access,
    ):
        applied = asyncio.run(migrations.migrate(access.owner, grant_to=grant_to))
        known = len(migrations.known_migrations())
        done = f"applied {len(applied)} of {known} migrations" if applied else "was there already"
        lines = [f"The schema is at {known}: {done}."]
        if grant_to is not None:
            lines.append(f"{grant_to} may serve.")
        out.show({"schema": known, "applied": applied, "granted_to": grant_to}, lines)
