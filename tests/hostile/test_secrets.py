"""Canaries: no secret of the operator's, and no client's key, is in any answer, header, log line or metric; nor is
anybody's prompt or answer in a log. One server, every ending, an upstream that repeats whatever it was told."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.control.billing.signing import a_session_event, body_of, signature
from tests.e2e.proxy import PEPPER, UPSTREAMS, Customer, Proxy, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    Received,
    ScriptedUpstream,
    Step,
    chat_answer,
    chunk,
    event,
    head,
    whole,
)
from tests.fakes.upstream import stream as streamed
from tests.hostile.server import Server, running_server
from tests.postgres import Database

UPSTREAM_KEY = "sk-canary-upstream-5f2d8c1ab94e"
ADMIN_TOKEN = "canary-admin-token-7c31e05d98aa4b62f1"
STRIPE_KEY = "sk_test_canary51c0ffee0ddba11"
STRIPE_SECRET = "whsec_canaryendpoint7d1f0a"
WEBHOOK_SECRET = "whsec_Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5"
PROMPT = "canaryprompt"
ANSWER = "canaryanswer"
SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})


def upstreams_yaml(url: str) -> str:
    lines = ["upstreams:"]
    for name in UPSTREAMS:
        where = "http://127.0.0.1:1/v1" if name == "dead" else url
        key = "FAREBOX_TEST_NO_SUCH_KEY" if name == "locked" else "CANARY_KEY"
        lines += [f"  {name}:", "    dialect: openai", f"    base_url: {where}", f"    api_key_env: {key}"]
    return "\n".join(lines) + "\n"


def repeat(received: Received) -> list[Step]:
    """Say the key again wherever an upstream could, in the manner that the request's ``user`` names."""
    told = received.headers["authorization"]
    if STRIPE_KEY in told:
        # Its own errors name a few letters of the key; a proxy in between might name them all.
        said = {"message": f"Invalid API Key provided: {told}", "type": told, "code": STRIPE_KEY, "param": told}
        return whole({"error": said}, 401, {"request-id": told, "www-authenticate": told})
    assert UPSTREAM_KEY in told
    error: dict[str, Any] = {"error": {"message": f"Incorrect API key: {told}", "type": told, "code": UPSTREAM_KEY}}
    headers = {"x-request-id": told, "openai-version": UPSTREAM_KEY, "www-authenticate": told, "set-cookie": told}
    by_manner: dict[str, list[Step]] = {
        "error": whole(error, 500, headers),
        "refusal": whole(error, 400, headers),
        "operator": whole(error, 401, headers),
        "limit": whole(error, 429, headers),
        "redirect": whole(b"", 307, {"location": f"http://127.0.0.1:1/?key={UPSTREAM_KEY}"}),
        "error with 200": whole(error, 200, headers),
        "answer": whole(chat_answer(f"{ANSWER} {told}"), headers=headers),
        "stream": streamed(chunk(ANSWER), chunk(told), chunk(finish="stop"), DONE, headers=headers),
        "error in stream": streamed(chunk(ANSWER), event(error), headers=headers),
        "broken stream": [SSE, Chunk(chunk(f"{ANSWER} {told}")), Chunk(b"data: {" + told.encode()), Cut()],
        "garbage": [*whole(told.encode())],
        "no http": [Chunk(told.encode()), Cut(reset=True)],
    }
    return by_manner[received.json["user"]]


MANNERS = [
    "error", "refusal", "operator", "limit", "redirect", "error with 200", "answer", "stream", "error in stream",
    "broken stream", "garbage", "no http",
]  # fmt: skip


