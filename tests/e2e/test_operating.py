"""Operating a running Farebox: its admin API, an account's own API, metrics, readiness, and logs that keep quiet."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog

from proxy.local.serving import listen
from proxy.logs import Redactor, configure
from tests.e2e.proxy import PEPPER, Proxy, running_proxy
from tests.fakes.upstream import DONE, ScriptedUpstream, chunk, stream, usage_chunk
from tests.postgres import Database

ADMIN_TOKEN = "canary-admin-token-of-more-than-32-characters"
ADMIN = {"authorization": f"Bearer {ADMIN_TOKEN}"}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that this process logs, at its most talkative."""
    sink, root = io.StringIO(), logging.getLogger()
    handlers, level, propagate = root.handlers, root.level, root.propagate
    configure(Redactor([PEPPER, ADMIN_TOKEN]), stream=sink, level=logging.DEBUG)
    yield sink
    structlog.reset_defaults()
    root.handlers, root.propagate = handlers, propagate
    # Not by the attribute: loggers remember what they may say until they are told so.
    root.setLevel(level)


@pytest.fixture
async def metrics_port() -> int:
    with listen("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
async def running(
    database: Database, tmp_path: Path, log: io.StringIO, metrics_port: int
) -> AsyncIterator[tuple[Proxy, ScriptedUpstream]]:
    """A proxy with the admin API and metrics, and its upstream."""
    async with (
        ScriptedUpstream() as upstream,
        running_proxy(
            database, tmp_path, upstream.base_url, admin_token=ADMIN_TOKEN, metrics_port=metrics_port
        ) as proxy,
    ):
        yield proxy, upstream


def root(proxy: Proxy) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=proxy.base_url.removesuffix("/v1"), timeout=30)


async def settled(http: httpx2.AsyncClient, request_id: str) -> dict[str, Any]:
    """The receipt, once the request is settled."""
    async with asyncio.timeout(5):
        while True:
            found: dict[str, Any] = (await http.get(f"/admin/v1/receipts/{request_id}", headers=ADMIN)).json()
            if found["state"] == "final":
                return found
            await asyncio.sleep(0.01)


async def test_an_operator_sells_a_call_and_explains_it(running: tuple[Proxy, ScriptedUpstream]) -> None:
    proxy, upstream = running
    async with root(proxy) as http:
        account = (await http.post("/admin/v1/accounts", json={"name": "a", "external_id": "x"}, headers=ADMIN)).json()
        grant = {"amount": "1", "reference": "first"}
        assert (await http.post("/admin/v1/accounts/x/grants", json=grant, headers=ADMIN)).status_code == 200
        key = (await http.post("/admin/v1/accounts/x/keys", headers=ADMIN)).json()
        mine = {"authorization": f"Bearer {key['key']}"}

        upstream.will(*stream(chunk("Hello."), usage_chunk(10, 5), DONE))
        body = {"model": "m", "stream": True, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
        call = await http.post("/v1/chat/completions", json=body, headers=mine)
        request_id = call.headers["x-request-id"]

        receipt = await settled(http, request_id)
        assert receipt["account"] == account["id"]
        assert receipt["prices"] == [
            {"class": "input", "credits_per_1k": "1", "tokens": 10, "amount": "0.01"},
            {"class": "output", "credits_per_1k": "3", "tokens": 5, "amount": "0.015"},
        ]
        assert (receipt["charge"], receipt["usage"]["source"], receipt["ending"]) == ("0.025", "reported", "complete")
        assert receipt["answer"]["usage_reported"]["completion_tokens"] == 5
        assert (await http.get(f"/v1/receipts/{request_id}", headers=mine)).json() == receipt
        assert (await http.get("/v1/credits", headers=mine)).json()["balance"] == "0.975"
        [charge, granted] = (await http.get("/v1/transactions", headers=mine)).json()["data"]
        assert (charge["amount"], charge["request_id"], granted["reference"]) == ("-0.025", request_id, "first")
        [day] = (await http.get("/v1/usage", headers=mine)).json()["data"]
        assert (day["model"], day["charged"], day["tokens"]["output"]) == ("m", "0.025", 5)

        back = {"request_id": request_id, "reference": "sorry", "reason": "it was dull"}
        assert (await http.post("/admin/v1/reversals", json=back, headers=ADMIN)).json()["amount"] == "0.025"
        assert (await http.get("/v1/credits", headers=mine)).json()["balance"] == "1"

        await http.post(f"/admin/v1/keys/{key['id']}/revoke", headers=ADMIN)
        assert (await http.get("/v1/credits", headers=mine)).status_code == 401
        assert (await http.get("/admin/v1/accounts", headers=mine)).status_code == 401
        assert (await http.get("/v1/credits", headers=ADMIN)).status_code == 401
    await proxy.audit()


async def test_metrics_tell_of_a_call(running: tuple[Proxy, ScriptedUpstream], metrics_port: int) -> None:
    proxy, upstream = running
    customer = await proxy.account(credits=1)
    upstream.will(*stream(chunk("Hello."), usage_chunk(10, 5), DONE))
    assert (await customer.post(stream=True)).status_code == 200
    await customer.ended()
    async with httpx2.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{metrics_port}/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("farebox_"))
    assert float(values['farebox_requests_total{route="chat",status="200"}']) == 1
    assert float(values['farebox_tokens_total{class="output",source="reported"}']) == 5
    assert float(values["farebox_charged_microcredits_total"]) == 25_000
    reserved, released = values["farebox_reserved_microcredits_total"], values["farebox_released_microcredits_total"]
    assert float(reserved) - float(released) == 25_000
    assert float(values["farebox_open_holds"]) == 0
    assert float(values["farebox_unsettled_finalizes"]) == 0
    assert float(values["farebox_worker_lease_held"]) == 1
    assert float(values["farebox_first_byte_added_seconds_count"]) == 1
    assert float(values['farebox_ledger_call_seconds_count{operation="reserve"}']) == 1
    assert [name for name in values if name.startswith("farebox_price_version_info")]


