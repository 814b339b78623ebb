"""The operator's API, /admin/v1: the command's functions over HTTP, with a token of its own.

    POST  /admin/v1/accounts                         make an account; the same external_id again is the same account
    GET   /admin/v1/accounts                         list; ?limit=&after=&external_id=
    GET   /admin/v1/accounts/{account}               by id or external id
    POST  /admin/v1/accounts/{account}/keys          make a key; the answer alone shows it
    GET   /admin/v1/accounts/{account}/keys          list
    POST  /admin/v1/accounts/{account}/grants        give credits, once for each reference
    GET   /admin/v1/accounts/{account}/lots          what each of them has left; ?limit=&used_up=
    POST  /admin/v1/accounts/{account}/freeze, /unfreeze  nothing is admitted; until that is lifted
    GET   /admin/v1/accounts/{account}/freezes       why it is frozen, and was
    GET   /admin/v1/accounts/{account}/transactions  the statement; ?limit=&after=
    GET   /admin/v1/keys/{key}                       show a key
    PATCH /admin/v1/keys/{key}                       change what it may do
    POST  /admin/v1/keys/{key}/revoke, /rotate       end it; or replace it, with an overlap
    POST  /admin/v1/reversals                        give back a charge or a part of it, once for each reference
    GET   /admin/v1/receipts/{request id}            why a request cost what it did

It is off (404) unless its token is set. A customer's key opens nothing here, and this token nothing elsewhere. Who
acted is kept with every transfer: the header ``x-farebox-actor``, or else ``admin``.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.fields import Fields, check_plain, query_fields, receive_fields
from proxy.control.operations import OVERLAP_SECONDS_MAX, KeyTerms, Operations
from proxy.control.views import (
    account_view,
    freeze_view,
    key_view,
    list_view,
    lot_view,
    page,
    receipt_view,
    transfer_view,
)
from proxy.core.errors import Unauthenticated
from proxy.ledger.control import GRANT_KINDS, PRIORITY_MAX

__all__ = ["TOKEN_CHARS_MIN", "AdminToken", "admin_actor", "admin_routes"]

TOKEN_CHARS_MIN = 32
OVERLAP_SECONDS_DEFAULT = 86_400
ACTOR_CHARS_MAX = 80

_PRIVATE = {"cache-control": "private, no-store"}

Endpoint = Callable[[Request], Awaitable[Response]]


class AdminToken:
    """The secret that opens the API. Raises ValueError where it is shorter than 32 characters."""

    def __init__(self, text: str) -> None:
        if len(text) < TOKEN_CHARS_MIN:
            raise ValueError(f"the admin token is too short: at least {TOKEN_CHARS_MIN} characters")
        self._digest = hashlib.sha256(text.encode()).digest()

    def check(self, request: Request) -> None:
        """Raises Unauthenticated unless the request carries the token."""
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        # Digests of equal length: neither the length of the token nor a matching beginning shows in the time.
        digest = hashlib.sha256(presented.strip().encode()).digest()
        if not hmac.compare_digest(digest, self._digest) or scheme.lower() != "bearer":
            raise Unauthenticated(
                "This needs the admin token, as Authorization: Bearer TOKEN.",
                code="invalid_admin_token",
                headers={"www-authenticate": "Bearer"},
            )


def admin_routes(token: AdminToken, operations: Operations) -> list[BaseRoute]:
    """The routes above."""
    handlers = _Handlers(operations)
    table: list[tuple[str, str, Endpoint]] = [
        ("POST", "/accounts", handlers.create_account),
        ("GET", "/accounts", handlers.list_accounts),
        ("GET", "/accounts/{account}", handlers.show_account),
        ("POST", "/accounts/{account}/keys", handlers.create_key),
        ("GET", "/accounts/{account}/keys", handlers.list_keys),
        ("POST", "/accounts/{account}/grants", handlers.grant),
        ("GET", "/accounts/{account}/lots", handlers.lots),
        ("POST", "/accounts/{account}/freeze", handlers.freeze),
        ("POST", "/accounts/{account}/unfreeze", handlers.unfreeze),
        ("GET", "/accounts/{account}/freezes", handlers.freezes),
        ("GET", "/accounts/{account}/transactions", handlers.transactions),
        ("GET", "/keys/{key}", handlers.show_key),
        ("PATCH", "/keys/{key}", handlers.update_key),
        ("POST", "/keys/{key}/revoke", handlers.revoke_key),
        ("POST", "/keys/{key}/rotate", handlers.rotate_key),
        ("POST", "/reversals", handlers.reverse),
        ("GET", "/receipts/{request_id}", handlers.receipt),
    ]
    paths: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in table:
        paths.setdefault(path, {})[method] = endpoint
    return [Route(f"/admin/v1{path}", _guarded(token, by), methods=list(by)) for path, by in paths.items()]


def _guarded(token: AdminToken, endpoints: dict[str, Endpoint]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        token.check(request)
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return endpoint


class _Handlers:
    """One method an endpoint: read the fields, call the operation, show what came of it."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def create_account(self, request: Request) -> Response:
        body = await _body(request)
        name = body.required_text("name")
        external_id, email = body.text("external_id"), body.text("email")
        body.done()
        return _answer(account_view(await self._operations.create_account(name, external_id=external_id, email=email)))

    async def list_accounts(self, request: Request) -> Response:
        query = query_fields(request)
        limit, after, external_id = query.limit(), query.text("after"), query.text("external_id")
        query.done()
        if external_id is None:
            found = await self._operations.accounts(after=after, limit=limit + 1)
            return _answer(page(map(account_view, found), limit))
        found = await self._operations.accounts_of(external_id)
        return _answer(list_view([account_view(account) for account in found], has_more=False))

    async def show_account(self, request: Request) -> Response:
        return _answer(account_view(await self._operations.account(request.path_params["account"], by_name=False)))

    async def create_key(self, request: Request) -> Response:
        body = await _body(request)
        terms = KeyTerms(**{"name": "key", **_terms(body)})
        body.done()
        account = await self._operations.account(request.path_params["account"], by_name=False)
        key, text = await self._operations.create_key(account.id, terms)
        return _answer({**key_view(key), "key": text}, 201)

    async def list_keys(self, request: Request) -> Response:
        account = await self._operations.account(request.path_params["account"], by_name=False)
        keys = await self._operations.keys(account.id)
        return _answer(list_view([key_view(key) for key in keys], has_more=False))

    async def show_key(self, request: Request) -> Response:
        return _answer(key_view(await self._operations.key(request.path_params["key"])))

    async def update_key(self, request: Request) -> Response:
        body = await _body(request)
        changes = _terms(body)
        body.done()
        return _answer(key_view(await self._operations.update_key(request.path_params["key"], changes)))

    async def revoke_key(self, request: Request) -> Response:
        (await _body(request)).done()
        return _answer(key_view(await self._operations.revoke_key(request.path_params["key"])))

    async def rotate_key(self, request: Request) -> Response:
        body = await _body(request)
        overlap = body.seconds("overlap_seconds", most=OVERLAP_SECONDS_MAX)
        body.done()
        seconds = OVERLAP_SECONDS_DEFAULT if overlap is None else overlap
        key, text = await self._operations.rotate_key(request.path_params["key"], overlap_seconds=seconds)
        return _answer({**key_view(key), "key": text}, 201)

    async def grant(self, request: Request) -> Response:
        body = await _body(request)
        amount = body.required_amount("amount")
        reference = body.required_text("reference")
        reason = body.text("reason", chars_max=1_000)
        kind = body.one_of("kind", GRANT_KINDS) or "grant"
        expires_at = body.moment("expires_at")
        priority = body.whole("priority", most=PRIORITY_MAX)
        body.done()
        account = await self._operations.account(request.path_params["account"], by_name=False)
        transfer = await self._operations.grant(
            account.id,
            amount,
            reference=reference,
            actor=admin_actor(request),
            reason=reason,
            kind=kind,
            expires_at=expires_at,
            priority=priority,
        )
        return _answer(transfer_view(transfer, internal=True))

    async def lots(self, request: Request) -> Response:
        query = query_fields(request)
        limit, used_up = query.limit(), query.text("used_up")
        query.done()
        if used_up not in (None, "true", "false"):
            query.refuse("used_up", "must be true or false")
        account = await self._operations.account(request.path_params["account"], by_name=False)
        found = await self._operations.lots(account.id, used_up=used_up == "true", limit=limit + 1)
        views = [lot_view(lot, internal=True) for lot in found[:limit]]
        return _answer(list_view(views, has_more=len(found) > limit))

    async def freeze(self, request: Request) -> Response:
        body = await _body(request)
        reason = body.required_text("reason", chars_max=1_000)
        reference = body.text("reference")
        body.done()
        account = await self._operations.account(request.path_params["account"], by_name=False)
        frozen = await self._operations.freeze(
            account.id, reason=reason, reference=reference, actor=admin_actor(request)
        )
        return _answer(account_view(frozen))

    async def unfreeze(self, request: Request) -> Response:
        body = await _body(request)
        reference = body.text("reference")
        body.done()
        account = await self._operations.account(request.path_params["account"], by_name=False)
        thawed = await self._operations.unfreeze(account.id, reference=reference, actor=admin_actor(request))
        return _answer(account_view(thawed))

    async def freezes(self, request: Request) -> Response:
        query_fields(request).done()
        account = await self._operations.account(request.path_params["account"], by_name=False)
        found = await self._operations.freezes(account.id)
        return _answer(list_view([freeze_view(freeze) for freeze in found], has_more=False))

    async def reverse(self, request: Request) -> Response:
        body = await _body(request)
        request_id = body.required_text("request_id")
        amount = body.amount("amount")
        reference = body.required_text("reference")
        reason = body.required_text("reason", chars_max=1_000)
        body.done()
        transfer = await self._operations.reverse(
            request_id, amount, reference=reference, actor=admin_actor(request), reason=reason
        )
        return _answer(transfer_view(transfer, internal=True))

    async def transactions(self, request: Request) -> Response:
        query = query_fields(request)
        limit, after = query.limit(), query.text("after")
        query.done()
        account = await self._operations.account(request.path_params["account"], by_name=False)
        found = await self._operations.transactions(account.id, after=after, limit=limit + 1)
        return _answer(page((transfer_view(transfer, internal=True) for transfer in found), limit))

    async def receipt(self, request: Request) -> Response:
        return _answer(receipt_view(await self._operations.receipt(request.path_params["request_id"])))


