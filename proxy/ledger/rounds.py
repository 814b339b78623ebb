"""Rounds: something that is done again and again while the process runs, whatever becomes of one time.

A loop that dies dies without a word, and what it did is missed only much later. So no failure ends one, nor does a
cancellation that wasn't meant for it: one that reached what it waited for.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

import asyncpg
import structlog

from proxy.ledger.errors import LedgerError

__all__ = ["EXPECTED", "Rounds", "was_cancelled"]

log = structlog.get_logger("farebox.rounds")

EXPECTED: tuple[type[Exception], ...] = (LedgerError, asyncpg.PostgresError, OSError)
"""The ledger, or the way to it."""


class Rounds:
    """Calls ``do`` about every ``seconds`` (some less, so that the workers' rounds don't fall together).

    ``complaint``: what the log says of a round that failed. ``at_once``: the first one comes without a pause.
    ``expected``: failures that are told without a traceback, since they aren't this program's.
    """

    def __init__(
        self,
        do: Callable[[], Awaitable[object]],
        *,
        seconds: float,
        complaint: str,
        at_once: bool = False,
        expected: tuple[type[Exception], ...] = EXPECTED,
    ) -> None:
        self._do = do
        self._seconds = seconds
        self._complaint = complaint
        self._at_once = at_once
        self._expected = expected
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End. A round that is under way is cut off where it waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        if not self._at_once:
            await self._pause()
        while True:
            try:
                await self._do()
            except asyncio.CancelledError as error:
                if was_cancelled():
                    raise
                log.error(self._complaint, reason=repr(error), exc_info=error)
            except Exception as error:
                log.warning(
                    self._complaint,
                    reason=str(error) or repr(error),
                    exc_info=None if isinstance(error, self._expected) else error,
                )
            await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(self._seconds * random.uniform(0.5, 1.0))  # noqa: S311 - jitter


def was_cancelled() -> bool:
    """Of a CancelledError that was caught: whether it was the current task that somebody wants to end."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
