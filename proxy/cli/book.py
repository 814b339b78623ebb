"""`farebox transactions` and `farebox receipts`: reading the book."""

from typing import Annotated

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, PageLimit
from proxy.cli.output import members, reporting, table_of
from proxy.cli.session import operate
from proxy.control.operations import Operations
from proxy.control.views import View, page, receipt_view, transfer_view
from proxy.ledger.records import Transfer

__all__ = ["receipts", "transactions"]

receipts = typer.Typer(help="Receipts: why a request cost what it did.", no_args_is_help=True)


def transactions(
    account: AccountRef,
    limit: PageLimit = 50,
    after: Annotated[str | None, typer.Option(help="Begin after (before, in time) the transaction of this id.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List an account's transactions, the newest first, in credits."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> list[Transfer]:
            owner = await operations.account(account)
            return await operations.transactions(owner.id, after=after, limit=limit + 1)

        found = operate(work, database_url, purpose="farebox transactions")
        out.show_table(
            page((transfer_view(transfer, internal=True) for transfer in found), limit),
            (
                "created_at",
                "kind",
                "amount",
                "balance_after",
                "debt_after",
                "request_id",
                "reference",
                "actor",
                "reason",
            ),
            right=("amount", "balance_after", "debt_after"),
            empty="No transactions.",
        )


@receipts.command()
def show(
    request_id: Annotated[str, typer.Argument(help="The request: its x-request-id.")],
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Show a request's receipt: what was quoted, held and used, at which prices, and what was charged."""
    with reporting(as_json=as_json) as out:
        ended = operate(
            lambda operations: operations.receipt(request_id), database_url, purpose="farebox receipts show"
        )
        view = receipt_view(ended)
        out.show(view, _receipt_lines(view))


def _receipt_lines(view: View) -> list[str]:
    flat: View = {}
    for name, value in view.items():
        if isinstance(value, dict):
            flat |= {f"{name} {member}": inner for member, inner in value.items() if not isinstance(inner, dict)}
        else:
            flat[name] = value
    amounts = ("credits_per_1k", "tokens", "amount")
    rows = table_of(view["prices"], ("class", *amounts), right=amounts)
    return [*members(flat, leave_out=("object", "prices")), *(["", *rows] if rows else [])]
