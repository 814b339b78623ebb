"""Self-service: what a key may know of its own account. Every row is read under row-level security.

    GET /v1/credits                    balance, held, available, debt; what expires soon
    GET /v1/credits/lots               what each grant and purchase has left, in the order in which they are drawn
    GET /v1/transactions               the statement, newest first; ?limit=&after=
    GET /v1/usage                      by day (UTC) and model; ?from=&to=, both inclusive
    GET /v1/receipts/{request id}      why one request cost what it did

All of it needs the scope ``read``. Another account's receipt, an unknown one and an id that is no id are one 404.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, time, timedelta

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.fields import Fields, parse_uuid, query_fields
from proxy.control.operations import no_receipt, transaction_version
from proxy.control.refusals import ledger_refusals
from proxy.control.views import credits_view, list_view, lot_view, page, receipt_view, transfer_view, usage_view
from proxy.core.errors import Forbidden
from proxy.ledger.reader import AccountReader
from proxy.ledger.records import ApiKey

__all__ = ["Authenticate", "account_routes"]

Authenticate = Callable[[Request], Awaitable[ApiKey]]
"""The key that a request carries, verified and not stale. Raises Unauthenticated or Unavailable."""

DAYS_DEFAULT = 30
DAYS_MAX = 366
EXPIRING_DAYS = 30
"""What expires within so many days is shown with the balance."""
LOTS_MAX = 100

# A balance in somebody's cache is a wrong balance.
_PRIVATE = {"cache-control": "private, no-store"}


def account_routes(
    authenticate: Authenticate, reader: AccountReader, *, today: Callable[[], date] = lambda: datetime.now(UTC).date()
) -> list[BaseRoute]:
    """The routes above. ``authenticate`` comes from the gateway; ``today`` (UTC) is for tests."""

    async def key_of(request: Request) -> ApiKey:
        key = await authenticate(request)
        if "read" not in key.scopes:
            raise Forbidden("This API key doesn't have the scope read.", code="insufficient_scope")
        return key

    async def credits(request: Request) -> Response:
        key = await key_of(request)
        query_fields(request).done()
        with ledger_refusals():
            account = await reader.account(key.account_id)
            soon = await reader.expiring(key.account_id, datetime.now(UTC) + timedelta(days=EXPIRING_DAYS))
        assert account is not None, "a key has an account"
        return JSONResponse(credits_view(account, soon), headers=_PRIVATE)

    async def lots(request: Request) -> Response:
        key = await key_of(request)
        query_fields(request).done()
        with ledger_refusals():
            found = await reader.lots(key.account_id, limit=LOTS_MAX + 1)
        views = [lot_view(lot, internal=False) for lot in found[:LOTS_MAX]]
        return JSONResponse(list_view(views, has_more=len(found) > LOTS_MAX), headers=_PRIVATE)

    async def transactions(request: Request) -> Response:
        key = await key_of(request)
        query = query_fields(request)
        limit, after = query.limit(), query.text("after")
        query.done()
        before = None if after is None else transaction_version(key.account_id, after)
        with ledger_refusals():
            found = await reader.transfers(key.account_id, before=before, limit=limit + 1)
        views = (transfer_view(transfer, internal=False) for transfer in found)
        return JSONResponse(page(views, limit), headers=_PRIVATE)

    async def usage(request: Request) -> Response:
        key = await key_of(request)
        query = query_fields(request)
        first, last = _days(query, today())
        query.done()
        with ledger_refusals():
            rows = await reader.usage(key.account_id, _midnight(first), _midnight(last + timedelta(days=1)))
        return JSONResponse(usage_view(rows, first, last), headers=_PRIVATE)

    async def receipt(request: Request) -> Response:
        key = await key_of(request)
        query_fields(request).done()
        hold_id = parse_uuid(request.path_params["request_id"])
        if hold_id is None:
            raise no_receipt()
        with ledger_refusals():
            ended = await reader.receipt(key.account_id, hold_id)
        if ended is None:
            raise no_receipt()
        return JSONResponse(receipt_view(ended), headers=_PRIVATE)

    return [
        Route("/v1/credits", credits),
        Route("/v1/credits/lots", lots),
        Route("/v1/transactions", transactions),
        Route("/v1/usage", usage),
        Route("/v1/receipts/{request_id}", receipt),
    ]


def _days(query: Fields, today: date) -> tuple[date, date]:
    """``from`` and ``to``, both inclusive; without them the last 30 days."""
    last = query.day("to")
    first = query.day("from")
    last = today if last is None else last
    first = last - timedelta(days=DAYS_DEFAULT - 1) if first is None else first
    if first > last:
        query.refuse("from", "must not be after to")
    if (last - first).days >= DAYS_MAX:
        query.refuse("from", f"must be less than {DAYS_MAX} days before to")
    return first, last


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
