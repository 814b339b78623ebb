"""An upgrade under load: the old release serves on while the schema is migrated and the new one starts beside it."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest

from proxy.ledger.audit import audit
from proxy.local.postgres import ClusterAddress
from tests.e2e.proxy import MESSAGES, PEPPER
from tests.e2e.test_processes import ROOT, serve
from tests.fakes.upstream import (
    DONE,
    Received,
    Script,
    ScriptedUpstream,
    chat_answer,
    chunk,
    stream,
    usage_chunk,
    whole,
)
from tests.ledger.previous.database import migrated, previous_database
from tests.postgres import Database

PREVIOUS_COMMIT = "76caefa"
"""The code of the release before, where this checkout has its history."""
STREAM_COST = 10 * 1000 + 20 * 3000
CALL_COST = 10 * 1000 + 5 * 3000
PRICING = "per: 1000\nmodels: {m: {upstream: up, input: 1, output: 3, max_output_tokens: 1000}}\n"
"""In words that the release before understands: it refuses a key that it doesn't know."""
GRANT = 1_000_000
"""Credits."""


@pytest.fixture
def previous_code(tmp_path: Path) -> Path:
    """A directory with the package ``proxy`` as it was."""
    archived = subprocess.run(["git", "archive", PREVIOUS_COMMIT, "proxy"], cwd=ROOT, capture_output=True, check=False)
    if archived.returncode != 0:
        pytest.skip("the history with the release before isn't here")
    directory = tmp_path / "previous"
    directory.mkdir()
    subprocess.run(["tar", "-x", "-C", directory], input=archived.stdout, check=True)
    return directory


@pytest.fixture
def database(cluster: ClusterAddress) -> Iterator[Database]:
    with previous_database(cluster) as found:
        yield found


def answer(received: Received) -> Script:
    if not received.json.get("stream"):
        return whole(chat_answer(prompt=10, completion=5))
    pieces = [chunk(f" {i}") for i in range(20)]
    return stream(*pieces, chunk(finish="stop"), usage_chunk(10, 20), DONE, delay=0.1)


async def keep_calling(http: httpx2.AsyncClient, url: str, key: str, enough: asyncio.Event) -> list[int]:
    """Calls and streams in turn, until it is enough; what each must have cost."""
    costs = []
    while not enough.is_set():
        for streamed in (False, True):
            body = {"model": "m", "messages": MESSAGES, "stream": streamed}
            got = await http.post(f"{url}/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            assert got.status_code == 200, got.text
            assert got.content.endswith(DONE) or not streamed
            costs.append(STREAM_COST if streamed else CALL_COST)
    return costs


async def test_old_and_new_serve_side_by_side_while_the_schema_is_migrated(
    database: Database, tmp_path: Path, previous_code: Path
) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    async with ScriptedUpstream() as upstream, httpx2.AsyncClient(timeout=60) as http:
        upstream.choose(answer)
        async with serve(database, tmp_path / "old", upstream, root=previous_code, pricing=PRICING) as (old, old_url):
            keys = [new_key(previous_code, database, name) for name in ("ann", "bob")]
            enough_of_old, enough = asyncio.Event(), asyncio.Event()
            calls = [asyncio.create_task(keep_calling(http, old_url, keys[i % 2], enough_of_old)) for i in range(6)]
            await asyncio.sleep(2)
            await migrated(database)
            await asyncio.sleep(1)
            async with serve(database, tmp_path / "new", upstream, pricing=PRICING, WORKERS="2") as (new, new_url):
                calls += [asyncio.create_task(keep_calling(http, new_url, keys[i % 2], enough)) for i in range(6)]
                await asyncio.sleep(3)
                enough_of_old.set()
                await asyncio.gather(*calls[:6])
                await stopped(old)
                enough.set()
                costs = [cost for made in await asyncio.gather(*calls) for cost in made]
                await stopped(new)
    await the_book_is_right(database, costs)


async def the_book_is_right(database: Database, costs: list[int]) -> None:
    connection = await asyncpg.connect(database.owner)
    try:
        states = await connection.fetch("SELECT state, count(*) FROM farebox.holds GROUP BY state")
        assert [tuple(row) for row in states] == [("final", len(costs))]
        money = await connection.fetchrow("SELECT sum(balance) AS balance, sum(held) AS held FROM farebox.accounts")
        assert money is not None
        assert (money["balance"], money["held"]) == (2 * GRANT * 1_000_000 - sum(costs), 0)
        assert [check for check in await audit(connection) if not check.ok] == []
    finally:
        await connection.close()


async def stopped(process: asyncio.subprocess.Process) -> None:
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await process.wait() == 0


def new_key(code: Path, database: Database, name: str) -> str:
    """An account with credits and its key, by the old release's commands."""
    command(code, database, "accounts", "create", name)
    command(code, database, "credits", "grant", name, str(GRANT), "--ref", name)
    return str(command(code, database, "keys", "create", name)["key"])


def command(code: Path, database: Database, *words: str) -> Any:
    environment = {"PYTHONPATH": str(code), "DATABASE_URL": database.app, "FAREBOX_KEY_PEPPER": PEPPER}
    ran = subprocess.run(
        [sys.executable, "-m", "proxy.cli", *words, "--json"],
        cwd=code,
        env=environment,
        capture_output=True,
        check=True,
    )
    return json.loads(ran.stdout)
