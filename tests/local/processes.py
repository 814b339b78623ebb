"""Programs that the tests of this directory run beside themselves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

OWNER = """
import sys, time
from pathlib import Path
from proxy.local.postgres import Cluster
from proxy.local.state import StateDirectory
cluster = Cluster(StateDirectory(Path(sys.argv[1])), purpose="the other one", serving=True, linger_seconds=10)
address = getattr(cluster, sys.argv[2])()
print(address.owner, cluster._watchdog.pid if cluster._watchdog else 0, flush=True)
sys.stdin.read()
cluster.close()
"""
"""Opens or starts the cluster of argv[1], says where it is, and lets go when its standard input ends."""


class Other:
    """Another process that has the cluster of ``state`` open."""

    def __init__(
        self, state: Path, *, how: str = "start", python: str = sys.executable, uid: int | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [python, "-c", OWNER, str(state), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            **({} if uid is None else {"user": uid, "group": uid, "extra_groups": []}),  # type: ignore[call-overload]
        )
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().split()
        assert answer, f"it ended with {self.process.wait(10)}"
        self.dsn, self.watchdog = answer[0], int(answer[1])

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def kill(self) -> None:
        """kill -9, as an out-of-memory killer would."""
        self.process.send_signal(signal.SIGKILL)
        self.leave()

    def leave(self) -> int:
        """Let go of the cluster, and wait for the end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        status: int = self.process.wait(30)
        return status


def eventually(holds: Callable[[], bool], *, seconds: float = 5) -> bool:
    """Whether ``holds`` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def postmaster(data: Path) -> int:
    """The server's process id."""
    return int((data / "postmaster.pid").read_text().split()[0])
