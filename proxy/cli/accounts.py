"""`farebox accounts`: who pays."""

from typing import Annotated

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, PageLimit
from proxy.cli.output import members, reporting, table_of
from proxy.cli.session import actor, operate
from proxy.control.operations import Operations
from proxy.control.views import View, account_view, freeze_view, page

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

        async def work(operations: Operations) -> View:
            found = await operations.account(account)
            freezes = await operations.freezes(found.id)
            return account_view(found) | {"freezes": [freeze_view(freeze) for freeze in freezes]}

        view = operate(work, database_url, purpose="farebox accounts show")
        out.show(
            view,
            members(view, leave_out=("object", "freezes"))
            + table_of(view["freezes"], ("reference", "reason", "actor", "created_at", "lifted_at", "lifted_by")),
        )


Freezing = Annotated[
    str | None, typer.Option("--ref", help="The freeze's name: yours, or the dispute's id that froze the account.")
]


@app.command()
def freeze(
    account: AccountRef,
    reason: Annotated[str, typer.Option(help="Why, for whoever wonders later.")],
    ref: Freezing = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Admit nothing more of an account. Calls that run go on to their end, and are charged."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> View:
            found = await operations.account(account)
            return account_view(await operations.freeze(found.id, reason=reason, reference=ref, actor=actor()))

        out.show_members(operate(work, database_url, purpose="farebox accounts freeze"))


@app.command()
def unfreeze(
    account: AccountRef, ref: Freezing = None, as_json: AsJson = False, database_url: DatabaseUrl = None
) -> None:
    """Lift what froze an account: one reason (--ref), or all of them."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> View:
            found = await operations.account(account)
            return account_view(await operations.unfreeze(found.id, reference=ref, actor=actor()))

        out.show_members(operate(work, database_url, purpose="farebox accounts unfreeze"))
