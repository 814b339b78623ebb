"""The door: what every request meets first and every answer last, whatever route it takes.

It gives the request its id, forgives the usual slips in ``base_url`` (no ``/v1``, or two), answers CORS, and turns
whatever is raised into one OpenAI-shaped error. Plain ASGI: an answer that streams is never buffered here.
"""

import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import structlog
from starlette.exceptions import HTTPException

from proxy.core.errors import MethodNotAllowed, NotFound, Refusal
from proxy.core.keys import without_keys
from proxy.gateway.headers import Headers
from proxy.gateway.ids import new_request_id
from proxy.logs import RequestLine, log_request
from proxy.metrics import ROUTES, Metrics

__all__ = ["App", "Call", "Front", "Message", "Receive", "Scope", "Send", "canonical_path", "send_json"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


log = structlog.get_logger("farebox.front")

CHAT_PATH = "/v1/chat/completions"

# First path segments that are ours, so that a base_url without /v1 works.
_OURS = frozenset(
    {
        "chat", "completions", "credits", "embeddings", "messages", "models", "receipts", "responses", "transactions",
        "usage",
    }
)  # fmt: skip

# Paths of the OpenAI API that clients try and Farebox doesn't serve, with what to do instead.
_INSTEAD = {
    "/v1/responses": (
        "Farebox doesn't serve /v1/responses. Use chat completions: client.chat.completions.create(...) in the OpenAI "
        "SDKs, openai.chat('model') in the AI SDK (its plain openai('model') posts to /v1/responses)."
    ),
    "/v1/completions": "Farebox doesn't serve /v1/completions. Use /v1/chat/completions.",
}

_EXPOSED = (
    b"x-request-id, x-farebox-output-cap, x-farebox-receipt, x-upstream-request-id, x-should-retry, retry-after, "
    b"retry-after-ms, idempotent-replayed"
)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,4096}\Z")
_SLASHES = re.compile(r"/{2,}")


@dataclass(frozen=True, slots=True)
class Call:
    """One request at the door: its id, and the headers that its answer carries whatever it is (x-request-id, CORS)."""

    id: UUID
    headers: Headers
    facts: dict[str, Any] = field(default_factory=dict)
    """What the route learned, for the request's line in the log: members of ``logs.RequestLine``."""


ChatHandler = Callable[[Scope, Receive, Send, Call], Awaitable[None]]


