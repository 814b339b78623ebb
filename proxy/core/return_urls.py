"""Where a payment may return to: an allow-list of origins and beginnings of paths.

A URL that a program sends is compared part by part with what an operator has allowed: the same scheme, host and port,
and a path that begins with the allowed one at a segment's end. What browsers and servers may read differently (user
names, backslashes, encoded or dotted segments, control characters) is refused before.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

__all__ = ["URL_CHARS_MAX", "ReturnUrls"]

URL_CHARS_MAX = 2_000

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|[0-9a-f:.]{2,45}")
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*")
# Braces stand in Stripe's own template, {CHECKOUT_SESSION_ID}.
_REST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%{}-]*")
_PORTS = {"http": 80, "https": 443}


class _Allowed(NamedTuple):
    scheme: str
    host: str
    port: int
    path: str


class ReturnUrls:
    """The allow-list. Raises ValueError, which names the entry, for one that is no origin and path."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self.prefixes = tuple(prefixes)
        self._allowed = [_prefix(text) for text in self.prefixes]

    def allow(self, url: str) -> bool:
        """Whether a payment may return to the URL."""
        parts = _parts(url)
        if parts is None or not _REST.fullmatch(parts.query) or not _REST.fullmatch(parts.fragment):
            return False
        return any(
            (parts.scheme, parts.hostname, _port(parts)) == allowed[:3] and _begins(parts.path, allowed.path)
            for allowed in self._allowed
        )


def _prefix(text: str) -> _Allowed:
    parts = _parts(text)
    if parts is None or parts.query or parts.fragment or "?" in text or "#" in text:
        # What stands before an @ may be a password.
        shown = repr(text[:100]) if "@" not in text else "what was given"
        raise ValueError(f"{shown} is no origin and path, such as https://example.com/billing")
    assert parts.hostname is not None
    return _Allowed(parts.scheme, parts.hostname, _port(parts), parts.path.rstrip("/"))


def _parts(url: str) -> SplitResult | None:
    """The URL's parts; None for one that two readers might read differently."""
    if len(url) > URL_CHARS_MAX or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        known = parts.scheme in _PORTS and parts.port != 0
    except ValueError:
        return None
    if not known or "@" in parts.netloc or parts.hostname is None or not _HOST.fullmatch(parts.hostname):
        return None
    dotted = {".", ".."} & set(parts.path.split("/"))
    return None if dotted or not _PATH.fullmatch(parts.path) else parts


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS[parts.scheme]


def _begins(path: str, allowed: str) -> bool:
    return path == allowed or path.startswith(f"{allowed}/")
