"""What scripts rely on: the commands' JSON, exit codes and errors, over a real ledger."""

import asyncio
import re
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.core.keys import Peppers, hmac_of, parse_key
from proxy.core.usage import Usage
from tests.cli.conftest import PEPPER, Farebox, Ran
from tests.ledger.bank import open_bank
from tests.postgres import Database

# Fixed, since the workers of a test run must agree on the names of the tests.
NOBODY = "01900000-0000-7000-8000-00000000dead"


def new_account(farebox: Farebox, *options: str) -> str:
    ran = farebox("accounts", "create", f"acme {uuid4()}", "--json", *options)
    assert ran.code == 0, ran.err
    return str(ran.json["id"])


def failed(ran: Ran, code: str) -> str:
    """The message of a failure: in the JSON on standard output, and in the one line on standard error."""
    assert ran.code == 1
    error: dict[str, Any] = ran.json["error"]
    assert error["code"] == code
    assert ran.err == f"farebox: {error['message']}\n"
    return str(error["message"])


def charged_request(database: Database, account_id: str, charge: int) -> str:
    """A request that the account was charged for; its id."""

    async def work() -> str:
        async with open_bank(database, size=1) as bank:
            key = await bank.open_key(UUID(account_id))
            reserve, _ = await bank.reserve(key, 2 * charge)
            await bank.finalize(reserve, charge, usage=Usage(output=charge))
            return str(reserve.hold_id)

    return asyncio.run(work())


# Accounts


def test_an_account_is_made_shown_and_listed(farebox: Farebox) -> None:
    made = farebox(
        "accounts", "create", "Ann & Co", "--external-id", "ann", "--email", "ann@example.org", "--json"
    ).json
    assert (made["name"], made["external_id"], made["email"]) == ("Ann & Co", "ann", "ann@example.org")
    for ref in (made["id"], "ann", "Ann & Co"):
        assert farebox("accounts", "show", ref, "--json").json == {**made, "freezes": []}
    assert {"balance", "held", "available", "debt"} <= made.keys()
    listed = farebox("accounts", "list", "--limit", "1000", "--json").json
    assert made in listed["data"]
    assert "Ann & Co" in farebox("accounts", "list", "--limit", "1000").out


def test_the_same_external_id_is_the_same_account(farebox: Farebox) -> None:
    first = farebox("accounts", "create", "One", "--external-id", "same", "--json").json
    assert farebox("accounts", "create", "One", "--external-id", "same", "--json").json == first
    again = farebox("accounts", "create", "Two", "--external-id", "same", "--json")
    assert "another account" in failed(again, "conflict")


def test_a_name_that_two_have_names_neither(farebox: Farebox) -> None:
    for _ in range(2):
        farebox("accounts", "create", "Twin")
    assert "Several accounts" in failed(farebox("accounts", "show", "Twin", "--json"), "conflict")


def test_an_account_is_frozen_and_unfrozen_and_shows_why(farebox: Farebox) -> None:
    account = new_account(farebox)
    frozen = farebox("accounts", "freeze", account, "--reason", "a chargeback", "--ref", "case 7", "--json").json
    assert frozen["frozen_at"] is not None
    [why] = farebox("accounts", "show", account, "--json").json["freezes"]
    assert (why["reference"], why["reason"], why["lifted_at"]) == ("case 7", "a chargeback", None)
    assert "a chargeback" in farebox("accounts", "show", account).out
    assert "never frozen" in failed(farebox("accounts", "unfreeze", account, "--ref", "case 8", "--json"), "not_found")
    for options in (["--ref", "case 7"], []):
        assert farebox("accounts", "unfreeze", account, *options, "--json").json["frozen_at"] is None
    [why] = farebox("accounts", "show", account, "--json").json["freezes"]
    assert why["lifted_by"].startswith("cli:")
    again = farebox("accounts", "freeze", account, "--reason", "again", "--ref", "case 7", "--json")
    assert "lifted" in failed(again, "conflict")
    for _ in range(2):
        assert farebox("accounts", "freeze", account, "--reason", "by hand").code == 0
    assert len(farebox("accounts", "show", account, "--json").json["freezes"]) == 3


