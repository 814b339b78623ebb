"""What passes the proxy unchanged, what stops at it, and what it answers where it serves nothing."""

import json
from typing import Any

import httpx2
import pytest
import structlog

from tests.e2e.proxy import MESSAGES, Customer, Proxy
from tests.fakes.upstream import DONE, ScriptedUpstream, chat_answer, chunk, stream, usage_chunk, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

ORIGIN = "https://app.example"


# Bytes.


async def test_a_request_keeps_its_bytes(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer()))
    body = (
        '{ "unknown" : [1.0, 1e2, 12345678901234567890, "\\u00e4\\ud800"], "model":"m",\n'
        '\t"messages":[{"content":"Say hello.","role":"user"}],"temperature":1.00 }'
    )
    assert (await customer.send(body.encode())).status_code == 200
    assert upstream.requests[-1].body == body.replace('"m"', '"gpt-4o-up"').encode()


async def test_a_request_that_needs_no_change_is_not_touched(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer()))
    body = b'{"model": "free", "messages": [{"role": "user", "content": "Say hello."}]}\n'
    await customer.send(body)
    assert upstream.requests[-1].body == body


async def test_a_clients_stream_options_are_kept(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(chunk("x"), chunk(finish="stop"), usage_chunk(10, 5), DONE))
    await customer.post(stream=True, stream_options={"include_obfuscation": False})
    assert upstream.requests[-1].json["stream_options"] == {"include_obfuscation": False, "include_usage": True}


async def test_an_answer_keeps_its_bytes(customer: Customer, upstream: ScriptedUpstream) -> None:
    text = '  {"id":"x","choices":[{"message":{"content":"\\u00e4"},"finish_reason":"stop"}],"usage":null,"n":1.50}\n'
    upstream.will(*whole(text.encode()))
    answer = await customer.post()
    assert answer.content == text.encode()
    assert answer.headers["content-length"] == str(len(text))


async def test_a_stream_is_not_gathered(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*stream(chunk("a"), chunk("b"), chunk(finish="stop"), DONE, delay=0.1))
    pieces = []
    async with customer.stream() as answer:
        async for piece in answer.aiter_raw():
            pieces.append(piece)
    assert pieces == [chunk("a"), chunk("b"), chunk(finish="stop"), DONE]
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in answer.headers


# Headers.


async def test_headers_to_the_upstream(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer()))
    sent = {
        "authorization": f"Bearer {customer.key}",
        "x-api-key": customer.key,
        "openai-organization": "org-1",
        "openai-project": "proj-1",
        "openai-beta": "x=1",
        "cookie": "a=b",
        "x-forwarded-for": "10.0.0.1",
        "forwarded": "for=10.0.0.1",
        "proxy-authorization": "Basic x",
        "accept-encoding": "gzip, br",
        "connection": "x-title, keep-alive",
        "x-title": "named by Connection",
        "te": "trailers",
        "user-agent": "OpenAI/Python 3.54.0",
        "x-stainless-lang": "python",
        "idempotency-key": "word",
        "x-unknown": "1",
    }
    body = json.dumps(customer.body()).encode()
    answer = await customer.proxy.http.post("/chat/completions", content=body, headers=sent)
    assert answer.status_code == 200
    received = upstream.requests[-1].headers
    assert received.pop("idempotency-key") not in ("", "word")
    assert received.pop("host").startswith("127.0.0.1:")
    assert received == {
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(upstream.requests[-1].body)),
        "openai-beta": "x=1",
        "user-agent": "OpenAI/Python 3.54.0",
        "x-stainless-lang": "python",
    }
    assert customer.key not in str(received)


