"""Backups: the ledger of one moment, the journals from after it, and what was served; checked before they are used.

    DIR/
      manifest.json     when, of what, and each file's SHA-256
      ledger.dump       pg_dump's custom format, the schema farebox with all rows
      seals.json        the heads of the seals just before, as `farebox audit --seals --json` writes them
      journal/          the journals, copied after the dump: what came after it stands in them
      config/           pricing.yaml and upstreams.yaml

What isn't in it: the pepper, the providers' keys, the database's passwords. Whoever finds a backup can read accounts,
e-mail addresses and receipts in it, and can make no call. The manifest has a check of each pepper, by which a restore
sees that it is given the right one.
"""

import hashlib
import hmac
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proxy.core.keys import Peppers
from proxy.local.state import LocalError, write_private

__all__ = [
    "CONFIG",
    "DUMP",
    "FORMAT",
    "JOURNAL",
    "SEALS",
    "Backup",
    "Draft",
    "Manifest",
    "begin",
    "missing_peppers",
    "now_text",
    "pepper_checks",
    "read",
]

FORMAT = 1
DUMP, SEALS, JOURNAL, CONFIG, MANIFEST = "ledger.dump", "seals.json", "journal", "config", "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself."""

    format: int
    created_at: str
    """When the dump began: UTC, RFC 3339."""
    release: str
    schema: int
    """The last migration."""
    postgres: int
    """The server's major version."""
    ledger: str
    transfers: int
    """How many there were, at least."""
    peppers: Mapping[str, str]
    """By version, a check of the pepper; empty where none was known."""
    files: Mapping[str, str]
    """SHA-256 by path in the backup."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that is there and whole."""

    path: Path
    manifest: Manifest

    @property
    def journals(self) -> list[Path]:
        """Its journals' files."""
        return sorted(path for path in (self.path / JOURNAL).glob("*") if path.is_file())


@dataclass(slots=True)
class Draft:
    """A backup that is being written, beside its place; it is there when ``finish`` has renamed it."""

    target: Path
    path: Path

    def copy(self, folder: str, source: Path) -> bool:
        """Put a copy of a file into the backup's ``folder``; False where it is gone by now."""
        (self.path / folder).mkdir(mode=0o700, exist_ok=True)
        copied = self.path / folder / source.name
        try:
            shutil.copyfile(source, copied)
        except FileNotFoundError:
            return False
        copied.chmod(0o600)
        return True

    def finish(self, **known: Any) -> Backup:
        """Write the manifest, and put the backup where it belongs."""
        files = {
            str(path.relative_to(self.path)): _sha256(path) for path in sorted(self.path.rglob("*")) if path.is_file()
        }
        manifest = Manifest(format=FORMAT, files=files, **known)
        write_private(self.path / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
        for path in (*self.path.rglob("*"), self.path):
            _sync(path)
        self.path.rename(self.target)
        _sync(self.target.parent)
        return Backup(self.target, manifest)

    def discard(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self.path, ignore_errors=True)


def begin(target: Path) -> Draft:
    """Begin a backup that will be the directory ``target``. Raises LocalError where something is there already."""
    target = target.absolute()
    if target.exists() or target.is_symlink():
        raise LocalError(f"{target} is there already; a backup goes to a new directory.")
    path = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise LocalError(f"{target} can't be made: {error.strerror}.") from error
    return Draft(target, path)


def read(path: Path) -> Backup:
    """The backup at ``path``, every file compared with its hash. Raises LocalError."""
    path = path.absolute()
    try:
        said = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if said.get("format") != FORMAT:
            raise LocalError(f"{path} is of format {said.get('format')}, and this release knows {FORMAT}.")
        manifest = Manifest(**said)
        damaged = [name for name, digest in manifest.files.items() if _sha256(path / name) != digest]
    except FileNotFoundError as error:
        raise LocalError(f"{path} is no backup, or not all of it: {error.filename} is missing.") from error
    except OSError as error:
        raise LocalError(f"{error.filename} can't be read: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise LocalError(f"{path / MANIFEST} is damaged: {error}") from error
    if damaged:
        raise LocalError(f"{path / damaged[0]} is damaged: it isn't what was backed up.")
    return Backup(path, manifest)


def pepper_checks(peppers: Peppers | None) -> dict[str, str]:
    """What tells one pepper from another and helps nobody to find it."""
    if peppers is None:
        return {}
    return {
        str(version): hmac.new(pepper, b"farebox: is this the pepper of the backup?", "sha256").hexdigest()[:16]
        for version, pepper in sorted(peppers.by_version.items())
    }


def missing_peppers(manifest: Manifest, peppers: Peppers | None) -> Sequence[str]:
    """Versions that keys of the backup may be hashed under and that ``peppers`` doesn't have so."""
    have = pepper_checks(peppers)
    return [version for version, check in manifest.peppers.items() if have.get(version) != check]


def now_text() -> str:
    """This moment, as the manifest has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
