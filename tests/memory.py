"""Where tests keep what needn't last longer than they do: in memory, where the machine has enough of it.

A database for each test is hundreds of files, made and removed: on a disk that is most of what a run waits for.
"""

import os
import tempfile
from pathlib import Path

__all__ = ["fast_directory"]

MEMORY = Path("/dev/shm")
BYTES_MIN = 4 << 30
"""Some hundred MiB are used. A container has 64 MiB there unless it was told otherwise."""


def fast_directory() -> Path:
    """Below it directories can be made; the same one throughout a run, in all of its processes."""
    try:
        size = os.statvfs(MEMORY)
    except OSError:
        return Path(tempfile.gettempdir())
    enough = size.f_blocks * size.f_frsize >= BYTES_MIN and os.access(MEMORY, os.W_OK | os.X_OK)
    return MEMORY if enough else Path(tempfile.gettempdir())
