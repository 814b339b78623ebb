"""Who runs the database, and who uses it: two advisory locks that the kernel drops when their process dies.

The owner's lock is exclusive, and its file names the holder for those who find it taken. The users' lock is shared:
whoever attached holds it, and the owner waits for it before it stops the server.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from proxy.local.state import LocalError

__all__ = ["FileLock", "Holder"]

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock, as it described itself."""

    pid: int
    purpose: str
    since: str
    """UTC, ISO 8601 to the second."""
    socket_directory: str = ""
    """Where the server it runs can be reached; empty while it is starting."""
    serving: bool = False
    """Whether it serves until it is stopped, rather than doing one task."""

    def __str__(self) -> str:
        return f"{self.purpose} (pid {self.pid}, since {self.since} UTC)"


class FileLock:
    """An advisory lock on a file that stays where it is; at most one descriptor is open at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self, *, shared: bool = False, timeout_seconds: float = 0) -> bool:
        """Take the lock, waiting at most so long; says whether it was got."""
        deadline = time.monotonic() + timeout_seconds
        if self.descriptor is None:
            self.descriptor = self._open()
        while True:
            try:
                fcntl.flock(self.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self.close()
                    return False
                time.sleep(POLL_SECONDS)
            except OSError as error:
                self.close()
                hint = " Network file systems can't hold a database." if error.errno == errno.ENOLCK else ""
                raise LocalError(f"{self.path} can't be locked: {error.strerror}.{hint}") from error
            else:
                return True

    def close(self) -> None:
        """Let go. A lock that was passed on to a child stays until the child lets go too."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def describe(self, holder: Holder) -> None:
        """Write into the file who holds it."""
        assert self.descriptor is not None, "only the holder describes itself"
        data = json.dumps(asdict(holder)).encode()
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, data, 0)

    def holder(self) -> Holder | None:
        """Who described itself last; None while it is being written, or where nobody has."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Holder(**json.loads(self.path.read_text(encoding="utf-8")))
        return None

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalError(f"{self.path} can't be opened: {error.strerror}.") from error
