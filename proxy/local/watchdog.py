"""The process between Farebox and its PostgreSQL: it sees to it that the server never outlives its owner.

It runs alone, by path, with the standard library only: ``python -I watchdog.py '{"command": [...], ...}'``.
Standard input is a pipe whose other end only the owner holds: its end of file means that the owner stopped or was
killed, by whatever means. The server then gets a fast shutdown, an immediate one after a limit, and SIGKILL at last.
The owner's lock is held here (by an inherited descriptor), so it is free exactly when the server is gone.

Should this process be killed itself, Linux sends the server a fast shutdown (PR_SET_PDEATHSIG); elsewhere the next
start finds the server and stops it.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
FAST_SHUTDOWN = signal.SIGINT
IMMEDIATE_SHUTDOWN = signal.SIGQUIT
ESCALATION = ((FAST_SHUTDOWN, 10.0), (IMMEDIATE_SHUTDOWN, 5.0), (signal.SIGKILL, 5.0))
"""Signals to the server, each with the seconds it is given before the next."""
POLL_SECONDS = 0.05


def main(options: dict[str, Any]) -> int:
    """Run the server until it ends or the owner does; the exit status is 0 after a clean shutdown."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    server = _start(options)
    if _owner_left(server, wake_read):
        _wait_for_users(server, options["users_lock"], options["linger_seconds"])
        _stop(server)
    return server.returncode or 0


def _start(options: dict[str, Any]) -> "subprocess.Popen[bytes]":
    uid, gid = options["uid"], options["gid"]
    identity: dict[str, Any] = {} if uid is None else {"user": uid, "group": gid, "extra_groups": []}
    with open(options["log"], "ab", buffering=0) as log:
        # The death signal is set after the change of user, which would clear it, and from this process's only thread,
        # whose end it watches.
        return subprocess.Popen(
            options["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=options["environment"],
            cwd="/",
            preexec_fn=_death_signal(os.getpid()),
            **identity,
        )


def _death_signal(parent: int) -> Callable[[], None]:
    if not sys.platform.startswith("linux"):
        return _restore_signals
    prctl = ctypes.CDLL(None).prctl

    def set_death_signal() -> None:
        _restore_signals()
        prctl(PR_SET_PDEATHSIG, FAST_SHUTDOWN, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return set_death_signal


def _restore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _owner_left(server: "subprocess.Popen[bytes]", wake_read: int) -> bool:
    """Wait for the owner's end or the server's; true where the server is still there to be stopped."""
    terminate = signal.SIGTERM.value
    while True:
        readable, _, _ = select.select([sys.stdin.fileno(), wake_read], [], [])
        if server.poll() is not None:
            return False
        if wake_read in readable and terminate in os.read(wake_read, 512):
            return True
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 512):
            return True


def _wait_for_users(server: "subprocess.Popen[bytes]", path: str, limit_seconds: float) -> None:
    """Give other commands that use the database the time to finish. New ones can't come: they try this lock first."""
    deadline = time.monotonic() + limit_seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while server.poll() is None:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECONDS)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    for number, limit_seconds in ESCALATION:
        if server.poll() is not None:
            return
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(limit_seconds)
            return


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
