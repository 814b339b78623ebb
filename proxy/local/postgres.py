"""The embedded PostgreSQL: one cluster in the state directory, run by whoever needs it first.

    cluster = Cluster(StateDirectory(path), purpose="farebox demo")
    address = cluster.open()        start the server, or attach to the one another process runs
    ...                             asyncpg.connect(address.app)
    cluster.close()                 stop it (after those who attached have left), or detach

The server listens on a unix socket in a private directory and nowhere else, with passwords that only the state
directory holds. fsync and data checksums are on: what is committed survives. The watchdog process (watchdog.py) ties
its life to ours. Making the cluster is one rename at the end, so that a crash in the middle leaves nothing half made.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlencode

from proxy.local import watchdog
from proxy.local.binaries import ROOT_STORE, Identity, find_binaries, reachable_binaries, server_identity
from proxy.local.locks import FileLock, Holder
from proxy.local.processes import is_running, processes_inside
from proxy.local.state import LocalError, StateDirectory

__all__ = ["Cluster", "ClusterAddress", "HeldBySomeoneElse", "refuse_if_served"]

SUPERUSER = "farebox_superuser"
OWNER = "farebox_owner"
APP = "farebox_app"
DATABASE = "farebox"
PORT = 5432
"""Only part of the socket's name: nothing listens on TCP."""
SOCKET_PATH_BYTES_MAX = 103
"""What sun_path holds on macOS, less the final NUL; Linux has four more."""
START_SECONDS_MAX = 120.0
"""Crash recovery of a large ledger takes its time."""
ATTACH_SECONDS_MAX = 40.0
"""How long another command may keep the database to itself while it starts or stops."""
PROBE_SECONDS = 0.25
"""Those who only look whether the lock is taken hold it for an instant; longer than this it is truly taken."""
ORPHAN_SECONDS_MAX = 15.0
POLL_SECONDS = 0.02
LOG_BYTES_MAX = 10_000_000
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "max_connections": "100",
}
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""All the server sees of the environment: no PG* variable of the user's reaches it."""


class HeldBySomeoneElse(LocalError):
    """Another process runs the database and this caller wanted it for itself; ``holder`` says who, if known."""

    def __init__(self, message: str, holder: Holder | None) -> None:
        super().__init__(message)
        self.holder = holder


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """How to reach a running cluster. The DSNs hold passwords: never log them."""

    socket_directory: str
    passwords: Mapping[str, str] = field(repr=False)

    def dsn(self, user: str, database: str = DATABASE) -> str:
        """A connection string for asyncpg and libpq alike."""
        query = urlencode({"host": self.socket_directory, "port": PORT})
        return f"postgresql://{user}:{quote(self.passwords[user], safe='')}@/{database}?{query}"

    @property
    def owner(self) -> str:
        """Owns the schema and migrates it; no superuser."""
        return self.dsn(OWNER)

    @property
    def app(self) -> str:
        """The server's login: a member of the group roles and nothing besides."""
        return self.dsn(APP)

    @property
    def superuser(self) -> str:
        """For tests and repairs; Farebox itself never uses it."""
        return self.dsn(SUPERUSER, "postgres")


