"""`farebox accounts`: who pays."""

from typing import Annotated

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, PageLimit
from proxy.cli.output import reporting
from proxy.cli.session import operate
from proxy.control.views import account_view, page

__all__ = ["app"]

app = typer.Typer(help="Accounts: who pays.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What people call it.")],
    external_id: Annotated[
        str | None, typer.Option(help="Your own id for it. The same id again gives the same account.")
    ] = None,
    email: Annotated[str | None, typer.Option(help="How to reach its owner.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Make an account, without credits."""
    with reporting(as_json=as_json) as out:
        account = operate(
            lambda operations: operations.create_account(name, external_id=external_id, email=email),
            database_url,
            purpose="farebox accounts create",
        )
        out.show_members(account_view(account))


@app.command("list")
def list_accounts(
    limit: PageLimit = 100,
    after: Annotated[str | None, typer.Option(help="Begin after the account of this id.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List accounts and what they have, in credits."""
    with reporting(as_json=as_json) as out:
        accounts = operate(
            lambda operations: operations.accounts(after=after, limit=limit + 1),
            database_url,
            purpose="farebox accounts list",
        )
        out.show_table(
            page(map(account_view, accounts), limit),
            ("id", "name", "external_id", "balance", "held", "available", "debt"),
            right=("balance", "held", "available", "debt"),
            empty="No accounts. Make one: farebox accounts create NAME",
        )


@app.command()
def show(account: AccountRef, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Show an account: its balance, what is held of it, what is available, and its debt, in credits."""
    with reporting(as_json=as_json) as out:
        found = operate(lambda operations: operations.account(account), database_url, purpose="farebox accounts show")
        out.show_members(account_view(found))
