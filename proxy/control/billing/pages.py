"""The two pages of our own that a payment returns to: plain, without scripts, and without anybody's data.

    GET /billing/success    the customer has been to Stripe's page and is done
    GET /billing/cancel     they turned back

Whoever opens one learns nothing by it, and it changes nothing: that an order was paid, Stripe alone tells us.
"""

import base64
import hashlib

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.billing.checkout import CANCEL_PATH, SUCCESS_PATH

__all__ = ["page_routes"]

_STYLE = "body{font:18px/1.5 system-ui,sans-serif;max-width:34em;margin:15vh auto;padding:0 1em}"
_PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    '<meta name="viewport" content="width=device-width"><style>{style}</style></head>'
    "<body><h1>{title}</h1><p>{text}</p></body></html>"
)
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    f" style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
}

_SUCCESS = _PAGE.format(
    title="Thank you",
    text="Your order is with us. The credits are on your account as soon as the payment is confirmed: moments for a"
    " card, up to some days for a bank's transfer. You may close this page.",
    style=_STYLE,
)
_CANCEL = _PAGE.format(
    title="Nothing was paid",
    text="You left before paying, and nothing was charged. The page of your order can be opened again for a day.",
    style=_STYLE,
)


def page_routes() -> list[BaseRoute]:
    """The routes above."""

    def answering(page: str) -> Route:
        async def answer(request: Request) -> Response:
            return HTMLResponse(page, headers=_HEADERS)

        return Route(SUCCESS_PATH if page is _SUCCESS else CANCEL_PATH, answer)

    return [answering(_SUCCESS), answering(_CANCEL)]
