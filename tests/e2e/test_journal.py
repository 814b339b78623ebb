"""The journal under the paid call: what a killed process knew is charged by the next one, to the microcredit."""

import asyncio
import contextlib
import errno
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import httpx2
import pytest

from proxy.ledger.journal_files import DONE, OPEN, JournalDirectory, JournalFile
from proxy.ledger.journal_records import read_journal
from tests.e2e.proxy import Customer, Proxy, running_proxy
from tests.e2e.test_processes import ROOT, serve
from tests.e2e.workers import eventually, workers
from tests.fakes.upstream import ScriptedUpstream, Wait, chat_answer, chunk, stream, usage_chunk, whole
from tests.ledger.journals import until
from tests.postgres import Database

# 27 tokens of prompt and 100 of answer, at 1 and 3 credits a thousand.
COST = 27 * 1000 + 100 * 3000


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
async def operator(database: Database, tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Proxy]:
    """The operator's hand on the ledger; its own server keeps its journal elsewhere."""
    async with running_proxy(database, tmp_path, upstream.base_url, state_dir=tmp_path / "operator") as running:
        yield running


async def call(url: str, customer: Customer) -> httpx2.Response:
    async with httpx2.AsyncClient(timeout=30) as http:
        body = json.dumps(customer.body(max_tokens=100)).encode()
        return await http.post(f"{url}/chat/completions", content=body, headers=customer.headers)


@contextlib.asynccontextmanager
async def account_locked(database: Database, customer: Customer) -> AsyncIterator[None]:
    """Nothing of this account can be settled meanwhile, nor afterwards by who waited for it."""
    blocker = await asyncpg.connect(database.superuser)
    async with blocker.transaction():
        await blocker.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", customer.id)
        yield
        await blocker.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    await blocker.close()


def rows_in(directory: JournalDirectory, *endings: str) -> int:
    return sum(len(read_journal(file.path.read_bytes()).rows) for file in directory.files(*endings))


