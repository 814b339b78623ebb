"""`farebox audit`: proves the book, in full or since the last time, and exports the seals' heads."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import EXIT_FAILED, CommandFailed, Output, reporting
from proxy.cli.session import ask_control
from proxy.control.views import View
from proxy.ledger import audit as audits
from proxy.ledger.audit import SealHead
from proxy.ledger.connect import Connection
from proxy.ledger.errors import InvalidValue

__all__ = ["audit", "head_view", "report"]

PURPOSE = "farebox audit"


def audit(
    since_last: Annotated[
        bool, typer.Option("--since-last", help="Only what is new since an audit last found nothing wrong.")
    ] = False,
    seals: Annotated[
        bool, typer.Option("--seals", help="Audit nothing; write the head of each account's seals, to keep elsewhere.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Heads kept elsewhere, as --seals --json wrote them."
        ),
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Prove the book: one line and row count a check. Ends with 1 if any fails."""
    with reporting(as_json=as_json) as out:
        if since_last + seals + (against is not None) > 1:
            raise typer.BadParameter("--since-last, --seals and --against go one by one")
        if seals:
            heads = ask_control(audits.seal_heads, database_url, purpose=PURPOSE)
            out.show_table(
                {"object": "list", "data": [head_view(head) for head in heads]},
                ("account", "number", "version", "head"),
                right=("number", "version"),
                empty="Nothing is sealed yet.",
            )
            return
        kept = [] if against is None else _kept(against)
        checks = ask_control(
            _since_last if since_last else lambda connection: audits.audit(connection, kept=kept),
            database_url,
            purpose=PURPOSE,
        )
        report(out, checks)


async def _since_last(connection: Connection) -> list[audits.Check]:
    """All that is new, in as many steps as it takes; of each check what the steps come to."""
    total: dict[str, audits.Check] = {}
    unaudited: int | None = None
    while True:
        checks = await audits.audit_since_last(connection)
        if not checks:
            raise CommandFailed("a server is auditing at this moment: try again", code="busy")
        for check in checks:
            seen = total.get(check.name, audits.Check(check.name, 0, 0, None))
            total[check.name] = audits.Check(
                check.name,
                max(seen.rows, check.rows) if check.name in _WHOLE else seen.rows + check.rows,
                max(seen.violations, check.violations),
                seen.example or check.example,
            )
        left = (await audits.book_state(connection)).unaudited
        if left == 0 or left == unaudited:
            return list(total.values())
        unaudited = left


_WHOLE = frozenset(
    {
        "balance_is_the_sum_of_transfers",
        "held_is_the_sum_of_open_holds",
        "debt_is_what_receivable_lent",
        "versions_are_gapless",
        "nothing_is_negative_and_debt_is_paid_first",
        "open_holds_belong_to_a_live_worker",
        "guards_stand",
    }
)
"""Checks that look at every account, open hold or guard each time."""


def report(out: Output, checks: list[audits.Check]) -> None:
    """Show the checks; ends the command with 1 if any fails."""
    ok = all(check.ok for check in checks)
    rows = [
        {
            "name": check.name,
            "ok": check.ok,
            "rows": check.rows,
            "violations": check.violations,
            "example": check.example,
        }
        for check in checks
    ]
    out.show({"ok": ok, "checks": rows}, (_line(row) for row in rows))
    if not ok:
        raise typer.Exit(EXIT_FAILED)


def _kept(path: Path) -> list[SealHead]:
    try:
        return [SealHead.of(view) for view in json.loads(path.read_text(encoding="utf-8"))["data"]]
    except (OSError, ValueError, KeyError, TypeError, InvalidValue) as error:
        raise CommandFailed(f"{path} doesn't hold what `farebox audit --seals --json` writes: {error}") from error


def head_view(head: SealHead) -> View:
    """A seal's head as it is kept elsewhere."""
    return {
        "object": "seal",
        "account": str(head.account_id),
        "number": head.number,
        "version": head.version,
        "head": head.head,
    }


def _line(row: dict[str, Any]) -> str:
    verdict = "ok  " if row["ok"] else "FAIL"
    line = f"{verdict}  {row['rows']:>10} rows  {row['name']}"
    return line if row["ok"] else f"{line}: {row['violations']} wrong, such as {row['example']}"
