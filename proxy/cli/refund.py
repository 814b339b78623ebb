"""`farebox refund`: gives money back through Stripe, and takes the credits that it bought."""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from proxy.billing import stripe_api
from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import EXIT_FAILED, CommandFailed, Output, reporting, table_of
from proxy.cli.serve import configure_logs
from proxy.cli.session import actor, with_control
from proxy.control.billing.desks import open_desks
from proxy.control.billing.refunding import Refunder, RefundTerms, refund_view
from proxy.control.billing.refunds import RefundDesk, Resumed
from proxy.ledger.connect import Pool
from proxy.metrics import Metrics
from proxy.settings import load

__all__ = ["refund"]

Result = TypeVar("Result")

RESUMED_MAX = 1_000

_COLUMNS = ("created_at", "id", "order", "amount", "currency", "credits", "state", "waits_for")


def refund(
    order: Annotated[
        str | None,
        typer.Argument(help="The order: its id, or its PaymentIntent's (pi_...), Checkout Session's or invoice's."),
    ] = None,
    amount: Annotated[
        str | None,
        typer.Option(
            metavar="MONEY",
            help="Decimal money in the order's currency, with tax. Without it: for what of the purchase isn't spent.",
        ),
    ] = None,
    all_left: Annotated[
        bool,
        typer.Option("--all-left", help="All that is left of the payment; credits that are spent are owed then."),
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why, for whoever reads the book later.")] = None,
    ref: Annotated[
        str | None, typer.Option(help="Your name for this refund. The same one again refunds nothing more.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Carry on with refunds that Stripe has not answered, instead of a new one.")
    ] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Refund a purchase through Stripe: its credits are held first, and taken when Stripe has refunded the money.

    Where Stripe refuses, they are available again.
    """
    if resume == (order is not None):
        raise typer.BadParameter("name an order to refund, or --resume what is under way: one of the two")
    with reporting(as_json=as_json) as out:
        if order is None:
            _show_resumed(out, _at_the_counter(lambda desk, _: desk.resume(limit=RESUMED_MAX), database_url))
            return
        named, terms = order, RefundTerms(all_left=all_left, reference=ref, actor=actor(), reason=reason)
        request = _at_the_counter(lambda _, refunder: refunder.refund_named(named, amount, terms), database_url)
        if request.state == "released":
            raise CommandFailed(
                f"Stripe didn't refund it: {request.problem}. The credits are available again.", code="refund_refused"
            )
        out.show_members(refund_view(request))


def _at_the_counter(work: Callable[[RefundDesk, Refunder], Awaitable[Result]], database_url: str | None) -> Result:
    settings = load(database_url=database_url)
    # On standard error, and what the command doesn't say itself.
    configure_logs(settings.model_copy(update={"log_level": "warning"}))
    api = stripe_api(settings)

    async def over(pool: Pool) -> Result:
        # Without plans, which are for payments that aren't known yet: what is refunded here is an order that was paid.
        desks = open_desks(api, pool, dict, metrics=Metrics())
        refunder = Refunder(desks.orders, desks.refund_requests, desks.refunds, livemode=api.livemode)
        return await work(desks.refunds, refunder)

    try:
        return with_control(over, database_url, purpose="farebox refund")
    finally:
        api.close()


def _show_resumed(out: Output, resumed: Resumed) -> None:
    views = [refund_view(request) for request in resumed.ended]
    views += [refund_view(request) | {"waits_for": why} for request, why in resumed.waiting]
    lines = table_of(views, _COLUMNS, right=("amount", "credits")) or ["No refund is under way."]
    out.show({"object": "list", "data": views, "has_more": False}, lines)
    if resumed.waiting:
        raise typer.Exit(EXIT_FAILED)
