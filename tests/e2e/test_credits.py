"""What a balance allows: the cap it forces, whom it refuses, and what a refusal says."""

import asyncio
import json

import pytest

from proxy.core.money import parse_credits
from tests.e2e.proxy import Customer, Proxy
from tests.fakes.upstream import DONE, ScriptedUpstream, Sleep, chat_answer, chunk, stream, usage_chunk, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The bound of "Say hello." for this family: 1.05 times what is counted (10), rounded up, and 16.
BOUND_IN = 27
WHOLE = BOUND_IN * 1000 + 1000 * 3000


async def test_no_cap_is_sent_where_the_balance_carries_the_routes(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=WHOLE / 1_000_000)
    upstream.will(*whole(chat_answer()))
    answer = await customer.post()
    assert "max_completion_tokens" not in upstream.requests[-1].json
    assert "max_tokens" not in upstream.requests[-1].json
    assert "x-farebox-output-cap" not in answer.headers
    [hold] = await customer.ended()
    assert hold["amount"] == WHOLE


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_short_balance_forces_a_cap_and_says_so(proxy: Proxy, upstream: ScriptedUpstream, choices: int) -> None:
    tokens = 200
    customer = await proxy.account(credits=(BOUND_IN * 1000 + choices * tokens * 3000 + 2999) / 1_000_000)
    upstream.will(*stream(chunk("x"), chunk(finish="length"), usage_chunk(10, choices * tokens), DONE))
    async with customer.stream(n=choices) as answer:
        await answer.aread()
    assert upstream.requests[-1].json["max_tokens"] == tokens
    assert answer.headers["x-farebox-output-cap"] == str(tokens)
    [hold] = await customer.ended()
    assert hold["charge"] == 10_000 + choices * tokens * 3000
    assert json.loads(hold["receipt"])["cap_sent"] == tokens


async def test_below_the_least_cap_a_call_is_refused(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    needed = BOUND_IN * 1000 + 64 * 3000
    customer = await proxy.account(credits=(needed - 1) / 1_000_000)
    sent = len(upstream.requests)
    answer = await customer.post()
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("insufficient_quota", "insufficient_quota", None)
    assert parse_credits(error["needed"]) == needed
    assert parse_credits(error["available"]) == needed - 1
    assert error["held"] == "0"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert len(upstream.requests) == sent
    assert await customer.holds() == []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_clients_own_cap_is_never_lowered(proxy: Proxy, upstream: ScriptedUpstream, name: str) -> None:
    customer = await proxy.account(credits=(BOUND_IN * 1000 + 500 * 3000 - 1) / 1_000_000)
    assert (await customer.post(**{name: 500})).status_code == 402
    upstream.will(*whole(chat_answer()))
    answer = await customer.post(**{name: 499})
    assert answer.status_code == 200
    assert upstream.requests[-1].json[name] == 499
    assert "x-farebox-output-cap" not in answer.headers


async def test_the_larger_of_two_caps_is_held_for(proxy: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer()))
    await customer.post(max_tokens=20, max_completion_tokens=30)
    [hold] = await customer.ended()
    assert hold["amount"] == BOUND_IN * 1000 + 30 * 3000


async def test_a_key_that_wants_no_forced_cap_is_refused(proxy: Proxy) -> None:
    customer = await proxy.account(credits=1, affordable_cap=False)
    answer = await customer.post()
    assert answer.status_code == 402
    assert parse_credits(answer.json()["error"]["needed"]) == WHOLE


async def test_credits_that_others_hold_are_worth_a_retry(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=1)
    upstream.will(Sleep(0.5), *whole(chat_answer()))
    first = asyncio.create_task(customer.post(max_tokens=300))
    await customer.opened()
    answer = await customer.post(max_tokens=300)
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "credits_held")
    assert parse_credits(error["held"]) == BOUND_IN * 1000 + 300 * 3000
    assert answer.headers["x-should-retry"] == "true"
    assert int(answer.headers["retry-after"]) > 0
    assert (await first).status_code == 200


