"""`farebox credits`: credits given by hand. Who did it and why is kept with the transfer."""

from typing import Annotated

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, amount_of
from proxy.cli.output import reporting
from proxy.cli.session import actor, operate
from proxy.control.operations import Operations
from proxy.control.views import transfer_view
from proxy.ledger.records import Transfer

__all__ = ["app"]

app = typer.Typer(help="Credits given by hand.", no_args_is_help=True)


@app.command()
def grant(
    account: AccountRef,
    amount: Annotated[int, typer.Argument(metavar="AMOUNT", parser=amount_of, help="Decimal credits, as 12.5.")],
    ref: Annotated[str, typer.Option(help="Your name for this grant. The same one again grants nothing more.")],
    reason: Annotated[str | None, typer.Option(help="Why, for whoever reads the book later.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Give an account credits, once for each reference."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> Transfer:
            owner = await operations.account(account)
            return await operations.grant(owner.id, amount, reference=ref, actor=actor(), reason=reason)

        transfer = operate(work, database_url, purpose="farebox credits grant")
        out.show_members(transfer_view(transfer, internal=True))


@app.command()
def reverse(
    request_id: Annotated[str, typer.Argument(help="The request whose charge is given back: its x-request-id.")],
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the book later.")],
    amount: Annotated[
        int | None,
        typer.Option(metavar="AMOUNT", parser=amount_of, help="Decimal credits; without it all that is left."),
    ] = None,
    ref: Annotated[
        str | None,
        typer.Option(help="Your name for this reversal. Without it the same request and amount are reversed once."),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Give back what a request was charged, or a part of it."""
    with reporting(as_json=as_json) as out:
        transfer = operate(
            lambda operations: operations.reverse(request_id, amount, reference=ref, actor=actor(), reason=reason),
            database_url,
            purpose="farebox credits reverse",
        )
        out.show_members(transfer_view(transfer, internal=True))
