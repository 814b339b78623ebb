"""`farebox messages`: what the operator's own endpoint is told, and what has not arrived there."""

import re
from typing import Annotated, cast, get_args
from uuid import UUID

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, PageLimit, amount_of
from proxy.cli.output import CommandFailed, reporting
from proxy.cli.session import ask_control, with_control
from proxy.control.operations import Operations
from proxy.control.views import message_view, page
from proxy.core.money import format_credits
from proxy.ledger.connect import Connection, Pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.outbox import Message, MessageState, Outbox
from proxy.ledger.records import Account

__all__ = ["app"]

app = typer.Typer(help="Messages to your own endpoint.", no_args_is_help=True)

STATES = get_args(MessageState)
_ID = re.compile(r"msg_([0-9a-f]{32})\Z", re.ASCII)


def _state_of(text: str) -> str:
    if (state := text.replace("-", "_")) not in (*STATES, "all"):
        raise typer.BadParameter("a state is waiting, given-up, delivered or all")
    return state


@app.command("list")
def list_messages(
    state: Annotated[
        str,
        typer.Option(metavar="STATE", parser=_state_of, help="waiting, given-up, delivered, or all of them."),
    ] = "all",
    limit: PageLimit = 100,
    after: Annotated[str | None, typer.Option(help="Begin after the message of this id.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List messages, the newest first, with what came of the last attempt to send each."""
    with reporting(as_json=as_json) as out:
        wanted = None if state == "all" else cast(MessageState, state)
        behind = None if after is None else _message_id(after)

        async def work(connection: Connection) -> list[Message]:
            return await Outbox(connection).messages(state=wanted, after=behind, limit=limit + 1)

        found = ask_control(work, database_url, purpose="farebox messages list")
        view = page(map(message_view, found), limit)
        out.show_table(
            view,
            ("id", "type", "account", "state", "attempts", "created_at", "error"),
            right=("attempts",),
            empty="No messages.",
        )


@app.command()
def resend(
    message: Annotated[str | None, typer.Argument(metavar="ID", help="The message's id, as the list shows it.")] = None,
    given_up: Annotated[bool, typer.Option("--given-up", help="All that were given up.")] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Send a message again, under its old id, or all that were given up. The server does it within seconds."""
    with reporting(as_json=as_json) as out:
        if (message is None) == (not given_up):
            raise typer.BadParameter("name one message, or --given-up for all of those")
        wanted = None if message is None else _message_id(message)

        async def work(connection: Connection) -> int:
            outbox = Outbox(connection)
            if wanted is None:
                return await outbox.resend_given_up()
            await outbox.resend(wanted)
            return 1

        count = ask_control(work, database_url, purpose="farebox messages resend")
        out.show({"object": "resent", "messages": count}, [f"{count} to be sent again."])


@app.command("low-balance")
def low_balance(
    account: AccountRef,
    below: Annotated[
        int | None,
        typer.Argument(metavar="CREDITS", parser=amount_of, help="Decimal credits; without it FAREBOX_LOW_BALANCE."),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Say below which balance of an account a message is sent, once each time it gets there."""
    with reporting(as_json=as_json) as out:

        async def work(pool: Pool) -> Account:
            found = await Operations(ControlLedger(pool), None).account(account)
            await Outbox(pool).set_low_balance(found.id, below)
            return found

        found = with_control(work, database_url, purpose="farebox messages low-balance")
        mark = None if below is None else format_credits(below)
        out.show_members({"object": "low_balance", "account": str(found.id), "low_balance": mark})


def _message_id(text: str) -> UUID:
    match = _ID.match(text)
    if match is None:
        raise CommandFailed(f"{text[:60]!r} is not the id of a message", code="not_found")
    return UUID(match[1])