def _answer(view: dict[str, Any], status: int = 200) -> Response:
    return JSONResponse(view, status, headers=_PRIVATE)


async def _body(request: Request) -> Fields:
    return await receive_fields(request)


def _terms(body: Fields) -> dict[str, Any]:
    """The members of KeyTerms that the body names. Null lifts a limit, and is refused where there is none to lift."""
    found: dict[str, Any] = {}
    readers: dict[str, Callable[[], Any]] = {
        "name": lambda: body.text("name"),
        "scopes": lambda: body.words("scopes"),
        "models": lambda: body.words("models"),
        "profile": lambda: body.text("profile"),
        "affordable_cap": lambda: body.flag("affordable_cap"),
        "spend_limit": lambda: body.amount("spend_limit", zero=True),
        "expires_at": lambda: body.moment("expires_at"),
    }
    for name, read in readers.items():
        value = read()
        if not body.given(name):
            continue
        if value is None and name in ("name", "scopes", "affordable_cap"):
            body.refuse(name, "must not be null")
        found[name] = value
    return found


def admin_actor(request: Request) -> str:
    """Who acts by this token, for the book: as the header says, or else ``admin``."""
    named = request.headers.get("x-farebox-actor")
    if named is None:
        return "admin"
    check_plain("x-farebox-actor", named, chars_max=ACTOR_CHARS_MAX)
    return f"admin:{named}"
