"""Who wrote a webhook: the header ``Stripe-Signature``, checked over the raw bytes of the body.

From https://docs.stripe.com/webhooks/signature#verify-manually: the header is ``t=TIMESTAMP,v1=HEX[,v1=HEX...]``, and
HEX is the HMAC-SHA256 of ``TIMESTAMP.BODY`` under an endpoint's secret, the whole text ``whsec_...``. Other schemes
(v0) are fakes for tests and count for nothing. While a secret is rotated Stripe signs with both, and we may know both:
one match of any with any is enough. A time further than 300 s from ours *either way* is refused, which Stripe's own
library doesn't do for times to come. Pure: the clock is the caller's.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence

from proxy.core.errors import InvalidRequest

__all__ = ["SECRET_PREFIX", "TOLERANCE_SECONDS", "check_signature", "usable_secret"]

TOLERANCE_SECONDS = 300
SECRET_PREFIX = "whsec_"  # noqa: S105 - what secrets begin with
HEADER_CHARS_MAX = 4096
SIGNATURES_MAX = 16

_TIMESTAMP = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_SIGNATURE = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)


def check_signature(body: bytes, headers: Sequence[str], *, secrets: Sequence[str], now: float) -> None:
    """Raises InvalidRequest unless one of the secrets signed the body within 300 s of ``now`` (Unix time).

    ``headers``: every Stripe-Signature that came; more than one is refused. The refusal says what is wrong, save that
    a time is judged only where the signature is right: to nobody else does it tell anything.
    """
    if not secrets or not all(map(usable_secret, secrets)):
        # Settings see to it; here it would be a door that stands open.
        raise ValueError("webhooks can't be checked without a secret")
    if not headers:
        raise InvalidRequest("There is no Stripe-Signature: webhooks come from Stripe.", code="signature_missing")
    timestamp, signatures = _parts(headers)
    expected = [_sign(secret, timestamp, body) for secret in secrets]
    # All are compared, each in constant time: how long it took says nothing about which.
    matches = [hmac.compare_digest(ours, theirs) for ours in expected for theirs in signatures]
    if not any(matches):
        raise InvalidRequest(
            "The signature is not of this body by any of the endpoint's secrets (FAREBOX_STRIPE_WEBHOOK_SECRETS).",
            code="signature_invalid",
        )
    away = int(timestamp) - now
    if abs(away) > TOLERANCE_SECONDS:
        raise InvalidRequest(
            f"The webhook was signed {abs(away):.0f} s {'from' if away > 0 else 'before'} now: at most "
            f"{TOLERANCE_SECONDS} s are allowed either way. Is this machine's clock right?",
            code="signature_expired" if away < 0 else "signature_in_future",
        )


def usable_secret(secret: str) -> bool:
    """Whether this may be an endpoint's secret at all: ``whsec_`` and something behind it."""
    return secret.startswith(SECRET_PREFIX) and bool(secret.removeprefix(SECRET_PREFIX).strip())


def _parts(headers: Sequence[str]) -> tuple[str, list[str]]:
    """The timestamp, in its own digits, and the signatures of scheme v1."""
    if len(headers) > 1:
        raise _malformed("there is more than one")
    [header] = headers
    if len(header) > HEADER_CHARS_MAX:
        raise _malformed(f"it has more than {HEADER_CHARS_MAX} characters")
    pairs = [item.partition("=") for item in header.split(",")]
    if not all(mark for _, mark, _ in pairs):
        raise _malformed("it is not a list of name=value")
    timestamps = [value for name, _, value in pairs if name == "t"]
    signatures = [value for name, _, value in pairs if name == "v1"]
    if len(timestamps) != 1 or not _TIMESTAMP.match(timestamps[0]):
        raise _malformed("it needs one t=, in seconds")
    if not signatures:
        raise _malformed("it has no signature of the scheme v1")
    if len(signatures) > SIGNATURES_MAX or not all(map(_SIGNATURE.match, signatures)):
        raise _malformed(f"a v1 has 64 digits of hex, and there are at most {SIGNATURES_MAX}")
    return timestamps[0], signatures


def _sign(secret: str, timestamp: str, body: bytes) -> str:
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _malformed(problem: str) -> InvalidRequest:
    return InvalidRequest(f"The Stripe-Signature can't be read: {problem}.", code="signature_malformed")