@contextlib.asynccontextmanager
async def canaries(
    database: Database, directory: Path, log_format: str
) -> AsyncIterator[tuple[Server, Proxy, int, ScriptedUpstream]]:
    """A server full of them: itself, the operator, and the port of its metrics."""
    (directory / "operator").mkdir()
    async with ScriptedUpstream() as upstream:
        upstream.choose(repeat)
        async with running_proxy(database, directory / "operator", upstream.base_url) as operator:
            with contextlib.closing(await _free_port()) as listener:
                metrics_port: int = listener.sockets[0].getsockname()[1]
            async with running_server(
                database,
                directory,
                upstream.base_url,
                environment={"CANARY_KEY": UPSTREAM_KEY},
                upstreams=upstreams_yaml(upstream.base_url),
                KEY_PEPPER=PEPPER,
                ADMIN_TOKEN=ADMIN_TOKEN,
                WEBHOOK_URL="http://127.0.0.1:1/?token=canaryhooktoken",
                WEBHOOK_SECRET=WEBHOOK_SECRET,
                STRIPE_KEY=STRIPE_KEY,
                STRIPE_WEBHOOK_SECRETS=f"whsec_other,{STRIPE_SECRET}",
                STRIPE_URL=upstream.base_url.removesuffix("/v1"),
                LOG_LEVEL="debug",
                LOG_FORMAT=log_format,
                METRICS_PORT=str(metrics_port),
                IDEMPOTENCY_ANSWER_SECONDS="60",
            ) as server:
                yield server, operator, metrics_port, upstream


async def _free_port() -> asyncio.Server:
    return await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)


class Collector:
    """Everything that the server has said to anybody."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.said: list[tuple[str, str]] = []

    async def ask(self, what: str, method: str, path: str, *, key: str, body: Any = None, **headers: str) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status = 0
        try:
            async with httpx2.AsyncClient(timeout=30) as http:
                url = self.base_url.removesuffix("/v1") + path
                sent = {"authorization": f"Bearer {key}", **headers}
                async with http.stream(method, url, content=content, headers=sent) as answer:
                    status = answer.status_code
                    self.said.append((f"{what}: headers", str(answer.headers.raw)))
                    async for piece in answer.aiter_raw():
                        self.said.append((f"{what}: body", piece.decode(errors="replace")))
        except httpx2.TransportError as error:
            self.said.append((f"{what}: error", str(error)))
        return status


async def everything(collector: Collector, customer: Customer) -> None:
    """Every manner of the upstream, streamed and not, and every refusal of Farebox's own."""
    chat = "/v1/chat/completions"
    messages = [{"role": "user", "content": PROMPT}]
    for manner in MANNERS:
        for streaming in (False, True):
            body = {"model": "m", "messages": messages, "user": manner, "stream": streaming}
            word = {"idempotency-key": f"{manner} {streaming}"}
            for _ in range(2):
                await collector.ask(f"{manner} {streaming}", "POST", chat, key=customer.key, body=body, **word)
    for model in ("dead", "locked", "nosuch", customer.key):
        await collector.ask(model, "POST", chat, key=customer.key, body={"model": model, "messages": messages})
    await collector.ask("bad json", "POST", chat, key=customer.key, body=b"{" + customer.key.encode())
    for bad in (f"{customer.key}x", customer.key[:-3], ADMIN_TOKEN, PEPPER, UPSTREAM_KEY):
        await collector.ask("bad key", "POST", chat, key=bad, body={"model": "m", "messages": messages})
        await collector.ask("bad admin", "GET", "/admin/v1/accounts", key=bad)
    await collector.ask("key in path", "GET", f"/v1/{customer.key}", key=customer.key)
    for path in ("/v1/models", "/v1/credits", "/v1/transactions", "/v1/usage", "/healthz", "/readyz"):
        await collector.ask(path, "GET", path, key=customer.key)
    for path in ("/admin/v1/accounts", f"/admin/v1/accounts/{customer.id}", f"/admin/v1/accounts/{customer.id}/keys"):
        await collector.ask(path, "GET", path, key=ADMIN_TOKEN)
    for hold in await customer.holds():
        await collector.ask("receipt", "GET", f"/v1/receipts/{hold['id']}", key=customer.key)


