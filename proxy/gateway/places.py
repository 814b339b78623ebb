"""Places: how many calls of one API key run at once in this process.

A call takes its place once its key is known, before its body is read, and has it until its exchange has ended: an
answer that is read on for a client that left still has one. So one customer's crowd can't take every stream, and every
drain, from the others. Each process counts for itself: this is about its memory and sockets, not about money.
"""

from collections.abc import Callable
from types import TracebackType

from proxy.core.errors import TooManyRequests

__all__ = ["Place", "Places"]

RETRY_AFTER_SECONDS = 1


class Places:
    """``calls_max``: for each key, 0 is no limit. ``open_of``: a key's open exchanges, which others count already."""

    def __init__(self, calls_max: int, open_of: Callable[[str], int]) -> None:
        self.calls_max = calls_max
        self.open_of = open_of
        self.arriving: dict[str, int] = {}
        """Calls of each key whose exchange isn't open yet."""

    def place(self) -> "Place":
        """A place for one call, not yet taken."""
        return Place(self)


class Place:
    """One call's, from ``take`` to ``pass_on`` or the end of the ``with``."""

    __slots__ = ("_key_id", "_places")

    def __init__(self, places: Places) -> None:
        self._places = places
        self._key_id: str | None = None

    def take(self, key_id: str) -> None:
        """Raises TooManyRequests where the key has as many calls as it may."""
        places = self._places
        arriving = places.arriving.get(key_id, 0)
        if 0 < places.calls_max <= arriving + places.open_of(key_id):
            raise TooManyRequests(
                f"This API key has {places.calls_max} calls running, which is as many as may run at once "
                "(FAREBOX_KEY_CALLS_MAX). Retry when some of them are done.",
                code="concurrency_limit",
                headers={"retry-after": str(RETRY_AFTER_SECONDS)},
            )
        places.arriving[key_id] = arriving + 1
        self._key_id = key_id

    def pass_on(self) -> None:
        """The call's exchange is open and counts for it from now on; or the call is over. More than once is once."""
        key_id, self._key_id = self._key_id, None
        if key_id is not None:
            left = self._places.arriving[key_id] - 1
            if left:
                self._places.arriving[key_id] = left
            else:
                del self._places.arriving[key_id]

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pass_on()
