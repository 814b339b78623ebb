"""What a usage costs, said twice: in Python before and after a call, in SQL for the sweeper and the audit."""

from dataclasses import astuple, replace

import pytest

from proxy.core.pricing import Price, charge
from proxy.core.usage import Usage
from tests.ledger.bank import Bank

BIG, LIMIT = 2**40, 2**30
PRICES = [
    Price(0, 0, 0, 0, 0, 0, 0),
    Price(1, 2, 3, 4, 5, 6, 7, 11),
    Price(*[LIMIT - 1] * 7),
    replace(Price(*[LIMIT] * 7), per_request=LIMIT),
    Price(0, 0, 0, 0, 0, 0, BIG, 1),
]
USAGES = [
    Usage(),
    Usage(1, 1, 1, 1, 1, 1, 1),
    Usage(7, 6, 5, 4, 3, 2, 1),
    Usage(*[LIMIT - 1] * 7),
    Usage(*[LIMIT] * 7),
    Usage(audio_output=BIG),
    Usage(input=999_999, output=1),
    Usage(input=1_000_000),
]


@pytest.mark.parametrize("price", PRICES)
async def test_sql_and_python_agree_where_numbers_grow_large_too(bank: Bank, price: Price) -> None:
    for usage in USAGES:
        query = "SELECT farebox.charge_at($1, $2, $3)"
        found = await bank.owner.fetchval(query, price.rates(), price.per_request, astuple(usage))
        assert found == charge(price, usage), usage
