"""Odd answers, limits by profile, and requests that break off. Odd requests are in test_bad_requests.py."""

import asyncio
import json
import socket
from typing import Any

import pytest

from tests.e2e.proxy import MESSAGES, Customer, Proxy
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("content", ["\0", "\ud800", "<|endoftext|>", " " * 1_000_000])
async def test_odd_text_in_an_answer_is_counted(customer: Customer, upstream: ScriptedUpstream, content: str) -> None:
    upstream.will(*whole({**chat_answer(content), "usage": None}))
    answer = await customer.post()
    assert answer.json()["choices"][0]["message"]["content"] == content
    [hold] = await customer.ended()
    assert (hold["state"], hold["usage_source"]) == ("final", "counted")
    assert 0 < hold["charge"] <= hold["amount"]


@pytest.mark.parametrize("usage", [-5, 1e400, "many", [], {}, 10**30, {"prompt_tokens": -1, "completion_tokens": "x"}])
async def test_a_nonsensical_usage_is_counted(customer: Customer, upstream: ScriptedUpstream, usage: Any) -> None:
    report = usage if isinstance(usage, dict | list) else {"prompt_tokens": usage, "completion_tokens": usage}
    upstream.will(*whole(json.dumps({**chat_answer(), "usage": report}).encode()))
    answer = await customer.post()
    assert answer.status_code == 200
    [hold] = await customer.ended()
    assert (hold["state"], hold["usage_source"]) == ("final", "counted")
    await customer.proxy.audit()


async def test_a_body_above_the_limit_names_its_setting(customer: Customer) -> None:
    answer = await customer.send(b'{"model":"m","x":"' + b"x" * (11 * 1024 * 1024) + b'"}')
    assert answer.status_code == 413
    assert "FAREBOX_BODY_BYTES_MAX" in answer.json()["error"]["message"]


async def test_the_chat_profile_is_narrower(proxy: Proxy) -> None:
    customer = await proxy.account(profile="chat")
    answer = await customer.post(messages=MESSAGES * 101)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_messages")
    answer = await customer.post(messages=[{"role": "user", "content": "x" * 33_000}])
    assert answer.status_code == 413


async def test_a_request_that_never_ends_holds_nothing(customer: Customer) -> None:
    host, port = customer.proxy.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {customer.key}\r\n"
    writer.write(head.encode() + b"content-length: 100\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    assert await customer.holds() == []
    del reader


async def test_half_a_close_counts_as_leaving(customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer()))
    host, port = customer.proxy.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as raw:
        body = json.dumps(customer.body()).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {customer.key}\r\n"
        raw.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        raw.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.2)
    assert (await customer.money()).held == 0
    await customer.proxy.audit()
