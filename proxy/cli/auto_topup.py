"""`farebox auto-topup`: accounts that buy a pack by themselves."""

from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

import typer

from proxy.billing import stripe_api
from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, amount_of
from proxy.cli.output import Output, reporting
from proxy.cli.session import actor, with_control
from proxy.control.billing.auto_settings import AutoSettings, Wish, auto_topup_view
from proxy.control.operations import Operations
from proxy.control.reload import read_catalog
from proxy.core.packs import Offers
from proxy.ledger.autotopups import AutoTopup, AutoTopupLedger
from proxy.ledger.connect import Pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.orders import OrderLedger
from proxy.settings import load

__all__ = ["app"]

app = typer.Typer(help="Accounts that buy a pack by themselves.", no_args_is_help=True)


@app.command()
def show(account: AccountRef, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Show what an account has asked to be bought for it, and how that stands."""
    with reporting(as_json=as_json) as out:
        _shown(out, account, lambda settings, id: settings.show(id), database_url, "show")


@app.command("set")
def set_auto_topup(
    account: AccountRef,
    pack: Annotated[str, typer.Option(help="The pack's id, as in pricing.yaml.")],
    below: Annotated[
        int, typer.Option(metavar="CREDITS", parser=amount_of, help="Bought when the balance is below these credits.")
    ],
    monthly_max: Annotated[
        str, typer.Option(metavar="MONEY", help="At most for so much a calendar month (UTC), in the pack's currency.")
    ],
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Buy an account a pack whenever its balance is low, by its saved payment method. Its owner has to agree."""
    with reporting(as_json=as_json) as out:
        wish = Wish(pack=pack, threshold=below, monthly_max=monthly_max)
        settings = load()
        offers = read_catalog(settings.pricing, settings.upstreams).offers
        api = stripe_api(settings)
        api.close()
        _shown(
            out,
            account,
            lambda topups, id: topups.set(id, wish, actor=actor()),
            database_url,
            "set",
            offers=offers,
            livemode=api.livemode,
            automatic_tax=settings.stripe_automatic_tax,
        )


@app.command()
def off(account: AccountRef, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Buy nothing more by itself for an account. What is under way comes to its end."""
    with reporting(as_json=as_json) as out:
        _shown(out, account, lambda settings, id: settings.stop(id, actor=actor()), database_url, "off")


def _shown(
    out: Output,
    account: str,
    work: Callable[[AutoSettings, UUID], Awaitable[AutoTopup | None]],
    database_url: str | None,
    command: str,
    *,
    offers: Offers | None = None,
    livemode: bool = False,
    automatic_tax: bool = False,
) -> None:
    async def asked(pool: Pool) -> AutoTopup | None:
        found = await Operations(ControlLedger(pool), None).account(account)
        settings = AutoSettings(
            AutoTopupLedger(pool),
            OrderLedger(pool),
            lambda: offers or Offers(),
            livemode=livemode,
            automatic_tax=automatic_tax,
        )
        return await work(settings, found.id)

    out.show_members(auto_topup_view(with_control(asked, database_url, purpose=f"farebox auto-topup {command}")))
