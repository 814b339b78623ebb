"""Requests to endpoints: whose key, which parameters, which idempotency key, which fault; then lists and expansions.

Nothing here knows the socket: ``Api.answer`` is a coroutine from a request to an answer, or to a cut connection.
"""

import asyncio
import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from tests.fakes.stripe.errors import Refused, invalid
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
from tests.fakes.stripe.idempotency import Answer, Keys
from tests.fakes.stripe.shapes import Form, Object, conform
from tests.fakes.stripe.state import State

__all__ = ["Api", "Asked", "Call", "Endpoint", "Request", "listed", "matches", "merged"]

LIST_MAX = 100
LIST_DEFAULT = 10
POLL_SECONDS = 0.005


@dataclass
class Request:
    """One as it came. ``form``: the query's and the body's text."""

    method: str
    path: str
    headers: dict[str, str]
    form: str


@dataclass
class Asked:
    """One as it was understood, for tests to look at. ``status`` None: the connection was cut, or is still open."""

    name: str
    params: dict[str, Any]
    key: str | None
    live: bool
    status: int | None = None
    replayed: bool = False


@dataclass(frozen=True)
class Call:
    """What an endpoint gets: typed parameters, the ids of its path, the mode of the caller's key."""

    params: dict[str, Any]
    live: bool
    id: str = ""


@dataclass(frozen=True)
class Endpoint:
    """``path`` may have one {id}; ``shape``: the library's TypedDict of its parameters."""

    method: str
    path: str
    shape: Any
    act: Callable[[Call], Object]


@dataclass
class Api:
    """All endpoints. ``keys_known``: the API keys that are good; any of Stripe's shape where it is None."""

    state: State
    faults: Faults
    keys: Keys
    endpoints: Sequence[Endpoint]
    asked: list[Asked] = field(default_factory=list)
    keys_known: set[str] | None = None

    def __post_init__(self) -> None:
        self._patterns = [
            (one, re.compile("".join((re.escape(one.method), " ", one.path.replace("{id}", "([^/]+)"), "$"))))
            for one in self.endpoints
        ]

    async def answer(self, request: Request) -> Answer | None:
        """None: the connection ends without an answer."""
        name = f"{request.method} {request.path}"
        fault = self.faults.draw(name)
        if isinstance(fault, LostRequest):
            return None
        request_id = self.state.new_id("req")
        key = request.headers.get("idempotency-key") if request.method == "POST" else None
        asked = Asked(name, {}, key, False)
        self.asked.append(asked)
        try:
            answer = await self._answer(request, asked, fault, request_id)
        except Refused as e:
            answer = Answer(e.status, e.body)
        answer.headers |= {"request-id": request_id} | ({"idempotency-key": key} if key else {})
        asked.replayed = "idempotent-replayed" in answer.headers
        if isinstance(fault, LostReply):
            return None
        asked.status = answer.status
        return answer

    async def _answer(self, request: Request, asked: Asked, fault: Fault | None, request_id: str) -> Answer:
        asked.live = live = self._mode(request.headers.get("authorization", ""))
        if isinstance(fault, Unavailable):
            raise Refused(503, "api_error", "The service is temporarily unavailable.")
        if isinstance(fault, RateLimited):
            raise Refused(429, "invalid_request_error", "Too many requests in a period of time.", code="rate_limit")
        endpoint, found = self._endpoint(asked.name)
        form = _decoded(request.form)
        expand = form.pop("expand", {})
        if asked.key is not None:
            kept = self.keys.begin(live, asked.key, asked.name, request.form, request_id)
            if kept is not None:
                asked.params = form
                return kept
        answer = None
        try:
            asked.params = conform(form, endpoint.shape)
            call = Call(asked.params, live, found)
            answer = await self._perform(endpoint, call, fault, expand, (request_id, asked.key))
        except Refused as e:
            if not e.stored:
                raise
            answer = Answer(e.status, e.body)
        finally:
            if asked.key is not None and answer is not None:
                self.keys.keep(live, asked.key, answer)
            elif asked.key is not None:
                self.keys.drop(live, asked.key)
        return answer

    async def _perform(
        self, endpoint: Endpoint, call: Call, fault: Fault | None, expand: Form, by: tuple[str, str | None]
    ) -> Answer:
        waits = fault if isinstance(fault, Delay | Hold) else None
        if waits is not None and not waits.after:
            await _wait(waits)
        if isinstance(fault, ErrorBefore):
            return _broken()
        with self.state.lock:
            self.state.request_id, self.state.request_key = by
            try:
                body = self._expanded(endpoint.act(call), [str(one) for one in expand.values()])
            finally:
                self.state.request_id = self.state.request_key = None
        if waits is not None and waits.after:
            await _wait(waits)
        return _broken() if isinstance(fault, ErrorAfter) else Answer(200, body)

    def _mode(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        if scheme != "Bearer" or not key:
            raise Refused(401, "invalid_request_error", "You did not provide an API key.")
        good = re.fullmatch(r"(sk|rk)_(test|live)_\w+", key)
        if good is None or (self.keys_known is not None and key not in self.keys_known):
            raise Refused(401, "invalid_request_error", f"Invalid API Key provided: {key[:8]}****")
        return good[2] == "live"

    def _endpoint(self, name: str) -> tuple[Endpoint, str]:
        for endpoint, pattern in self._patterns:
            if (match := pattern.match(name)) is not None:
                return endpoint, match[1] if match.groups() else ""
        raise invalid(f"Unrecognized request URL ({name}).", status=404, stored=False)

    def _expanded(self, body: Object, paths: Iterable[str]) -> Object:
        body = copy.deepcopy(body)
        for path in paths:
            if body.get("object") in ("list", "search_result"):
                first, _, rest = path.partition(".")
                if first != "data" or not rest:
                    raise _not_expandable(path)
                for one in body["data"]:
                    self._expand(one, rest, path)
            else:
                self._expand(body, path, path)
        return body

    def _expand(self, thing: Object, rest: str, path: str) -> None:
        name, _, further = rest.partition(".")
        include = self.state.includable.get((thing.get("object", ""), name))
        if include is not None:
            thing[name] = copy.deepcopy(include(thing))
        elif name not in thing:
            raise _not_expandable(path)
        value = thing[name]
        if include is None and isinstance(value, str):
            found = self.state.known(value)
            if found is None:
                raise _not_expandable(path)
            value = thing[name] = copy.deepcopy(found)
        if further and isinstance(value, dict):
            in_list = value.get("object") == "list" and further.startswith("data.")
            for one in value["data"] if in_list else [value]:
                self._expand(one, further.removeprefix("data.") if in_list else further, path)


async def _wait(fault: Delay | Hold) -> None:
    if isinstance(fault, Delay):
        await asyncio.sleep(fault.seconds)
        return
    fault.reached.set()
    # A thread's event: it is the test's to set, from whatever thread that runs in.
    while not fault.until.is_set():  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)


