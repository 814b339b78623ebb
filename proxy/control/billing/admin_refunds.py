"""The operator's API for refunds, beside ``control/admin.py``: `farebox refund` over HTTP.

    POST /admin/v1/orders/{order}/refunds    refund a purchase, or a part of it, once for each reference

It is there where billing is on and the admin token is set.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.admin import AdminToken, admin_actor
from proxy.control.billing.refunding import Refunder, RefundTerms, refund_view
from proxy.control.fields import receive_fields
from proxy.control.refusals import ledger_refusals

__all__ = ["refund_routes"]

_PRIVATE = {"cache-control": "private, no-store"}


def refund_routes(token: AdminToken, refunder: Refunder) -> list[BaseRoute]:
    """The route above."""

    async def refund(request: Request) -> Response:
        token.check(request)
        body = await receive_fields(request)
        amount, all_left = body.text("amount"), body.flag("all_left")
        terms = RefundTerms(
            all_left=bool(all_left),
            reference=body.required_text("reference"),
            actor=admin_actor(request),
            reason=body.text("reason", chars_max=1_000),
        )
        body.done()
        with ledger_refusals():
            done = await refunder.refund_named(request.path_params["order"], amount, terms)
        return JSONResponse(refund_view(done), headers=_PRIVATE)

    return [Route("/admin/v1/orders/{order}/refunds", refund, methods=["POST"])]
