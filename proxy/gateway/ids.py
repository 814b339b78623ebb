"""Request ids: UUIDv7 of our own making, never a client's. One id names the request, its hold and its receipt."""

import secrets
import time
from uuid import UUID

__all__ = ["new_request_id"]

_VERSION_7 = 0x7 << 76
_VARIANT = 0b10 << 62


def new_request_id() -> UUID:
    """A UUIDv7: 48 bits of Unix milliseconds, then 74 random ones: ids of one moment lie together in an index."""
    milliseconds = time.time_ns() // 1_000_000
    random = secrets.randbits(74)
    return UUID(int=milliseconds << 80 | _VERSION_7 | (random >> 62) << 64 | _VARIANT | random & ((1 << 62) - 1))
