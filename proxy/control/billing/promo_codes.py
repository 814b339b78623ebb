"""Promo codes: what the operator makes, and what a key redeems for its account.

    POST /v1/billing/promo_codes/redeem    {"code": "..."}; needs the scope billing

A code is read without regard to case. Each account redeems it once: the same again is the same answer. Whoever tries
codes is told to wait after ten that were refused within an hour, whatever process they were sent to.
"""

import math
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from proxy.control.fields import receive_fields
from proxy.control.refusals import ledger_refusals
from proxy.control.views import View, time_text, transaction_id
from proxy.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, Refusal, TooManyRequests
from proxy.core.money import format_credits
from proxy.ledger.promos import PromoCode, PromoLedger, PromoOutcome, PromoTerms, Redemption
from proxy.ledger.records import ApiKey

__all__ = ["Promos", "promo_code_view", "promo_routes", "redemption_view"]

# Without the letters that look like digits, or like each other. Twelve of them are 60 bits: nobody finds one by trying.
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
GENERATED_CHARS = 12

_CODE = re.compile(r"[A-Z0-9][A-Z0-9_-]{2,39}\Z", re.ASCII)
_PRIVATE = {"cache-control": "private, no-store"}

_REFUSALS: dict[PromoOutcome, tuple[type[Refusal], str, str]] = {
    PromoOutcome.UNKNOWN: (NotFound, "promo_code_unknown", "There is no such promo code."),
    PromoOutcome.NOT_STARTED: (Conflict, "promo_code_not_started", "This promo code can't be redeemed yet."),
    PromoOutcome.ENDED: (Conflict, "promo_code_ended", "This promo code has ended."),
    PromoOutcome.USED_UP: (Conflict, "promo_code_used_up", "This promo code has been redeemed as often as it may be."),
    PromoOutcome.ABOVE_LIMIT: (Conflict, "balance_limit", "The account has as many credits as one account can have."),
}


class Promos:
    """The functions of the command and the endpoint over one ledger. ``chance`` is a cryptographic source."""

    def __init__(self, ledger: PromoLedger, *, chance: Callable[[str], str] = secrets.choice) -> None:
        self._ledger = ledger
        self._chance = chance

    async def create(self, code: str | None, terms: PromoTerms, *, actor: str) -> PromoCode:
        """A new code, one made up where ``code`` is None. Raises Conflict where it has other terms, or was ended."""
        if terms.starts_at and terms.ends_at and terms.starts_at >= terms.ends_at:
            raise InvalidRequest("The code would end before it starts.", code="invalid_value", param="ends_at")
        text = self._made_up() if code is None else _checked(code)
        with ledger_refusals():
            return await self._ledger.create(text, terms, actor=actor)

    async def end(self, code: str) -> PromoCode:
        """From now on nobody redeems it; what was redeemed stays. Raises NotFound."""
        with ledger_refusals():
            return await self._ledger.end(_normal(code))

    async def codes(self, *, after: str | None = None, limit: int) -> list[PromoCode]:
        """At most ``limit`` codes, newest first, those behind the code ``after``."""
        with ledger_refusals():
            return await self._ledger.codes(after=None if after is None else _normal(after), limit=limit)

    async def redeem(self, key: ApiKey, code: str) -> Redemption:
        """Give the key's account the code's credits, once. Raises NotFound, Conflict, TooManyRequests."""
        text = _normal(code)
        if not _CODE.match(text):
            # No code looks like that: there is nothing to be found by trying, and nothing to ask the ledger.
            raise _refusal(PromoOutcome.UNKNOWN)
        with ledger_refusals():
            found = await self._ledger.redeem(key.account_id, text, actor=f"key:{key.id}")
        if found.outcome is PromoOutcome.WAIT:
            raise _wait(found)
        if found.outcome in _REFUSALS:
            raise _refusal(found.outcome)
        return found

    def _made_up(self) -> str:
        text = "".join(self._chance(ALPHABET) for _ in range(GENERATED_CHARS))
        return "-".join(text[i : i + 4] for i in range(0, GENERATED_CHARS, 4))


def promo_routes(authenticate: Callable[[Request], Awaitable[ApiKey]], promos: Promos) -> list[BaseRoute]:
    """The route above. ``authenticate`` comes from the gateway."""

    async def redeem(request: Request) -> Response:
        key = await authenticate(request)
        if "billing" not in key.scopes:
            raise Forbidden("This API key doesn't have the scope billing.", code="insufficient_scope")
        body = await receive_fields(request)
        code = body.required_text("code")
        body.done()
        return JSONResponse(redemption_view(await promos.redeem(key, code)), headers=_PRIVATE)

    return [Route("/v1/billing/promo_codes/redeem", redeem, methods=["POST"])]


def promo_code_view(promo: PromoCode) -> View:
    """A code as its operator sees it. ``redemptions_max`` null: any number; ``credits_seconds`` null: for ever."""
    terms = promo.terms
    return {
        "object": "promo_code",
        "id": promo.code,
        "credits": format_credits(terms.credits),
        "credits_seconds": terms.credits_seconds,
        "starts_at": time_text(terms.starts_at),
        "ends_at": time_text(terms.ends_at),
        "redemptions_max": terms.redemptions_max,
        "redeemed": promo.redeemed,
        "created_by": promo.actor,
        "created_at": time_text(promo.created_at),
        "ended_at": time_text(promo.ended_at),
    }


def redemption_view(redemption: Redemption) -> View:
    """What a code brought its account, now or (``redeemed_before``) by an earlier request."""
    transfer = redemption.transfer
    assert transfer is not None, "a refusal is raised, not shown"
    return {
        "object": "promo_redemption",
        "credits": format_credits(transfer.amount),
        "expires_at": time_text(redemption.expires_at),
        "transaction": transaction_id(transfer),
        "redeemed_at": time_text(transfer.created_at),
        "redeemed_before": redemption.outcome is PromoOutcome.AGAIN,
    }


def _normal(code: str) -> str:
    return code.strip().upper()


def _checked(code: str) -> str:
    text = _normal(code)
    if not _CODE.match(text):
        raise InvalidRequest(
            "A promo code has 3 to 40 letters (A to Z), digits, - and _, and begins with a letter or digit.",
            code="invalid_value",
            param="code",
        )
    return text


def _refusal(outcome: PromoOutcome) -> Refusal:
    kind, code, message = _REFUSALS[outcome]
    return kind(message, code=code, param="code")


def _wait(redemption: Redemption) -> TooManyRequests:
    assert redemption.retry_at is not None, "WAIT says until when"
    seconds = max(1, math.ceil((redemption.retry_at - datetime.now(UTC)).total_seconds()))
    return TooManyRequests(
        "Too many promo codes of this account were refused; wait before you try another.",
        code="promo_code_limit",
        headers={"retry-after": str(seconds), "x-should-retry": "false"},
    )
