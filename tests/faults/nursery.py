"""Processes of the real command, forked from one that has everything imported; each may be made to die at a point."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Nursery", "Process", "running_nursery"]

ROOT = Path(__file__).parents[2]
READY_SECONDS_MAX = 60.0
"""Starting takes half a second on a machine with nothing else to do."""


@dataclass
class Process:
    """A command that runs, or has run. ``note`` names the point that it died at."""

    pid: int
    directory: Path
    name: str
    at: str | None
    status: "asyncio.Future[int]" = field(repr=False)

    @property
    def output(self) -> str:
        return self._read("out")

    @property
    def errors(self) -> str:
        return self._read("err")

    @property
    def note(self) -> str | None:
        """The label of the point that it reached; None where it reached none."""
        return self._read("note").strip() or None

    @property
    def alive(self) -> bool:
        return not self.status.done()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """SIGKILL, and the end of it."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ended(self, seconds: float = 60.0) -> int:
        """Its exit status (negative: the signal that ended it), once it has ended."""
        async with asyncio.timeout(seconds):
            return await asyncio.shield(self.status)

    async def url(self) -> str:
        """Where `farebox serve` serves, once it does. Raises AssertionError where it ended instead."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while self.alive and time.monotonic() < deadline:
            if "\n" in (said := self.output):
                ready = json.loads(said.splitlines()[0])
                assert "base_url" in ready, f"{self.name}: {said} {self.errors[-2000:]}"
                found: str = ready["base_url"]
                return found
            await asyncio.sleep(0.02)
        ended = f"ended with {self.status.result()}" if self.status.done() else "isn't ready"
        raise AssertionError(f"{self.name} {ended}: {self.errors[-2000:]}")

    def _read(self, suffix: str) -> str:
        path = self.directory / f"{self.name}.{suffix}"
        return path.read_text() if path.exists() else ""


class Nursery:
    """The other end of ``python -m tests.faults.dying --nursery``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._expected: dict[int, tuple[Path, str, str | None, asyncio.Future[Process]]] = {}
        self._alive: dict[int, Process] = {}
        self._number = 0

    async def spawn(
        self,
        name: str,
        arguments: list[str],
        *,
        directory: Path,
        environment: Mapping[str, str],
        factor: float = 1.0,
        timing: Mapping[str, float] | None = None,
        at: str | None = None,
    ) -> Process:
        """Run ``farebox ARGUMENTS`` in ``directory``, with its output, errors and note in files called ``name``.

        ``factor``: what its times are divided by; ``timing``: those of ``app.Timing`` that it shall have instead.
        """
        assert self._process.stdin is not None
        self._number += 1
        born: asyncio.Future[Process] = asyncio.get_running_loop().create_future()
        self._expected[self._number] = (directory, name, at, born)
        order: dict[str, Any] = {
            "number": self._number,
            "arguments": arguments,
            "directory": str(directory),
            "environment": dict(environment),
            "stdout": str(directory / f"{name}.out"),
            "stderr": str(directory / f"{name}.err"),
            "note": str(directory / f"{name}.note"),
            "at": at,
            "factor": factor,
            "timing": dict(timing or {}),
        }
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return await born

    async def listen(self) -> None:
        """Hear who was born and who has ended, until the nursery ends."""
        assert self._process.stdout is not None
        loop = asyncio.get_running_loop()
        async for line in self._process.stdout:
            said = json.loads(line)
            if "born" in said:
                directory, name, at, born = self._expected.pop(said["born"])
                process = Process(said["pid"], directory, name, at, loop.create_future())
                self._alive[process.pid] = process
                born.set_result(process)
            elif "ended" in said:
                self._alive.pop(said["ended"]).status.set_result(said["status"])

    async def close(self) -> None:
        """End every process that still runs."""
        for process in list(self._alive.values()):
            await process.kill()


@contextlib.asynccontextmanager
async def running_nursery() -> AsyncIterator[Nursery]:
    """A nursery, and the end of all that came from it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.dying", "--nursery"),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(READY_SECONDS_MAX):
        assert json.loads(await process.stdout.readline()) == {"ready": True}
    nursery = Nursery(process)
    listening = asyncio.create_task(nursery.listen())
    try:
        yield nursery
        await nursery.close()
    finally:
        process.stdin.close()
        await process.wait()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
