"""Messages out: what happened to accounts, posted to the operator's own endpoint.

Signed as Standard Webhooks (standardwebhooks.com, version v1): ``webhook-id`` is the same at every attempt, so that the
receiver can tell a repetition; ``webhook-signature`` covers id, timestamp and body. Whoever answers 2xx has taken it.
Anything else is tried again over some three days, as that standard proposes, and then given up: `farebox messages`.

The endpoint is the operator's. It is reached without cookies, without proxies from the environment, and redirects are
not followed: who set the address says where messages go, and nobody on the way.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import httpx2
import structlog

from proxy.core.webhook_signing import sign
from proxy.ledger.outbox import Message, Outbox, Waiting
from proxy.ledger.rounds import Rounds

__all__ = ["RETRY_SECONDS", "HttpPost", "MessageSender", "Observer", "Post", "PostFailed"]

log = structlog.get_logger("farebox.messages")

POLL_SECONDS = 5.0
MESSAGES_MAX = 20
"""Claimed, and sent side by side, at once."""
POST_SECONDS = 15.0
LEASE_SECONDS = 60.0
"""Longer than a post may take, with what comes before and after it: then another process may send it."""
RETRY_SECONDS = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Between one attempt and the next: ten attempts in 75 hours, the schedule that Standard Webhooks proposes."""
FORGET_SECONDS = 3_600.0
KEPT_SECONDS = 90 * 86_400.0
STALE_SECONDS = 4 * 86_400.0
"""What was due for so long without anybody trying is not news any more."""


class PostFailed(Exception):
    """The endpoint didn't take it; the message says why, for the list."""


class Post(Protocol):
    """What carries a message to the endpoint. Raises PostFailed."""

    async def __call__(self, body: bytes, headers: Sequence[tuple[str, str]]) -> None: ...


class Observer(Protocol):
    """Is told what became of messages: ``proxy.metrics.Metrics`` is one."""

    def message(self, outcome: str) -> None: ...

    def messages_waiting(self, *, waiting: int, given_up: int, oldest_seconds: float) -> None: ...


class HttpPost:
    """``Post`` over httpx2's transport: the client above it would keep cookies and could follow redirects."""

    def __init__(self, url: str, *, post_seconds: float = POST_SECONDS) -> None:
        self._url = httpx2.URL(url)
        self._seconds = post_seconds
        limits = httpx2.Limits(max_connections=MESSAGES_MAX, max_keepalive_connections=2, keepalive_expiry=30.0)
        # trust_env: neither proxies nor certificates come from the environment.
        self._transport = httpx2.AsyncHTTPTransport(
            verify=httpx2.create_ssl_context(trust_env=False), trust_env=False, limits=limits
        )

    async def __call__(self, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
        request = httpx2.Request(
            "POST",
            self._url,
            headers=[*headers, ("user-agent", "farebox")],
            content=body,
            extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self._seconds)},
        )
        try:
            async with asyncio.timeout(self._seconds):
                response = await self._transport.handle_async_request(request)
        except TimeoutError:
            raise PostFailed(f"no answer within {self._seconds:g} s") from None
        except (httpx2.TransportError, OSError) as error:
            raise PostFailed(f"{type(error).__name__}: {error}") from error
        # What it says beside the status is nobody's; unread, it costs this connection at most.
        await response.aclose()
        if not 200 <= response.status_code < 300:
            hint = ": redirects are not followed" if 300 <= response.status_code < 400 else ""
            raise PostFailed(f"HTTP {response.status_code}{hint}")

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.aclose()


class MessageSender:
    """Sends what waits in the outbox, in a loop of every process; without a target it only tidies up.

    Each message is taken by one process for a minute. One that dies with it lets it be sent by another, maybe twice.
    """

    def __init__(
        self,
        outbox: Outbox,
        post: Post | None,
        keys: Sequence[bytes] = (),
        *,
        observe: Observer,
        poll_seconds: float = POLL_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = outbox
        self._post = post
        self._keys = keys
        self._observe = observe
        self._clock = clock
        self._forget_at = 0.0
        self._rounds = Rounds(self.round, seconds=poll_seconds, complaint="messages could not be sent")

    def start(self) -> None:
        """Begin; the first round comes soon."""
        self._rounds.start()

    async def stop(self) -> None:
        """End. Messages on their way may have arrived or not: they are sent again."""
        await self._rounds.stop()

    async def round(self) -> int:
        """Send what is due; how many messages were tried. Raises LedgerUnavailable."""
        if (now := time.monotonic()) >= self._forget_at:
            # Before the first claim: what nobody sent while nobody listened isn't sent now.
            await self._outbox.forget(age_seconds=KEPT_SECONDS, stale_seconds=STALE_SECONDS)
            self._forget_at = now + FORGET_SECONDS
        tried = 0
        while (post := self._post) is not None:
            claimed = await self._outbox.claim(MESSAGES_MAX, lease_seconds=LEASE_SECONDS)
            sent = await asyncio.gather(*(self._send(message, post) for message in claimed), return_exceptions=True)
            for failure in sent:
                if isinstance(failure, BaseException):
                    raise failure
            tried += len(claimed)
            if len(claimed) < MESSAGES_MAX:
                break
        waiting: Waiting = await self._outbox.waiting()
        self._observe.messages_waiting(
            waiting=waiting.messages, given_up=waiting.given_up, oldest_seconds=waiting.oldest_seconds
        )
        return tried

    async def _send(self, message: Message, post: Post) -> None:
        try:
            await self._post_signed(message, post)
        except PostFailed as error:
            await self._failed(message, str(error))
        except Exception as error:
            # Nothing that we know of; tried for ever it would be worse than given up.
            log.error("a message could not be posted", message=message.webhook_id, exc_info=error)
            await self._failed(message, f"{type(error).__name__}: {error}")
        else:
            await self._outbox.delivered(message.id)
            self._observe.message("delivered")

    async def _post_signed(self, message: Message, post: Post) -> None:
        message_id, timestamp, body = message.webhook_id, int(self._clock()), message.payload.encode()
        headers = [
            ("content-type", "application/json"),
            ("webhook-id", message_id),
            ("webhook-timestamp", str(timestamp)),
            ("webhook-signature", sign(self._keys, message_id, timestamp, body)),
        ]
        await post(body, headers)

    async def _failed(self, message: Message, reason: str) -> None:
        again = RETRY_SECONDS[message.attempts - 1] if message.attempts <= len(RETRY_SECONDS) else None
        if again is not None:
            # So that what failed together doesn't come back together.
            await self._outbox.failed(message, reason, again_seconds=again * random.uniform(1.0, 1.1))  # noqa: S311
            self._observe.message("failed")
            return
        await self._outbox.failed(message, reason, again_seconds=None)
        self._observe.message("given_up")
        log.error(
            "a message was given up; `farebox messages resend` sends it again",
            message=message.webhook_id,
            type=message.type,
            account=str(message.account_id),
            reason=reason,
        )
