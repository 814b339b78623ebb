"""Which headers pass, both ways: one policy for every route and every upstream.

Both lists name what is *let through*; anything else stops here. So hop-by-hop headers, cookies, forwarding headers, the
client's own credentials, the provider's rate limits of the operator's account and whatever a provider thinks of next
year need no rule. A header that ``Connection`` names is dropped even if it is listed (RFC 9110, 7.6.1).
"""

import hashlib
from collections.abc import Iterable
from uuid import UUID

__all__ = ["Headers", "answer_headers", "request_headers"]

Headers = list[tuple[bytes, bytes]]

# To the upstream. Not here, on purpose: openai-organization and openai-project choose whose account at the provider
# pays; anthropic-beta can switch on what the route's price doesn't cover (an operator may set it in upstreams.yaml).
_UP = frozenset(
    {
        b"accept",
        b"accept-language",
        b"anthropic-version",
        b"content-type",
        b"http-referer",
        b"openai-beta",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-client-request-id",
        b"x-title",
    }
)
_UP_PREFIX = b"x-stainless-"

# To the client. x-ratelimit-* is about the operator's account; x-request-id is ours, the upstream's is renamed.
_DOWN = frozenset(
    {
        b"content-language",
        b"content-type",
        b"openai-model",
        b"openai-processing-ms",
        b"openai-version",
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
    }
)
_DOWN_RENAMED = {b"x-request-id": b"x-upstream-request-id", b"request-id": b"x-upstream-request-id"}


def request_headers(received: Iterable[tuple[bytes, bytes]], account_id: UUID, body: bytes) -> Headers:
    """What a client's headers become for the upstream, names in lower case; credentials are added elsewhere.

    ``idempotency-key`` is scoped to the account: all accounts share the operator's key at the provider, where the
    same word from two of them must not give one the other's answer. And to ``body``, as it is sent: a retry may go with
    a cap that the first try didn't have, which a provider would take for another request under the same word.
    """
    received = [(name.lower(), value) for name, value in received]
    named = _named_by_connection(received)
    passed = [
        (name, value) for name, value in received if (name in _UP or name.startswith(_UP_PREFIX)) and name not in named
    ]
    passed += [
        (name, hashlib.sha256(account_id.bytes + hashlib.sha256(value).digest() + body).hexdigest().encode())
        for name, value in received
        if name == b"idempotency-key"
    ]
    return passed


def answer_headers(received: Iterable[tuple[bytes, bytes]]) -> Headers:
    """What an upstream's headers become for the client, names in lower case; ours are added elsewhere."""
    received = [(name.lower(), value) for name, value in received]
    named = _named_by_connection(received)
    passed: Headers = []
    for name, value in received:
        passed_name = name if name in _DOWN else _DOWN_RENAMED.get(name)
        if passed_name is not None and name not in named:
            passed.append((passed_name, value))
    return passed


def _named_by_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    values = [value for name, value in headers if name == b"connection"]
    return frozenset(word.strip().lower() for value in values for word in value.split(b","))
