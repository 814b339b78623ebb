"""Fixtures of the ledger's tests."""

from collections.abc import AsyncIterator

import pytest

from tests.ledger.bank import Bank, open_bank
from tests.postgres import Database


@pytest.fixture
async def bank(module_database: Database) -> AsyncIterator[Bank]:
    """A bank with a worker of its own, on the database that the module's tests share."""
    async with open_bank(module_database) as opened:
        yield opened


@pytest.fixture
async def own_bank(database: Database) -> AsyncIterator[Bank]:
    """A bank on a database of the test's own."""
    async with open_bank(database) as opened:
        yield opened
