"""``farebox serve`` in a process of its own, whose memory, sockets and every written word can be looked at."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.proxy import PEPPER, pricing_yaml, upstreams_yaml
from tests.postgres import Database

__all__ = ["Server", "running_server"]

ROOT = Path(__file__).parents[2]
START_SECONDS_MAX = 60.0


@dataclass
class Server:
    """A running one. ``address`` is what a raw socket connects to."""

    process: asyncio.subprocess.Process
    base_url: str
    log: Path
    """Standard error: every line that it logged."""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.base_url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def rss_bytes(self) -> int:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def processor_ticks(self) -> int:
        """Processor time that it has used, in the kernel's hundredths of a second."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def descriptors(self) -> int:
        """Open file descriptors now."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@asynccontextmanager
async def running_server(
    database: Database,
    directory: Path,
    upstream_url: str,
    *,
    environment: Mapping[str, str] | None = None,
    upstreams: str | None = None,
    **settings: str,
) -> AsyncIterator[Server]:
    """Serve with these FAREBOX_* settings, and with ``environment`` besides."""
    (directory / "pricing.yaml").write_text(pricing_yaml())
    (directory / "upstreams.yaml").write_text(upstreams or upstreams_yaml(upstream_url))
    values = {
        "METRICS_PORT": "0",
        "KEY_PEPPER": PEPPER,
        "DATABASE_URL": database.app,
        "LOG_LEVEL": "warning",
    } | settings
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **(environment or {})}
    variables |= {f"FAREBOX_{name}": value for name, value in values.items()}
    log = directory / "server.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy.cli", "serve", "--port", "0", "--json"),
            *("--pricing", str(directory / "pricing.yaml"), "--upstreams", str(directory / "upstreams.yaml")),
            env=variables,
            cwd=directory,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS_MAX):
            line = await process.stdout.readline()
        started = json.loads(line) if line else {}
        assert "base_url" in started, f"{started}\n{log.read_text()}"
        yield Server(process, started["base_url"], log)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(40):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
