"""Every refusal Farebox makes, as one tree of exceptions.

    Refusal                      a status, an OpenAI-shaped body, headers
      InvalidRequest       400   the request can't be served as it is; names the limit and its setting
      Unauthenticated      401   no key, an unknown, revoked or expired one
      OutOfCredits         402   (or 429, a setting) the account can't carry the call: not worth a retry
      CreditsHeld          402   enough credits, but other calls hold them: worth a retry
      Forbidden            403   the key lacks a scope or the model is not on its list
      NotFound             404   unknown path, model or receipt
      MethodNotAllowed     405   the path exists, the method doesn't
      Conflict             409   the id, reference or Idempotency-Key stands for something else already
      TooLarge             413   body above the limit
      Unprocessable        422   the Idempotency-Key belongs to a request with another body
      TooManyRequests      429   a limit of the key
      UpstreamError        502   the upstream refused us or can't be reached: not the client's fault
      Unavailable          503   Farebox can't serve now (database, draining, a missing upstream key)

One handler in ``app.py`` writes them. Whose fault it is can be read off the status: 4xx the client's, 502 the
upstream's, 503 ours.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "Conflict",
    "CreditsHeld",
    "Forbidden",
    "InvalidRequest",
    "MethodNotAllowed",
    "NotFound",
    "OutOfCredits",
    "Refusal",
    "TooLarge",
    "TooManyRequests",
    "Unauthenticated",
    "Unavailable",
    "Unprocessable",
    "UpstreamError",
]


class Refusal(Exception):
    """A request that is answered with an error.

    ``headers`` are sent along (Retry-After, x-should-retry...); ``details`` are further members of the error object.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    retry: ClassVar[bool | None] = None
    """What ``x-should-retry`` tells SDKs; None leaves it out."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})
        if self.retry is not None:
            self.headers.setdefault("x-should-retry", "true" if self.retry else "false")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.details,
            }
        }


class InvalidRequest(Refusal):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(Refusal):
    status = 401
    type = "invalid_request_error"


class OutOfCredits(Refusal):
    status = 402
    type = "insufficient_quota"
    retry = False


class CreditsHeld(Refusal):
    status = 402
    type = "insufficient_quota"
    retry = True


class Forbidden(Refusal):
    status = 403
    type = "invalid_request_error"


class NotFound(Refusal):
    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(Refusal):
    status = 405
    type = "invalid_request_error"


class Conflict(Refusal):
    status = 409
    type = "invalid_request_error"
    # SDKs retry a 409 unless they are told not to; one that isn't final says so in its headers.
    retry = False


class TooLarge(Refusal):
    status = 413
    type = "invalid_request_error"


class Unprocessable(Refusal):
    status = 422
    type = "invalid_request_error"


class TooManyRequests(Refusal):
    status = 429
    type = "rate_limit_error"


class UpstreamError(Refusal):
    status = 502
    type = "upstream_error"


class Unavailable(Refusal):
    status = 503
    type = "server_error"
