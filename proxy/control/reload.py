"""Reload: pricing.yaml and config/upstreams.yaml are watched; a changed pair becomes the catalog, whole or not at all.

The rules it keeps:

- Content decides, not dates: the two files' bytes are compared by hash. A cheap look at the files' stamps says when to
  read; every half minute they are read whatever the stamps say, for file systems whose stamps lie.
- A file that is being written isn't judged: both must read the same twice, a moment apart.
- A catalog serves only after its body is in the ledger, so that every charge can name the prices it was made with.
- What can't be used changes nothing. The last good catalog goes on; the log says why, once for each content.
"""

import asyncio
import hashlib
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import structlog

from proxy.core.catalog import Catalog, CatalogHolder
from proxy.core.catalog_files import load_catalog
from proxy.core.yaml_reader import FILE_BYTES_MAX, ConfigError, Problem

__all__ = ["CatalogMetrics", "CatalogReloader", "PutPriceVersion", "ReloadState", "read_catalog"]

SETTLE_SECONDS = 0.2
REREAD_SECONDS = 30.0
# A file's clock ticks in milliseconds and more: a change within the tick of an earlier one may leave the same stamp.
_STAMP_DOUBTED_NS = 2_000_000_000

PutPriceVersion = Callable[[str, str], Awaitable[object]]
"""Stores a body under its version, durably; storing what is there already does nothing."""

log = structlog.get_logger("farebox.catalog")


