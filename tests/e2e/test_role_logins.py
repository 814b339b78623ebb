"""A login for each role: the server works with three that may act as one role each, and uses no other."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import httpx2
import pytest

from proxy.ledger.connect import Role, connect
from proxy.ledger.errors import MissingRole
from proxy.ledger.migrate import migrate
from proxy.settings import Settings, SettingsError, load
from tests.e2e.proxy import running_proxy
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.postgres import Database

TOKEN = "an admin token of thirty-two letters"


@contextlib.asynccontextmanager
async def logins(database: Database) -> AsyncIterator[dict[str, str]]:
    """DSNs by role, and of ``nobody``, who may act as none."""
    admin = await asyncpg.connect(database.superuser)
    suffix = secrets.token_hex(4)
    where = database.superuser.partition("@")[2]
    names = {role: f"t_{role}_{suffix}" for role in ("gateway", "control", "reader", "nobody")}
    try:
        for name in names.values():
            await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
        for role in Role:
            await migrate(database.owner, grant_to=names[role.name.lower()], roles=[role])
        yield {role: f"postgresql://{name}:{name}@{where}" for role, name in names.items()}
    finally:
        for name in names.values():
            await admin.execute(f"DROP ROLE {name}")
        await admin.close()


async def test_each_role_is_acted_as_by_a_login_of_its_own(database: Database, tmp_path: Path) -> None:
    async with logins(database) as dsn, ScriptedUpstream() as upstream:
        upstream.will(*whole(chat_answer(prompt=10, completion=5)))
        async with running_proxy(
            database,
            tmp_path,
            upstream.base_url,
            database_url=dsn["nobody"],
            gateway_database_url=dsn["gateway"],
            control_database_url=dsn["control"],
            reader_database_url=dsn["reader"],
            admin_token=TOKEN,
        ) as proxy:
            customer = await proxy.account()
            assert (await customer.post()).status_code == 200
            await customer.ended()
            credits = await proxy.http.get("/credits", headers=customer.headers)
            assert (credits.status_code, credits.json()["balance"]) == (200, "999.975")
            root = proxy.base_url.removesuffix("/v1")
            async with httpx2.AsyncClient(headers={"authorization": f"Bearer {TOKEN}"}) as http:
                assert (await http.get(f"{root}/admin/v1/accounts/{customer.id}")).status_code == 200
                assert (await http.get(f"{root}/readyz")).status_code == 200


async def test_a_login_of_one_role_cant_act_as_another(database: Database) -> None:
    async with logins(database) as dsn:
        for role in Role:
            for other in Role:
                if role is other:
                    await (await connect(dsn[role.name.lower()], other)).close()
                else:
                    with pytest.raises(MissingRole):
                        await connect(dsn[role.name.lower()], other)


def test_the_command_line_s_database_stands_for_every_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_CONTROL_DATABASE_URL", "postgresql://control@host/farebox")
    monkeypatch.setenv("DATABASE_URL", "postgresql://app@host/farebox")
    assert load().database_url_of("control") == "postgresql://control@host/farebox"
    assert load().database_url_of("reader") == "postgresql://app@host/farebox"
    other = "postgresql://owner@elsewhere/farebox"
    assert load(database_url=other).database_url_of("control") == other


def test_a_role_s_url_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("FAREBOX_READER_DATABASE_URL", "postgresql://reader:hidden@host/farebox")
    with pytest.raises(SettingsError) as caught:
        load()
    assert "FAREBOX_READER_DATABASE_URL" in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert Settings.model_fields["reader_database_url"].default is None
