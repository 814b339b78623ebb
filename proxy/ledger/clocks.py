"""Two clocks of this machine that only go forward, and differ by the time for which it was suspended.

A lease is judged by ``elapsed``: the ledger's clock goes on while a laptop sleeps, or while a virtual machine is paused
and set right again. Timers and intervals of work go by ``awake``, as the event loop's own.
"""

import sys
import time

__all__ = ["awake", "elapsed"]

if sys.platform == "darwin":
    # There, "monotonic raw" goes on while the machine sleeps, and "uptime" doesn't.
    def elapsed() -> float:
        """Seconds that have passed, suspended or not."""
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)

    def awake() -> float:
        """Seconds for which the machine has run."""
        return time.clock_gettime(time.CLOCK_UPTIME_RAW)

elif sys.platform == "linux":

    def elapsed() -> float:
        """Seconds that have passed, suspended or not."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def awake() -> float:
        """Seconds for which the machine has run."""
        return time.clock_gettime(time.CLOCK_MONOTONIC)

else:
    # Where nothing tells them apart, a suspension is found out by the ledger alone, which refuses a lapsed worker.
    elapsed = awake = time.monotonic