async def refused_file(http: httpx2.AsyncClient) -> httpx2.Response:
    """/readyz, once it shows that a file was refused."""
    async with asyncio.timeout(5):
        while True:
            answer = await http.get("/readyz")
            if not answer.json()["catalog"]["ok"]:
                return answer
            await asyncio.sleep(0.05)


async def test_a_broken_file_shows_and_does_not_stop_the_service(running: tuple[Proxy, ScriptedUpstream]) -> None:
    proxy, _ = running
    async with root(proxy) as http:
        before = (await http.get("/readyz")).json()
        assert set(before["checks"]) >= {"database", "schema", "lease", "admitting"}
        assert before["catalog"]["ok"] is True
        (proxy.directory / "pricing.yaml").write_text("per: 1000\nmodels: 7\n")
        answer = await refused_file(http)
        assert answer.status_code == 200
        assert answer.json()["catalog"]["version"] == before["catalog"]["version"]
        assert "pricing.yaml" in answer.json()["catalog"]["problem"]


async def test_the_logs_keep_every_secret_and_every_word(
    running: tuple[Proxy, ScriptedUpstream], log: io.StringIO
) -> None:
    proxy, upstream = running
    customer = await proxy.account(credits=1)
    upstream.will(*stream(chunk("canary completion"), usage_chunk(10, 5), DONE))
    messages = [{"role": "user", "content": "canary prompt"}]
    call = await customer.post(stream=True, messages=messages)
    await customer.ended()
    # Each way of failing, with something secret in it.
    await customer.send(b'{"model": "canary model", "messages": [{"role": "user", "content": "canary prompt"}]}')
    await customer.send(b'{"model": "m", "messages": "canary prompt')
    upstream.will(*stream(chunk("canary completion")))
    with pytest.raises(httpx2.HTTPError):
        await customer.post(stream=True, messages=messages)
    for key in (f"{customer.key[:-1]}x", "sk-canary0123456789"):
        await proxy.http.post("/chat/completions", json={}, headers={"authorization": f"Bearer {key}"})
    async with root(proxy) as http:
        await http.get("/admin/v1/accounts", headers={"authorization": f"Bearer {ADMIN_TOKEN}x"})
        await http.get("/nothing?key=sk-canary0123456789")
    await customer.ended(count=2)
    text = log.getvalue()
    for secret in ("canary", customer.key.split("_")[2], PEPPER, "farebox_app:"):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    told = {line["event"]: line for line in lines if line.get("request_id") == call.headers["x-request-id"]}
    request, charged = told["request"], told["charged"]
    assert (request["route"], request["status"], request["model"]) == ("chat", 200, "m")
    assert (request["key_id"], request["account_id"]) == (customer.key_id, str(customer.id))
    assert (charged["charge"], charged["ending"], charged["usage_source"]) == ("0.025", "complete", "reported")
