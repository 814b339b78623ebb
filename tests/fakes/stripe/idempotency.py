"""Idempotency keys as API v1 has them: https://docs.stripe.com/api/idempotent_requests.

The first result is kept, a 500 too, and given to whoever comes with the key again; other parameters under it are
refused; while the first is being answered a second gets a 409. A key may be forgotten after 24 hours: here it is, at
once, so that whoever relies on it longer pays twice in a test and not in production.
"""

from dataclasses import dataclass, field

from tests.fakes.stripe.clock import Clock
from tests.fakes.stripe.errors import Refused, invalid
from tests.fakes.stripe.shapes import Object

__all__ = ["KEPT_SECONDS", "Answer", "Keys"]

KEPT_SECONDS = 24 * 3600
KEY_MAX = 255


@dataclass
class Answer:
    """A status, a body, and headers beyond the usual."""

    status: int
    body: Object
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class _Kept:
    asked: tuple[str, str]
    since: int
    request_id: str
    answer: Answer | None = None


class Keys:
    """The keys of both modes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: dict[tuple[bool, str], _Kept] = {}

    def begin(self, live: bool, key: str, name: str, body: str, request_id: str) -> Answer | None:
        """The answer that the key remembers; None where the request is the first. Raises Refused."""
        if len(key) > KEY_MAX:
            raise invalid("Idempotency keys are 255 characters at most.", stored=False)
        kept = self._kept.get((live, key))
        if kept is None or self._clock.now() - kept.since >= KEPT_SECONDS:
            self._kept[live, key] = _Kept((name, body), self._clock.now(), request_id)
            return None
        if kept.asked[0] != name:
            raise _reused(f"the same endpoint they were first used for ('{name}' vs '{kept.asked[0]}')", key)
        if kept.asked[1] != body:
            raise _reused("the same parameters they were first used with", key)
        if kept.answer is None:
            raise Refused(
                409,
                "idempotency_error",
                "There is currently another in-progress request using this Idempotent Key (that probably means you "
                "submitted twice, and the other request is still going through): "
                f"{key}. Please try again later.",
                code="idempotency_key_in_use",
                stored=False,
            )
        headers = {"idempotent-replayed": "true", "original-request": kept.request_id}
        return Answer(kept.answer.status, kept.answer.body, kept.answer.headers | headers)

    def keep(self, live: bool, key: str, answer: Answer) -> None:
        """The first result."""
        self._kept[live, key].answer = answer

    def drop(self, live: bool, key: str) -> None:
        """As if the key had never been used: the endpoint hadn't begun."""
        del self._kept[live, key]

    def forget(self) -> None:
        """Each key, at once."""
        self._kept.clear()


def _reused(what: str, key: str) -> Refused:
    return Refused(
        400,
        "idempotency_error",
        f"Keys for idempotent requests can only be used with {what}. "
        f"Try using a key other than '{key}' if you meant to execute a different request.",
        stored=False,
    )