def test_accounts_come_by_pages(farebox: Farebox) -> None:
    first, second, third = (new_account(farebox) for _ in range(3))
    page = farebox("accounts", "list", "--after", first, "--limit", "1", "--json").json
    assert [account["id"] for account in page["data"]] == [second]
    assert page["has_more"] is True
    ran = farebox("accounts", "list", "--after", first, "--limit", "1")
    assert f"--after {second}" in ran.out
    assert third not in ran.out


@pytest.mark.parametrize("account", ["nobody", "", "a\x00b", "\udcff", NOBODY])
def test_an_account_that_is_none(farebox: Farebox, account: str) -> None:
    ran = farebox("accounts", "show", account, "--json")
    assert ran.code == 1
    assert ran.json["error"]["code"] in ("not_found", "invalid_value")


# Keys


def test_a_key_is_shown_once(farebox: Farebox) -> None:
    account = new_account(farebox)
    made = farebox("keys", "create", account, "--json").json
    assert parse_key(made["key"]) is not None
    assert made["id"] in made["key"]
    assert (made["scopes"], made["models"], made["affordable_cap"]) == (["inference", "read"], None, True)
    listed = farebox("keys", "list", account, "--json")
    assert [key["id"] for key in listed.json["data"]] == [made["id"]]
    assert made["key"].split("_")[2] not in listed.out
    assert made["id"] in farebox("keys", "list", account).out


def test_a_key_is_stored_under_the_pepper(farebox: Farebox, module_database: Database) -> None:
    made = farebox("keys", "create", new_account(farebox), "--json").json

    async def stored() -> bytes:
        async with open_bank(module_database, size=1) as bank:
            return (await bank.control.find_key(made["id"])).secret_hmac

    assert asyncio.run(stored()) == hmac_of(Peppers.parse(PEPPER).by_version[1], made["key"])


def test_a_key_s_terms_are_set_and_changed(farebox: Farebox) -> None:
    options = "--name laptop --scopes inference --models m1,m2 --spend-limit 2.5 --profile chat --no-affordable-cap"
    key = farebox("keys", "create", new_account(farebox), *options.split(), "--expires-in", "90d", "--json").json
    assert (key["name"], key["scopes"], key["models"]) == ("laptop", ["inference"], ["m1", "m2"])
    assert (key["spend_limit"], key["profile"], key["affordable_cap"]) == ("2.5", "chat", False)
    assert key["expires_at"] is not None
    lifted = "--models all --expires-in never --spend-limit none --profile none --affordable-cap"
    changed = farebox("keys", "update", key["id"], *lifted.split(), "--json").json
    assert (changed["models"], changed["expires_at"], changed["spend_limit"]) == (None, None, None)
    assert (changed["profile"], changed["affordable_cap"], changed["name"]) == (None, True, "laptop")
    assert "at least one option" in failed(farebox("keys", "update", key["id"], "--json"), "failed")


def test_rotation_and_revocation(farebox: Farebox) -> None:
    made = farebox("keys", "create", new_account(farebox), "--json").json
    rotated = farebox("keys", "rotate", made["key"], "--overlap", "1h", "--json").json
    assert rotated["rotated_from"] == made["id"]
    assert parse_key(rotated["key"]) is not None
    assert farebox("keys", "rotate", rotated["id"], "--json").code == 0
    revoked = farebox("keys", "revoke", f"fb_{made['id']}", "--json").json
    assert revoked["revoked_at"] is not None
    assert failed(farebox("keys", "rotate", made["id"], "--json"), "conflict")


