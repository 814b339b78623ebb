"""A frozen account at the door: refused by name, by a process that has its key in the cache, too; streams end well."""

import asyncio

import pytest

from tests.e2e.proxy import Customer, Proxy
from tests.fakes.upstream import DONE, ScriptedUpstream, Wait, chat_answer, chunk, stream, usage_chunk, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def freeze(customer: Customer) -> None:
    await customer.proxy.operations.freeze(customer.id, reason="a chargeback", actor="test")


async def test_403_account_frozen_for_a_key_that_is_in_the_cache(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    assert (await customer.post()).status_code == 200
    sent = len(upstream.requests)
    await freeze(customer)
    for _ in range(2):  # by the reserve, then by what was loaded upon it
        answer = await customer.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "account_frozen")
        assert answer.headers["x-should-retry"] == "false"
    assert len(upstream.requests) == sent
    assert len(await customer.holds()) == 1
    await proxy.audit()


async def test_403_account_frozen_for_a_key_that_was_not(customer: Customer) -> None:
    await freeze(customer)
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "account_frozen")


async def test_the_account_may_read_that_it_is_frozen(proxy: Proxy, customer: Customer) -> None:
    await freeze(customer)
    answer = await proxy.http.get("/credits", headers=customer.headers)
    assert answer.status_code == 200
    assert answer.json()["frozen_at"] is not None
    assert answer.json()["available"] == "1000"


async def test_a_stream_that_runs_ends_in_peace(proxy: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    rest = asyncio.Event()
    first, *others = stream(chunk("one"), chunk(" two"), chunk(finish="stop"), usage_chunk(10, 2), DONE)
    upstream.will(first, others[0], Wait(rest), *others[1:])
    async with customer.stream(stream_options={"include_usage": True}) as answer:
        await customer.opened()
        await freeze(customer)
        rest.set()
        text = (await answer.aread()).decode()
    assert " two" in text
    assert text.rstrip().endswith("[DONE]")
    [hold] = await customer.ended()
    assert (hold["state"], hold["ending"], hold["charge"]) == ("final", "complete", 10 * 1000 + 2 * 3000)
    await proxy.audit()


async def test_200_again_once_it_is_lifted(proxy: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    await freeze(customer)
    await proxy.operations.unfreeze(customer.id, actor="test")
    upstream.will(*whole(chat_answer()))
    assert (await customer.post()).status_code == 200
