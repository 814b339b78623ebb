"""What goes wrong between us and Stripe, and at Stripe: said beforehand for a request, or drawn from a seed.

fake.faults.on("POST /v1/refunds", LostReply())
fake.faults.seeded(7, chance=0.2, among=(Unavailable(), LostReply()))
"""

import fnmatch
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = [
    "Delay", "ErrorAfter", "ErrorBefore", "Fault", "Faults", "Hold", "LostReply", "LostRequest",
    "RateLimited", "Unavailable",
]  # fmt: skip


@dataclass(frozen=True)
class Unavailable:
    """503 before the endpoint begins: nothing is done, and no key remembers it."""


@dataclass(frozen=True)
class ErrorBefore:
    """500 once it has begun, before its effect: the key remembers it, and gives it to whoever asks again."""


@dataclass(frozen=True)
class ErrorAfter:
    """500 after its effect: what was asked for is done, and the key remembers the 500."""


@dataclass(frozen=True)
class LostRequest:
    """The connection ends before the request arrives."""


@dataclass(frozen=True)
class LostReply:
    """Done, and remembered by its key; then the connection ends without an answer."""


@dataclass(frozen=True)
class RateLimited:
    """429: nothing is done."""


@dataclass(frozen=True)
class Delay:
    """It takes so long. Meanwhile the key is in use: a second request with it gets a 409. ``after``: once it is done,
    so that others see the effect before the caller has the answer."""

    seconds: float
    after: bool = False


@dataclass(frozen=True)
class Hold:
    """As a delay, until a test sets the event. ``reached`` is set when it has begun."""

    until: threading.Event
    after: bool = False
    reached: threading.Event = field(default_factory=threading.Event, compare=False)


Fault = Hold | Unavailable | ErrorBefore | ErrorAfter | LostRequest | LostReply | RateLimited | Delay


@dataclass
class _Said:
    pattern: str
    fault: Fault
    times: int


class Faults:
    """Which fault the next request meets. ``hit``: those that were met, with the request's name."""

    def __init__(self) -> None:
        self.hit: list[tuple[str, Fault]] = []
        self._said: list[_Said] = []
        self._random: random.Random | None = None
        self._chance = 0.0
        self._pattern = "*"
        self._among: Sequence[Fault] = ()

    def on(self, pattern: str, fault: Fault, times: int = 1) -> None:
        """The next requests of this name meet it: ``POST /v1/refunds``, or with * ``GET /v1/checkout/sessions/*``."""
        self._said.append(_Said(pattern, fault, times))

    def seeded(self, seed: int, chance: float, among: Sequence[Fault], *, pattern: str = "*") -> None:
        """From now on each request of such a name meets one of them with this chance."""
        self._random, self._chance, self._among, self._pattern = random.Random(seed), chance, among, pattern

    def clear(self) -> None:
        self._said.clear()
        self._random = None

    def draw(self, name: str) -> Fault | None:
        """What a request of this name meets now."""
        fault = self._draw(name)
        if fault is not None:
            self.hit.append((name, fault))
        return fault

    def _draw(self, name: str) -> Fault | None:
        for said in self._said:
            if said.times > 0 and fnmatch.fnmatchcase(name, said.pattern):
                said.times -= 1
                return said.fault
        if self._random is None or not fnmatch.fnmatchcase(name, self._pattern):
            return None
        return self._random.choice(self._among) if self._random.random() < self._chance else None
