"""Events on their way: signed by stripe's own helper, and delivered as they are, twice, late, out of order, or at last.

Each attempt is signed anew at the wall's time, as Stripe does, whatever the fake's clock says: the receiver's clock is
the wall's.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2
from stripe import WebhookSignature

from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State
from tests.fakes.stripe.webhooks import Webhooks

__all__ = ["Courier", "Delivered", "Signed", "Turbulence", "sign", "signed"]

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Signed:
    """A webhook's body, and its headers."""

    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Delivered:
    """What the receiver said to one attempt. ``status`` 0: it couldn't be reached, or didn't answer."""

    event: str
    url: str
    status: int
    text: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Turbulence:
    """How events travel by themselves: each that is told waits for up to ``delay_seconds_max``, so that they pass one
    another; ``duplicates`` is the chance of a second copy, ``lost`` that of none at all. One that the receiver doesn't
    take comes again up to ``retries`` times, after ``retry_seconds``, doubled each time."""

    seed: int = 0
    delay_seconds_max: float = 0.0
    duplicates: float = 0.0
    lost: float = 0.0
    retries: int = 8
    retry_seconds: float = 0.05


def signed(event: Object, *secrets: str, at: int | None = None) -> Signed:
    """An event as Stripe would post it, now. Several secrets: each signs, as while one is being rotated."""
    return sign(json.dumps(event, indent=2), *secrets, at=at)


def sign(payload: str, *secrets: str, at: int | None = None) -> Signed:
    """Any body, with Stripe's headers."""
    at = int(time.time()) if at is None else at
    headers = [WebhookSignature.generate_signature_header(payload, one, at) for one in secrets]
    header = ",".join([headers[0], *(one.partition(",")[2] for one in headers[1:])])
    return Signed(
        payload.encode(),
        {
            "content-type": "application/json; charset=utf-8",
            "user-agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
            "stripe-signature": header,
        },
    )


@dataclass
class Courier:
    """Takes events to the endpoints that want them. Its coroutines run in the fake's loop."""

    state: State
    webhooks: Webhooks
    turbulence: Turbulence | None = None
    """None: nothing travels by itself."""
    attempts: list[Delivered] = field(default_factory=list)
    _ways: set[asyncio.Task[None]] = field(default_factory=set)
    _random: random.Random = field(default_factory=random.Random)
    _client: httpx2.AsyncClient | None = None

    def begin(self, turbulence: Turbulence | None) -> None:
        """From now on events travel so."""
        self.turbulence = turbulence
        self._random = random.Random(turbulence.seed if turbulence else 0)

    def set_out(self, event: Object) -> None:
        """In the fake's loop: an event that was just told."""
        if self.turbulence is None:
            return
        for endpoint in self.webhooks.subscribed(event):
            copies = (self._random.random() >= self.turbulence.lost) + (
                self._random.random() < self.turbulence.duplicates
            )
            for _ in range(copies):
                delay = self._random.random() * self.turbulence.delay_seconds_max
                task = asyncio.ensure_future(self._travel(event, endpoint, delay, self.turbulence))
                self._ways.add(task)
                task.add_done_callback(self._ways.discard)

    async def settled(self) -> None:
        """When nothing is under way any more."""
        while self._ways:
            await asyncio.wait(self._ways)

    async def deliver(self, event: Object) -> list[Delivered]:
        """One attempt at each endpoint that wants it."""
        return [await self._attempt(event, one) for one in self.webhooks.subscribed(event)]

    async def deliver_all(
        self, events: Sequence[Object], *, seed: int | None, copies: int, at_once: int
    ) -> list[Delivered]:
        """Each event ``copies`` times, shuffled by the seed (None: in order), that many at once."""
        whole = [event for event in events for _ in range(copies)]
        if seed is not None:
            random.Random(seed).shuffle(whole)
        limit = asyncio.Semaphore(at_once)

        async def one(event: Object) -> list[Delivered]:
            async with limit:
                return await self.deliver(event)

        return [result for results in await asyncio.gather(*map(one, whole)) for result in results]

    async def _travel(self, event: Object, endpoint: Object, delay: float, turbulence: Turbulence) -> None:
        await asyncio.sleep(delay)
        for attempt in range(turbulence.retries + 1):
            if (await self._attempt(event, endpoint)).ok:
                return
            await asyncio.sleep(turbulence.retry_seconds * 2**attempt)

    async def _attempt(self, event: Object, endpoint: Object) -> Delivered:
        if self._client is None:
            self._client = httpx2.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False)
        post = signed(event, self.webhooks.secrets[endpoint["id"]])
        try:
            answer = await self._client.post(endpoint["url"], content=post.body, headers=post.headers)
            result = Delivered(event["id"], endpoint["url"], answer.status_code, answer.text)
        except httpx2.HTTPError as e:
            result = Delivered(event["id"], endpoint["url"], 0, repr(e))
        self.attempts.append(result)
        if result.ok:
            self.webhooks.delivered.setdefault(event["id"], set()).add(endpoint["id"])
        return result

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
