"""Signatures of the messages that we send, in the way of Standard Webhooks (standardwebhooks.com, version v1)."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

__all__ = ["sign", "signing_key"]

SECRET_PREFIX = "whsec_"  # noqa: S105 - what every secret begins with
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64


def signing_key(secret: str) -> bytes:
    """The key that ``whsec_BASE64`` stands for: 24 to 64 bytes. Raises ValueError, without the secret in it."""
    if not secret.startswith(SECRET_PREFIX):
        raise ValueError(f"a signing secret begins with {SECRET_PREFIX}")
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"what follows {SECRET_PREFIX} is not base64") from None
    if not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        raise ValueError(f"a signing secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, not {len(key)}")
    return key


def sign(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``: one for each key, so that a receiver may know either while they change.

    ``timestamp``: whole seconds since 1970, as in ``webhook-timestamp``.
    """
    content = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(key, content, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