@pytest.mark.parametrize("options", [["--scopes", "admin"], ["--profile", "vast"], ["--name", "a\nb"]])
def test_terms_that_are_none_fail(farebox: Farebox, options: list[str]) -> None:
    assert failed(farebox("keys", "create", new_account(farebox), *options, "--json"), "invalid_value")


WRONG = [
    ["keys", "create", "a", "--expires-in", "90"],
    ["keys", "create", "a", "--expires-in", "tomorrow"],
    ["keys", "create", "a", "--spend-limit", "1e3"],
    ["keys", "create", "a", "--scopes", ","],
    ["keys", "revoke", "nonsense"],
    ["keys", "rotate", "abcdefghijkl", "--overlap", "1y"],
    ["credits", "grant", "a", "0", "--ref", "r"],
    ["credits", "grant", "a", "-5", "--ref", "r"],
    ["credits", "grant", "a", "1.0000001", "--ref", "r"],
    ["credits", "grant", "a", "12,5", "--ref", "r"],
    ["credits", "grant", "a", "5"],
    ["credits", "grant", "a", "5", "--ref", "r", "--kind", "purchase"],
    ["credits", "grant", "a", "5", "--ref", "r", "--expires", "soon"],
    ["credits", "grant", "a", "5", "--ref", "r", "--priority", "1001"],
    ["credits", "reverse", NOBODY],
    ["accounts", "list", "--limit", "0"],
    ["accounts", "bogus"],
    ["--bogus"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_command_line_ends_with_2(farebox: Farebox, arguments: list[str]) -> None:
    ran = farebox(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Error" in ran.err


# Credits


def test_a_grant_is_given_once_for_each_reference(farebox: Farebox) -> None:
    account = new_account(farebox)
    reference = f"order {uuid4()}"
    given = farebox("credits", "grant", account, "12.5", "--ref", reference, "--reason", "first", "--json").json
    assert (given["amount"], given["balance_after"], given["reason"]) == ("12.5", "12.5", "first")
    assert given["actor"].startswith("cli:")
    assert farebox("credits", "grant", account, "12.5", "--ref", reference, "--json").json == given
    assert failed(farebox("credits", "grant", account, "12.6", "--ref", reference, "--json"), "conflict")
    shown = farebox("accounts", "show", account, "--json").json
    assert (shown["balance"], shown["held"], shown["available"], shown["debt"]) == ("12.5", "0", "12.5", "0")


def test_a_promotion_expires_and_its_lot_says_when(farebox: Farebox) -> None:
    account = new_account(farebox)
    assert "Nothing is left" in farebox("lots", account).out
    grant = ("credits", "grant", account, "3", "--ref", str(uuid4()), "--kind", "promo")
    given = farebox(*grant, "--expires", "2100-01-31", "--json").json
    assert given["kind"] == "promo"
    assert farebox(*grant, "--expires", "90d", "--json").json == given, "the first word counts"
    farebox("credits", "grant", account, "1", "--ref", str(uuid4()), "--priority", "50")
    lots = farebox("lots", account, "--json").json["data"]
    assert [(lot["kind"], lot["remaining"], lot["expires_at"]) for lot in lots] == [
        ("granted", "1", None),
        ("promo", "3", "2100-01-31T00:00:00.000000Z"),
    ]
    assert re.search(r"promo +3 +3 +0 +0 +100 +2100-01-31", farebox("lots", account, "--all").out)
    expired = farebox("credits", "grant", account, "1", "--ref", "old", "--expires", "2020-01-31", "--json")
    assert failed(expired, "conflict")


def test_a_charge_is_looked_up_and_reversed(farebox: Farebox, module_database: Database) -> None:
    account = new_account(farebox)
    farebox("credits", "grant", account, "1", "--ref", str(uuid4()))
    request_id = charged_request(module_database, account, 400)
    receipt = farebox("receipts", "show", request_id, "--json").json
    assert (receipt["held"], receipt["charge"], receipt["released"]) == ("0.0008", "0.0004", "0.0004")
    assert receipt["prices"] == [{"class": "output", "credits_per_1k": "0.001", "tokens": 400, "amount": "0.0004"}]
    text = farebox("receipts", "show", request_id).out
    assert re.search(r"^charge +0\.0004$", text, re.MULTILINE)
    assert re.search(r"^usage source +reported$", text, re.MULTILINE)
    assert re.search(r"^output +0\.001 +400 +0\.0004$", text, re.MULTILINE)
    part = farebox("credits", "reverse", request_id, "--amount", "0.0001", "--reason", "part", "--json").json
    again = farebox("credits", "reverse", request_id, "--amount", "0.0001", "--reason", "part", "--json").json
    assert again == part
    rest = farebox("credits", "reverse", request_id, "--reason", "rest", "--json").json
    assert (rest["kind"], rest["amount"], rest["reason"]) == ("reversal", "0.0003", "rest")
    assert farebox("accounts", "show", account, "--json").json["balance"] == "1"
    listed = farebox("transactions", account, "--json").json
    assert [t["kind"] for t in listed["data"]] == ["reversal", "reversal", "charge", "grant"]
    page = farebox("transactions", account, "--after", listed["data"][1]["id"], "--limit", "1", "--json").json
    assert ([t["kind"] for t in page["data"]], page["has_more"]) == (["charge"], True)
    assert "reversal" in farebox("transactions", account).out


@pytest.mark.parametrize("request_id", [NOBODY, "nonsense", "a\x00b"])
def test_a_request_that_nobody_made(farebox: Farebox, request_id: str) -> None:
    assert failed(farebox("receipts", "show", request_id, "--json"), "receipt_not_found")
    assert farebox("credits", "reverse", request_id, "--reason", "x").code == 1


def test_a_control_character_in_a_name_never_reaches_the_terminal(farebox: Farebox, module_database: Database) -> None:
    async def store() -> None:
        async with open_bank(module_database, size=1) as bank:
            await bank.control.create_account("evil\x1b[2Jname")

    asyncio.run(store())
    listed = farebox("accounts", "list", "--limit", "1000")
    assert "evil?[2Jname" in listed.out
    assert failed(farebox("accounts", "create", "evil\x1b[2Jname", "--json"), "invalid_value")


def test_a_fault_of_ours_is_one_line(farebox: Farebox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise TypeError("this is a fault\nof two lines")

    monkeypatch.setattr("proxy.cli.accounts.operate", fault)
    assert "TypeError: this is a fault" in failed(farebox("accounts", "list", "--json"), "unexpected")


# The book


def test_the_audit_says_what_it_checked(farebox: Farebox, module_database: Database) -> None:
    account = new_account(farebox)
    farebox("credits", "grant", account, "1", "--ref", str(uuid4()))
    charged_request(module_database, account, 10)
    ran = farebox("audit", "--json")
    assert ran.code == 0, ran.out
    assert ran.json["ok"] is True
    assert any(check["rows"] > 0 for check in ran.json["checks"])
    lines = farebox("audit").out.splitlines()
    assert len(lines) == len(ran.json["checks"])
    assert all(re.match(r"ok +[0-9]+ rows  \w+$", line) for line in lines)


def test_the_audit_ends_with_1_where_the_book_is_wrong(bare: Farebox, database: Database) -> None:
    made = bare("accounts", "create", "robbed", "--database-url", database.app, "--json").json

    async def rob() -> None:
        connection = await asyncpg.connect(database.superuser)
        await connection.execute("UPDATE farebox.accounts SET balance = 5 WHERE id = $1", UUID(made["id"]))
        await connection.close()

    asyncio.run(rob())
    ran = bare("audit", "--database-url", database.app)
    assert ran.code == 1
    [wrong] = [line for line in ran.out.splitlines() if line.startswith("FAIL")]
    assert made["id"] in wrong
    assert bare("audit", "--database-url", database.app, "--json").json["ok"] is False
