"""Where a cluster lies, how it is made there, and what has to be cleared away before its server can start.

Making it is one rename at the end, so that a crash in the middle leaves nothing half made. Whoever calls these
functions holds the owner's lock (locks.py): nobody else makes, starts or clears at the same time.
"""

import errno
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy.local.binaries import ROOT_STORE, Identity, server_identity
from proxy.local.processes import is_running, processes_inside
from proxy.local.state import LocalError, StateDirectory

__all__ = [
    "APP",
    "DATABASE",
    "ENVIRONMENT",
    "OWNER",
    "PORT",
    "SUPERUSER",
    "Place",
    "clear_stale_locks",
    "explained",
    "initialise",
    "socket_directory",
]

SUPERUSER = "farebox_superuser"
OWNER = "farebox_owner"
APP = "farebox_app"
DATABASE = "farebox"
PORT = 5432
"""Only part of the socket's name: nothing listens on TCP."""
SOCKET_PATH_BYTES_MAX = 103
"""What sun_path holds on macOS, less the final NUL; Linux has four more."""
INITIALISE_SECONDS_MAX = 120.0
ORPHAN_SECONDS_MAX = 15.0
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""All that PostgreSQL's programs see of the environment: no PG* variable of the user's reaches them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster lies: in the state directory, or beside it where the server's user can't get in there."""

    home: Path
    passwords: Mapping[str, str]

    @property
    def data(self) -> Path:
        return self.home / "data"

    @classmethod
    def of(cls, state: StateDirectory) -> "Place":
        """The place recorded in database.json, chosen and recorded at the first start."""
        recorded = state.read_json("database.json")
        inside = state.path / "postgres"
        if recorded is None:
            if (inside / "data").exists():
                raise LocalError(
                    f"{inside} holds a database, but {state.path / 'database.json'} with its passwords is missing. "
                    f"Restore that file; or move {inside} away to begin with an empty ledger."
                )
            passwords = {user: secrets.token_urlsafe(32) for user in (SUPERUSER, OWNER, APP)}
            home = _reachable_home(state.path)
            recorded = {"home": None if home is None else str(home), "passwords": passwords}
            state.write_json("database.json", recorded)
        home = inside if recorded["home"] is None else Path(recorded["home"])
        return cls(home, recorded["passwords"])


def _reachable_home(state: Path) -> Path | None:
    """A home outside the state directory where PostgreSQL's user can't pass through to it; None means inside."""
    identity = server_identity(state)
    if identity.uid is None or identity.can("-x", state):
        return None
    return ROOT_STORE / secrets.token_hex(6)


def initialise(place: Place, programs: Path, identity: Identity) -> None:
    """Make the cluster with its roles and database in a directory of its own, and rename that when it is complete."""
    unfinished = place.home / "data.tmp"
    password_file = place.home / "password.tmp"
    try:
        _make_private(place.home, identity)
        shutil.rmtree(unfinished, ignore_errors=True)
        _make_private(unfinished, identity)
        password_file.unlink(missing_ok=True)
        with open(os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(place.passwords[SUPERUSER] + "\n")
        identity.give(password_file)
        _run([*_initdb(programs, unfinished), f"--pwfile={password_file}"], identity)
        _run([str(programs / "postgres"), "--single", "-D", str(unfinished), "postgres"], identity, _roles(place))
        unfinished.rename(place.data)
        _sync_directory(place.home)
    except OSError as error:
        raise LocalError(_os_error_text(f"The database can't be made in {place.home}", error)) from error
    finally:
        password_file.unlink(missing_ok=True)


def _initdb(programs: Path, data: Path) -> list[str]:
    return [
        str(programs / "initdb"),
        f"--pgdata={data}",
        f"--username={SUPERUSER}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--data-checksums",
        "--no-instructions",
    ]


def _roles(place: Place) -> str:
    """What the single-user server is told: one statement a line. Passwords are URL-safe, so need no quoting."""
    return (
        f"CREATE ROLE {OWNER} LOGIN CREATEROLE PASSWORD '{place.passwords[OWNER]}'\n"
        f"CREATE ROLE {APP} LOGIN PASSWORD '{place.passwords[APP]}'\n"
        f"CREATE DATABASE {DATABASE} OWNER {OWNER}\n"
    )


def _run(command: list[str], identity: Identity, text: str = "") -> None:
    program = Path(command[0]).name
    try:
        result = subprocess.run(
            command,
            input=text,
            text=True,
            capture_output=True,
            cwd="/",
            env=dict(ENVIRONMENT),
            timeout=INITIALISE_SECONDS_MAX,
            check=False,
            **identity.popen_options(),
        )
    except subprocess.TimeoutExpired as error:
        raise LocalError(f"{program} wasn't done after {INITIALISE_SECONDS_MAX:.0f} seconds.") from error
    except OSError as error:
        raise LocalError(_os_error_text(f"{command[0]} can't be run", error)) from error
    # The single-user server ends with 0 whatever its statements did.
    if result.returncode != 0 or "ERROR:" in result.stderr or "FATAL:" in result.stderr:
        lines = [line for line in result.stderr.splitlines() if "STATEMENT:" not in line]
        raise LocalError(f"{program} failed: {explained(' '.join(lines[-5:]) or f'exit status {result.returncode}')}")


def _make_private(path: Path, identity: Identity) -> None:
    """A directory of mode 0700 that belongs to the server's user. /var/lib/farebox itself may be passed through."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o755, parents=True)
    path.mkdir(mode=0o700, exist_ok=True)
    identity.give(path)


