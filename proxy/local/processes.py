"""What can be learned about other processes without a library: from /proc on Linux, from ps(1) elsewhere."""

import os
import subprocess
from pathlib import Path

__all__ = ["is_running", "processes_inside"]

PROC = Path("/proc")


def is_running(pid: int, program: str | None = None) -> bool:
    """Whether process ``pid`` is alive (a zombie isn't) and runs ``program``, where one is named."""
    if (PROC / "self").exists():
        try:
            # "pid (name) state ...": the name may hold blanks and parentheses itself.
            head, _, rest = (PROC / str(pid) / "stat").read_text().rpartition(")")
        except OSError:
            return False
        return program in {None, head.partition("(")[2]} and rest.split()[0] not in {"Z", "X"}
    command = ["/bin/ps", "-o", "stat=,comm=", "-p", str(pid)]
    columns = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split(maxsplit=1)
    if len(columns) != 2 or columns[0].startswith("Z"):
        return False
    return program in {None, os.path.basename(columns[1].strip())}


def processes_inside(directory: Path) -> set[int]:
    """The live processes whose working directory is ``directory``; always empty where there is no /proc."""
    wanted = os.path.realpath(directory)
    found = set()
    for entry in PROC.glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == wanted:
                found.add(int(entry.name))
        except OSError:
            # Gone meanwhile, a zombie (it has no working directory), or somebody else's.
            continue
    return found
