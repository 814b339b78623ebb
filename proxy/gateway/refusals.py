"""What the ledger's refusals become for a client: who is told to pay, who to wait, and who to come again."""

from collections.abc import Callable, Mapping

from proxy.core.errors import CreditsHeld, OutOfCredits, Refusal, Unauthenticated, Unavailable
from proxy.core.money import format_credits
from proxy.ledger.records import Reserved, ReserveOutcome

__all__ = ["NOT_NOW", "refusal_for", "unavailable"]

NOT_NOW = "Credits can't be reserved at the moment, so nothing was sent to the provider; please retry."

RETRY_SECONDS = 2


def unavailable(code: str, message: str) -> Unavailable:
    """A 503 that is worth a retry soon."""
    return Unavailable(message, code=code, headers={"retry-after": str(RETRY_SECONDS)})


def refusal_for(reserved: Reserved, needed: int) -> Refusal:
    """The error for a reserve that was not granted. ``needed``: the least that would have been, in microcredits."""
    return _REFUSALS.get(reserved.outcome, _not_now)(reserved, needed)


def _insufficient(reserved: Reserved, needed: int) -> Refusal:
    debt = f" The account owes {format_credits(reserved.debt)} credits, which are paid first." if reserved.debt else ""
    return OutOfCredits(
        f"This call needs {format_credits(needed)} credits and {format_credits(_available(reserved))} are available."
        f"{debt} Top the account up, or ask for less with max_tokens.",
        code="insufficient_quota",
        details=_details(reserved, needed),
    )


def _held(reserved: Reserved, needed: int) -> Refusal:
    return CreditsHeld(
        f"This call needs {format_credits(needed)} credits and {format_credits(_available(reserved))} are available,"
        f" since calls that are still running hold {format_credits(reserved.held)}. Retry when they are done.",
        code="credits_held",
        headers={"retry-after": str(RETRY_SECONDS)},
        details=_details(reserved, needed),
    )


def _spend_limit(reserved: Reserved, needed: int) -> Refusal:
    left = format_credits(reserved.spend_limit_left or 0)
    return OutOfCredits(
        f"This call needs {format_credits(needed)} credits and the API key's own spend limit leaves {left}.",
        code="spend_limit_reached",
        details={**_details(reserved, needed), "spend_limit_left": left},
    )


def _expired(_reserved: Reserved, _needed: int) -> Refusal:
    return Unauthenticated("This API key has expired.", code="api_key_expired", headers={"www-authenticate": "Bearer"})


def _not_now(_reserved: Reserved, _needed: int) -> Refusal:
    return unavailable("ledger_unavailable", NOT_NOW)


def _available(reserved: Reserved) -> int:
    return 0 if reserved.debt else reserved.balance - reserved.held


def _details(reserved: Reserved, needed: int) -> dict[str, str]:
    return {
        "available": format_credits(_available(reserved)),
        "held": format_credits(reserved.held),
        "needed": format_credits(needed),
    }


_REFUSALS: Mapping[ReserveOutcome, Callable[[Reserved, int], Refusal]] = {
    ReserveOutcome.INSUFFICIENT: _insufficient,
    ReserveOutcome.CREDITS_HELD: _held,
    ReserveOutcome.SPEND_LIMIT: _spend_limit,
    ReserveOutcome.KEY_EXPIRED: _expired,
}
