"""Refusals in Stripe's shape: https://docs.stripe.com/api/errors."""

from typing import Any

__all__ = ["Refused", "invalid", "missing"]


class Refused(Exception):
    """An answer that isn't 200. ``stored``: whether an idempotency key remembers it, as it does once the endpoint has
    begun; what fails the validation of its parameters isn't remembered."""

    def __init__(self, status: int, kind: str, message: str, *, stored: bool = True, **more: Any) -> None:
        super().__init__(message)
        self.status, self.stored = status, stored
        self.body: dict[str, Any] = {"error": {"type": kind, "message": message, **more}}


def invalid(message: str, *, status: int = 400, **more: Any) -> Refused:
    """An invalid_request_error."""
    code = more.get("code")
    if code is not None:
        more["doc_url"] = f"https://stripe.com/docs/error-codes/{code.replace('_', '-')}"
    return Refused(status, "invalid_request_error", message, **more)


def missing(kind: str, name: str, live: bool, *, elsewhere: bool, param: str = "id") -> Refused:
    """A 404. ``live``: the key's mode; ``elsewhere``: it is there in the other mode."""
    text = f"No such {kind}: '{name}'"
    if elsewhere:
        here, there = ("live", "test") if live else ("test", "live")
        text += f"; a similar object exists in {there} mode, but a {here} mode key was used to make this request."
    return invalid(text, status=404, code="resource_missing", param=param)
