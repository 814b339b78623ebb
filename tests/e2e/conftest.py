"""Fixtures of the end-to-end tests: one proxy and one scripted upstream a module, an account a test."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.fakes.upstream import ScriptedUpstream
from tests.postgres import Database


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("proxy")
    async with running_proxy(module_database, directory, upstream.base_url) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def customer(proxy: Proxy) -> Customer:
    return await proxy.account(credits=1000)
