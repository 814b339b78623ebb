"""The museum, third room: how gateways were broken into or tricked in public, and that Farebox isn't."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator

import pytest

from tests.e2e.proxy import Customer, Proxy
from tests.fakes.upstream import ScriptedUpstream, Send, chat_answer, head, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def status_with(customer: Customer, key: str) -> int:
    body = json.dumps(customer.body()).encode()
    headers = {"authorization": f"Bearer {key}"}
    return (await customer.proxy.http.post("/chat/completions", content=body, headers=headers)).status_code


async def test_half_a_key_opened_the_door(customer: Customer, upstream: ScriptedUpstream) -> None:
    """CVE-2026-35030: the cache knew a credential by its first 20 characters."""
    upstream.will(*whole(chat_answer()))
    assert await status_with(customer, customer.key) == 200
    for length in (20, 30, len(customer.key) - 7):
        forged = customer.key[:length] + "".join("a" if c != "a" else "b" for c in customer.key[length:])
        assert await status_with(customer, forged) == 401
    assert await status_with(customer, customer.key) == 200


async def test_a_credential_became_part_of_a_query(customer: Customer) -> None:
    """CVE-2026-42208: the Authorization value stood in the SQL of the path that reported its error."""
    for key in ("' OR 1=1 --", "fb_x'; DROP TABLE farebox.accounts; --", f"{customer.key}' OR ''='"):
        assert await status_with(customer, key) == 401
    assert (await customer.money()).balance == 1000_000_000


async def test_a_revoked_key_lived_on_in_a_cache(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Sessions and keys that outlive their end (CVE-2026-12796): the reserve itself looks at the key again."""
    upstream.will(*whole(chat_answer()))
    assert await status_with(customer, customer.key) == 200
    await customer.proxy.operations.revoke_key(customer.key_id)
    assert await status_with(customer, customer.key) == 401


async def test_somebody_elses_record_was_served(proxy: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    """CVE-2026-30886: an id was enough to read what belongs to another account."""
    upstream.will(*whole(chat_answer()))
    request_id = (await customer.post()).headers["x-request-id"]
    await customer.ended()
    stranger = await proxy.account(scopes=frozenset({"inference", "read"}))
    answer = await proxy.http.get(f"/receipts/{request_id}", headers=stranger.headers)
    assert answer.status_code == 404


async def test_the_client_chose_the_upstream(customer: Customer, upstream: ScriptedUpstream) -> None:
    """CVE-2024-6587, CVE-2025-66405: `api_base` or a custom host sent the provider's key to an attacker."""
    upstream.will(*whole(chat_answer()))
    before = len(upstream.requests)
    async with _listener() as (url, connections):
        body = customer.body(api_base=url, base_url=url, custom_llm_provider="openai")
        headers = {"x-portkey-custom-host": url, "x-farebox-upstream": url, "host": url.removeprefix("http://")}
        answer = await customer.proxy.http.post(
            "/chat/completions", content=json.dumps(body).encode(), headers=customer.headers | headers
        )
        assert answer.status_code == 200
        assert connections == []
    assert len(upstream.requests) == before + 1


async def test_a_redirect_was_followed(customer: Customer, upstream: ScriptedUpstream) -> None:
    """Portkey #1718 and others: a redirect took the provider's key to whoever was named in it."""
    async with _listener() as (url, connections):
        upstream.will(*whole(b"", 307, {"location": f"{url}/v1/chat/completions"}))
        assert (await customer.post()).status_code == 502
        assert connections == []
    [hold] = await customer.ended()
    assert hold["state"] == "released"


async def test_the_clients_key_went_upstream(customer: Customer, upstream: ScriptedUpstream) -> None:
    """LiteLLM #32202: the proxy's own Authorization header was passed through to the provider."""
    upstream.will(*whole(chat_answer()))
    assert await status_with(customer, customer.key) == 200
    received = upstream.requests[-1]
    assert customer.key not in str(received.headers)
    assert customer.key.encode() not in received.body


async def test_a_small_answer_unpacked_to_a_large_one(customer: Customer, upstream: ScriptedUpstream) -> None:
    """GHSA-6mq8-rvhq-8wgg, CVE-2026-84382: a kilobyte on the wire, megabytes in memory."""
    bomb = gzip.compress(b"\0" * 50_000_000)
    upstream.will(
        head(200, {"content-type": "application/json", "content-encoding": "gzip", "content-length": str(len(bomb))}),
        Send(bomb),
    )
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_encoded")
    [hold] = await customer.ended()
    assert hold["state"] == "released"


async def test_a_wildcard_found_every_account(proxy: Proxy, customer: Customer) -> None:
    """CVE-2026-25591: `%` in a search became a pattern that scanned the whole table."""
    for pattern in ("%", "_" * 8, "cust%", "customer' --"):
        with pytest.raises(Exception, match="No account"):
            await proxy.operations.account(pattern)
    assert (await customer.money()).id == customer.id


async def test_two_lengths_hid_a_second_request(customer: Customer, upstream: ScriptedUpstream) -> None:
    """CVE-2025-43859 and its kin: where two parsers disagree about a body's end, a request can hide behind another."""
    upstream.will(*whole(chat_answer()))
    before = len(upstream.requests)
    body = json.dumps(customer.body()).encode()
    hidden = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    host, port = customer.proxy.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [
        b"POST /v1/chat/completions HTTP/1.1",
        b"host: x",
        b"authorization: Bearer " + customer.key.encode(),
        b"content-length: %d" % len(body),
        b"transfer-encoding: chunked",
    ]
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + body + hidden)
    await writer.drain()
    async with asyncio.timeout(10):
        answer = await reader.readline()
    writer.close()
    assert answer.split()[1] == b"400"
    assert len(upstream.requests) == before


@contextlib.asynccontextmanager
async def _listener() -> AsyncIterator[tuple[str, list[object]]]:
    """An attacker's host, and the connections that were made to it."""
    connections: list[object] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(reader)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    finally:
        server.close()
