"""`farebox orders`: what customers bought, and the payments that don't match what they asked for."""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar
from uuid import UUID

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl, PageLimit
from proxy.cli.output import CommandFailed, reporting
from proxy.cli.session import actor, with_control
from proxy.control.billing.views import order_view, quarantined_view
from proxy.control.fields import parse_uuid
from proxy.control.views import page
from proxy.gateway.ids import new_request_id
from proxy.ledger.connect import Pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.errors import Unknown
from proxy.ledger.orders import STATES, Order, OrderLedger, Quarantined

__all__ = ["app"]

app = typer.Typer(help="Orders: what was bought, and payments that don't match.", no_args_is_help=True)

Result = TypeVar("Result")

_COLUMNS = ("created_at", "id", "account", "state", "credits", "price", "currency", "payment_intent", "problem")
_QUARANTINE_COLUMNS = ("seen_at", "id", "reason", "order", "received", "currency", "resolution")


def state_of(text: str) -> str:
    """A state that an order can have; a usage error otherwise."""
    if text not in STATES:
        raise typer.BadParameter(f"an order is one of {', '.join(STATES)}")
    return text


@app.command("list")
def list_orders(
    account: Annotated[
        str | None, typer.Option(metavar="ACCOUNT", help="Only this account's, by id, external id or name.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", parser=state_of, help=f"Only those that are {', '.join(STATES)}.")
    ] = None,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="Payments that don't match their order, and wait to be resolved.")
    ] = False,
    limit: PageLimit = 50,
    after: Annotated[str | None, typer.Option(help="Begin after (before, in time) the order of this id.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List orders, the newest first; or with --quarantined the payments that wait to be looked at, the oldest first."""
    with reporting(as_json=as_json) as out:
        if quarantined:
            waiting = _orders(lambda orders: orders.quarantine(limit=limit + 1), database_url, "list")
            out.show_table(
                page(map(quarantined_view, waiting), limit),
                _QUARANTINE_COLUMNS,
                right=("received",),
                empty="No payment is in quarantine.",
            )
            return
        if after is not None and parse_uuid(after) is None:
            raise CommandFailed(f"{after[:80]!r} is no order's id.", code="invalid_value")

        async def work(pool: Pool) -> list[Order]:
            account_id = None if account is None else (await ControlLedger(pool).find_account(account)).id
            behind = None if after is None else UUID(after)
            return await OrderLedger(pool).list_orders(account_id, state=state, after=behind, limit=limit + 1)

        found = with_control(work, database_url, purpose="farebox orders list")
        views = (order_view(order, internal=True) for order in found)
        out.show_table(page(views, limit), _COLUMNS, right=("credits", "price"), empty="No orders.")


@app.command()
def show(
    order: Annotated[
        str, typer.Argument(metavar="ORDER", help="Its id, or Stripe's of its payment (pi_), page (cs_) or invoice.")
    ],
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Show an order, or a payment in quarantine."""
    with reporting(as_json=as_json) as out:

        async def work(orders: OrderLedger) -> Order | Quarantined:
            found = await orders.search(order)
            return found if found is not None else await orders.quarantined(order)

        try:
            found = _orders(work, database_url, "show")
        except Unknown:
            raise CommandFailed(f"No order and no payment {order[:80]!r}.", code="not_found") from None
        out.show_members(order_view(found, internal=True) if isinstance(found, Order) else quarantined_view(found))


@app.command()
def resolve(
    payment: Annotated[
        str, typer.Argument(metavar="PAYMENT", help="The payment in quarantine: pi_..., cs_... or in_...")
    ],
    credit: Annotated[
        bool, typer.Option("--credit", help="It buys what its order asked for, whatever came in.")
    ] = False,
    dismiss: Annotated[
        bool, typer.Option("--dismiss", help="It buys nothing here, for instance since it was refunded at Stripe.")
    ] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Decide about a payment in quarantine, once: --credit or --dismiss.

    Where another payment has paid the order already, --credit gives its credits a second time, as an order of its own.
    """
    with reporting(as_json=as_json) as out:
        if credit == dismiss:
            raise typer.BadParameter("say either --credit or --dismiss")

        async def work(orders: OrderLedger) -> tuple[Quarantined, Order | None]:
            resolution = "credited" if credit else "dismissed"
            paid = await orders.resolve(payment, resolution, actor=actor(), new_id=new_request_id())
            found = None if paid is None or dismiss else await orders.find(paid)
            return await orders.quarantined(payment), found

        resolved, paid = _orders(work, database_url, "resolve")
        view = quarantined_view(resolved)
        out.show_members(view if paid is None else {**view, "order": str(paid.id)})


def _orders(work: Callable[[OrderLedger], Awaitable[Result]], database_url: str | None, command: str) -> Result:
    return with_control(lambda pool: work(OrderLedger(pool)), database_url, purpose=f"farebox orders {command}")
