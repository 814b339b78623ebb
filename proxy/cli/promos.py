"""`farebox promo`: codes that give credits, once to each account."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, TypeVar

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl, PageLimit, amount_of, moment_of, seconds_of
from proxy.cli.output import reporting
from proxy.cli.session import actor, with_control
from proxy.control.billing.promo_codes import Promos, promo_code_view
from proxy.control.views import page
from proxy.ledger.promos import PromoLedger, PromoTerms

__all__ = ["app"]

app = typer.Typer(help="Promo codes: credits, once to each account that names one.", no_args_is_help=True)

Result = TypeVar("Result")


CodeRef = Annotated[str, typer.Argument(metavar="CODE", help="The code; capitals and small letters are the same.")]


@app.command()
def create(
    amount: Annotated[int, typer.Argument(metavar="AMOUNT", parser=amount_of, help="Decimal credits, as 12.5.")],
    code: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="What people type; without it one is made up that none can guess."),
    ] = None,
    max_redemptions: Annotated[
        int | None, typer.Option("--max", min=1, help="By how many accounts at most; without it by any number.")
    ] = None,
    starts: Annotated[
        datetime | None, typer.Option(metavar="WHEN", parser=moment_of, help="From when on, as 2027-01-31 (UTC).")
    ] = None,
    ends: Annotated[
        datetime | None, typer.Option(metavar="WHEN", parser=moment_of, help="Until when it can be redeemed.")
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(metavar="DURATION", parser=seconds_of, help="How long the credits last, as 90d; else for ever."),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a code. The same code with the same terms again is the same code."""
    with reporting(as_json=as_json) as out:
        terms = PromoTerms(
            credits=amount, credits_seconds=last, starts_at=starts, ends_at=ends, redemptions_max=max_redemptions
        )
        made = _promos(lambda promos: promos.create(code, terms, actor=actor()), database_url, "create")
        out.show_members(promo_code_view(made))


@app.command("list")
def list_codes(
    limit: PageLimit = 100,
    after: Annotated[str | None, typer.Option(help="Begin after this code.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List the codes, the newest first, and how often each was redeemed."""
    with reporting(as_json=as_json) as out:
        found = _promos(lambda promos: promos.codes(after=after, limit=limit + 1), database_url, "list")
        out.show_table(
            page(map(promo_code_view, found), limit),
            ("id", "credits", "redeemed", "redemptions_max", "starts_at", "ends_at", "ended_at"),
            right=("credits", "redeemed", "redemptions_max"),
            empty="No promo codes. Make one: farebox promo create AMOUNT",
        )


@app.command()
def end(code: CodeRef, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """End a code: nobody redeems it from now on. What was redeemed stays."""
    with reporting(as_json=as_json) as out:
        out.show_members(promo_code_view(_promos(lambda promos: promos.end(code), database_url, "end")))


def _promos(work: Callable[[Promos], Awaitable[Result]], database_url: str | None, command: str) -> Result:
    return with_control(lambda pool: work(Promos(PromoLedger(pool))), database_url, purpose=f"farebox promo {command}")
