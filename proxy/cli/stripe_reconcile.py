"""`farebox stripe reconcile`: Stripe's book against ours, over as long a time as is asked for."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from proxy.billing import stripe_api
from proxy.cli.arguments import AsJson, DatabaseUrl, seconds_of
from proxy.cli.output import EXIT_FAILED, CommandFailed, reporting, table_of
from proxy.cli.serve import configure_logs
from proxy.cli.session import Access, database_access, require_schema
from proxy.control.billing.desks import open_desks, open_reconciler
from proxy.control.billing.errors import StripeError
from proxy.control.billing.reconcile import Reconciliation
from proxy.control.billing.reconcile_loop import reconcile_and_note
from proxy.control.reload import read_catalog
from proxy.control.views import View, time_text
from proxy.core.currencies import format_amount
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.reconciliation import ReconciliationLedger
from proxy.metrics import Metrics
from proxy.settings import load

__all__ = ["reconcile"]

BACK = timedelta(hours=72)
CONNECTIONS = 4
LISTED_MAX = 50


def reconcile(
    since: Annotated[
        int | None,
        typer.Option(metavar="DURATION", parser=seconds_of, help="How far to look back, as 30d; without it 72h."),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Apply what was missed of Stripe's payments, invoices, refunds and disputes. Ends with 1 if anything differs."""
    with reporting(as_json=as_json) as out:
        progress = (lambda line: None) if as_json else (lambda line: typer.echo(line, err=True))
        with database_access(load(database_url=database_url), purpose="farebox stripe reconcile") as access:
            back = BACK if since is None else timedelta(seconds=since)
            report = asyncio.run(_reconcile(access, back, progress))
        out.show(_view(report), _lines(report))
        if not report.clean:
            raise typer.Exit(EXIT_FAILED)


async def _reconcile(access: Access, back: timedelta, progress: Callable[[str], None]) -> Reconciliation:
    settings = access.settings
    # What is done here is the command's answer; on standard error there is only what an alarm would be made of.
    configure_logs(settings.model_copy(update={"log_level": "error"}))
    plans = read_catalog(settings.pricing, settings.upstreams).offers.plans
    api = stripe_api(settings)
    try:
        login = access.login_of("control")
        await require_schema(login, Role.CONTROL)
        pool = await create_pool(login, Role.CONTROL, size=CONNECTIONS)
        try:
            ledger = ReconciliationLedger(pool)
            reconciler = open_reconciler(open_desks(api, pool, lambda: plans, metrics=Metrics()), ledger)
            return await reconcile_and_note(reconciler, ledger, datetime.now(UTC) - back, progress=progress)
        finally:
            await pool.close()
    except StripeError as error:
        raise CommandFailed(f"{error}; nothing is lost, and it may be run again", code="stripe") from None
    finally:
        api.close()


def _view(report: Reconciliation) -> View:
    return {
        "object": "reconciliation",
        "ok": report.clean,
        "since": time_text(report.since),
        "totals": [
            {
                "kind": kind,
                "currency": currency.upper(),
                "count": totals.count,
                "at_stripe": format_amount(totals.at_stripe, currency),
                "here": format_amount(totals.here, currency),
                "difference": format_amount(totals.at_stripe - totals.here, currency),
            }
            for (kind, currency), totals in sorted(report.totals.items())
        ],
        "finished": report.finished,
        "mended": [{"kind": one.kind, "id": one.id, "outcome": one.outcome} for one in report.mended],
        "differing": [
            {
                "kind": one.kind,
                "id": one.id,
                "currency": one.currency.upper(),
                "at_stripe": _money(one.at_stripe, one.currency),
                "here": _money(one.here, one.currency),
                "why": one.why,
            }
            for one in report.differences
        ],
        "failures": report.failures,
    }


def _money(amount: int | None, currency: str) -> str | None:
    return None if amount is None else format_amount(amount, currency)


def _lines(report: Reconciliation) -> list[str]:
    view = _view(report)
    amounts = ("count", "at_stripe", "here", "difference")
    lines = table_of(view["totals"], ("kind", "currency", *amounts), right=amounts) or ["Nothing to compare."]
    resumed = [f"{count} {name}" for name, count in report.finished.items() if count]
    if resumed:
        lines += ["", f"Brought to their end: {', '.join(resumed)}."]
    if report.mended:
        lines += ["", "Missed, and applied now:", *table_of(view["mended"][:LISTED_MAX], ("kind", "id", "outcome"))]
        lines += _more(len(report.mended))
    if report.differences:
        columns = ("kind", "id", "currency", "at_stripe", "here", "why")
        lines += ["", "Differing still:", *table_of(view["differing"][:LISTED_MAX], columns)]
        lines += _more(len(report.differences))
    lines += ["", *report.failures[:LISTED_MAX], *_more(len(report.failures))] if report.failures else []
    lines += ["", "The books agree: the difference is 0." if report.clean else "The books differ: see docs/stripe.md."]
    return lines


def _more(count: int) -> list[str]:
    return [f"... and {count - LISTED_MAX} more; --json has all."] if count > LISTED_MAX else []
