"""The arguments and options that several commands share: read in one way, described in the same words."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from proxy.core.money import MoneyError, parse_credits

__all__ = [
    "AccountRef",
    "AsJson",
    "DatabaseUrl",
    "KeyRef",
    "PageLimit",
    "amount_of",
    "expiry_of",
    "moment_of",
    "seconds_of",
]

_DURATION = re.compile(r"([0-9]{1,6})([smhdw])\Z", re.ASCII)
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_KEY_START = re.compile(r"(?:fb_)?([0-9A-Za-z]{12})(?:_.*)?\Z", re.ASCII)


def amount_of(text: str) -> int:
    """Microcredits for decimal credits above 0; a usage error otherwise."""
    try:
        amount = parse_credits(text)
    except MoneyError as error:
        raise typer.BadParameter(str(error)) from None
    if amount == 0:
        raise typer.BadParameter("the amount must be above 0")
    return amount


def seconds_of(text: str) -> int:
    """Seconds for ``30s``, ``15m``, ``12h``, ``90d`` or ``4w``; a usage error otherwise."""
    match = _DURATION.match(text)
    if match is None:
        raise typer.BadParameter(f"{text[:40]!r} is not a duration such as 30s, 15m, 12h, 90d or 4w")
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def moment_of(text: str) -> datetime:
    """A time, or the beginning (UTC) of a day; a usage error otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text[:40]!r} is neither a day such as 2027-01-31 nor a time") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    if not 1970 <= moment.year <= 9000:
        raise typer.BadParameter("the year must lie between 1970 and 9000")
    return moment


def expiry_of(text: str) -> datetime:
    """As ``moment_of``, or so long from now: ``90d``; a usage error otherwise."""
    if _DURATION.match(text):
        return datetime.now(UTC) + timedelta(seconds=seconds_of(text))
    return moment_of(text)


def key_id_of(text: str) -> str:
    """A key's id out of the id, the visible beginning ``fb_ID`` or a whole key; a usage error otherwise."""
    match = _KEY_START.match(text)
    if match is None:
        raise typer.BadParameter("a key is named by its id: the 12 characters after fb_")
    return match[1]


AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON value; amounts are decimal strings of credits.")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        metavar="URL",
        help="The database. Without it: DATABASE_URL, and without that the embedded PostgreSQL.",
        show_default=False,
    ),
]
AccountRef = Annotated[
    str, typer.Argument(metavar="ACCOUNT", help="Its id, its external id, or its name where only one has it.")
]
KeyRef = Annotated[
    str, typer.Argument(metavar="KEY", parser=key_id_of, help="The key's id: the 12 characters after fb_.")
]
PageLimit = Annotated[int, typer.Option(min=1, max=1_000, help="How many at most.")]
