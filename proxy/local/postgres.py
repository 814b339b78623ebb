"""The embedded PostgreSQL: one cluster in the state directory, run by whoever needs it first.

    cluster = Cluster(StateDirectory(path), purpose="farebox demo")
    address = cluster.open()        start the server, or attach to the one another process runs
    ...                             asyncpg.connect(address.app)
    cluster.close()                 stop it (after those who attached have left), or detach

The server listens on a unix socket in a private directory and nowhere else, with passwords that only the state
directory holds. fsync and data checksums are on: what is committed survives. The watchdog process (watchdog.py) ties
its life to ours.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlencode

from proxy.local import watchdog
from proxy.local.binaries import Identity, find_binaries, reachable_binaries, server_identity
from proxy.local.locks import FileLock, Holder
from proxy.local.place import (
    APP,
    DATABASE,
    ENVIRONMENT,
    OWNER,
    PORT,
    SUPERUSER,
    Place,
    clear_stale_locks,
    explained,
    initialise,
    socket_directory,
)
from proxy.local.processes import is_running
from proxy.local.state import LocalError, StateDirectory

__all__ = [
    "APP",
    "OWNER",
    "SUPERUSER",
    "Cluster",
    "ClusterAddress",
    "HeldBySomeoneElse",
    "refuse_if_served",
    "users_lock_of",
]

START_SECONDS_MAX = 120.0
"""Crash recovery of a large ledger takes its time."""
ATTACH_SECONDS_MAX = 40.0
"""How long another command may keep the database to itself while it starts or stops."""
PROBE_SECONDS = 0.25
"""Those who only look whether the lock is taken hold it for an instant; longer than this it is truly taken."""
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
        self._users = FileLock(users_lock_of(state))
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
        if holder is None or secret is None or not _answers(holder.socket_directory):
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
            limit_seconds = self.linger_seconds + sum(seconds for _, seconds in watchdog.ESCALATION) + 5
            try:
                process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                raise LocalError(
                    f"PostgreSQL hasn't stopped after {limit_seconds:.0f} seconds; see {self.log}."
                ) from None

    def stopped(self) -> bool:
        """Whether the server we started has ended by itself."""
        return self._watchdog is not None and self._watchdog.poll() is not None

    # Starting, under the owner's lock

    def _start_locked(self) -> ClusterAddress:
        try:
            self._describe()
            place = Place.of(self.state)
            identity = server_identity(place.data)
            programs = reachable_binaries(self.binaries or find_binaries(), identity)
            passwords = place.passwords
            if not place.data.is_dir():
                self.progress("making the database (once)")
                initialise(place, programs, identity)
            clear_stale_locks(place)
            sockets = socket_directory(place, identity)
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

    def _spawn(self, place: Place, programs: Path, identity: Identity, sockets: Path) -> None:
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

    def _wait_until_ready(self, place: Place) -> None:
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


def users_lock_of(state: StateDirectory) -> Path:
    """The lock that whoever uses the cluster holds, shared: its owner's stop waits for them."""
    return state.path / "users"


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


def _answers(socket_directory: str) -> bool:
    """Whether a server listens there: one that was killed may leave its watchdog, and the lock, for a moment."""
    if not socket_directory:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(f"{socket_directory}/.s.PGSQL.{PORT}")
        except OSError:
            return False
    return True


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
    return explained(" ".join((complaints or lines)[-3:])) + f" See {log}."
