"""The API keys of the upstreams: read where config/upstreams.yaml says they are, at the time of the request.

A key file is looked at again at most once a second and read again when it changed, so that a key can be replaced while
requests run. A value is never logged and stands in no message; what is missing is named by its variable or its file.
"""

import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy.core.catalog import Catalog, Upstream
from proxy.core.errors import Unavailable

__all__ = ["UpstreamKeys"]

LOOK_SECONDS = 1.0
_FILE_BYTES_MAX = 16 * 1024
# What can stand in a header without changing its meaning.
_KEY = re.compile(r"[!-~]{1,4096}")

_Stamp = tuple[int, int, int, int, int]


@dataclass(slots=True)
class _File:
    """A key file as it was last read: the key, or why there is none."""

    looked_at: float
    stamp: _Stamp | None
    key: str | None
    problem: str


class UpstreamKeys:
    """``environment`` is read live. A relative key file is looked for in ``directory``, that of upstreams.yaml."""

    def __init__(
        self, environment: Mapping[str, str], directory: Path, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._environment = environment
        self._directory = directory
        self._monotonic = monotonic
        self._files: dict[str, _File] = {}

    def key(self, upstream: Upstream) -> str | None:
        """The key to send now; None where the upstream wants none. Raises Unavailable, naming where one is missing."""
        key, problem = self._look(upstream)
        if problem:
            raise Unavailable(f"This model can't be served now: {problem}.", code="upstream_key_missing")
        return key

    def has_key(self, upstream: Upstream) -> bool:
        """Whether the upstream can be called now: its key can be had, or it wants none."""
        return not self._look(upstream)[1]

    def missing(self, upstream: Upstream) -> str | None:
        """Why there is no key now, naming the variable or the file; None where all is well."""
        return self._look(upstream)[1] or None

    def missing_routes(self, catalog: Catalog) -> dict[str, str]:
        """The models that can't be served now, each with the reason."""
        reasons = {upstream.name: self.missing(upstream) for upstream in catalog.upstreams.values()}
        found = ((model, reasons[route.upstream.name]) for model, route in catalog.routes.items())
        return {model: reason for model, reason in found if reason is not None}

    def _look(self, upstream: Upstream) -> tuple[str | None, str]:
        """The key, or a problem; neither where the upstream wants no key."""
        if upstream.api_key_env is not None:
            return _checked(
                self._environment.get(upstream.api_key_env, ""), f"the environment variable {upstream.api_key_env}"
            )
        if upstream.api_key_file is not None:
            file = self._file(upstream.api_key_file)
            return file.key, file.problem
        return None, ""

    def _file(self, name: str) -> _File:
        now = self._monotonic()
        known = self._files.get(name)
        if known is not None and now - known.looked_at < LOOK_SECONDS:
            return known
        path = self._directory / name
        stamp = _stamp(path)
        if known is not None and known.stamp is not None and known.stamp == stamp:
            known.looked_at = now
            return known
        key, problem = (None, f"the key file {name} is missing") if stamp is None else _read(path, name)
        read = self._files[name] = _File(now, _settled(stamp), key, problem)
        return read


def _stamp(path: Path) -> _Stamp | None:
    """What changes when the file changes; None where there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _settled(stamp: _Stamp | None) -> _Stamp | None:
    # A file's clock ticks in milliseconds and more: a second change within the tick would leave the same stamp. So a
    # file that changed just now is read again next time, whatever its stamp says.
    return None if stamp is None or time.time_ns() - stamp[4] < 2_000_000_000 else stamp


def _read(path: Path, name: str) -> tuple[str | None, str]:
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES_MAX)
    except OSError as error:
        return None, f"the key file {name} can't be read ({error.strerror})"
    return _checked(content.decode("latin-1"), f"the key file {name}")


def _checked(value: str, where: str) -> tuple[str | None, str]:
    key = value.strip()
    if not key:
        return None, f"{where} is not set" if where.startswith("the environment") else f"{where} is empty"
    if not _KEY.fullmatch(key):
        return None, f"{where} doesn't hold a key: a key is one line of visible ASCII characters"
    return key, ""
