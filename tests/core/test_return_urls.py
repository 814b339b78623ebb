"""Where a payment may return to: part by part, and nothing that two readers might read differently."""

import pytest

from proxy.core.return_urls import ReturnUrls

URLS = ReturnUrls(["https://app.example.com/billing", "http://localhost:3000", "https://EXAMPLE.org/"])


@pytest.mark.parametrize(
    "url",
    [
        "https://app.example.com/billing",
        "https://app.example.com/billing/",
        "https://app.example.com/billing/done?session={CHECKOUT_SESSION_ID}&ok=1#top",
        "https://APP.example.com:443/billing?x=%20",
        "http://localhost:3000",
        "http://localhost:3000/anything/at/all",
        "https://example.org/a",
        "https://example.org",
    ],
)
def test_is_allowed(url: str) -> None:
    assert URLS.allow(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/billing",
        "//app.example.com/billing",
        "https://app.example.com",
        "https://app.example.com/billings",
        "https://app.example.com/other",
        "https://app.example.com/billing/../other",
        "https://app.example.com/billing/%2e%2e/other",
        "https://app.example.com/billing/./x",
        "https://app.example.com:444/billing",
        "http://app.example.com/billing",
        "https://app.example.com.evil.net/billing",
        "https://app.example.com@evil.net/billing",
        "https://evil.net/https://app.example.com/billing",
        "https://evil.net\\@app.example.com/billing",
        "https:\\\\app.example.com/billing",
        "https://app.example.com\t/billing",
        "https://app.example.com/billing\n",
        "https://app.example.com /billing",
        "https://app.exämple.com/billing",
        "https://app.example.com/billing/\x00",
        "https://app.example.com/billing?<script>",
        "javascript:alert(1)",
        "javascript://app.example.com/billing",
        "data:text/html,x",
        "http://localhost:3001/",
        "http://localhost:99999/",
        "http://localhost:0/",
        "http://[::1/",
        f"http://localhost:3000/{'a' * 2000}",
    ],
)
def test_is_not_allowed(url: str) -> None:
    assert not URLS.allow(url)


@pytest.mark.parametrize(
    "text",
    ["example.com", "https://", "https://a b", "ftp://a", "https://a/?x=1", "https://u:p@a/", "https://a/b?", ""],
)
def test_what_is_no_origin_and_path_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no origin and path"):
        ReturnUrls([text])


def test_an_empty_list_allows_nothing() -> None:
    assert not ReturnUrls([]).allow("https://app.example.com/billing")