class Cluster:
    """One process's hold on the cluster of a state directory.

    ``purpose`` is what others are told about us; ``serving`` says that we stay until stopped, so that nobody waits for
    us. ``linger_seconds`` is how long our stop waits for processes that attached meanwhile. ``settings`` override the
    server's (tests). ``progress`` is told of everything that takes longer than a moment.
    """

    def __init__(
        self,
        state: StateDirectory,
        *,
        purpose: str,
        serving: bool = False,
        linger_seconds: float = 30.0,
        settings: Mapping[str, str] | None = None,
        binaries: Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.state = state
        self.purpose = purpose
        self.serving = serving
        self.linger_seconds = linger_seconds
        self.settings = {**SETTINGS, **(settings or {})}
        self.binaries = binaries
        self.progress = progress
        self._lock = FileLock(state.path / "lock")
        self._users = FileLock(state.path / "users")
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """The server's own log."""
        return self.state.path / "postgres.log"

    def open(self) -> ClusterAddress:
        """Attach to the running server, or start it. Raises LocalError."""
        deadline = time.monotonic() + ATTACH_SECONDS_MAX
        self.state.make()
        while True:
            address = self.attach()
            if address is not None:
                return address
            if self._lock.acquire():
                return self._start_locked()
            if time.monotonic() >= deadline:
                raise self._held()
            time.sleep(POLL_SECONDS)

    def start(self) -> ClusterAddress:
        """Start the server and own it. Raises HeldBySomeoneElse at once where another process serves from this
        directory; a command that only uses the database for a moment is waited for."""
        self.state.make()
        deadline = time.monotonic() + ATTACH_SECONDS_MAX
        announced = False
        while not self._lock.acquire(timeout_seconds=PROBE_SECONDS):
            holder = self._lock.holder()
            stays = holder is not None and holder.serving and is_running(holder.pid)
            if stays or time.monotonic() >= deadline:
                raise self._held()
            if not announced and holder is not None:
                self.progress(f"waiting for {holder} to finish with the database")
                announced = True
            time.sleep(POLL_SECONDS)
        return self._start_locked()

    def attach(self) -> ClusterAddress | None:
        """The address of a server that another process runs, or None where none can be reached.

        As long as we are attached, its owner's stop waits for us (at most its linger time).
        """
        self.state.make()
        if not self._users.acquire(shared=True, timeout_seconds=ATTACH_SECONDS_MAX):
            return None
        holder = _running_holder(self.state)
        secret = self.state.read_json("database.json")
        if holder is None or not holder.socket_directory or secret is None:
            self._users.close()
            return None
        return ClusterAddress(holder.socket_directory, secret["passwords"])

    def close(self) -> None:
        """Stop the server we started, or leave the one we attached to. May be called twice."""
        self._users.close()
        process, self._watchdog = self._watchdog, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(self.linger_seconds + sum(seconds for _, seconds in watchdog.ESCALATION) + 5)

    def stopped(self) -> bool:
        """Whether the server we started has ended by itself."""
        return self._watchdog is not None and self._watchdog.poll() is not None

    # Starting, under the owner's lock

    def _start_locked(self) -> ClusterAddress:
        try:
            self._describe()
            place = _Place.of(self.state)
            identity = server_identity(place.data)
            programs = reachable_binaries(self.binaries or find_binaries(), identity)
            passwords = place.passwords
            if not place.data.is_dir():
                self.progress("making the database (once)")
                _initialise(place, programs, identity)
            _clear_stale_locks(place)
            sockets = _socket_directory(place, identity)
            self._spawn(place, programs, identity, sockets)
            self._wait_until_ready(place)
            self._describe(sockets)
        except BaseException:
            self.close()
            raise
        finally:
            # From here on the watchdog alone holds the owner's lock.
            self._lock.close()
        return ClusterAddress(str(sockets), passwords)

    def _describe(self, sockets: Path | None = None) -> None:
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        self._lock.describe(Holder(os.getpid(), self.purpose, since, str(sockets or ""), self.serving))

    def _spawn(self, place: "_Place", programs: Path, identity: Identity, sockets: Path) -> None:
        command = [str(programs / "postgres"), "-D", str(place.data)]
        for name, value in {**self.settings, "unix_socket_directories": str(sockets), "port": str(PORT)}.items():
            command += ["-c", f"{name}={value}"]
        _bound_log(self.log)
        options = {
            "command": command,
            "environment": dict(ENVIRONMENT),
            "uid": identity.uid,
            "gid": identity.gid,
            "log": str(self.log),
            "users_lock": str(self._users.path),
            "linger_seconds": self.linger_seconds,
        }
        assert self._lock.descriptor is not None
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            pass_fds=(self._lock.descriptor,),
        )

    def _wait_until_ready(self, place: "_Place") -> None:
        assert self._watchdog is not None
        began = time.monotonic()
        announced = began
        while not _is_ready(place.data):
            now = time.monotonic()
            if self._watchdog.poll() is not None:
                raise LocalError(f"PostgreSQL didn't start. {_why(self.log)}")
            if now - began > START_SECONDS_MAX:
                raise LocalError(f"PostgreSQL wasn't ready after {START_SECONDS_MAX:.0f} seconds; see {self.log}.")
            if now - announced > 2:
                self.progress("the database is recovering")
                announced = now
            time.sleep(POLL_SECONDS)

    def _held(self) -> HeldBySomeoneElse:
        return _held_by(self.state, self._lock.holder())


