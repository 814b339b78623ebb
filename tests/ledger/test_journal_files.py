"""The journal's directory: locks, names and modes, with other processes in the same directory."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from proxy.ledger.errors import JournalError
from proxy.ledger.journal_files import DONE, NEW, OPEN, REJECTED, JournalDirectory

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from proxy.ledger.journal_files import JournalDirectory
file = JournalDirectory(Path(sys.argv[1]).parent).take(Path(sys.argv[1]))
print(file is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path: Path) -> JournalDirectory:
    directory = JournalDirectory(tmp_path / "state" / "journal")
    directory.make()
    return directory


@contextmanager
def another_process_takes(path: Path) -> Iterator[bool]:
    """Whether it got the file; it keeps it until the end."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline() == "True\n"
        process.communicate("")


def test_only_its_owner_can_read_it(directory: JournalDirectory) -> None:
    old = os.umask(0)
    try:
        file = directory.create(uuid4(), 1, b"head", 4096)
    finally:
        os.umask(old)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert directory.path.stat().st_mode & 0o777 == 0o700
    file.close()


def test_a_file_is_there_whole_and_its_room_is_taken(directory: JournalDirectory) -> None:
    file = directory.create(uuid4(), 1, b"head", 64 * 1024)
    assert file.path.suffix == OPEN
    assert file.read().rstrip(b"\0") == b"head"
    if sys.platform == "linux":
        assert file.path.stat().st_blocks * 512 >= 64 * 1024
    file.close()


def test_its_name_is_durable_before_anybody_relies_on_it(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is synced first, then the name that others look for, then the directory that holds the name."""
    done: list[str] = []
    fdatasync, fsync, rename = os.fdatasync, os.fsync, Path.rename

    def note(word: str, really: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object) -> object:
            done.append(word)
            return really(*arguments)

        return noted

    monkeypatch.setattr(os, "fdatasync", note("content", fdatasync))
    monkeypatch.setattr(os, "fsync", note("directory", fsync))
    monkeypatch.setattr(Path, "rename", note("name", rename))
    file = directory.create(uuid4(), 1, b"head", 4096)
    assert done == ["content", "name", "directory"]
    file.rename(DONE)
    assert done[3:] == ["name", "directory"]
    file.close()


def test_a_file_that_could_not_be_made_leaves_nothing(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, begin: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        directory.create(uuid4(), 1, b"head", 4096)
    assert list(directory.path.iterdir()) == []


def test_a_file_is_one_process_alone(directory: JournalDirectory) -> None:
    file = directory.create(uuid4(), 1, b"head", 4096)
    assert directory.take(file.path) is None
    with another_process_takes(file.path) as got:
        assert not got
    file.close()
    with another_process_takes(file.path) as got:
        assert got
        assert directory.take(file.path) is None
    taken = directory.take(file.path)
    assert taken is not None
    taken.close()


def test_a_file_that_was_dealt_with_while_we_opened_it_is_not_ours(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one renames it and lets go between our open and our lock."""
    file = directory.create(uuid4(), 1, b"head", 4096)
    path = file.path
    really_open = os.open

    def slowly(name: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = really_open(name, flags, mode)
        if Path(name) == path:
            file.rename(DONE)
            file.close()
        return descriptor

    monkeypatch.setattr(os, "open", slowly)
    assert directory.take(path) is None
    monkeypatch.undo()
    [known] = directory.files()
    assert known.ending == DONE
    taken = directory.take(known.path)
    assert taken is not None, "nor is its lock kept"
    taken.close()


def test_whoever_cleans_up_leaves_a_file_that_is_being_made(directory: JournalDirectory) -> None:
    being_made = directory._lock_new()
    abandoned = directory.path / f"abandoned{NEW}"
    abandoned.write_bytes(b"")
    directory.prune(keep_seconds=0, bytes_max=0)
    assert list(directory.path.iterdir()) == [being_made.path]
    being_made.close()


def test_what_is_done_goes_when_its_time_is_over_or_room_is_short(directory: JournalDirectory) -> None:
    now = time.time()
    for number, (ending, age) in enumerate([(DONE, 100), (DONE, 10), (DONE, 1), (REJECTED, 1000), (OPEN, 1000)]):
        path = directory.path / f"w-{number}{ending}"
        path.write_bytes(bytes(1000))
        os.utime(path, (now - age, now - age))
    assert directory.prune(keep_seconds=50, bytes_max=10_000) == 0
    assert {file.path.name for file in directory.files()} == {"w-1.done", "w-2.done", "w-3.rejected", "w-4.open"}
    assert directory.prune(keep_seconds=50, bytes_max=1_500) == 1
    assert {file.path.name for file in directory.files()} == {"w-2.done", "w-3.rejected", "w-4.open"}


def test_a_directory_that_cannot_be_used_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"file/journal.*FAREBOX_JOURNAL_DIR"):
        JournalDirectory(tmp_path / "file" / "journal").make()
