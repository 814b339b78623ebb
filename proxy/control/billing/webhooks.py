"""``POST /webhooks/stripe``: what Stripe tells us, as a verified hint.

The raw body's signature is checked before anything else is read of it. Then: the event is committed, the object that it
names is fetched outside any transaction and applied, the event is marked processed, and only then it is answered 2xx.
Anything else is a 4xx, where Stripe (or who claims to be Stripe) sent what must not be believed, or a 5xx, after which
the event stays unprocessed and is resumed: by Stripe's next delivery, and by our own loop (``resume.py``).
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.billing.errors import StripeAway, StripeError
from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.events import EventDesk, outcome_without_work
from proxy.control.billing.signatures import check_signature
from proxy.control.refusals import ledger_refusals
from proxy.core.errors import Conflict, InvalidRequest, Refusal, TooLarge, Unavailable
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.stripe_events import Event, EventLedger, Taken
from proxy.metrics import Metrics

__all__ = ["BODY_BYTES_MAX", "PATH", "WebhookEndpoint", "webhook_routes"]

log = structlog.get_logger("farebox.billing")

PATH = "/webhooks/stripe"
BODY_BYTES_MAX = 512 * 1024
RECEIVE_SECONDS_MAX = 10.0

_PRIVATE = {"cache-control": "no-store"}
_CLOSE = {"connection": "close"}
_ID = re.compile(r"[A-Za-z0-9_]{1,255}\Z", re.ASCII)
_TYPE = re.compile(r"[a-z0-9_.]{1,200}\Z", re.ASCII)
# Some thousand years, so that no date overflows.
_CREATED_MAX = 2**35


@dataclass(frozen=True, slots=True)
class Received:
    """A verified webhook. ``account``: the connected account that it came from, None: our own."""

    event: Event
    account: str | None


class WebhookEndpoint:
    """The endpoint. ``secrets``: one of them must have signed; ``livemode``: the mode of our own key."""

    def __init__(
        self,
        ledger: EventLedger,
        desk: EventDesk,
        *,
        secrets: Sequence[str],
        livemode: bool,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._desk = desk
        self._secrets = tuple(secrets)
        self._livemode = livemode
        self._metrics = metrics
        self._clock = clock

    async def handle(self, request: Request) -> Response:
        """One delivery. Raises refusals."""
        try:
            received = await self._received(request)
        except Refusal as refusal:
            self._metrics.stripe_event("refused")
            log.warning("a webhook was refused", code=refusal.code, reason=refusal.message)
            raise
        event = received.event
        outcome = outcome_without_work(event.type, received.account)
        with ledger_refusals():
            taken = await self._ledger.take(event, outcome=outcome)
        if taken is Taken.CONFLICT:
            self._metrics.stripe_event("refused")
            log.error("a webhook's id stands for another event", event_id=event.id, type=event.type)
            raise Conflict("This event's id came before, with another type or object.", code="event_conflict")
        if taken is Taken.TAKEN:
            outcome = await self._process(event)
        elif outcome is not None:
            self._metrics.stripe_event(outcome)
        else:
            self._metrics.stripe_event("known")
        return JSONResponse({"received": True, "event": event.id, "outcome": outcome or "known"}, headers=_PRIVATE)

    async def _received(self, request: Request) -> Received:
        body = await _body(request)
        headers = request.headers.getlist("stripe-signature")
        check_signature(body, headers, secrets=self._secrets, now=self._clock())
        received = _read(body)
        if received.event.livemode != self._livemode:
            theirs, ours = ("live", "test") if received.event.livemode else ("test", "live")
            raise InvalidRequest(
                f"This is an event of {theirs} mode, and this Farebox serves {ours} mode (FAREBOX_STRIPE_KEY).",
                code="livemode_mismatch",
            )
        return received

    async def _process(self, event: Event) -> str:
        try:
            return await self._desk.process(event)
        except Exception as error:
            away = isinstance(error, LedgerUnavailable | StripeAway | TimeoutError)
            if not isinstance(error, LedgerUnavailable | StripeError | TimeoutError):
                log.error("a webhook could not be applied", event_id=event.id, type=event.type, exc_info=error)
            raise Unavailable(
                "The event was received and could not be applied yet: "
                f"{'the ledger or Stripe could not be asked' if away else 'the log says why'}. It is tried again.",
                code="event_unprocessed",
                headers={"retry-after": "60"},
            ) from error


def webhook_routes(endpoint: WebhookEndpoint) -> list[BaseRoute]:
    """The route above."""
    return [Route(PATH, endpoint.handle, methods=["POST"])]


async def _body(request: Request) -> bytes:
    """The body's bytes, as they came. Raises TooLarge, or InvalidRequest: encoded, late, or cut off."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise InvalidRequest("Webhooks come as they are, not encoded.", code="content_encoding_unsupported")
    too_large = TooLarge(f"The body is above {BODY_BYTES_MAX} bytes.", code="body_too_large", headers=_CLOSE)
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or len(declared) > 18 or int(declared) > BODY_BYTES_MAX:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(RECEIVE_SECONDS_MAX):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise too_large
    except TimeoutError:
        raise InvalidRequest(
            f"The body didn't arrive within {RECEIVE_SECONDS_MAX:g} s.", code="request_timeout", headers=_CLOSE
        ) from None
    except ClientDisconnect:
        raise InvalidRequest("The body was cut off.", code="request_cut_off", headers=_CLOSE) from None
    return bytes(body)


def _read(body: bytes) -> Received:
    """The event in a body whose signature was right. Raises InvalidRequest."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        _refuse("it is not JSON")
    if not isinstance(value, dict):
        _refuse("it is not an object")
    if str(value.get("object", "")).startswith("v2."):
        raise InvalidRequest(
            "This is a thin event. Farebox takes snapshot events: make the endpoint with `farebox stripe setup`, or "
            "choose the payload style 'Snapshot' for the event destination.",
            code="thin_event",
        )
    if value.get("object") != "event":
        _refuse("its object is no event")
    livemode, created = value.get("livemode"), value.get("created")
    if not isinstance(livemode, bool):
        _refuse("livemode must be true or false")
    if not isinstance(created, int) or isinstance(created, bool) or not 0 <= created < _CREATED_MAX:
        _refuse("created must be a Unix time")
    event_id, event_type = _matching(value, "id", _ID), _matching(value, "type", _TYPE)
    about = _about(value, event_type)
    account = value.get("account")
    if account is not None and not isinstance(account, str):
        _refuse("account must be an id")
    event = Event(event_id, event_type, livemode, about, datetime.fromtimestamp(created, UTC))
    return Received(event, account)


def _about(value: dict[str, Any], event_type: str) -> str:
    """The id of the object that the event is about, which must be of the kind that its type says. "" where none is
    needed: not all that Stripe tells of has an id."""
    data = value.get("data")
    about = data.get("object") if isinstance(data, dict) else None
    if not isinstance(about, dict):
        _refuse("it has no data.object")
    subject = EVENT_TYPES.get(event_type)
    if subject is None:
        found = about.get("id")
        return found if isinstance(found, str) and _ID.match(found) else ""
    if about.get("object") != subject:
        _refuse(f"{event_type} is about a {subject.value}, and its data.object is none")
    return _matching(about, "id", _ID)


def _matching(value: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not pattern.match(found):
        _refuse(f"its {name} is missing, or has characters that no {name} has")
    return found


def _refuse(problem: str) -> NoReturn:
    raise InvalidRequest(f"The body is no event of Stripe's: {problem}.", code="event_malformed")