async def webhooks(collector: Collector, key: str) -> None:
    """Webhooks that are refused in each way, and one that is believed and can't be applied."""
    body = body_of(a_session_event("canary", note=f"{STRIPE_SECRET} {STRIPE_KEY} {key}"))
    signatures = ["", STRIPE_SECRET, f"t=1,v1={STRIPE_SECRET}", signature(body), signature(body, secret=STRIPE_SECRET)]
    signatures.append(signature(body, secret=STRIPE_SECRET, at=1_000_000_000))
    answers = [
        await collector.ask("webhook", "POST", "/webhooks/stripe", key=key, body=body, **{"stripe-signature": signed})
        for signed in signatures
    ]
    assert answers == [400, 400, 400, 400, 503, 400]


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_no_secret_is_ever_said(database: Database, tmp_path: Path, log_format: str) -> None:
    password = urlsplit(database.app).password
    assert password
    async with canaries(database, tmp_path, log_format) as (server, operator, metrics_port, upstream):
        customer = await operator.account(scopes=frozenset({"inference", "read"}))
        collector = Collector(server.base_url)
        await everything(collector, customer)
        assert len(upstream.requests) >= 2 * len(MANNERS)
        await webhooks(collector, customer.key)
        [event] = await operator.query("SELECT error FROM farebox.stripe_events")
        collector.said.append(("the event's row", event["error"]))
        assert any(ANSWER in text for _, text in collector.said), "the answers themselves were read"
        async with httpx2.AsyncClient() as http:
            metrics = (await http.get(f"http://127.0.0.1:{metrics_port}/metrics")).text
        # The ledger goes away: what is said then quotes no connection either.
        await operator.query("ALTER FUNCTION farebox.find_key RENAME TO find_key_away")
        other = await operator.account()
        await collector.ask("no ledger", "POST", "/v1/chat/completions", key=other.key, body=customer.body())
    assert "farebox_requests_total" in metrics
    log = server.log.read_text()
    assert '"request"' in log or "request " in log
    secrets = {"upstream key": UPSTREAM_KEY, "admin token": ADMIN_TOKEN, "pepper": PEPPER, "password": password}
    secrets |= {"webhook secret": WEBHOOK_SECRET, "its key": "canarycanary", "webhook token": "canaryhooktoken"}
    secrets |= {"stripe's key": STRIPE_KEY, "endpoint's secret": STRIPE_SECRET, "its end": STRIPE_SECRET[-12:]}
    secrets |= {"client key": customer.key, "end of the client key": customer.key[-20:]}
    places = [*collector.said, ("log", log), ("metrics", metrics)]
    found = [(name, where) for name, secret in secrets.items() for where, text in places if secret in text]
    assert found == []
    assert [word for word in (PROMPT, ANSWER) if word in log or word in metrics] == []


@pytest.mark.parametrize(
    "setting",
    [
        {"DATABASE_URL": "postgresql://u:canary-password@127.0.0.1:1/x"},
        {"DATABASE_URL": "mysql://u:canary-password@127.0.0.1:1/x"},
        {"KEY_PEPPER": "canary-password", "METRICS_PORT": "no number"},
        {"ADMIN_TOKEN": "canary-password"},
        {"WEBHOOK_URL": "https://example.org/?canary-password"},
        {"WEBHOOK_SECRET": "canary-password"},
        {"STRIPE_KEY": "canary-password"},
        {"STRIPE_KEY": "sk_test_canary-password"},
        {"STRIPE_KEY": "sk_test_1", "STRIPE_WEBHOOK_SECRETS": "whsec_good,canary-password"},
        {"STRIPE_KEY": "sk_test_1", "STRIPE_WEBHOOK_SECRETS": '["whsec_canary-password", ""]'},
    ],
    ids=str,
)
async def test_a_start_that_fails_says_no_secret(database: Database, tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(AssertionError) as failed:
        async with running_server(database, tmp_path, "http://127.0.0.1:1/v1", **setting):
            pass
    said = (tmp_path / "server.log").read_text() + str(failed.value)
    assert "code" in said or "error" in said
    assert "canary-password" not in said
