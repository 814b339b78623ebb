"""What may pass, both ways; the whole picture over sockets is in tests/e2e/test_transparency.py."""

from uuid import UUID

from proxy.gateway.headers import answer_headers, request_headers

ACCOUNT = UUID(int=1)


def test_an_idempotency_key_is_the_accounts_own() -> None:
    word = [(b"Idempotency-Key", b"word")]
    [(name, first)] = request_headers(word, ACCOUNT, b"body")
    assert name == b"idempotency-key"
    assert request_headers(word, ACCOUNT, b"body") == [(name, first)]
    assert request_headers(word, UUID(int=2), b"body") != [(name, first)]
    # A retry that is sent with another cap is another request to a provider.
    assert request_headers(word, ACCOUNT, b"another") != [(name, first)]


def test_what_connection_names_is_dropped_whatever_its_case() -> None:
    headers = [(b"Connection", b"close, X-Title"), (b"x-title", b"a"), (b"OpenAI-Beta", b"b")]
    assert request_headers(headers, ACCOUNT, b"") == [(b"openai-beta", b"b")]
    down = [(b"Connection", b"Retry-After"), (b"retry-after", b"1"), (b"Content-Type", b"text/plain")]
    assert answer_headers(down) == [(b"content-type", b"text/plain")]


def test_an_anthropic_beta_is_the_operators_to_set() -> None:
    headers = [(b"anthropic-beta", b"context-1m"), (b"anthropic-version", b"2023-06-01")]
    assert request_headers(headers, ACCOUNT, b"") == [(b"anthropic-version", b"2023-06-01")]


def test_either_request_id_of_an_upstream_is_renamed() -> None:
    for name in (b"X-Request-Id", b"request-id"):
        assert answer_headers([(name, b"r")]) == [(b"x-upstream-request-id", b"r")]
