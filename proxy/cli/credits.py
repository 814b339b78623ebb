"""`farebox credits`: credits given by hand. Who did it and why is kept with the transfer."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, PageLimit, amount_of, expiry_of
from proxy.cli.output import reporting
from proxy.cli.session import actor, operate
from proxy.control.operations import Operations
from proxy.control.views import list_view, lot_view, transfer_view
from proxy.ledger.control import PRIORITY_MAX
from proxy.ledger.records import Lot, Transfer

__all__ = ["app", "lots"]

app = typer.Typer(help="Credits given by hand.", no_args_is_help=True)


class Kind(StrEnum):
    """What a grant is."""

    GRANT = "grant"
    PROMO = "promo"


@app.command()
def grant(
    account: AccountRef,
    amount: Annotated[int, typer.Argument(metavar="AMOUNT", parser=amount_of, help="Decimal credits, as 12.5.")],
    ref: Annotated[str, typer.Option(help="Your name for this grant. The same one again grants nothing more.")],
    reason: Annotated[str | None, typer.Option(help="Why, for whoever reads the book later.")] = None,
    kind: Annotated[Kind, typer.Option(help="promo: a promotion, drawn before all other credits.")] = Kind.GRANT,
    expires: Annotated[
        datetime | None,
        typer.Option(metavar="WHEN", parser=expiry_of, help="When what is left is gone: 2027-01-31 (UTC), or 90d."),
    ] = None,
    priority: Annotated[
        int | None, typer.Option(min=0, max=PRIORITY_MAX, help="Lower is drawn first: promo 100, grant 200, paid 300.")
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Give an account credits, once for each reference."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> Transfer:
            owner = await operations.account(account)
            return await operations.grant(
                owner.id,
                amount,
                reference=ref,
                actor=actor(),
                reason=reason,
                kind=kind.value,
                expires_at=expires,
                priority=priority,
            )

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


def lots(
    account: AccountRef,
    used_up: Annotated[bool, typer.Option("--all", help="Those with nothing left as well, the newest first.")] = False,
    limit: PageLimit = 100,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Show what each grant and purchase of an account has left, in the order in which they are drawn."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> list[Lot]:
            owner = await operations.account(account)
            return await operations.lots(owner.id, used_up=used_up, limit=limit + 1)

        found = operate(work, database_url, purpose="farebox lots")
        out.show_table(
            list_view([lot_view(lot, internal=True) for lot in found[:limit]], has_more=False),
            ("id", "kind", "amount", "remaining", "reserved", "owed", "priority", "expires_at", "created_at"),
            right=("amount", "remaining", "reserved", "owed", "priority"),
            empty="Nothing is left of any grant or purchase.",
        )
