"""Stripe, as far as Farebox speaks to it, on a real loopback socket: for the real stripe-python client.

    with FakeStripe() as fake:
        client = stripe.StripeClient(fake.key, base_addresses={"api": fake.url})
        ...
        fake.checkout.pay(session.id)                   # what customers do
        fake.listen("http://127.0.0.1:8000/webhooks/stripe")
        await fake.deliver_all(seed=7, copies=2)        # what Stripe does

It runs in a thread of its own, so a blocking client in the test's own thread is served. Idempotency keys, errors,
paging and expansion are Stripe's; parameters and fields are held against stripe-python's own declarations, so what
Stripe would refuse as unknown is refused here. ``faults`` says what goes wrong, ``asked`` what came in.
"""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from tests.fakes.stripe.api import Api, Asked
from tests.fakes.stripe.checkout import Checkout
from tests.fakes.stripe.clock import Clock
from tests.fakes.stripe.customers import Behaviour, Customers
from tests.fakes.stripe.delivery import Courier, Delivered, Signed, Turbulence, sign, signed
from tests.fakes.stripe.disputes import Disputes
from tests.fakes.stripe.faults import (
    Delay,
    ErrorAfter,
    ErrorBefore,
    Fault,
    Faults,
    Hold,
    LostReply,
    LostRequest,
    RateLimited,
    Unavailable,
)
from tests.fakes.stripe.idempotency import Keys
from tests.fakes.stripe.invoices import Invoices
from tests.fakes.stripe.payments import Payments
from tests.fakes.stripe.refunds import Refunds
from tests.fakes.stripe.server import Server
from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State
from tests.fakes.stripe.webhooks import Webhooks

__all__ = [
    "Asked", "Behaviour", "Delay", "Delivered", "ErrorAfter", "ErrorBefore", "FakeStripe", "Fault", "Hold", "LostReply",
    "LostRequest", "Object", "RateLimited", "Signed", "Turbulence", "Unavailable", "sign", "signed",
]  # fmt: skip


class FakeStripe:
    """Use as a context manager. ``url`` is FAREBOX_STRIPE_URL; ``key`` and ``secret`` are what goes with it.

    ``customers``, ``checkout``, ``payments``, ``refunds``, ``disputes``, ``invoices`` have what people, banks and
    months do; ``clock`` lets time pass.
    """

    def __init__(self, *, live: bool = False, secret: str = "whsec_of_the_fake", port: int = 0) -> None:
        self.live, self.secret, self._port = live, secret, port
        self.key = f"sk_{'live' if live else 'test'}_ofthefake"
        self.url = ""
        self.clock = Clock()
        self.state = State(self.clock)
        self.faults = Faults()
        self.keys = Keys(self.clock)
        self.customers = Customers(self.state)
        self.payments = Payments(self.state, self.customers)
        self.invoices = Invoices(self.state, self.customers, self.payments)
        self.checkout = Checkout(self.state, self.customers, self.payments, self.invoices)
        self.refunds = Refunds(self.state, self.payments)
        self.disputes = Disputes(self.state, self.payments)
        self.webhooks = Webhooks(self.state)
        self.courier = Courier(self.state, self.webhooks)
        self.api = Api(self.state, self.faults, self.keys, [one for room in self._rooms() for one in room.endpoints()])
        self._server = Server(self.api.answer)

    def __enter__(self) -> "FakeStripe":
        self._server.start(self._port)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.state.on_event.append(lambda event: self._server.call(lambda: self.courier.set_out(event)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.run(self.courier.close()).result()
        self._server.stop()

    def _rooms(self) -> Sequence[Customers | Payments | Checkout | Refunds | Disputes | Invoices | Webhooks]:
        return (
            self.customers,
            self.payments,
            self.checkout,
            self.refunds,
            self.disputes,
            self.invoices,
            self.webhooks,
        )

    @property
    def asked(self) -> list[Asked]:
        """The requests that came in."""
        return self.api.asked

    @property
    def events(self) -> list[Object]:
        """All that was told, oldest first."""
        return self.state.events

    def events_of(self, *kinds: str) -> list[Object]:
        """Those of these types, oldest first."""
        return [event for event in self.events if event["type"] in kinds]

    def object(self, name: str) -> Object:
        """Any object by its id, as it is now."""
        with self.state.lock:
            return dict(self.state.find(name))

    def signed(self, event: Object, *secrets: str, at: int | None = None) -> Signed:
        """An event as it would be posted now, by this fake's secret or those."""
        return signed(event, *(secrets or (self.secret,)), at=at)

    def listen(self, url: str, events: Sequence[str] = ("*",)) -> None:
        """An endpoint for the events of this fake's mode, with its secret."""
        with self.state.lock:
            self.webhooks.add(self.live, url, events, secret=self.secret)

    def deliver_by_itself(self, turbulence: Turbulence | Literal[False] = Turbulence()) -> None:  # noqa: B008 - frozen
        """From now on events go to their endpoints as they happen, as turbulently as that. False: no more."""
        self.courier.begin(turbulence or None)

    async def deliver(self, event: Object | str) -> list[Delivered]:
        """One attempt, for each endpoint."""
        found = self.object(event) if isinstance(event, str) else event
        return await asyncio.wrap_future(self._server.run(self.courier.deliver(found)))

    async def deliver_all(
        self, events: Sequence[Object] | None = None, *, seed: int | None = None, copies: int = 1, at_once: int = 1
    ) -> list[Delivered]:
        """All events, or those: each ``copies`` times, in order or shuffled by the seed, that many at once."""
        whole = list(self.events if events is None else events)
        work = self.courier.deliver_all(whole, seed=seed, copies=copies, at_once=at_once)
        return await asyncio.wrap_future(self._server.run(work))

    async def settled(self, seconds_max: float = 30.0) -> None:
        """When what travels by itself has arrived, or was given up."""
        await asyncio.wait_for(asyncio.wrap_future(self._server.run(self.courier.settled())), seconds_max)

    def settle_now(self, seconds_max: float = 30.0) -> None:
        """``settled`` for a test that isn't a coroutine."""
        self._server.run(self.courier.settled()).result(seconds_max)
