"""Health: /healthz says that the process lives, /readyz whether it should get requests, and if not, why not.

/readyz answers 503 unless every check passes, and names each. A refused pricing file is shown but leaves it at 200: the
last good catalog serves, and taking a working proxy out of service over a typing error would be the worse failure.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

__all__ = ["CatalogStatus", "Check", "Health", "Problem", "health_routes"]

CHECK_SECONDS_MAX = 2.0
FRESH_SECONDS = 0.5

_NOT_STORED = {"cache-control": "no-store"}


class Problem(Exception):
    """A check failed; the message is shown to anyone who asks, so it holds no address and no credential."""


Check = Callable[[], Awaitable[None]]
"""Returns if all is well and raises Problem if not. Any other exception shows by its class alone."""


@dataclass(frozen=True, slots=True)
class CatalogStatus:
    """The catalog that serves, and why the files on disk don't, where they were refused."""

    version: str
    models: int
    error: str | None = None


class Health:
    """Runs the checks. Their outcome is kept for half a second, so that nobody can tire the database by asking."""

    def __init__(
        self,
        checks: Mapping[str, Check],
        catalog: Callable[[], CatalogStatus],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checks = dict(checks)
        self._catalog = catalog
        self._monotonic = monotonic
        self._lock = asyncio.Lock()
        self._outcome: dict[str, Any] = {}
        self._looked_at = float("-inf")

    async def report(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests are welcome, and the body that says why."""
        async with self._lock:
            if self._monotonic() - self._looked_at >= FRESH_SECONDS:
                outcomes = await asyncio.gather(*(_outcome(check) for check in self._checks.values()))
                self._outcome = dict(zip(self._checks, outcomes, strict=True))
                self._looked_at = self._monotonic()
            outcome = self._outcome
        ready = all(check["ok"] for check in outcome.values())
        return ready, {"ready": ready, "checks": outcome, "catalog": _catalog_view(self._catalog())}


def health_routes(health: Health) -> list[BaseRoute]:
    """/healthz and /readyz. Neither asks for a key."""

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"ok": True}, headers=_NOT_STORED)

    async def readyz(_request: Request) -> Response:
        ready, body = await health.report()
        return JSONResponse(body, 200 if ready else 503, headers=_NOT_STORED)

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


async def _outcome(check: Check) -> dict[str, Any]:
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            await check()
    except Problem as problem:
        return {"ok": False, "problem": str(problem)}
    except TimeoutError:
        return {"ok": False, "problem": f"no answer within {CHECK_SECONDS_MAX:g} s"}
    except Exception as error:  # noqa: BLE001 - whatever a check dies of is its outcome
        return {"ok": False, "problem": type(error).__name__}
    return {"ok": True}


def _catalog_view(status: CatalogStatus) -> dict[str, Any]:
    view: dict[str, Any] = {"ok": status.error is None, "version": status.version, "models": status.models}
    if status.error is not None:
        view["problem"] = status.error
    return view
