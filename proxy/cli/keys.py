"""`farebox keys`: the credentials of an account."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from proxy.cli.arguments import AccountRef, AsJson, DatabaseUrl, KeyRef, amount_of, seconds_of
from proxy.cli.output import CommandFailed, Output, reporting
from proxy.cli.session import operate
from proxy.control.operations import PROFILES, SCOPES, SCOPES_DEFAULT, KeyTerms, Operations
from proxy.control.views import View, key_view, list_view
from proxy.ledger.records import ApiKey

__all__ = ["app"]

app = typer.Typer(help="API keys: the credentials of an account.", no_args_is_help=True)

Name = Annotated[str | None, typer.Option(help="What people call it.")]
Scopes = Annotated[
    str | None,
    typer.Option(
        metavar="WORDS",
        help=f"What it may do, some of {', '.join(sorted(SCOPES))}. A new key: {','.join(sorted(SCOPES_DEFAULT))}.",
    ),
]
Models = Annotated[
    str | None, typer.Option(metavar="NAMES", help="The only models it may call, as a,b; 'all' for all.")
]
ExpiresIn = Annotated[
    str | None, typer.Option(metavar="DURATION", help="When it ends, as 12h, 90d or 4w from now; 'never'.")
]
SpendLimit = Annotated[
    str | None,
    typer.Option(metavar="CREDITS", help="The most it and its rotations may ever spend; 'none' for no limit."),
]
Profile = Annotated[
    str | None,
    typer.Option(help=f"Its limits on a request: {' or '.join(sorted(PROFILES))}; 'none' for the server's own."),
]
AffordableCap = Annotated[
    bool | None,
    typer.Option(
        "--affordable-cap/--no-affordable-cap",
        help="Where the balance is short: shorten the answer, or refuse the call. Agents want the refusal.",
    ),
]

_COLUMNS = ("id", "name", "scopes", "models", "spend_limit", "spent", "expires_at", "revoked_at")


@app.command()
def create(
    account: AccountRef,
    name: Name = None,
    scopes: Scopes = None,
    models: Models = None,
    expires_in: ExpiresIn = None,
    spend_limit: SpendLimit = None,
    profile: Profile = None,
    affordable_cap: AffordableCap = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a key and show it. It is shown this once and can't be shown again."""
    changes = _changes(name, scopes, models, expires_in, spend_limit, profile, affordable_cap)
    with reporting(as_json=as_json) as out:
        terms = KeyTerms(**{"name": "key", **changes})

        async def work(operations: Operations) -> tuple[ApiKey, str]:
            owner = await operations.account(account)
            return await operations.create_key(owner.id, terms)

        _show_new(out, *operate(work, database_url, purpose="farebox keys create"))


@app.command("list")
def list_keys(account: AccountRef, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """List an account's keys, revoked and expired ones too."""
    with reporting(as_json=as_json) as out:

        async def work(operations: Operations) -> list[ApiKey]:
            owner = await operations.account(account)
            return await operations.keys(owner.id)

        found = operate(work, database_url, purpose="farebox keys list")
        view = list_view([key_view(key) for key in found], has_more=False)
        out.show_table(view, _COLUMNS, right=("spend_limit", "spent"), empty="No keys.")


@app.command()
def update(
    key: KeyRef,
    name: Name = None,
    scopes: Scopes = None,
    models: Models = None,
    expires_in: ExpiresIn = None,
    spend_limit: SpendLimit = None,
    profile: Profile = None,
    affordable_cap: AffordableCap = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Change what a key may do. What isn't named stays."""
    changes = _changes(name, scopes, models, expires_in, spend_limit, profile, affordable_cap)
    with reporting(as_json=as_json) as out:
        if not changes:
            raise CommandFailed("Nothing to change: give at least one option. See farebox keys update --help")
        updated = operate(
            lambda operations: operations.update_key(key, changes), database_url, purpose="farebox keys update"
        )
        out.show_members(key_view(updated))


@app.command()
def revoke(key: KeyRef, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """End a key now. Calls that it has already been admitted for are finished and charged."""
    with reporting(as_json=as_json) as out:
        revoked = operate(lambda operations: operations.revoke_key(key), database_url, purpose="farebox keys revoke")
        out.show_members(key_view(revoked))


@app.command()
def rotate(
    key: KeyRef,
    overlap: Annotated[
        int, typer.Option(metavar="DURATION", parser=seconds_of, help="How long the old key still works, as 1h or 7d.")
    ] = "24h",  # type: ignore[assignment]  # typer runs the parser over the default, too
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a key of the same rights in the place of another, which ends after the overlap."""
    with reporting(as_json=as_json) as out:
        new = operate(
            lambda operations: operations.rotate_key(key, overlap_seconds=overlap),
            database_url,
            purpose="farebox keys rotate",
        )
        _show_new(out, *new)


def _show_new(out: Output, key: ApiKey, text: str) -> None:
    view: View = {**key_view(key), "key": text}
    out.show(view, [f"{text}", f"Key {key.id} ({key.name}). It can't be shown again: put it away now."])


def _changes(
    name: str | None,
    scopes: str | None,
    models: str | None,
    expires_in: str | None,
    spend_limit: str | None,
    profile: str | None,
    affordable_cap: bool | None,
) -> dict[str, Any]:
    """The members of KeyTerms that were named on the command line. A wrong one is a usage error."""
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = name
    if scopes is not None:
        changes["scopes"] = _words(scopes)
    if models is not None:
        changes["models"] = None if models == "all" else _words(models)
    if expires_in is not None:
        changes["expires_at"] = None if expires_in == "never" else _from_now(seconds_of(expires_in))
    if spend_limit is not None:
        changes["spend_limit"] = None if spend_limit == "none" else amount_of(spend_limit)
    if profile is not None:
        changes["profile"] = None if profile == "none" else profile
    if affordable_cap is not None:
        changes["affordable_cap"] = affordable_cap
    return changes


def _words(text: str) -> frozenset[str]:
    words = frozenset(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise typer.BadParameter("expected words with commas between them")
    return words


def _from_now(seconds: int) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)
