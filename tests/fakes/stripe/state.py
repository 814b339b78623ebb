"""What Stripe remembers: objects of either mode, and the events that tell of them.

Test mode and live mode see nothing of each other. Whoever touches an object holds ``lock``: requests are answered in
the server's thread, and a test acts from its own.
"""

import copy
import secrets
import string
import threading
from collections.abc import Callable, Iterator
from typing import Any

import stripe

from tests.fakes.stripe.clock import Clock
from tests.fakes.stripe.errors import missing
from tests.fakes.stripe.shapes import Object, whole

__all__ = ["State"]

LETTERS = string.ascii_letters + string.digits
API_VERSION = stripe.api_version


class State:
    """The objects by id, each with its mode; ``events`` in the order in which they came to be."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.events: list[Object] = []
        self.on_event: list[Callable[[Object], None]] = []
        """Called with each event as it comes to be, under the lock."""
        self.includable: dict[tuple[str, str], Callable[[Object], Object]] = {}
        """Fields, by kind and name, that an object has only where they are expanded."""
        self.request_id: str | None = None
        self.request_key: str | None = None
        self._objects: dict[str, Object] = {}
        self._by_kind: dict[str, dict[str, Object]] = {}
        self._live: dict[str, bool] = {}
        self._run = secrets.token_hex(4)

    def new_id(self, prefix: str) -> str:
        """Unlike any other's, another fake's too: tests share databases."""
        return f"{prefix}_{self._run}{''.join(secrets.choice(LETTERS) for _ in range(16))}"

    def add(self, resource: type[stripe.StripeObject], prefix: str, live: bool, /, **fields: Any) -> Object:
        """A new object with all the fields of its class."""
        named = {"id": self.new_id(prefix), "created": self.clock.now(), "livemode": live} | fields
        known = {name: value for name, value in named.items() if name in resource.__annotations__}
        assert fields.keys() <= known.keys(), f"{resource.__name__} has no {sorted(fields.keys() - known.keys())}"
        name: str = resource.OBJECT_NAME  # type: ignore[attr-defined]
        optional = {field for kind, field in self.includable if kind == name}
        found = {
            field: value for field, value in whole(resource, object=name, **known).items() if field not in optional
        }
        self._objects[found["id"]] = found
        self._by_kind.setdefault(name, {})[found["id"]] = found
        self._live[found["id"]] = live
        return found

    def get(self, kind: str, name: str, live: bool, *, param: str = "id") -> Object:
        """The object of that kind. Raises Refused (404) where this mode has none."""
        found = self._objects.get(name)
        if found is None or found["object"] != kind or self._live[name] is not live:
            elsewhere = found is not None and found["object"] == kind
            raise missing(kind, name, live, elsewhere=elsewhere, param=param)
        return found

    def find(self, name: str) -> Object:
        """For tests: the object itself, of either mode. KeyError where there is none."""
        return self._objects[name]

    def known(self, name: object) -> Object | None:
        return self._objects.get(name) if isinstance(name, str) else None

    def is_live(self, name: str) -> bool:
        return self._live[name]

    def all(self, kind: str, live: bool | None = None) -> Iterator[Object]:
        """Newest first, as Stripe lists them."""
        for name, found in reversed(list(self._by_kind.get(kind, {}).items())):
            if live in (None, self._live[name]):
                yield found

    def remove(self, name: str) -> None:
        found = self._objects.pop(name)
        del self._by_kind[found["object"]][name], self._live[name]

    def tell(self, kind: str, thing: Object, before: Object | None = None) -> Object:
        """An event: a copy of the object as it is now, and of what it was before where an update is told of."""
        data: Object = {"object": copy.deepcopy(thing)}
        if before is not None:
            data["previous_attributes"] = before
        event = self.add(
            stripe.Event,
            "evt",
            self._live[thing["id"]],
            type=kind,
            data=data,
            api_version=API_VERSION,
            pending_webhooks=0,
            request={"id": self.request_id, "idempotency_key": self.request_key},
        )
        self.events.append(event)
        for heard in self.on_event:
            heard(event)
        return event