def _broken() -> Answer:
    body = {"error": {"type": "api_error", "message": "An unknown error occurred."}}
    # Stripe says so of a 500 that its keys remember: to ask again would only bring it again.
    return Answer(500, body, {"stripe-should-retry": "false"})


def _not_expandable(path: str) -> Refused:
    return invalid(f"This property cannot be expanded ({path}).", param="expand", stored=False)


def _decoded(text: str) -> Form:
    form: Form = {}
    for name, value in parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)):
        first, *inner = [part.rstrip("]") for part in name.split("[")]
        at = form
        parts = [first, *inner]
        for part in parts[:-1]:
            at = at.setdefault(part, {})
        last = parts[-1]
        at[last if last else str(len(at))] = value
    return form


def listed(things: Iterable[Object], call: Call, url: str, *, filters: Sequence[str] = ()) -> Object:
    """A page: newest first, by ``limit``, ``starting_after`` and ``ending_before``, with the filters that were asked
    for and by ``created``."""
    params = call.params
    wanted = {name: params[name] for name in filters if name in params}
    found = [
        one
        for one in things
        if all(one[name] == value for name, value in wanted.items()) and matches(one["created"], params.get("created"))
    ]
    limit = params.get("limit", LIST_DEFAULT)
    if not 1 <= limit <= LIST_MAX:
        raise invalid(f"Invalid limit: {limit} must be between 1 and {LIST_MAX}", param="limit", stored=False)
    ids = [one["id"] for one in found]
    for cursor in ("starting_after", "ending_before"):
        if cursor in params and params[cursor] not in ids:
            raise invalid(f"No such object: '{params[cursor]}'", code="resource_missing", param=cursor, stored=False)
    if "ending_before" in params:
        before = found[: ids.index(params["ending_before"])]
        page, more = before[-limit:], len(before) > limit
    else:
        after = found[ids.index(params["starting_after"]) + 1 :] if "starting_after" in params else found
        page, more = after[:limit], len(after) > limit
    return {"object": "list", "url": url, "has_more": more, "data": page}


def matches(created: int, asked: Any) -> bool:
    """A time against ``created``: a time, or bounds of it."""
    if asked is None:
        return True
    if not isinstance(asked, dict):
        return bool(created == asked)
    tests = {"gt": created.__gt__, "gte": created.__ge__, "lt": created.__lt__, "lte": created.__le__}
    return all(tests[name](bound) for name, bound in asked.items())


def merged(old: dict[str, str] | None, new: Any) -> dict[str, str]:
    """Metadata after an update: an empty value takes its key away."""
    both = (old or {}) | (new or {})
    return {name: value for name, value in both.items() if value != ""}
