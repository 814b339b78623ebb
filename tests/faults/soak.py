"""`make soak`: many streams for minutes or hours, and a look at what a worker keeps that it should have let go of.

    python -m tests.faults.soak [--minutes 60] [--streams 500] [--slower 1] [--seed N]

Each minute of load is followed by a quiet moment. Wrong is: resident memory that grows by more than a MiB an hour after
the warm-up, more descriptors in the last quiet moment than in those of the warm-up, more threads or tasks than in the
first, a hold that is left, calls that weren't served, and whatever the judge finds. A run of a few minutes can't tell
such a slope from noise, and says so.
"""

import argparse
import asyncio
import random
import secrets
import shutil
import socket
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.nursery import Process, running_nursery
from tests.faults.provider import running_provider
from tests.faults.scene import Scene, open_scene
from tests.faults.trouble import Crowd, Found, quiet
from tests.postgres import fresh_database, remove_cluster, running_cluster

SLOPE_MIB_AN_HOUR_MAX = 1.0
SLOPE_MINUTES_MIN = 30.0
WARM_UP_SHARE = 0.25
SAMPLE_SECONDS = 5.0
SERVED_SHARE_MIN = 0.9
"""Of each round's calls. Those that the provider refuses count as served."""
ACCOUNTS = 2
"""New ones each minute: what is remembered of a key, within the limits of its cache, must not look like a leak."""
MORE_MAX = 10
"""Threads or tasks by which one quiet moment may differ from another, and descriptors, whose number may rise to what a
quiet moment of the warm-up had: idle connections to the upstream stay open, as many as there were at once."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at a moment: seconds, MiB, open descriptors, threads; and tasks of its loop, where it was asked."""

    at: float
    mib: float
    descriptors: int
    threads: int
    tasks: int = 0


def look(process: Process) -> Sample:
    """What the kernel says of the process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
    )
    descriptors = sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())
    return Sample(time.monotonic(), int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"]))


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


async def tasks_of(scene: Scene, port: int) -> int:
    """How many tasks the process with its metrics at ``port`` says it has."""
    answer = await scene.http.get(f"http://127.0.0.1:{port}/metrics")
    [value] = [line.split()[1] for line in answer.text.splitlines() if line.startswith("farebox_tasks ")]
    return int(float(value))


def slope(samples: list[Sample]) -> float:
    """MiB an hour, by least squares."""
    mean_at = sum(sample.at for sample in samples) / len(samples)
    mean_mib = sum(sample.mib for sample in samples) / len(samples)
    above = sum((sample.at - mean_at) * (sample.mib - mean_mib) for sample in samples)
    below = sum((sample.at - mean_at) ** 2 for sample in samples)
    return 3600 * above / below if below else 0.0


async def soak(scene: Scene, *, seed: int, streams: int, minutes: float, slower: float) -> list[str]:
    """Serve for so long, in rounds of calls, and return what is wrong."""
    port = free_port()
    process = await scene.worker("worker", LOG_LEVEL="warning", SHUTDOWN_SECONDS="10", METRICS_PORT=str(port))
    await process.url()
    random_, found, samples = random.Random(seed), Found(), []
    crowd = Crowd(scene, random_, streams, {"worker": process}, slower=slower, accounts=ACCOUNTS)
    quiets: list[Sample] = []
    end, warm = time.monotonic() + minutes * 60, time.monotonic() + minutes * 60 * WARM_UP_SHARE
    while time.monotonic() < end:
        await crowd.start()
        round_ends = min(end, time.monotonic() + 60)
        while time.monotonic() < round_ends:
            await asyncio.sleep(SAMPLE_SECONDS)
            sample = look(process)
            if sample.at > warm:
                samples.append(sample)
        calls, exact = found.calls, found.exact
        await quiet(scene, found, crowd)
        if found.exact - exact < SERVED_SHARE_MIN * (found.calls - calls):
            found.wrongs.append(f"only {found.exact - exact} of {found.calls - calls} calls were served")
        quiets.append(replace(look(process), tasks=await tasks_of(scene, port)))
        print(f"  {quiets[-1]}: {found.told()}", flush=True)
        scene.forget()
    rise, first, last = slope(samples), quiets[0], quiets[-1]
    print(f"first quiet {first}\nlast quiet  {last}\nslope {rise:.2f} MiB an hour, {len(samples)} samples", flush=True)
    wrongs = found.wrongs
    if minutes < SLOPE_MINUTES_MIN:
        print(f"{minutes} minutes are too few to judge the slope by; at least {SLOPE_MINUTES_MIN}", flush=True)
    elif rise > SLOPE_MIB_AN_HOUR_MAX:
        wrongs.append(f"memory grows by {rise:.2f} MiB an hour")
    open_before = max(sample.descriptors for sample in quiets if sample is first or sample.at < warm)
    if last.descriptors > open_before + MORE_MAX:
        wrongs.append(f"{last.descriptors} descriptors, where there were {open_before}")
    if last.threads > first.threads + MORE_MAX:
        wrongs.append(f"{last.threads} threads, where there were {first.threads}")
    if last.tasks > first.tasks + MORE_MAX:
        wrongs.append(f"{last.tasks} tasks, where there were {first.tasks}")
    return wrongs


async def run(seed: int, streams: int, minutes: float, slower: float, directory: Path, run_id: str) -> list[str]:
    """A soak on a ledger of its own, with leases as they are."""
    async with AsyncExitStack() as stack:
        address = stack.enter_context(running_cluster(run_id))
        database = stack.enter_context(fresh_database(address))
        provider = await stack.enter_async_context(running_provider())
        nursery = await stack.enter_async_context(running_nursery())
        scene = await stack.enter_async_context(open_scene(database, provider, nursery, directory, factor=1.0))
        return await soak(scene, seed=seed, streams=streams, minutes=minutes, slower=slower)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument(
        "--slower", type=float, default=1.0, help="by how much answers come slower: fewer calls a minute"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    given = parser.parse_args()
    print(f"seed {given.seed}; {given.streams} streams for {given.minutes} minutes", flush=True)
    directory, run_id = Path(tempfile.mkdtemp(prefix="fbs")), secrets.token_hex(6)
    directory.chmod(0o755)
    try:
        wrongs = asyncio.run(run(given.seed, given.streams, given.minutes, given.slower, directory, run_id))
    finally:
        remove_cluster(run_id)
        shutil.rmtree(directory, ignore_errors=True)
    print("\n".join(wrongs) if wrongs else "nothing wrong", flush=True)
    sys.exit(bool(wrongs))


if __name__ == "__main__":
    main()
