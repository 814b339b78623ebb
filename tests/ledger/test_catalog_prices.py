"""The ledger reads a catalog's body as the gateway means it: the same price for every variant, to the microcredit."""

import random

from proxy.core.catalog_files import load_catalog
from proxy.core.pricing import charge
from proxy.core.usage import TOKEN_CLASSES, Usage
from tests.ledger.bank import Bank

UPSTREAMS = "upstreams: {openai: {dialect: openai, base_url: 'https://h/v1', api_key: none}}"
PRICING = """\
credit_value: {amount: 0.01, currency: USD}
models:
  openai/gpt-4.1:
    upstream: openai
    input: 0.000000001
    cached_input: 0.333333333
    audio_input: 1000000
    output: 999999.999999999
    reasoning: 0
    max_output_tokens: 10000000
    per_request: 1000000
    cost: {input: 1, output: 1000000}
    service_tiers: {flex: {input: 0.7, output: 1.1}, priority: {input: 2, output: 6, per_request: 0.000001}}
    web_search: {per_request: 0.25}
    hosted_tools: {per_request: 0}
  free: {upstream: openai, input: 0, output: 0, max_output_tokens: 1}
"""


async def test_sql_and_python_charge_the_same_under_every_variant(bank: Bank) -> None:
    catalog = load_catalog(PRICING, UPSTREAMS)
    assert await bank.holds.put_price_version(catalog.version, catalog.body)
    chance = random.Random(1)
    for route in catalog.routes.values():
        for variant in route.variants.values():
            for most in (0, 1, 1_000, 10_000_000):
                usage = Usage(*(chance.randint(0, most) for _ in TOKEN_CLASSES))
                found = await bank.owner.fetchval(
                    "SELECT farebox.charge_for($1, $2, $3, $4)",
                    catalog.version,
                    route.model,
                    variant.name,
                    usage.as_tuple(),
                )
                assert found == charge(variant.price, usage), (route.model, variant.name, usage)


async def test_a_catalog_is_stored_once(own_bank: Bank) -> None:
    catalog = load_catalog(PRICING, UPSTREAMS)
    assert await own_bank.holds.put_price_version(catalog.version, catalog.body)
    assert not await own_bank.holds.put_price_version(catalog.version, catalog.body)