def socket_directory(place: Place, identity: Identity) -> Path:
    """A private directory whose path is short enough for a socket's address."""
    inside = place.home / "socket"
    if _fits(inside):
        _make_private(inside, identity)
        return inside
    name = f"farebox-{os.geteuid()}-{hashlib.sha256(str(place.home).encode()).hexdigest()[:12]}"
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 (private, and its owner is checked below)
        if not _fits(parent / name) or not parent.is_dir():
            continue
        directory = parent / name
        _make_private_among_strangers(directory, identity)
        return directory
    raise LocalError(f"The path of {place.home} is too long for a socket's address; set FAREBOX_STATE_DIR.")


def _fits(directory: Path) -> bool:
    return len(os.fsencode(directory / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES_MAX


def _make_private_among_strangers(directory: Path, identity: Identity) -> None:
    """Make ``directory`` in a place where others may write too; refuse one that somebody else prepared."""
    wanted = os.geteuid() if identity.uid is None else identity.uid
    try:
        directory.mkdir(mode=0o700)
        identity.give(directory)
    except FileExistsError:
        found = directory.lstat()
        if directory.is_symlink() or found.st_uid != wanted or found.st_mode & 0o077:
            raise LocalError(
                f"{directory} isn't ours; remove it, or set FAREBOX_STATE_DIR to a shorter path."
            ) from None


def clear_stale_locks(place: Place) -> None:
    """Remove what a killed server left behind, after making sure that nothing of it runs any more.

    PostgreSQL takes a zombie, or a stranger with the same process id, for a live server and would never start.
    We hold the owner's lock, so a server that does run has lost its owner and is stopped.
    """
    pid_file = place.data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().splitlines()[0])
    except FileNotFoundError:
        return
    except (OSError, ValueError, IndexError):
        pid = 0
    deadline = time.monotonic() + ORPHAN_SECONDS_MAX
    number = signal.SIGINT
    while True:
        running = {other for other in processes_inside(place.data) if other != os.getpid()}
        if pid > 0 and is_running(pid, "postgres"):
            running |= {pid} if not running else set()
        if not running:
            break
        if time.monotonic() > deadline:
            raise LocalError(f"A PostgreSQL without an owner (pid {min(running)}) doesn't stop; end it by hand.")
        for other in running:
            _signal(other, number)
        number = signal.SIGINT if time.monotonic() < deadline - ORPHAN_SECONDS_MAX / 2 else signal.SIGQUIT
        time.sleep(0.1)
    pid_file.unlink(missing_ok=True)
    for lock in place.home.glob("socket/.s.PGSQL.*"):
        lock.unlink(missing_ok=True)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise LocalError(f"A PostgreSQL of another user (pid {pid}) runs on these data; stop it first.") from error


def explained(text: str) -> str:
    """What PostgreSQL said, with what to do about it where that is known."""
    hints = {
        "No space left on device": "The disk is full: make room and start again.",
        "Permission denied": "A file isn't accessible to the user PostgreSQL runs as.",
        "could not create shared memory segment": "The system's shared memory is used up.",
        "could not look up effective user ID": "PostgreSQL runs only as a user that is known by name on this "
        "machine: start Farebox as one, or set DATABASE_URL to a PostgreSQL of yours.",
        "not compatible with this server": "The data were made by another major version: dump there and restore here.",
    }
    return " ".join([text, *(hint for words, hint in hints.items() if words in text)])


def _os_error_text(what: str, error: OSError) -> str:
    advice = {
        errno.ENOSPC: " The disk is full: make room and start again.",
        errno.EACCES: " Set FAREBOX_STATE_DIR to a directory you can write.",
        errno.EROFS: " The file system is read-only: set FAREBOX_STATE_DIR to one that can be written.",
    }
    return f"{what}: {error.strerror}.{advice.get(error.errno or 0, '')}"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
