"""What asking Stripe raises.

StripeError
  StripeAway         it can't be reached, is too slow, answers 5xx or 429, or something that can't be read: try again
  StripeRefused      it says no, and would say so again: a declined card, a wrong key, a parameter it doesn't take
    StripeUnknown    no such object, for this key in this mode

The messages may be logged: they name no key. What a client is told is up to who catches them.
"""

__all__ = ["StripeAway", "StripeError", "StripeRefused", "StripeUnknown"]


class StripeError(Exception):
    """Anything that asking Stripe raises."""


class StripeAway(StripeError):
    """No answer that says anything. The call may have taken effect: the same idempotency key makes a retry safe.

    ``replayed``: Stripe keeps a failure under this idempotency key, and will go on answering it for a day.
    """

    def __init__(self, message: str, *, replayed: bool = False) -> None:
        super().__init__(message)
        self.replayed = replayed


class StripeRefused(StripeError):
    """Stripe says no. ``payment_intent``: the one that a declined payment has left behind."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        decline_code: str | None = None,
        param: str | None = None,
        payment_intent: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.decline_code = decline_code
        self.param = param
        self.payment_intent = payment_intent


class StripeUnknown(StripeRefused):
    """There is no such object for this key in this mode."""
