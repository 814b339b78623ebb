"""The command's list of messages, over a real ledger."""

import asyncio
from uuid import UUID, uuid4

from proxy.ledger.connect import Role, connect
from proxy.ledger.outbox import Outbox
from tests.cli.conftest import Farebox
from tests.postgres import Database


def outbox(database: Database, *told: str, fail: bool = False, account: UUID | None = None) -> None:
    """Write messages of these types, and fail for good whatever waits."""

    async def work() -> None:
        owner, control = await connect(database.owner), await connect(database.app, Role.CONTROL)
        for type in told:
            await owner.execute("SELECT farebox.tell($1, $2, NULL)", type, account)
        if fail:
            for message in await Outbox(control).claim(100, lease_seconds=60):
                await Outbox(control).failed(message, "HTTP 500", again_seconds=None)
        await owner.close()
        await control.close()

    asyncio.run(work())


def account(farebox: Farebox) -> UUID:
    return UUID(farebox("accounts", "create", f"acme {uuid4()}", "--json").json["id"])


def test_messages_are_listed_and_sent_again(farebox: Farebox, module_database: Database) -> None:
    assert "No messages" in farebox("messages", "list", "--state", "given-up").out
    owner = account(farebox)
    outbox(module_database, "account.debt", "account.frozen", fail=True, account=owner)
    listed = farebox("messages", "list", "--state", "given-up", "--json").json["data"]
    assert [(m["type"], m["state"], m["error"], m["attempts"]) for m in listed] == [
        ("account.frozen", "given_up", "HTTP 500", 1),
        ("account.debt", "given_up", "HTTP 500", 1),
    ]
    assert listed[0]["payload"]["data"]["account"] == str(owner)
    assert "HTTP 500" in farebox("messages", "list").out
    first = farebox("messages", "list", "--limit", "1", "--json").json
    rest = farebox("messages", "list", "--after", first["last_id"], "--json").json
    assert [m["id"] for m in first["data"] + rest["data"]] == [m["id"] for m in listed]
    assert farebox("messages", "resend", listed[0]["id"]).out == "1 to be sent again.\n"
    assert [m["id"] for m in farebox("messages", "list", "--state", "waiting", "--json").json["data"]] == [
        listed[0]["id"]
    ]
    assert farebox("messages", "resend", "--given-up", "--json").json["messages"] == 1
    assert farebox("messages", "list", "--state", "given-up", "--json").json["data"] == []


def test_what_is_no_message_is_said_so(farebox: Farebox) -> None:
    for id in ("msg_" + "0" * 32, "x"):
        ran = farebox("messages", "resend", id)
        assert (ran.code, ran.out) == (1, "")
        assert id in ran.err
    assert farebox("messages", "resend").code == 2
    assert farebox("messages", "list", "--state", "odd").code == 2


def test_an_account_has_a_mark_of_its_own(farebox: Farebox, module_database: Database) -> None:
    owner = str(account(farebox))
    assert farebox("messages", "low-balance", owner, "2.5", "--json").json["low_balance"] == "2.5"
    assert farebox("messages", "low-balance", owner, "--json").json["low_balance"] is None
    assert farebox("messages", "low-balance", "nobody", "1").code == 1
