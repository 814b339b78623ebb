"""Stripe's own clock: the wall's, plus what a test has let pass. Whole seconds since 1970, as Stripe gives them."""

import time

__all__ = ["Clock"]


class Clock:
    """What ages sessions, idempotency keys and the search's index."""

    def __init__(self) -> None:
        self._ahead_seconds = 0.0

    def now(self) -> int:
        """Seconds since 1970."""
        return int(time.time() + self._ahead_seconds)

    def advance(self, seconds: float) -> None:
        """Let so much time pass at Stripe. Signatures go on being made at the wall's time: see delivery.py."""
        self._ahead_seconds += seconds
