"""Our few calls to Stripe: its synchronous client in a few threads, values of our own out, and its errors named ours.

Every call that makes something carries an idempotency key, so that the client's own retries, and ours after a crash,
do it once. Nothing here runs inside a transaction.

For an object that has no method here: ``await api.call(lambda client: members(client.v1.refunds.retrieve(id)))``.
"""

import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar, cast

import stripe

from proxy.control.billing.errors import StripeAway, StripeError, StripeRefused, StripeUnknown
from proxy.control.billing.stripe_objects import (
    Members,
    PaymentIntent,
    Session,
    members,
    payment_intent,
    session,
)
from proxy.control.billing.threads import Busy, Threads

__all__ = ["StripeApi"]

Result = TypeVar("Result")

THREADS = 8
WAITING_MAX = 64
CONNECT_SECONDS_MAX = 5.0
RETRIES = 2
KEYS_MAX = 4
PAGE = 100

_LIVE_KEYS = ("sk_live_", "rk_live_")


class StripeApi:
    """Stripe, as one secret key sees it: in test mode or in live mode, never both.

    ``url``: another base address than Stripe's, for tests. ``seconds``: how long one attempt may take; the client makes
    up to ``retries`` more. All methods raise StripeAway and StripeRefused.
    """

    def __init__(self, key: str, *, url: str | None = None, seconds: float = 10.0, retries: int = RETRIES) -> None:
        self._key = key
        self.livemode = key.startswith(_LIVE_KEYS)
        timeout = (min(seconds, CONNECT_SECONDS_MAX), seconds)
        self._client = stripe.StripeClient(
            key,
            http_client=stripe.RequestsClient(timeout=timeout, session=cast(Any, _Sessions())),
            max_network_retries=retries,
            base_addresses={"api": url.rstrip("/")} if url else {},
        )
        self._threads = Threads("stripe", count=THREADS, waiting_max=WAITING_MAX)

    def close(self) -> None:
        """No more calls. One that is under way is left to itself."""
        self._threads.close()

    async def call(self, work: Callable[[stripe.StripeClient], Result]) -> Result:
        """What ``work`` makes of the client, from a thread. Its result should hold none of Stripe's objects."""
        try:
            return await self._threads.run(lambda: work(self._client))
        except Busy as error:
            raise StripeAway(f"too many calls to Stripe at once: {error}") from None
        except stripe.StripeError as error:
            raise _translated(error, self._key) from None

    async def once(self, key: str, work: Callable[[stripe.StripeClient, Mapping[str, Any]], Result]) -> Result:
        """``work`` under the idempotency key, for what may be made twice where nobody hears of the first.

        Stripe keeps a failure under its key as it keeps a success, and refuses the key for other parameters (a setting
        was changed meanwhile): then a next key, made of this one, is used. Never for a call that takes money.
        """
        for attempt in range(1, KEYS_MAX):
            options = {"idempotency_key": key if attempt == 1 else f"{key}:{attempt}"}
            try:
                return await self.call(lambda client, options=options: work(client, options))  # type: ignore[misc]
            except StripeAway as away:
                if not away.replayed:
                    raise
            except StripeRefused as refused:
                if refused.code != "idempotency_error":
                    raise
        return await self.call(lambda client: work(client, {"idempotency_key": f"{key}:{KEYS_MAX}"}))

    async def create_customer(self, params: Mapping[str, Any], *, key: str) -> str:
        """A customer's id."""
        return await self.once(
            key,
            lambda client, options: members(client.v1.customers.create(params, options)).text("id"),  # type: ignore[arg-type]
        )

    async def create_session(self, params: Mapping[str, Any], *, key: str) -> Session:
        """A Checkout Session."""
        return await self.once(
            key,
            lambda client, options: session(members(client.v1.checkout.sessions.create(params, options))),  # type: ignore[arg-type]
        )

    async def session(self, id: str) -> Session:
        """A Checkout Session with its PaymentIntent. Raises StripeUnknown."""
        return await self.call(
            lambda client: session(members(client.v1.checkout.sessions.retrieve(id, {"expand": ["payment_intent"]})))
        )

    async def session_of(self, payment_intent: str) -> Session | None:
        """The Checkout Session that the PaymentIntent was made by, with it; None where there is none."""

        def look(client: stripe.StripeClient) -> Session | None:
            found = members(
                client.v1.checkout.sessions.list(
                    {"payment_intent": payment_intent, "limit": 1, "expand": ["data.payment_intent"]}
                )
            ).listed("data")
            return session(found[0]) if found else None

        return await self.call(look)

    async def sessions_of(self, customer: str, *, since: datetime) -> list[Session]:
        """The customer's Checkout Sessions made from then on, newest first, at most a page of them."""

        def look(client: stripe.StripeClient) -> list[Session]:
            created: Any = {"gte": int(since.timestamp())}
            found = client.v1.checkout.sessions.list({"customer": customer, "created": created, "limit": PAGE})
            return [session(item) for item in members(found).listed("data")]

        return await self.call(look)

    async def payment_intent(self, id: str) -> PaymentIntent:
        """A PaymentIntent. Raises StripeUnknown."""
        return await self.call(lambda client: payment_intent(members(client.v1.payment_intents.retrieve(id))))


class _Sessions:
    """A session of the library ``requests`` for each thread, which takes nothing from the environment.

    A proxy there would be asked instead, and the host's line in a .netrc would take the key's place.
    """

    def __init__(self) -> None:
        self._requests: Any = stripe.RequestsClient().requests
        self._local = threading.local()

    def request(self, *arguments: Any, **options: Any) -> Any:
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = self._requests.Session()
            session.trust_env = False
            session.max_redirects = 0
        return session.request(*arguments, **options)


def _translated(error: stripe.StripeError, key: str) -> StripeError:
    """Our name for what Stripe's client raised; a message that repeats the key loses it."""
    message = str(error).replace(key, "sk_...")
    status = error.http_status
    # Odd ones are those that say nothing about the request: 409 is another call under the same idempotency key.
    if isinstance(error, stripe.APIConnectionError | stripe.RateLimitError) or status is None or status in {409, 429}:
        return StripeAway(f"Stripe can't be asked: {message}")
    if status >= 500 or status < 400:
        return StripeAway(f"Stripe answered {status}: {message}", replayed=_replayed(error))
    details = Members(_error_members(error), "error")
    kind = details.text_or_none("type")
    code = error.code or details.text_or_none("code") or (kind if kind == "idempotency_error" else None)
    intent = details.members("payment_intent")
    unknown = status == 404 or code == "resource_missing"
    return (StripeUnknown if unknown else StripeRefused)(
        f"Stripe refused ({status}): {message}",
        status=status,
        code=code,
        decline_code=details.text_or_none("decline_code"),
        param=details.text_or_none("param"),
        payment_intent=intent.text_or_none("id") if intent else None,
    )


def _error_members(error: stripe.StripeError) -> Mapping[str, Any]:
    body = error.json_body
    found = body.get("error") if isinstance(body, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _replayed(error: stripe.StripeError) -> bool:
    headers = {name.lower(): value for name, value in dict(error.headers or {}).items()}
    return headers.get("idempotent-replayed") == "true"
