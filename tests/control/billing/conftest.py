"""Billing's tests: a ledger that a module shares, and a Stripe that a module shares."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.control.billing.counter import Counter, open_counter
from tests.control.billing.till import Desk, open_desk
from tests.fakes.stripe import FakeStripe
from tests.ledger.bank import Bank


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeStripe]:
    """In test mode."""
    with FakeStripe() as running:
        yield running


@pytest.fixture
async def desk(bank: Bank, fake: FakeStripe) -> AsyncIterator[Desk]:
    """Orders, Stripe and the till, on the database that the module's tests share."""
    async with open_desk(bank, fake) as opened:
        yield opened


@pytest.fixture
async def counter(desk: Desk) -> AsyncIterator[Counter]:
    """Refunds and disputes beside the till; at the end the audit is asked."""
    async with open_counter(desk) as opened:
        yield opened
