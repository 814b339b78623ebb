"""Calls of one key at once: as many as may run, those included that are read on for clients that left."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from tests.e2e.proxy import MESSAGES, Customer, Proxy, running_proxy
from tests.fakes.upstream import (
    DONE,
    Chunk,
    ScriptedUpstream,
    Send,
    Step,
    Wait,
    chat_answer,
    chunk,
    head,
    usage_chunk,
    whole,
)
from tests.postgres import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

SSE = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
CALLS_MAX = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("proxy")
    async with running_proxy(module_database, directory, upstream.base_url, key_calls_max=CALLS_MAX) as running:
        yield running


def answer_after(go: asyncio.Event) -> list[Step]:
    rest = [Chunk(event) for event in (chunk(finish="stop"), usage_chunk(10, 5), DONE)]
    return [SSE, Chunk(chunk("Hel")), Wait(go), *rest, Send(b"0\r\n\r\n")]


async def all_running(customer: Customer) -> None:
    """Once as many calls as may run do."""
    async with asyncio.timeout(10):
        while True:
            if len(await customer.holds()) == CALLS_MAX:
                return
            await asyncio.sleep(0.01)


async def begin(customer: Customer) -> None:
    """A call whose client leaves after the first words."""
    async with customer.stream(model="drained") as answer:
        assert answer.status_code == 200
        async for _ in answer.aiter_raw():
            return


async def test_one_more_is_429_and_the_sdk_comes_again(customer: Customer, upstream: ScriptedUpstream) -> None:
    go = asyncio.Event()
    upstream.will(Wait(go), *whole(chat_answer()))
    running = [asyncio.create_task(customer.post()) for _ in range(CALLS_MAX)]
    await all_running(customer)
    refused = await customer.post()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) > 0
    async with openai.AsyncOpenAI(base_url=customer.proxy.base_url, api_key=customer.key, max_retries=5) as sdk:
        call = asyncio.create_task(sdk.chat.completions.create(model="m", messages=MESSAGES))
        await asyncio.sleep(0.2)
        go.set()
        assert (await call).choices[0].message.content
    assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}
    await customer.ended(CALLS_MAX + 1)


async def test_another_key_is_not_in_its_way(customer: Customer, proxy: Proxy, upstream: ScriptedUpstream) -> None:
    go = asyncio.Event()
    upstream.will_in_turn([*[[Wait(go), *whole(chat_answer())]] * CALLS_MAX, whole(chat_answer())])
    running = [asyncio.create_task(customer.post()) for _ in range(CALLS_MAX)]
    await all_running(customer)
    other = await proxy.account()
    assert (await other.post()).status_code == 200
    go.set()
    await asyncio.gather(*running)


async def test_an_answer_that_is_read_on_without_its_client_has_a_place(
    customer: Customer, upstream: ScriptedUpstream
) -> None:
    """Or whoever opens and leaves could have every stream of the process."""
    go = asyncio.Event()
    upstream.will(*answer_after(go))
    for _ in range(CALLS_MAX):
        await begin(customer)
    assert (await customer.post(stream=True)).status_code == 429
    go.set()
    await customer.ended(CALLS_MAX)
    assert (await customer.post(stream=True)).status_code == 200


async def test_refused_calls_leave_their_places(customer: Customer, upstream: ScriptedUpstream) -> None:
    for _ in range(2 * CALLS_MAX):
        assert (await customer.post(model="nosuch")).status_code == 404
        assert (await customer.send(b"{")).status_code == 400
        assert (await customer.post(model="locked")).status_code == 503
        assert (await customer.post(model="dead")).status_code == 502
    upstream.will(*whole(chat_answer()))
    assert (await customer.post()).status_code == 200
