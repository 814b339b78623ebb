"""`farebox migrate`: bring a database's schema up to this release."""

import asyncio
from enum import StrEnum
from typing import Annotated

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import reporting
from proxy.cli.session import database_access
from proxy.ledger import migrate as migrations
from proxy.ledger.connect import Role
from proxy.settings import load

__all__ = ["migrate"]


class RoleName(StrEnum):
    """The group roles, as a command line names them."""

    GATEWAY = "gateway"
    CONTROL = "control"
    READER = "reader"


def migrate(
    grant_to: Annotated[
        str | None,
        typer.Option(metavar="LOGIN", help="A login that may then run `farebox serve` and the other commands."),
    ] = None,
    role: Annotated[
        list[RoleName] | None,
        typer.Option(help="With --grant-to: act as this role only; may be given again. Otherwise as all three."),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Bring the schema up to this release. Run it as the owner of the schema, before the new release serves."""
    with (
        reporting(as_json=as_json) as out,
        database_access(load(database_url=database_url), purpose="farebox migrate") as access,
    ):
        if role and grant_to is None:
            raise typer.BadParameter("--role says as what a login may act: name one with --grant-to")
        roles = [Role[name.name] for name in role or RoleName]
        applied = asyncio.run(migrations.migrate(access.owner, grant_to=grant_to, roles=roles))
        known = len(migrations.known_migrations())
        done = f"applied {len(applied)} of {known} migrations" if applied else "was there already"
        lines = [f"The schema is at {known}: {done}."]
        if grant_to is not None:
            lines.append(
                f"{grant_to} may act as {', '.join(name.value for name in role)}." if role else f"{grant_to} may serve."
            )
        out.show({"schema": known, "applied": applied, "granted_to": grant_to}, lines)