async def test_a_free_model_needs_no_credits(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    customer = await proxy.account(credits=0)
    upstream.will(*whole(chat_answer()))
    assert (await customer.post(model="free")).status_code == 200
    [hold] = await customer.ended()
    assert (hold["charge"], hold["usage_source"]) == (0, "reported")


async def test_a_charge_is_rounded_up_once(proxy: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer(prompt=1, completion=1)))
    assert (await customer.post(model="tiny")).status_code == 200
    [hold] = await customer.ended()
    # 1 and 3 microcredits for a thousand tokens: 4 thousandths of a microcredit.
    assert hold["charge"] == 1


async def test_a_spend_limit_is_the_keys_own(proxy: Proxy) -> None:
    customer = await proxy.account(credits=1000, spend_limit=100_000)
    answer = await customer.post()
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert (error["code"], error["spend_limit_left"]) == ("spend_limit_reached", "0.1")


async def test_a_key_that_changed_is_loaded_once_more(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer()))
    assert (await customer.post()).status_code == 200
    await proxy.operations.update_key(customer.key_id, {"affordable_cap": False})
    assert (await customer.post()).status_code == 200
    await proxy.operations.update_key(customer.key_id, {"models": frozenset({"free"})})
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_forbidden")


async def test_a_revoked_key_is_refused_at_once(proxy: Proxy, customer: Customer, upstream: ScriptedUpstream) -> None:
    upstream.will(*whole(chat_answer()))
    assert (await customer.post()).status_code == 200
    await proxy.operations.revoke_key(customer.key_id)
    answer = await customer.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "api_key_revoked")
    assert len(await customer.ended(1)) == 1


async def test_a_missing_upstream_key_is_named(customer: Customer) -> None:
    answer = await customer.post(model="locked")
    assert answer.status_code == 503
    assert "FAREBOX_TEST_NO_SUCH_KEY" in answer.json()["error"]["message"]
    assert await customer.holds() == []


@pytest.mark.parametrize(
    "option",
    [
        {"service_tier": "flex"},
        {"web_search_options": {}},
        {"tools": [{"type": "web_search"}]},
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        {"store": True},
    ],
)
async def test_an_option_without_a_price_is_refused(customer: Customer, option: dict[str, object]) -> None:
    answer = await customer.post(**option)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unpriced_option")
    assert await customer.holds() == []


async def test_prices_change_under_traffic_and_each_call_pays_its_own(
    proxy: Proxy, customer: Customer, upstream: ScriptedUpstream
) -> None:
    upstream.will(*stream(chunk("x"), chunk(finish="stop"), usage_chunk(10, 5), DONE, delay=0.02))
    file = proxy.directory / "pricing.yaml"
    prices_a = file.read_text()
    prices_b = prices_a.replace("input: 1\n    output: 3", "input: 2\n    output: 5")
    answered: list[int] = []

    async def call() -> None:
        async with customer.stream(max_tokens=100) as answer:
            await answer.aread()
        answered.append(answer.status_code)

    async def traffic(until: str) -> None:
        before = proxy.app.price_version
        file.write_text(until)
        async with asyncio.timeout(10):
            while proxy.app.price_version == before:
                await asyncio.gather(*(call() for _ in range(4)))
        await asyncio.gather(*(call() for _ in range(4)))

    version_a = proxy.app.price_version
    await traffic(prices_b)
    version_b = proxy.app.price_version
    await traffic(prices_a)
    assert proxy.app.price_version == version_a != version_b
    assert set(answered) == {200}
    holds = await customer.ended(len(answered))
    due = {version_a: 10 * 1000 + 5 * 3000, version_b: 10 * 2000 + 5 * 5000}
    assert {hold["price_version"] for hold in holds} == {version_a, version_b}
    assert all(hold["charge"] == due[hold["price_version"]] for hold in holds)
    assert (await customer.money()).balance == 1000_000_000 - sum(hold["charge"] for hold in holds)
    await proxy.audit()
