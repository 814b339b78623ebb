"""Comments into a stream whose upstream is silent: what stands between us and the client closes silent connections.

TCP's own keep-alives don't count for load balancers, and half an hour of unseen reasoning is silence. A comment is a
line that every reader of server-sent events skips. It may stand only between two events: never in one, never before
the head, never behind the end, never in an answer that turns out to be no stream.
"""

import asyncio
from collections.abc import Callable

from proxy.gateway.channel import Channel

__all__ = ["COMMENT", "KeepAlive"]

COMMENT = b": keep-alive\n\n"


class KeepAlive:
    """One stream's. ``may_speak`` is asked each time whether a comment may stand here; ``seconds`` 0: never."""

    def __init__(self, channel: Channel, seconds: float, may_speak: Callable[[], bool]) -> None:
        self._channel = channel
        self._seconds = seconds
        self._may_speak = may_speak
        self._loop = asyncio.get_running_loop()
        self._spoken_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The head has been given: silence counts from here."""
        self.spoken()
        if self._seconds:
            self._wait()

    def spoken(self) -> None:
        """The client was just given something."""
        self._spoken_at = self._loop.time()

    def stop(self) -> None:
        """Nothing more comes, or nobody reads it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._seconds = 0

    def _wait(self) -> None:
        self._timer = self._loop.call_at(self._spoken_at + self._seconds, self._look)

    def _look(self) -> None:
        if self._loop.time() >= self._spoken_at + self._seconds:
            # A client that hasn't even taken what is there needs no comment, and must not be sent one for every wait.
            if self._channel.is_empty and self._may_speak():
                self._channel.interject(COMMENT)
            self.spoken()
        self._wait()
