"""The state directory: what one Farebox on one machine keeps between starts.

Everything secret in it is a file of mode 0600, written whole or not at all. The directory itself is ours alone
(0700); started as root it is 0711, so that PostgreSQL, which refuses to run as root, can pass through to its data.
No parent's permissions are ever changed.

    .farebox/
      lock             held by whoever runs the database; says who that is
      users            shared lock of every process that uses it
      database.json    where the data lies, and the three passwords
      pepper           what keys are hashed with (only where FAREBOX_KEY_PEPPER isn't set)
      demo.json        the demo account's key
      postgres/        data, socket and log
"""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

__all__ = ["LocalError", "StateDirectory", "write_private"]

PEPPER_BYTES = 32


class LocalError(Exception):
    """Something on this machine is in the way; the message says what, and what to do about it."""


def write_private(path: Path, text: str) -> None:
    """Put ``text`` into ``path`` with mode 0600, durably, so that a crash leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise LocalError(f"{path} can't be written: {error.strerror}.") from error


class StateDirectory:
    """The directory at ``path``; it is made when first needed. Raises LocalError where it can't be used."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def make(self) -> None:
        """Make the directory, if it isn't there, and see that it is ours to write."""
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            self.path.mkdir(mode=mode, parents=True, exist_ok=True)
            if os.geteuid() == self.path.stat().st_uid:
                self.path.chmod(mode)
        except FileExistsError as error:
            raise LocalError(f"{self.path} is a file; FAREBOX_STATE_DIR must name a directory.") from error
        except OSError as error:
            raise LocalError(
                f"The state directory {self.path} can't be made: {error.strerror}. "
                "Set FAREBOX_STATE_DIR to a directory you can write."
            ) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            owner = self.path.stat().st_uid
            raise LocalError(
                f"The state directory {self.path} belongs to user {owner} and can't be written by user {os.geteuid()}. "
                "Start as that user, or set FAREBOX_STATE_DIR to another directory."
            )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in ``name``, or None where there is no such file."""
        path = self.path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalError(f"{path} can't be read: {error.strerror}.") from error
        except ValueError as error:
            raise LocalError(f"{path} is damaged: {error}. Restore it from a backup.") from error
        if not isinstance(value, dict):
            raise LocalError(f"{path} is damaged: it should hold one JSON object. Restore it from a backup.")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace ``name`` by ``value``, mode 0600."""
        write_private(self.path / name, json.dumps(value, indent=2) + "\n")

    def pepper(self) -> str:
        """The secret that keys are hashed with: 64 hexadecimal digits, made at the first call."""
        path = self.path / "pepper"
        try:
            return path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            write_private(path, secrets.token_hex(PEPPER_BYTES) + "\n")
            return path.read_text(encoding="ascii").strip()
        except OSError as error:
            raise LocalError(f"{path} can't be read: {error.strerror}.") from error