async def test_a_charge_that_was_known_when_its_process_was_killed_is_booked_by_the_next(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    customer = await operator.account(credits=10)
    journals = JournalDirectory(tmp_path / ".farebox" / "journal")
    answered = asyncio.Event()
    upstream.will(*whole(chat_answer(prompt=27, completion=100)))
    async with serve(database, tmp_path, upstream) as (process, url):
        # The hold is there before the lock is, and the charge after it.
        upstream.choose(lambda _: [Wait(answered), *whole(chat_answer(prompt=27, completion=100))])
        calling = asyncio.create_task(call(url, customer))
        await customer.opened()
        async with account_locked(database, customer):
            answered.set()
            assert (await calling).status_code == 200
            await until(lambda: rows_in(journals, OPEN) == 1)
            process.kill()
            await process.wait()
    [hold] = await customer.holds()
    assert hold["state"] == "open"
    async with serve(database, tmp_path, upstream):
        [hold] = await customer.ended(seconds=15)
        await until(lambda: rows_in(journals, DONE) == rows_in(journals) == 1)
    assert (hold["state"], hold["charge"], hold["usage_source"]) == ("final", COST, "reported")
    money = await customer.money()
    assert (money.balance, money.held) == (10_000_000 - COST, 0)
    await operator.audit()


async def test_a_living_process_takes_over_for_a_dead_one(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    customer = await operator.account(credits=10)
    answered = asyncio.Event()
    upstream.choose(lambda _: [Wait(answered), *whole(chat_answer(prompt=27, completion=100))])
    journals = JournalDirectory(tmp_path / ".farebox" / "journal")
    async with serve(database, tmp_path, upstream), serve(database, tmp_path, upstream) as (mortal, url):
        calling = asyncio.create_task(call(url, customer))
        await customer.opened()
        async with account_locked(database, customer):
            answered.set()
            assert (await calling).status_code == 200
            await until(lambda: rows_in(journals, OPEN) == 1)
            mortal.kill()
            await mortal.wait()
        [hold] = await customer.ended(seconds=20)
    assert (hold["state"], hold["charge"]) == ("final", COST)
    await operator.audit()


async def test_a_clean_stop_leaves_nothing_waiting(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(*stream(chunk("Hi"), usage_chunk(27, 100)))
    async with running_proxy(database, tmp_path, upstream.base_url) as proxy:
        customer = await proxy.account(credits=10)
        for _ in range(3):
            assert (await customer.post(max_tokens=100)).status_code == 200
        await customer.ended(3)
    journals = JournalDirectory(tmp_path / "state" / "journal")
    assert [file.ending for file in journals.files()] == [DONE]
    assert rows_in(journals) == 3


async def test_a_broken_disk_ends_the_process_and_costs_no_charge(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.will(*whole(chat_answer(prompt=27, completion=100)))
    async with running_proxy(database, tmp_path, upstream.base_url) as proxy:
        customer = await proxy.account(credits=10)

        def broken(_file: JournalFile) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(JournalFile, "sync", broken)
        assert (await customer.post(max_tokens=100)).status_code == 200
        [hold] = await customer.ended()
        assert (hold["state"], hold["charge"]) == ("final", COST)
        assert "Input/output error" in str(proxy.app.broken)
        ready = await proxy.http.get(proxy.base_url.removesuffix("/v1") + "/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"]["journal"] == {"ok": False, "problem": "the journal can't be written"}
        refused = await customer.post(max_tokens=100)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "journal_full")
        await proxy.audit()


async def test_a_full_journal_refuses_with_its_name(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.will(*whole(chat_answer(prompt=27, completion=100)))
    async with running_proxy(database, tmp_path, upstream.base_url) as proxy:
        customer = await proxy.account(credits=10)
        real = JournalFile.allocate, JournalFile.write_at

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(JournalFile, "allocate", full)
        monkeypatch.setattr(JournalFile, "write_at", full)
        assert (await customer.post(max_tokens=100)).status_code == 200
        await customer.ended()
        refused = await customer.post(max_tokens=100)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "journal_full")
        assert int(refused.headers["retry-after"]) > 0
        assert len(upstream.requests) == 1
        monkeypatch.setattr(JournalFile, "allocate", real[0])
        monkeypatch.setattr(JournalFile, "write_at", real[1])
        answer = refused
        async with asyncio.timeout(10):
            while answer.status_code != 200:
                answer = await customer.post(max_tokens=100)
        assert proxy.app.broken is None
        await customer.ended(2)


async def test_without_a_journal_it_serves_all_the_same(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.will(*whole(chat_answer(prompt=27, completion=100)))
    async with running_proxy(database, tmp_path, upstream.base_url, journal_dir="off") as proxy:
        customer = await proxy.account(credits=10)
        assert (await customer.post(max_tokens=100)).status_code == 200
        [hold] = await customer.ended()
        assert hold["charge"] == COST
    assert "state" not in os.listdir(tmp_path)


async def test_a_wiped_database_gets_nothing_of_the_old_ones_journal(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    journals = JournalDirectory(tmp_path / ".farebox" / "journal")
    customer = await operator.account(credits=10)
    answered = asyncio.Event()
    upstream.choose(lambda _: [Wait(answered), *whole(chat_answer(prompt=27, completion=100))])
    async with serve(database, tmp_path, upstream) as (process, url):
        calling = asyncio.create_task(call(url, customer))
        await customer.opened()
        async with account_locked(database, customer):
            answered.set()
            await calling
            await until(lambda: rows_in(journals, OPEN) == 1)
            process.kill()
            await process.wait()
    # The same account in what is another ledger by its name.
    await operator.query("UPDATE farebox.ledger_identity SET id = $1", uuid4())
    async with serve(database, tmp_path, upstream) as (process, url):
        await asyncio.sleep(1)
        [hold] = await customer.holds()
        assert hold["state"] == "open"
        process.terminate()
        assert await process.wait() == 0
    assert [file.ending for file in journals.files()] == [OPEN]
    assert rows_in(journals) == 1


BREAKS = """
import errno, os
from pathlib import Path
from proxy.ledger.journal_files import JournalFile

sync = JournalFile.sync

def sync_unless_broken(file):
    if Path("broken").exists():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    sync(file)

JournalFile.sync = sync_unless_broken
"""


async def test_a_process_whose_disk_breaks_ends_with_1_and_has_settled(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    customer = await operator.account(credits=10)
    upstream.will(*whole(chat_answer(prompt=27, completion=100)))
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(BREAKS)
    async with serve(database, tmp_path, upstream, root=f"{shim}:{ROOT}", SHUTDOWN_SECONDS="1") as (process, url):
        assert (await call(url, customer)).status_code == 200
        await customer.ended()
        (tmp_path / "broken").touch()
        assert (await call(url, customer)).status_code == 200
        async with asyncio.timeout(20):
            assert await process.wait() == 1
    assert [hold["charge"] for hold in await customer.ended(2)] == [COST, COST]
    await operator.audit()


async def test_workers_share_a_directory_and_take_over_for_each_other(
    database: Database, tmp_path: Path, upstream: ScriptedUpstream, operator: Proxy
) -> None:
    customer = await operator.account(credits=10)
    answered = asyncio.Event()
    upstream.choose(lambda _: [Wait(answered), *whole(chat_answer(prompt=27, completion=100))])
    journals = JournalDirectory(tmp_path / ".farebox" / "journal")
    async with workers(3, database, tmp_path, upstream) as supervised:
        assert len(journals.files(OPEN)) == 3
        calling = [asyncio.create_task(call(supervised.url, customer)) for _ in range(9)]
        await eventually(lambda: _count(customer, 9))
        async with account_locked(database, customer):
            answered.set()
            assert [(await one).status_code for one in calling] == [200] * 9
            await until(lambda: rows_in(journals, OPEN) == 9)
            for pid in await supervised.pids():
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.5)
        # Those that the supervisor puts in their place carry it out.
        holds = await customer.ended(9, seconds=30)
        assert {(hold["state"], hold["charge"]) for hold in holds} == {("final", COST)}
        await supervised.stop()
    assert {file.ending for file in journals.files()} == {DONE}
    await operator.audit()


async def _count(customer: Customer, count: int) -> bool:
    return len(await customer.holds()) == count