def refuse_if_served(state: StateDirectory) -> None:
    """Raise HeldBySomeoneElse where another process serves from ``state``: for those who would first find its port
    taken, and not be told by whom."""
    state.make()
    holder = _running_holder(state)
    if holder is not None and holder.serving and is_running(holder.pid):
        raise _held_by(state, holder)


def _running_holder(state: StateDirectory) -> Holder | None:
    """Who holds the owner's lock now. Looking takes a lock for an instant, as flock can't be asked otherwise."""
    probe = FileLock(state.path / "lock")
    if probe.acquire(shared=True):
        probe.close()
        return None
    return probe.holder()


def _held_by(state: StateDirectory, holder: Holder | None) -> HeldBySomeoneElse:
    return HeldBySomeoneElse(
        f"The data in {state.path} are in use by {holder or 'another process'}. "
        "Stop that one first, or set FAREBOX_STATE_DIR to a directory of its own.",
        holder,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a cluster lies: in the state directory, or beside it where the server's user can't get in there."""

    home: Path
    passwords: Mapping[str, str]

    @property
    def data(self) -> Path:
        return self.home / "data"

    @classmethod
    def of(cls, state: StateDirectory) -> "_Place":
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


def _initialise(place: _Place, programs: Path, identity: Identity) -> None:
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


def _roles(place: _Place) -> str:
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
            timeout=START_SECONDS_MAX,
            check=False,
            **identity.popen_options(),
        )
    except subprocess.TimeoutExpired as error:
        raise LocalError(f"{program} wasn't done after {START_SECONDS_MAX:.0f} seconds.") from error
    except OSError as error:
        raise LocalError(_os_error_text(f"{command[0]} can't be run", error)) from error
    # The single-user server ends with 0 whatever its statements did.
    if result.returncode != 0 or "ERROR:" in result.stderr or "FATAL:" in result.stderr:
        lines = [line for line in result.stderr.splitlines() if "STATEMENT:" not in line]
        raise LocalError(f"{program} failed: {_hint(' '.join(lines[-5:]) or f'exit status {result.returncode}')}")


def _make_private(path: Path, identity: Identity) -> None:
    """A directory of mode 0700 that belongs to the server's user. /var/lib/farebox itself may be passed through."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o755, parents=True)
    path.mkdir(mode=0o700, exist_ok=True)
    identity.give(path)


def _socket_directory(place: _Place, identity: Identity) -> Path:
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


def _clear_stale_locks(place: _Place) -> None:
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


def _is_ready(data: Path) -> bool:
    """Whether the server says, in the last line of postmaster.pid, that it takes connections."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[7].strip() == "ready"


def _bound_log(log: Path) -> None:
    """Begin a new log when the old one has grown large; one predecessor is kept."""
    try:
        if log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))
    except FileNotFoundError:
        log.touch(mode=0o600)


def _why(log: Path) -> str:
    """The last thing the server complained about."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").splitlines()
    complaints = [line for line in lines if any(word in line for word in ("FATAL:", "PANIC:", "ERROR:", "HINT:"))]
    return _hint(" ".join((complaints or lines)[-3:])) + f" See {log}."


def _hint(text: str) -> str:
    """What PostgreSQL said, with what to do about it where that is known."""
    hints = {
        "No space left on device": "The disk is full: make room and start again.",
        "Permission denied": "A file isn't accessible to the user PostgreSQL runs as.",
        "could not create shared memory segment": "The system's shared memory is used up.",
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