class CatalogMetrics(Protocol):
    """What a reload tells ``metrics.Metrics``."""

    def catalog_loaded(self, version: str, routes: int) -> None: ...
    def catalog_failed(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ReloadState:
    """What serves and whether the files say the same. For /readyz (which stays at 200) and for metrics."""

    version: str
    """The price version that serves."""
    models: int
    ok: bool
    """Whether the files hold what serves; False while a changed file is refused, or can't be stored."""
    error: str | None
    """Why not: the first problem, and how many more there are."""
    since: datetime
    """Since when ``ok`` and ``version`` have been as they are."""


class CatalogReloader:
    """Owns the swap. ``load`` first, then ``run`` as a task; ``check`` is one look, for tests and for the impatient."""

    def __init__(
        self,
        pricing: Path,
        upstreams: Path,
        put_price_version: PutPriceVersion,
        *,
        metrics: CatalogMetrics | None = None,
        adapt: Callable[[Catalog], Catalog] = lambda catalog: catalog,
        poll_seconds: float = 1.0,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._files = _Files(pricing, upstreams)
        self._put = put_price_version
        self._metrics = metrics
        # What every catalog goes through before it serves; the demo moves all routes to its own upstream. No price may
        # change by it: the stored body is the files'.
        self._adapt = adapt
        self._poll_seconds = poll_seconds
        self._settle_seconds = settle_seconds
        self._judged = ""
        self._holder: CatalogHolder | None = None
        self._state: ReloadState | None = None

    @property
    def holder(self) -> CatalogHolder:
        """Where the current catalog stands."""
        assert self._holder is not None, "load() comes first"
        return self._holder

    @property
    def state(self) -> ReloadState:
        assert self._state is not None, "load() comes first"
        return self._state

    async def load(self) -> CatalogHolder:
        """Read, store and serve the files as they are. Raises ConfigError, or what storing raised: nothing serves."""
        read = await asyncio.to_thread(self._files.read)
        catalog = await asyncio.to_thread(read.catalog)
        await self._put(catalog.version, catalog.body)
        self._holder = CatalogHolder(self._adapt(catalog))
        self._judged = read.digest
        self._loaded(catalog)
        return self._holder

    async def run(self) -> None:
        """Look every ``poll_seconds``, until cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self.check()

    async def check(self) -> bool:
        """Look once. True where another catalog serves afterwards. Raises nothing: a failure becomes the state."""
        try:
            read = await self._settled_change()
            return read is not None and await self._adopt(read)
        except Exception as error:  # noqa: BLE001 - a watcher that dies would freeze the prices without a word
            self._forget()
            self._refused(f"looking at the files failed ({type(error).__name__})", reason=str(error))
            return False

    async def _settled_change(self) -> "_Read | None":
        """The files, where they hold something not yet judged and nobody is writing them."""
        first = await asyncio.to_thread(self._files.read_if_touched)
        if first is None or first.digest == self._judged:
            return None
        await asyncio.sleep(self._settle_seconds)
        second = await asyncio.to_thread(self._files.read)
        if second.digest == first.digest:
            return second
        self._files.distrust()
        return None

    async def _adopt(self, read: "_Read") -> bool:
        try:
            catalog = await asyncio.to_thread(read.catalog)
        except ConfigError as error:
            self._judged = read.digest
            self._refused(_summary(error), problems=[str(problem) for problem in error.problems], more=error.more)
            return False
        try:
            await self._put(catalog.version, catalog.body)
        except Exception as error:  # noqa: BLE001 - whatever the ledger says: not stored, so not served, and tried again
            self._forget()
            self._refused(f"the new prices couldn't be stored ({type(error).__name__})", reason=str(error))
            return False
        self._judged = read.digest
        self.holder.current = self._adapt(catalog)
        self._loaded(catalog)
        return True

    def _forget(self) -> None:
        """Judge anew at the next look whatever the files hold then, also what serves already."""
        self._judged = ""
        self._files.distrust()

    def _loaded(self, catalog: Catalog) -> None:
        before = self._state
        self._state = ReloadState(catalog.version, len(catalog.routes), ok=True, error=None, since=datetime.now(UTC))
        if self._metrics is not None:
            self._metrics.catalog_loaded(catalog.version, len(catalog.routes))
        log.info(
            "catalog_loaded",
            version=catalog.version,
            models=len(catalog.routes),
            version_before=before.version if before else None,
        )

    def _refused(self, error: str, **details: object) -> None:
        state = self.state
        if state.error == error:
            return  # said already: the same failure comes round with every poll
        since = state.since if not state.ok else datetime.now(UTC)
        self._state = replace(state, ok=False, error=error, since=since)
        if self._metrics is not None:
            self._metrics.catalog_failed()
        log.error("catalog_refused", error=error, version_kept=state.version, **details)


def read_catalog(pricing: Path, upstreams: Path) -> Catalog:
    """The catalog of the two files, now; for the CLI. Raises ConfigError, also where a file can't be read."""
    return _Files(pricing, upstreams).read().catalog()


_Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Read:
    """Both files as they were read; a file that couldn't be read is why."""

    names: tuple[str, str]
    contents: tuple[bytes | str, bytes | str]
    digest: str

    def catalog(self) -> Catalog:
        """Raises ConfigError."""
        unreadable = tuple(
            Problem(name, 1, 1, "", content)
            for name, content in zip(self.names, self.contents, strict=True)
            if isinstance(content, str)
        )
        if unreadable:
            raise ConfigError(unreadable)
        return load_catalog(*self.contents, names=self.names)


class _Files:
    """The two files. Its methods do blocking I/O: call them in a thread."""

    def __init__(self, pricing: Path, upstreams: Path) -> None:
        self._paths = (pricing, upstreams)
        self._stamps: tuple[_Stamp | None, ...] | None = None
        self._read_at = 0.0

    def read_if_touched(self) -> _Read | None:
        """Both files, where a stamp changed or half a minute has passed; else None."""
        stamps = tuple(map(_stamp, self._paths))
        if stamps == self._stamps and time.monotonic() - self._read_at < REREAD_SECONDS:
            return None
        return self.read()

    def read(self) -> _Read:
        """Both files, whatever the stamps say."""
        stamps = tuple(map(_stamp, self._paths))
        contents = (_content(self._paths[0]), _content(self._paths[1]))
        fresh = any(stamp and time.time_ns() - stamp[4] < _STAMP_DOUBTED_NS for stamp in stamps)
        self._stamps = None if fresh else stamps
        self._read_at = time.monotonic()
        return _Read((str(self._paths[0]), str(self._paths[1])), contents, _digest(contents))

    def distrust(self) -> None:
        """Read again at the next look."""
        self._stamps = None


def _stamp(path: Path) -> _Stamp | None:
    """What changes when the file, or the link that leads to it, changes."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _content(path: Path) -> bytes | str:
    """The file's bytes, one more than allowed at most; or why there are none."""
    try:
        # A pipe would block for ever, a device might never end.
        if not stat.S_ISREG(path.stat().st_mode):
            return "isn't a regular file"
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        return f"can't be read: {error.strerror or type(error).__name__}"


def _digest(contents: tuple[bytes | str, bytes | str]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        kind, data = ("file", content) if isinstance(content, bytes) else ("error", content.encode())
        digest.update(f"{kind} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def _summary(error: ConfigError) -> str:
    more = len(error.problems) + error.more - 1
    return f"{error.problems[0]}{f' (and {more} more)' if more else ''}"
