"""A ledger that was restored to an earlier moment, brought forward with the journals of what came after it."""

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from proxy.local.postgres import OWNER, ClusterAddress
from tests.e2e.proxy import PEPPER, Customer, running_proxy
from tests.e2e.test_processes import ROOT
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.postgres import Database


@pytest.fixture
async def restored(cluster: ClusterAddress, database: Database) -> AsyncIterator[Database]:
    """An empty database for the restore."""
    name = f"t_{secrets.token_hex(6)}"
    superuser = await asyncpg.connect(cluster.superuser)
    await superuser.execute(f"CREATE DATABASE {name} OWNER {OWNER}")

    def dsn(of: str) -> str:
        return of.replace(database.name, name)

    yield Database(name, dsn(database.owner), dsn(database.app), dsn(database.superuser))
    await superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await superuser.close()


async def farebox(directory: Path, *arguments: str) -> Any:
    """Run the command as an operator does; what it wrote."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "FAREBOX_KEY_PEPPER": PEPPER}
    environment |= {"FAREBOX_STATE_DIR": str(directory / "state")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy.cli", *arguments, "--json"),
        env=environment,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    return json.loads(out)


async def charges(dsn: str) -> dict[UUID, int]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT id, charge FROM farebox.holds WHERE state = 'final'")
        return {row["id"]: row["charge"] for row in rows}
    finally:
        await connection.close()


async def balance(dsn: str, account_id: UUID) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        found: int = await connection.fetchval("SELECT balance FROM farebox.accounts WHERE id = $1", account_id)
        return found
    finally:
        await connection.close()


async def test_calls_from_after_the_backup_are_charged_in_the_restored_ledger(
    database: Database, restored: Database, tmp_path: Path
) -> None:
    async with ScriptedUpstream() as upstream, running_proxy(database, tmp_path, upstream.base_url) as proxy:
        upstream.will(*whole(chat_answer(prompt=27, completion=100)))
        customer = await proxy.account()
        await _call(customer, 3)
        made = await farebox(tmp_path, "backup", "kept", "--database-url", database.owner)
        assert made["transfers"] == 1 + 3
        # Of these the dump knows nothing.
        await _call(customer, 2)
    before = await charges(database.superuser)
    assert len(before) == 5

    await farebox(tmp_path, "restore", "kept", "--database-url", restored.owner)
    assert len(await charges(restored.superuser)) == 3
    for _ in range(2):
        replayed = await farebox(tmp_path, "journal", "replay", "--database-url", restored.app)
        assert sum(file["rows"] for file in replayed["data"]) == 5, "more than was lost, and again: it changes nothing"
    assert await charges(restored.superuser) == before
    assert await balance(restored.superuser, customer.id) == await balance(database.superuser, customer.id)
    assert (await farebox(tmp_path, "audit", "--database-url", restored.app))["ok"]


async def test_journals_of_a_lost_machine_come_out_of_the_backup(
    database: Database, restored: Database, tmp_path: Path
) -> None:
    """The charge was written down and the database never heard of it; then the machine burned."""
    async with ScriptedUpstream() as upstream, running_proxy(database, tmp_path, upstream.base_url) as proxy:
        upstream.will(*whole(chat_answer(prompt=27, completion=100)))
        customer = await proxy.account()
        await _call(customer, 2)
    await farebox(tmp_path, "backup", "kept", "--database-url", database.owner)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    await farebox(elsewhere, "restore", str(tmp_path / "kept"), "--database-url", restored.owner)
    superuser = await asyncpg.connect(restored.superuser)
    # As it would stand if the dump had been made a moment before the second charge.
    await superuser.execute("SET session_replication_role = replica")
    lost = await superuser.fetchrow(
        "SELECT * FROM farebox.transfers WHERE kind = 'charge' ORDER BY version DESC LIMIT 1"
    )
    assert lost is not None
    await superuser.execute("DELETE FROM farebox.transfers WHERE hold_id = $1", lost["hold_id"])
    await superuser.execute("DELETE FROM farebox.holds WHERE id = $1", lost["hold_id"])
    await superuser.execute(
        "UPDATE farebox.accounts SET version = version - 1, balance = balance + $2 WHERE id = $1",
        lost["account_id"],
        lost["amount"],
    )
    await superuser.close()
    await farebox(elsewhere, "journal", "replay", "--database-url", restored.app)
    assert await charges(restored.superuser) == await charges(database.superuser)
    assert (await farebox(elsewhere, "audit", "--database-url", restored.app))["ok"]


async def _call(customer: Customer, times: int) -> None:
    before = len(await customer.holds())
    for _ in range(times):
        assert (await customer.post(max_tokens=100)).status_code == 200
    await customer.ended(before + times)
