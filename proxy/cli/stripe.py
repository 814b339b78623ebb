"""`farebox stripe`: what Stripe told us, and what came of it."""

from typing import Annotated

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl, PageLimit
from proxy.cli.output import CommandFailed, reporting
from proxy.cli.session import actor, ask_control
from proxy.cli.stripe_endpoint import check, setup
from proxy.cli.stripe_reconcile import reconcile
from proxy.control.views import page, stripe_event_view
from proxy.ledger.connect import Connection
from proxy.ledger.stripe_events import EventLedger, EventState

__all__ = ["app"]

app = typer.Typer(help="Stripe: webhooks, and whether the books agree.", no_args_is_help=True)


app.command()(setup)
app.command()(check)
app.command()(reconcile)


@app.command()
def events(
    unprocessed: Annotated[bool, typer.Option("--unprocessed", help="Only those that are not applied yet.")] = False,
    limit: PageLimit = 50,
    after: Annotated[str | None, typer.Option(help="Begin after (before, in time) the event of this id.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List the webhooks that came, the newest first, and what became of each."""
    with reporting(as_json=as_json) as out:

        async def work(connection: Connection) -> list[EventState]:
            return await EventLedger(connection).newest(after=after, limit=limit + 1, unprocessed=unprocessed)

        found = ask_control(work, database_url, purpose="farebox stripe events")
        out.show_table(
            page(map(stripe_event_view, found), limit),
            ("received_at", "id", "type", "about", "attempts", "outcome", "error"),
            right=("attempts",),
            empty="No webhooks" + (" are left to be processed." if unprocessed else " came yet."),
        )


@app.command()
def dismiss(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's id: evt_...")],
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Give up a webhook that can't be applied, as one about another Stripe account's objects.

    It is tried no more. Nothing is lost by it: reconciliation asks Stripe for what was paid, not for what was told.
    """
    with reporting(as_json=as_json) as out:

        async def work(connection: Connection) -> bool:
            return await EventLedger(connection).finish(event, f"dismissed by {actor()}")

        if not ask_control(work, database_url, purpose="farebox stripe dismiss"):
            raise CommandFailed(f"No event {event[:80]!r} is left to be processed.", code="not_found")
        out.show({"id": event, "outcome": "dismissed"}, [f"{event} is dismissed: it is tried no more."])
