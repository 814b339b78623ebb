"""A PostgreSQL that may be stopped at once and started again: a cluster of its own, since others need theirs."""

import asyncio
import os
import signal
from pathlib import Path

from proxy.ledger.migrate import migrate
from proxy.local.place import DATABASE
from proxy.local.postgres import APP, OWNER, SUPERUSER, Cluster, ClusterAddress
from proxy.local.state import StateDirectory
from tests.postgres import SETTINGS, Database

__all__ = ["RestartingPostgres"]


class RestartingPostgres:
    """One cluster in ``directory``, with a migrated ledger. ``crash`` is what `pg_ctl -m immediate` does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cluster = self._new()
        self._address: ClusterAddress | None = None

    async def start(self) -> Database:
        """Make it, and the ledger in it."""
        await asyncio.to_thread(self._directory.mkdir, parents=True)
        await self._open()
        assert self._address is not None
        address = self._address
        await migrate(address.owner, grant_to=APP)
        return Database(DATABASE, address.dsn(OWNER), address.dsn(APP), address.dsn(SUPERUSER, DATABASE))

    async def crash(self) -> None:
        """An immediate shutdown: every connection is cut, nothing is written that wasn't."""
        [pid] = {int(path.read_text().split()[0]) for path in self._directory.glob("**/postmaster.pid")}
        os.kill(pid, signal.SIGQUIT)
        async with asyncio.timeout(30):
            while not self._cluster.stopped():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.to_thread(self._cluster.close)

    async def recover(self) -> None:
        """Start it again; it is where it was, with what had been committed."""
        before, self._cluster = self._address, self._new()
        await self._open()
        assert self._address == before

    async def stop(self) -> None:
        """For good."""
        await asyncio.to_thread(self._cluster.close)

    def _new(self) -> Cluster:
        return Cluster(
            StateDirectory(self._directory), purpose="tests of restarts", linger_seconds=0.0, settings=SETTINGS
        )

    async def _open(self) -> None:
        self._address = await asyncio.to_thread(self._cluster.open)