class Front:
    """An ASGI app around the chat handler and the router of everything else.

    ``chat`` writes its answer's headers itself, ``call.headers`` among them; ``router``'s answers get them added. Both
    raise ``Refusal`` for an error. ``cors_origins``: ``*`` is any. ``exhausted_status``: what "out of credits" answers.
    """

    def __init__(
        self,
        chat: ChatHandler,
        router: App,
        *,
        metrics: Metrics,
        cors_origins: Iterable[str] = ("*",),
        exhausted_status: int = 402,
    ) -> None:
        self._chat = chat
        self._router = router
        self._metrics = metrics
        self._origins = frozenset(origin.encode() for origin in cors_origins)
        self._exhausted_status = exhausted_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        path = scope["path"] = canonical_path(scope["path"])
        # Starlette's router reads the root-relative path from here as well.
        scope["raw_path"] = path.encode()
        call = self._open(scope, path)
        scope.setdefault("state", {})["request_id"] = str(call.id)
        status = 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._serve(scope, receive, noting_send, call)
        except Exception as error:
            # The last line: no traceback may reach a client. An answer that has begun is left without an end.
            log.error("request failed", request_id=str(call.id), path=path, exc_info=error)
            if not status:
                await send_json(noting_send, 500, _INTERNAL, call.headers)
        finally:
            self._tell(path, status, time.monotonic() - arrived, call)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *call.headers]
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and not scope["path"].startswith("/admin"):
                await _preflight(scope, send, call)
            elif scope["path"] == CHAT_PATH:
                await self._chat_or_405(scope, receive, send, call)
            else:
                await self._router(scope, receive, send_with_headers)
        except Refusal as refusal:
            await self._refuse(scope, send, call, refusal)
        except HTTPException as error:
            await self._refuse(scope, send, call, _refusal(scope, error))

    def _tell(self, path: str, status: int, seconds: float, call: Call) -> None:
        """The metrics and the log learn of the request. Status 499: the client left before it was answered."""
        route = _route_of(path)
        status = status or 499
        self._metrics.request(route, status, seconds)
        if route != "health":
            line = RequestLine(request_id=str(call.id), route=route, status=status, seconds=seconds, **call.facts)
            log_request(log, line)

    def _open(self, scope: Scope, path: str) -> Call:
        request_id = new_request_id()
        headers: Headers = [(b"x-request-id", str(request_id).encode())]
        origin = _header(scope, b"origin")
        if origin is not None and not path.startswith("/admin"):
            if b"*" in self._origins:
                headers += [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
            elif origin in self._origins:
                headers += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
                headers.append((b"vary", b"origin"))
        return Call(request_id, headers)

    async def _chat_or_405(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed(
                f"{scope['method']} isn't served on {CHAT_PATH}: use POST.",
                code="method_not_allowed",
                headers={"allow": "POST, OPTIONS"},
            )
        await self._chat(scope, receive, send, call)

    async def _refuse(self, scope: Scope, send: Send, call: Call, refusal: Refusal) -> None:
        status = self._exhausted_status if refusal.status == 402 else refusal.status
        call.facts["code"] = refusal.code
        headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        body = refusal.body()
        body["error"]["message"] = without_keys(refusal.message)
        await send_json(send, status, body, [*call.headers, *headers], head=scope["method"] == "HEAD")


def canonical_path(path: str) -> str:
    """``/chat/completions``, ``/v1/v1/chat/completions``, ``/v1//chat/completions/`` -> ``/v1/chat/completions``."""
    path = _SLASHES.sub("/", path)
    path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    return f"/v1{path}" if _segments(path)[0] in _OURS else path


async def send_json(send: Send, status: int, body: object, headers: Headers, *, head: bool = False) -> None:
    """A whole JSON answer."""
    text = json.dumps(body, ensure_ascii=True).encode()
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": b"" if head else text})


async def _preflight(scope: Scope, send: Send, call: Call) -> None:
    """What a browser asks before it sends a key; so it needs none. Allow-Origin is among the call's headers."""
    wanted = _header(scope, b"access-control-request-headers") or b""
    headers: Headers = [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", wanted if _HEADER_NAMES.match(wanted) else b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"access-control-request-headers"),
    ]
    start = {"type": "http.response.start", "status": 204, "headers": [*call.headers, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": b""})


def _refusal(scope: Scope, error: HTTPException) -> Refusal:
    """The router's 404 and 405 in OpenAI's shape."""
    path, method = scope["path"], scope["method"]
    if error.status_code == 405:
        message = f"{method} isn't served on {path[:200]}."
        return MethodNotAllowed(message, code="method_not_allowed", headers=dict(error.headers or {}))
    instead = _INSTEAD.get(path, f"Unknown request URL: {method} {path[:200]}.")
    return NotFound(instead, code="unknown_url")


def _route_of(path: str) -> str:
    """The metric's and the log's word for a path. Never a client's own: it could be a key, or a page of a prompt."""
    first, second = _segments(path)
    if first == "v1":
        route = second if path != CHAT_PATH else "chat"
    else:
        route = "health" if first in ("healthz", "readyz") else first
    return route if route in ROUTES else "other"


def _segments(path: str) -> tuple[str, str]:
    """The first two; empty where there are none (``OPTIONS *`` has no path at all)."""
    _, first, second, *_ = [*path.split("/", 3), "", ""]
    return first, second


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


_INTERNAL = {
    "error": {
        "message": "Farebox failed on this request. Its log has the reason under the x-request-id.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
}
