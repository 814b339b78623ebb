"""Fixtures of the ledger's tests."""

from collections.abc import AsyncIterator

import pytest

from tests.ledger.bank import Bank, open_bank
from tests.postgres import Database


@pytest.fixture
async def bank(database: Database) -> AsyncIterator[Bank]:
    """A bank on a database of the test's own."""
    async with open_bank(database) as opened:
        yield opened
