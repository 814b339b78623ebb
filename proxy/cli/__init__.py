"""The command `farebox`: one file a group of commands. Output, errors and exit codes: ``output.py``."""

import sys

import typer

from proxy.cli import accounts, auto_topup, book, credits, journal, keys, messages, orders, pricing, promos, stripe
from proxy.cli.audit import audit
from proxy.cli.backup import backup, restore
from proxy.cli.demo import demo
from proxy.cli.migrate import migrate
from proxy.cli.refund import refund
from proxy.cli.serve import serve

__all__ = ["app", "main"]

app = typer.Typer(
    name="farebox",
    help="A metering reverse proxy for OpenAI-compatible APIs, paid for with prepaid credits.",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: what is printed is read by scripts and in logs, too.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(demo)
app.command()(migrate)
app.add_typer(accounts.app, name="accounts")
app.add_typer(keys.app, name="keys")
app.add_typer(credits.app, name="credits")
app.add_typer(promos.app, name="promo")
app.command()(credits.lots)
app.add_typer(auto_topup.app, name="auto-topup")
app.add_typer(orders.app, name="orders")
app.command()(book.transactions)
app.add_typer(book.receipts, name="receipts")
app.add_typer(pricing.app, name="pricing")
app.add_typer(stripe.app, name="stripe")
app.command()(refund)
app.command()(audit)
app.command()(backup)
app.command()(restore)
app.add_typer(journal.app, name="journal")
app.add_typer(messages.app, name="messages")


def main() -> None:
    """Run the command line of this process."""
    try:
        app()
    except BrokenPipeError:
        # Whoever read the output has read enough.
        sys.stderr.close()
        sys.exit(1)