async def test_headers_to_the_client(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(
        *whole(
            chat_answer(),
            headers={
                "server": "provider",
                "date": "yesterday",
                "set-cookie": "a=b",
                "location": "http://elsewhere",
                "x-ratelimit-remaining-requests": "7",
                "openai-organization": "the-operators",
                "access-control-allow-origin": "*",
                "access-control-expose-headers": "x",
                "x-request-id": "req_upstream",
                "openai-processing-ms": "12",
                "openai-version": "2020-10-01",
                "retry-after-ms": "5",
                "keep-alive": "timeout=5",
                "connection": "openai-version",
            },
        )
    )
    answer = await customer.post()
    [hold] = await customer.ended()
    headers = dict(answer.headers)
    length = headers.pop("content-length")
    assert int(length) == len(answer.content)
    assert headers == {
        "content-type": "application/json",
        "openai-processing-ms": "12",
        "retry-after-ms": "5",
        "x-request-id": str(hold["id"]),
        "x-upstream-request-id": "req_upstream",
    }
    assert json.loads(hold["receipt"])["upstream_request_id"] == "req_upstream"


@pytest.mark.parametrize("status", [401, 402, 403, 429])
async def test_the_operators_trouble_is_not_the_clients(
    customer: Customer, upstream: ScriptedUpstream, status: int
) -> None:
    error = {"error": {"message": "Incorrect API key provided: sk-prov...ider", "code": "insufficient_quota"}}
    upstream.will(*whole(error, status))
    answer = await customer.post()
    assert answer.status_code == 502
    assert b"sk-prov" not in answer.content
    assert answer.json()["error"]["code"] in ("upstream_credentials", "upstream_quota")
    assert answer.headers["x-should-retry"] == "false"


async def test_whose_account_pays_the_provider_is_not_told(customer: Customer, upstream: ScriptedUpstream) -> None:
    message = "Rate limit reached for m in organization org-AbCdEf123456, project proj_AbCdEf123456 on tokens per min."
    upstream.will(*whole({"error": {"message": message, "type": "tokens", "code": "rate_limit_exceeded"}}, 429))
    answer = await customer.post()
    assert answer.status_code == 429
    assert answer.json()["error"]["message"].startswith("Rate limit reached for m in organization org-[redacted],")
    assert "AbCdEf" not in answer.text


async def test_a_redirect_is_not_followed(customer: Customer, upstream: ScriptedUpstream) -> None:
    before = len(upstream.requests)
    upstream.will(*whole(b"", 307, {"location": f"{upstream.base_url}/elsewhere"}))
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_redirect")
    assert "location" not in answer.headers
    assert len(upstream.requests) == before + 1


# Paths, methods, browsers.


def root(proxy: Proxy) -> str:
    return proxy.base_url.removesuffix("/v1")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/v1/chat/completions",
        "/v1//chat/completions/",
        "//v1/chat/completions",
        "/v1/chat/completions?api-version=1",
    ],
)
async def test_a_base_url_with_a_slip_works(customer: Customer, upstream: ScriptedUpstream, path: str) -> None:
    upstream.will(*whole(chat_answer()))
    url = root(customer.proxy) + path
    answer = await customer.proxy.http.post(url, json=customer.body(), headers=customer.headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/models", "/v1/models", "/v1/v1/models", "/v1/credits", "/credits", "/v1/usage"])
async def test_so_do_the_other_paths(proxy: Proxy, path: str) -> None:
    customer = await proxy.account(scopes=frozenset({"inference", "read"}))
    answer = await proxy.http.get(root(proxy) + path, headers=customer.headers)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/responses", 404),
        ("POST", "/responses", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/chat", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/%00", 404),
        ("GET", "/v1/chat/completions", 405),
        ("HEAD", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/admin/v1/accounts", 404),
    ],
)
async def test_what_is_not_served_says_so_in_openais_shape(proxy: Proxy, method: str, path: str, status: int) -> None:
    answer = await proxy.http.request(method, root(proxy) + path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"]
    if method != "HEAD":
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if "responses" in path:
            assert ".chat(" in error["message"]


async def test_a_browser_asks_first_without_a_key(proxy: Proxy) -> None:
    headers = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    answer = await proxy.http.options("/chat/completions", headers=headers)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.content == b""


async def test_a_browser_may_read_answers_and_errors(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer(), headers={"access-control-allow-origin": "*"}))
    body = json.dumps(customer.body()).encode()
    for key, status in ((customer.key, 200), ("wrong", 401)):
        headers = {"origin": ORIGIN, "authorization": f"Bearer {key}"}
        answer = await customer.proxy.http.post("/chat/completions", content=body, headers=headers)
        assert answer.status_code == status
        assert answer.headers.get_list("access-control-allow-origin") == ["*"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    missing = await customer.proxy.http.get("/nowhere", headers={"origin": ORIGIN})
    assert missing.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key"])
async def test_a_key_may_come_in_three_headers(customer: Customer, upstream: ScriptedUpstream, name: str) -> None:
    upstream.will(*whole(chat_answer()))
    value = f"Bearer {customer.key}" if name == "authorization" else customer.key
    answer = await customer.proxy.http.post("/chat/completions", json=customer.body(), headers={name: value})
    assert answer.status_code == 200


async def test_no_key_is_asked_for(proxy: Proxy) -> None:
    answer = await proxy.http.post("/chat/completions", json={"model": "m", "messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "api_key_missing")


async def test_a_path_is_not_logged(proxy: Proxy) -> None:
    with structlog.testing.capture_logs() as lines:
        await proxy.http.get(f"{root(proxy)}/v1/a-prompt-or-a-key")
        await proxy.http.get(f"{root(proxy)}/a-prompt-or-a-key")
    assert [line["route"] for line in lines if line["event"] == "request"] == ["other", "other"]
    assert "a-prompt" not in str(lines)


async def test_health(proxy: Proxy) -> None:
    async with httpx2.AsyncClient(base_url=root(proxy)) as http:
        assert (await http.get("/healthz")).json() == {"ok": True}
        ready: Any = await http.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
