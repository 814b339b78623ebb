"""The journal's directory and its files: names, locks, durability. Everything here may block.

A file's name says what it is: ``WORKER-NUMBER`` and an ending.

    .new       being made: nothing is in it yet
    .open      rows may wait in it. Its writer holds its lock; where the lock is free, the writer is gone
    .done      every row was carried out; kept for a while, for a ledger that forgets (a failover, a restored backup)
    .rejected  the ledger will never carry out some of its rows: kept until somebody has looked
    .damaged   a part of it can't be read; what could be was carried out: kept until somebody has looked

Rules:
- A file is locked before it gets the name under which others look for it, and renamed before its lock is let go. Who
  takes a lock looks whether the name still leads to what it has locked.
- Files are 0600, the directory 0700. A name is durable (its directory synced) before anything relies on it.
- A sync that failed is never tried again: the kernel may have dropped what it couldn't write.
"""

import errno
import fcntl
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from proxy.ledger.errors import JournalError

__all__ = ["DAMAGED", "DONE", "OPEN", "REJECTED", "JournalDirectory", "JournalFile", "KnownFile", "is_full"]

NEW, OPEN, DONE, REJECTED, DAMAGED = ".new", ".open", ".done", ".rejected", ".damaged"
_ENDINGS = frozenset({OPEN, DONE, REJECTED, DAMAGED})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_full(error: OSError) -> bool:
    """Whether the disk (or a quota) is full, rather than broken."""
    return error.errno in _NO_SPACE


class JournalFile:
    """One file, open and locked. Writes are at places that the caller names; none is durable before ``sync``."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    def allocate(self, size: int) -> None:
        """Take room on the disk before it is needed, where the system can. Raises OSError, as when the disk is full."""
        if sys.platform == "linux":
            os.posix_fallocate(self._descriptor, 0, size)

    def write_at(self, data: bytes, place: int) -> None:
        """Write all of it. Raises OSError; what was written until then is overwritten by the next try."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, place)
            rest, place = rest[written:], place + written

    def sync(self) -> None:
        """Return when what was written would survive the machine. Raises OSError: then nothing is known any more."""
        if sys.platform == "darwin":
            fcntl.fcntl(self._descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(self._descriptor)

    def read(self) -> bytes:
        """All of it."""
        size = os.fstat(self._descriptor).st_size
        parts, place = [], 0
        while place < size and (part := os.pread(self._descriptor, size - place, place)):
            parts.append(part)
            place += len(part)
        return b"".join(parts)

    def cut_at(self, size: int) -> None:
        """Drop what stands behind ``size``."""
        os.ftruncate(self._descriptor, size)

    def rename(self, ending: str) -> None:
        """Give it another ending, durably."""
        self.rename_to(self.path.with_suffix(ending))

    def rename_to(self, path: Path) -> None:
        """Give it another name in its directory, durably."""
        self.path.rename(path)
        self.path = path
        _sync_directory(path.parent)

    def remove(self) -> None:
        """Remove it; for a file that never held a row."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it and of its lock. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_where_its_name_leads(self) -> bool:
        """Whether the name still stands for this file: somebody else may have dealt with it before we had the lock."""
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(self._descriptor)
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file of the directory as a look at it showed. ``modified``: seconds since 1970."""

    path: Path
    bytes: int
    modified: float

    @property
    def ending(self) -> str:
        return self.path.suffix


class JournalDirectory:
    """The directory at ``path``, which many processes may share."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def make(self) -> None:
        """Make it if it isn't there, and try whether it can be used. Raises JournalError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_directory(self.path.parent)
            trial = self._lock_new()
            trial.remove()
            trial.close()
        except OSError as error:
            raise self._unusable(error) from error

    def create(self, worker_id: UUID, number: int, head: bytes, size: int) -> JournalFile:
        """A new file with ``head`` in it and room for ``size`` bytes: locked, durable, and only then visible.

        Raises OSError; then nothing of it is left.
        """
        file = self._lock_new()
        try:
            file.allocate(size)
            file.write_at(head, 0)
            file.sync()
            file.rename_to(self.path / f"{worker_id}-{number:06}{OPEN}")
        except OSError:
            file.remove()
            file.close()
            raise
        return file

    def take(self, path: Path) -> JournalFile | None:
        """The file, if nobody else has it: its writer is gone, and no other process is dealing with it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        file = JournalFile(descriptor, path)
        try:
            if _lock(descriptor) and file.is_where_its_name_leads():
                return file
        except OSError:
            file.close()
            raise
        file.close()
        return None

    def is_held(self, path: Path) -> bool:
        """Whether somebody has the file's lock at this moment."""
        file = self.take(path)
        if file is None:
            return path.exists()
        file.close()
        return False

    def files(self, *endings: str) -> list[KnownFile]:
        """The files with these endings (none: every journal), the oldest first."""
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if Path(entry.name).suffix not in (endings or _ENDINGS):
                    continue
                try:
                    state = entry.stat()
                except FileNotFoundError:
                    continue
                found.append(KnownFile(Path(entry.path), state.st_size, state.st_mtime))
        return sorted(found, key=lambda file: (file.modified, file.path.name))

    def prune(self, *, keep_seconds: float, bytes_max: int) -> int:
        """Remove files that are done, the oldest first: those kept long enough, and what is above ``bytes_max``.

        Returns how many went before their time. What was left half made goes too.
        """
        for file in self.files(NEW):
            self._remove_left(file.path)
        kept = self.files(DONE)
        total, early, now = sum(file.bytes for file in kept), 0, time.time()
        for file in kept:
            old = now - file.modified > keep_seconds
            if not old and total <= bytes_max:
                continue
            file.path.unlink(missing_ok=True)
            total -= file.bytes
            early += not old
        return early

    def _remove_left(self, path: Path) -> None:
        """Remove a file whose maker died at it; one that is being made is locked."""
        file = self.take(path)
        if file is not None:
            file.remove()
            file.close()

    def _lock_new(self) -> JournalFile:
        """A new, locked file of a name that nobody else comes upon."""
        while True:
            path = self.path / f"{uuid4().hex}{NEW}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            file = JournalFile(descriptor, path)
            try:
                # Whoever cleans up may have been faster than our lock.
                if _lock(descriptor) and file.is_where_its_name_leads():
                    return file
            except OSError:
                file.remove()
                file.close()
                raise
            file.close()

    def _unusable(self, error: OSError) -> JournalError:
        hint = " Network file systems mostly can't hold a journal." if error.errno == errno.ENOLCK else ""
        return JournalError(
            f"The journal can't be kept in {self.path}: {error.strerror}.{hint} Set FAREBOX_JOURNAL_DIR to a directory "
            "that can be written and outlives this process, or to off, where there is none (docs/journal.md)."
        )


def _lock(descriptor: int) -> bool:
    """Take the lock without waiting; whether it was to be had. The kernel drops it when its process dies."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
