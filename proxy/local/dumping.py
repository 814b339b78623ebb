"""pg_dump and pg_restore: found, fit for the server, and told its address without showing the password to anybody."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from proxy.local.binaries import find_binaries
from proxy.local.state import LocalError

__all__ = ["dump", "program", "restore"]

SCHEMA = "farebox"
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")


def program(name: str, server: int, *, directories: Sequence[Path] | None = None) -> Path:
    """The path of ``pg_dump`` or ``pg_restore`` that knows servers of major version ``server``: of the embedded
    PostgreSQL, or else on the PATH. Raises LocalError where there is none, or only older ones."""
    seen: list[str] = []
    for directory in _directories() if directories is None else directories:
        path = directory / name
        if not os.access(path, os.X_OK):
            continue
        major = _major(path)
        if major >= server:
            return path
        seen.append(f"{path} is of version {major}")
    found = "; ".join(seen) or "there is none on the PATH"
    raise LocalError(
        f"{name} of PostgreSQL {server} or newer is needed, and {found}. "
        "Install PostgreSQL's client programs, or farebox[embedded]."
    )


def dump(pg_dump: Path, dsn: str, target: Path) -> None:
    """Write the ledger's schema with all rows, of one moment, to ``target``. Raises LocalError."""
    command = [str(pg_dump), "--format=custom", f"--schema={SCHEMA}", "--no-owner", f"--file={target}"]
    _run(command, dsn)


def restore(pg_restore: Path, dsn: str, source: Path) -> None:
    """Make the schema of ``source`` in an empty database, whole or not at all. Raises LocalError."""
    command = [str(pg_restore), "--exit-on-error", "--single-transaction", "--no-owner", str(source)]
    _run(command, dsn)


def _directories() -> list[Path]:
    found = [Path(name) for name in os.environ.get("PATH", "").split(os.pathsep) if name]
    try:
        return [find_binaries(), *found]
    except LocalError:
        return found


def _major(path: Path) -> int:
    said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False).stdout
    version = _VERSION.search(said)
    return int(version[1]) if version else 0


def _run(command: list[str], dsn: str) -> None:
    address, secret = _without_password(dsn)
    command = [command[0], f"--dbname={address}", "--no-password", *command[1:]]
    ended = subprocess.run(command, env={**os.environ, **secret}, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise LocalError(f"{Path(command[0]).name} failed: {' '.join(lines[-4:]) or ended.returncode}")


def _without_password(dsn: str) -> tuple[str, Mapping[str, str]]:
    """The address to be shown to everybody who lists processes, and the variable for the rest."""
    parts = urlsplit(dsn)
    userinfo, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = userinfo.partition(":")
    address = urlunsplit(parts._replace(netloc=f"{user}{at}{hosts}"))
    return (address, {"PGPASSWORD": unquote(password)}) if colon else (dsn, {})
