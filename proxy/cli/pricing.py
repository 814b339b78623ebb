"""`farebox pricing`: what is sold, before it is sold so."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from proxy.cli.arguments import AsJson
from proxy.cli.output import reporting
from proxy.control.reload import read_catalog
from proxy.core.catalog import Catalog
from proxy.core.catalog_diff import CatalogDiff, compare
from proxy.core.yaml_reader import ConfigError
from proxy.settings import load

__all__ = ["app"]

app = typer.Typer(help="Prices: checked before they serve.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `pricing check` two words while it is the only command here."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The pricing file to check.")],
    upstreams: Annotated[Path | None, typer.Option(help="The upstreams file that goes with it.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="The pricing file that serves now; without it FAREBOX_PRICING.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a pricing file and show what would change. Ends with 1 if it would be refused."""
    with reporting(as_json=as_json) as out:
        settings = load(upstreams=upstreams)
        current = against or settings.pricing
        after = read_catalog(file, settings.upstreams)
        before = _before(file, current, settings.upstreams, required=against is not None)
        diff = compare(before, after)
        out.show(_view(diff, after), _lines(diff, after, compared_with=None if before is None else current))


def _lines(diff: CatalogDiff, after: Catalog, *, compared_with: Path | None) -> list[str]:
    head = f"{len(after.routes)} models, price version {after.version[:12]}"
    head += f", compared with {compared_with}:" if compared_with else ":"
    return [f"OK: {head}", *diff.render().splitlines()]


def _view(diff: CatalogDiff, after: Catalog) -> dict[str, object]:
    return {
        "ok": True,
        "models": len(after.routes),
        "version_before": diff.version_before,
        "version_after": diff.version_after,
        "changes": [asdict(entry) for entry in diff.entries],
        "warnings": list(diff.warnings),
    }


def _before(file: Path, current: Path, upstreams: Path, *, required: bool) -> Catalog | None:
    """The catalog to compare with, or None where there is none: it is the same file, or it is missing or broken.

    Raises ConfigError where it was asked for by name (``required``).
    """
    if not required and _same_file(current, file):
        return None
    try:
        return read_catalog(current, upstreams)
    except ConfigError:
        if required:
            raise
        return None


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
