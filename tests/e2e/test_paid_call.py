"""One paid call, from the socket to the settled hold."""

import pytest

from tests.e2e.proxy import Customer, Proxy
from tests.fakes.upstream import DONE, ScriptedUpstream, chat_answer, chunk, stream, usage_chunk, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_streamed_call_is_relayed_and_charged(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*stream(chunk("Hel"), chunk("lo."), chunk(finish="stop"), usage_chunk(10, 5), DONE))
    async with customer.stream() as answer:
        body = await answer.aread()
    assert answer.status_code == 200
    assert body == chunk("Hel") + chunk("lo.") + chunk(finish="stop") + DONE
    await customer.ended()
    account = await customer.money()
    assert account.balance == 1000_000_000 - (10 * 1000 + 5 * 3000)
    receipt = await customer.receipt(answer.headers["x-request-id"])
    assert (receipt.state, receipt.usage_source, receipt.ending) == ("final", "reported", "complete")
    await proxy.audit()


async def test_a_whole_answer_is_relayed_and_charged(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer(prompt=10, completion=5)))
    answer = await customer.post()
    assert answer.status_code == 200
    assert answer.json() == chat_answer(prompt=10, completion=5)
    await customer.ended()
    account = await customer.money()
    assert account.balance == 1000_000_000 - (10 * 1000 + 5 * 3000)
    await proxy.audit()
