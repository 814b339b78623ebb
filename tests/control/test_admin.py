"""The operator's API, over HTTP and a real ledger; each test is named by what is answered."""

import json
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from proxy.control.admin import AdminToken, admin_routes
from proxy.control.operations import Operations
from proxy.core.keys import Peppers, hmac_of
from proxy.core.usage import Usage
from tests.control.conftest import ADMIN_TOKEN, client_of
from tests.ledger.bank import Bank

# Fixed, since the workers of a test run must agree on the names of the tests.
NOBODY = "01900000-0000-7000-8000-00000000dead"


async def make_account(admin: httpx2.AsyncClient, **members: Any) -> dict[str, Any]:
    answer = await admin.post("/admin/v1/accounts", json={"name": "Acme", **members})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"].endswith(".")
    return error


# The token


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Bearer {ADMIN_TOKEN[:-1]}", f"Bearer {ADMIN_TOKEN}x", f"Basic {ADMIN_TOKEN}", ADMIN_TOKEN, "é"],
)
async def test_401_without_the_token(operations: Operations, header: str) -> None:
    async with client_of(admin_routes(AdminToken(ADMIN_TOKEN), operations)) as client:
        answer = await client.get("/admin/v1/accounts", headers={b"authorization": header.encode()})
        assert error_of(answer, 401)["code"] == "invalid_admin_token"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert ADMIN_TOKEN not in answer.text


async def test_401_comes_before_anything_is_read_or_found(operations: Operations) -> None:
    async with client_of(admin_routes(AdminToken(ADMIN_TOKEN), operations)) as client:
        assert (await client.post("/admin/v1/accounts", content=b"{")).status_code == 401
        assert (await client.get("/admin/v1/keys/nothing")).status_code == 401


async def test_404_where_the_api_is_off() -> None:
    async with client_of([], {"authorization": f"Bearer {ADMIN_TOKEN}"}) as client:
        assert error_of(await client.get("/admin/v1/accounts"), 404)["code"] == "unknown_url"


def test_a_short_token_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="at least 32 characters"):
        AdminToken("x" * 31)


# Accounts


async def test_200_an_account_is_made_and_found_by_both_ids(admin: httpx2.AsyncClient) -> None:
    made = await make_account(admin, external_id="cus/ä 1", email="a@example.org")
    assert made["object"] == "account"
    assert (made["balance"], made["held"], made["available"], made["debt"]) == ("0", "0", "0", "0")
    assert (await admin.get(f"/admin/v1/accounts/{made['id']}")).json() == made
    found = (await admin.get("/admin/v1/accounts", params={"external_id": "cus/ä 1"})).json()
    assert found["data"] == [made]
    plain = await make_account(admin, external_id="plain")
    assert (await admin.get("/admin/v1/accounts/plain")).json() == plain


async def test_200_the_same_external_id_is_the_same_account(admin: httpx2.AsyncClient) -> None:
    first = await make_account(admin, external_id="one")
    assert await make_account(admin, external_id="one") == first
    answer = await admin.post("/admin/v1/accounts", json={"name": "Another", "external_id": "one"})
    assert error_of(answer, 409)["code"] == "conflict"
    assert answer.headers["x-should-retry"] == "false"


async def test_404_for_an_account_by_its_name(admin: httpx2.AsyncClient) -> None:
    await make_account(admin)
    await make_account(admin)
    assert error_of(await admin.get("/admin/v1/accounts/Acme"), 404)["code"] == "not_found"
    assert (await admin.get("/admin/v1/accounts", params={"external_id": "Acme"})).json()["data"] == []


async def test_200_accounts_by_pages(admin: httpx2.AsyncClient) -> None:
    first, *ids = [(await make_account(admin, name=f"a{n}"))["id"] for n in range(6)]
    seen: list[str] = []
    after = first
    for _ in range(3):
        page = (await admin.get("/admin/v1/accounts", params={"limit": "2", "after": after})).json()
        seen += [account["id"] for account in page["data"]]
        after = page["last_id"]
    assert seen == ids
    assert page["has_more"] is False


BAD_ACCOUNTS = [
    ({}, "name"),
    ({"name": ""}, "name"),
    ({"name": None}, "name"),
    ({"name": 5}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"name": "a\x00b"}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": "a\ud800"}, "name"),
    ({"name": "a", "external_id": ["x"]}, "external_id"),
    ({"name": "a", "mail": "x"}, "mail"),
]


@pytest.mark.parametrize(("body", "param"), BAD_ACCOUNTS)
async def test_400_names_the_member(admin: httpx2.AsyncClient, body: dict[str, Any], param: str) -> None:
    error = error_of(await admin.post("/admin/v1/accounts", content=json.dumps(body)), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"name": NaN}',
        b'{"name": "a", "name": "b"}',
        b"[" * 60_000,
        b'{"name": ' + b"9" * 5_000 + b"}",
        b'{"a\\u0000b": 1, "name": "x"}',
    ],
)
async def test_400_for_a_body_that_is_no_object(admin: httpx2.AsyncClient, content: bytes) -> None:
    error_of(await admin.post("/admin/v1/accounts", content=content), 400)


async def test_413_for_a_body_too_large(admin: httpx2.AsyncClient) -> None:
    error_of(await admin.post("/admin/v1/accounts", content=b" " * 70_000), 413)


@pytest.mark.parametrize("account", ["%00", "nobody", NOBODY, "%ED%A0%80", "a%0Ab", "x" * 3_000])
async def test_404_or_400_for_an_account_that_is_none(admin: httpx2.AsyncClient, account: str) -> None:
    for method, tail in (("GET", ""), ("GET", "/keys"), ("GET", "/transactions"), ("POST", "/keys")):
        answer = await admin.request(method, f"/admin/v1/accounts/{account}{tail}")
        assert answer.status_code in (400, 404), answer.text


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "limit=²", "after=x", "nonsense=1", "limit=1&limit=2"]
)
async def test_400_for_a_query_that_is_wrong(admin: httpx2.AsyncClient, query: str) -> None:
    error_of(await admin.get(f"/admin/v1/accounts?{query}"), 400)


async def test_200_an_account_is_frozen_and_unfrozen(admin: httpx2.AsyncClient) -> None:
    account = (await make_account(admin))["id"]
    path = f"/admin/v1/accounts/{account}"
    body = {"reason": "a chargeback", "reference": "case 7"}
    for _ in range(2):
        answer = await admin.post(f"{path}/freeze", json=body, headers={"x-farebox-actor": "ann"})
        assert answer.json()["frozen_at"] is not None
    [why] = (await admin.get(f"{path}/freezes")).json()["data"]
    assert (why["reference"], why["reason"], why["actor"]) == ("case 7", "a chargeback", "admin:ann")
    for _ in range(2):
        assert (await admin.post(f"{path}/unfreeze", json={})).json()["frozen_at"] is None
    assert error_of(await admin.post(f"{path}/freeze", json=body), 409)["code"] == "conflict"
    assert error_of(await admin.post(f"{path}/unfreeze", json={"reference": "case 8"}), 404)["code"] == "not_found"
    assert error_of(await admin.post(f"{path}/freeze", json={}), 400)["param"] == "reason"


# Keys


async def test_201_a_key_is_shown_once(admin: httpx2.AsyncClient, bank: Bank, peppers: Peppers) -> None:
    account = await make_account(admin)
    terms = {
        "name": "laptop",
        "scopes": ["inference"],
        "models": ["gpt-4o"],
        "profile": "chat",
        "affordable_cap": False,
        "spend_limit": "0.000001",
        "expires_at": "2999-01-31T12:00:00+02:00",
    }
    answer = await admin.post(f"/admin/v1/accounts/{account['id']}/keys", json=terms)
    assert answer.status_code == 201
    made = answer.json()
    text = made.pop("key")
    assert {name: made[name] for name in terms} == {**terms, "expires_at": "2999-01-31T10:00:00.000000Z"}
    stored = await bank.control.find_key(made["id"])
    assert stored.secret_hmac == hmac_of(peppers.by_version[1], text)
    assert stored.spend_limit == 1
    listed = await admin.get(f"/admin/v1/accounts/{account['id']}/keys")
    assert listed.json()["data"] == [made]
    assert text.split("_")[2] not in listed.text
    assert (await admin.get(f"/admin/v1/keys/{made['id']}")).json() == made


async def test_201_a_key_made_without_a_word(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    made = (await admin.post(f"/admin/v1/accounts/{account['id']}/keys")).json()
    assert made["scopes"] == ["inference", "read"]
    assert (made["models"], made["spend_limit"], made["expires_at"], made["affordable_cap"]) == (None, None, None, True)


BAD_KEYS = [
    ({"scopes": []}, "scopes"),
    ({"scopes": ["admin"]}, "scopes"),
    ({"scopes": "read"}, "scopes"),
    ({"models": [1]}, "models"),
    ({"models": ["a\x00"]}, "models"),
    ({"spend_limit": 5}, "spend_limit"),
    ({"spend_limit": "-1"}, "spend_limit"),
    ({"spend_limit": "1e3"}, "spend_limit"),
    ({"expires_at": "tomorrow"}, "expires_at"),
    ({"expires_at": 1_900_000_000}, "expires_at"),
    ({"expires_at": "2027-01-01T00:00:00"}, "expires_at"),
    ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
    ({"profile": "vast"}, "profile"),
    ({"affordable_cap": "no"}, "affordable_cap"),
    ({"affordable_cap": None}, "affordable_cap"),
    ({"secret": "x"}, "secret"),
]


@pytest.mark.parametrize(("body", "param"), BAD_KEYS)
async def test_400_for_terms_that_are_wrong(admin: httpx2.AsyncClient, body: dict[str, Any], param: str) -> None:
    account = await make_account(admin)
    answer = await admin.post(f"/admin/v1/accounts/{account['id']}/keys", json=body)
    assert error_of(answer, 400)["param"] == param
    assert (await admin.get(f"/admin/v1/accounts/{account['id']}/keys")).json()["data"] == []


async def test_200_a_key_is_changed_member_by_member(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    made = (await admin.post(f"/admin/v1/accounts/{account['id']}/keys", json={"models": ["m"]})).json()
    path = f"/admin/v1/keys/{made['id']}"
    changed = (await admin.patch(path, json={"spend_limit": "5", "name": "new"})).json()
    assert (changed["spend_limit"], changed["name"], changed["models"]) == ("5", "new", ["m"])
    lifted = (await admin.patch(path, json={"spend_limit": None, "models": None})).json()
    assert (lifted["spend_limit"], lifted["models"], lifted["name"]) == (None, None, "new")
    assert error_of(await admin.patch(path, json={"scopes": None}), 400)["param"] == "scopes"


async def test_200_a_revoked_key_stays_so_and_changes_no_more(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    made = (await admin.post(f"/admin/v1/accounts/{account['id']}/keys")).json()
    path = f"/admin/v1/keys/{made['id']}"
    revoked = (await admin.post(f"{path}/revoke")).json()
    assert revoked["revoked_at"] is not None
    assert (await admin.post(f"{path}/revoke")).json() == revoked
    assert error_of(await admin.patch(path, json={"name": "x"}), 409)["code"] == "conflict"
    assert error_of(await admin.post(f"{path}/rotate"), 409)["code"] == "conflict"


async def test_201_rotation_gives_a_second_key_and_ends_the_first(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    made = (await admin.post(f"/admin/v1/accounts/{account['id']}/keys", json={"models": ["m"]})).json()
    answer = await admin.post(f"/admin/v1/keys/{made['id']}/rotate", json={"overlap_seconds": 60})
    assert answer.status_code == 201
    new = answer.json()
    assert (new["rotated_from"], new["models"]) == (made["id"], ["m"])
    assert new["key"] != made["key"]
    assert (await admin.get(f"/admin/v1/keys/{made['id']}")).json()["expires_at"] is not None


@pytest.mark.parametrize("overlap", [-1, 1.5, "60", True, 10**9])
async def test_400_for_an_overlap_that_is_wrong(admin: httpx2.AsyncClient, overlap: object) -> None:
    answer = await admin.post("/admin/v1/keys/abcdefghijkl/rotate", json={"overlap_seconds": overlap})
    assert error_of(answer, 400)["param"] == "overlap_seconds"


@pytest.mark.parametrize("key", ["nobody", "%00", "%ED%A0%80"])
async def test_404_or_400_for_a_key_that_is_none(admin: httpx2.AsyncClient, key: str) -> None:
    assert (await admin.get(f"/admin/v1/keys/{key}")).status_code in (400, 404)
    for verb in ("revoke", "rotate"):
        assert (await admin.post(f"/admin/v1/keys/{key}/{verb}")).status_code in (400, 404)


# Credits


async def test_200_a_grant_is_given_once_for_each_reference(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    path = f"/admin/v1/accounts/{account['id']}/grants"
    body = {"amount": "12.5", "reference": f"order {uuid4()}", "reason": "goodwill"}
    first = (await admin.post(path, json=body, headers={"x-farebox-actor": "ann"})).json()
    assert (first["kind"], first["amount"], first["balance_after"]) == ("grant", "12.5", "12.5")
    assert (first["actor"], first["reason"], first["other_side"]) == ("admin:ann", "goodwill", "grants")
    assert (await admin.post(path, json=body)).json() == first
    assert error_of(await admin.post(path, json={**body, "amount": "13"}), 409)["code"] == "conflict"
    assert (await admin.get(f"/admin/v1/accounts/{account['id']}")).json()["balance"] == "12.5"


async def test_200_a_promotion_that_expires_and_what_is_left_of_it(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    path = f"/admin/v1/accounts/{account['id']}"
    body = {
        "amount": "2",
        "reference": str(uuid4()),
        "kind": "promo",
        "expires_at": "2100-01-01T00:00:00Z",
        "priority": 7,
    }
    first = (await admin.post(f"{path}/grants", json=body)).json()
    assert (first["kind"], first["other_side"]) == ("promo", "grants")
    assert (await admin.post(f"{path}/grants", json={**body, "expires_at": "2101-01-01T00:00:00Z"})).json() == first
    plain = {"amount": "1", "reference": body["reference"]}
    assert (await admin.post(f"{path}/grants", json=plain)).json()["kind"] == "grant", "another kind, another grant"
    lots = (await admin.get(f"{path}/lots")).json()["data"]
    assert [(lot["kind"], lot["remaining"], lot["priority"]) for lot in lots] == [
        ("promo", "2", 7),
        ("granted", "1", 200),
    ]
    assert lots[0]["expires_at"] == "2100-01-01T00:00:00.000000Z"
    assert (lots[0]["reserved"], lots[0]["owed"], lots[0]["id"]) == ("0", "0", first["id"])
    assert (await admin.get(f"{path}/lots", params={"limit": "1"})).json()["has_more"] is True


async def test_409_for_credits_that_would_have_expired(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    body = {"amount": "2", "reference": str(uuid4()), "expires_at": "2020-01-01T00:00:00Z"}
    error = error_of(await admin.post(f"/admin/v1/accounts/{account['id']}/grants", json=body), 409)
    assert "would have expired" in error["message"]
    assert (await admin.get(f"/admin/v1/accounts/{account['id']}/lots")).json()["data"] == []


BAD_GRANTS = [
    ({"amount": "1", "reference": "r", "kind": "purchase"}, "kind"),
    ({"amount": "1", "reference": "r", "priority": 1001}, "priority"),
    ({"amount": "1", "reference": "r", "priority": True}, "priority"),
    ({"amount": "1", "reference": "r", "expires_at": "tomorrow"}, "expires_at"),
    ({"amount": 5, "reference": "r"}, "amount"),
    ({"amount": 5.0, "reference": "r"}, "amount"),
    ({"amount": True, "reference": "r"}, "amount"),
    ({"amount": "0", "reference": "r"}, "amount"),
    ({"amount": "-1", "reference": "r"}, "amount"),
    ({"amount": "1.0000001", "reference": "r"}, "amount"),
    ({"amount": "999999999999999", "reference": "r"}, "amount"),
    ({"amount": "1e2", "reference": "r"}, "amount"),
    ({"amount": "١", "reference": "r"}, "amount"),
    ({"amount": "", "reference": "r"}, "amount"),
    ({"reference": "r"}, "amount"),
    ({"amount": "1"}, "reference"),
    ({"amount": "1", "reference": "a\x00"}, "reference"),
    ({"amount": "1", "reference": "\udfff"}, "reference"),
    ({"amount": "1", "reference": "r", "reason": "x" * 1_001}, "reason"),
]


@pytest.mark.parametrize(("body", "param"), BAD_GRANTS)
async def test_400_for_a_grant_that_is_wrong(
    admin: httpx2.AsyncClient, bank: Bank, body: dict[str, Any], param: str
) -> None:
    account = await make_account(admin)
    answer = await admin.post(f"/admin/v1/accounts/{account['id']}/grants", content=json.dumps(body))
    assert error_of(answer, 400)["param"] == param
    assert await bank.book(UUID(account["id"])) == []


async def test_400_for_an_actor_that_is_wrong(admin: httpx2.AsyncClient) -> None:
    account = await make_account(admin)
    answer = await admin.post(
        f"/admin/v1/accounts/{account['id']}/grants",
        json={"amount": "1", "reference": "r"},
        headers={"x-farebox-actor": "x" * 81},
    )
    assert error_of(answer, 400)["param"] == "x-farebox-actor"


async def test_404_for_a_grant_to_nobody(admin: httpx2.AsyncClient) -> None:
    body = {"amount": "1", "reference": "r"}
    assert error_of(await admin.post(f"/admin/v1/accounts/{uuid4()}/grants", json=body), 404)["code"] == "not_found"


async def test_200_a_charge_is_reversed_in_parts_and_no_further(admin: httpx2.AsyncClient, bank: Bank) -> None:
    account, key = await bank.open_account(100)
    reserve, _ = await bank.reserve(key, 80)
    await bank.finalize(reserve, 60)
    body = {"request_id": str(reserve.hold_id), "reason": "it was wrong"}
    part = (
        await admin.post("/admin/v1/reversals", json={**body, "amount": "0.00001", "reference": str(uuid4())})
    ).json()
    assert (part["kind"], part["amount"], part["request_id"]) == ("reversal", "0.00001", str(reserve.hold_id))
    rest = (await admin.post("/admin/v1/reversals", json={**body, "reference": str(uuid4())})).json()
    assert rest["amount"] == "0.00005"
    assert rest["reason"] == "it was wrong"
    more = await admin.post("/admin/v1/reversals", json={**body, "reference": str(uuid4())})
    assert error_of(more, 409)["code"] == "conflict"
    assert await bank.money(account.id) == (100, 0, 0)
    receipt = (await admin.get(f"/admin/v1/receipts/{reserve.hold_id}")).json()
    assert (receipt["charge"], receipt["reversed"]) == ("0.00006", "0.00006")


@pytest.mark.parametrize("missing", ["request_id", "reference", "reason"])
async def test_400_for_a_reversal_without(admin: httpx2.AsyncClient, missing: str) -> None:
    body = {"request_id": str(uuid4()), "reference": "r", "reason": "why"}
    del body[missing]
    assert error_of(await admin.post("/admin/v1/reversals", json=body), 400)["param"] == missing


@pytest.mark.parametrize("request_id", [NOBODY, "nonsense", "{" + NOBODY + "}"])
async def test_404_for_a_request_that_nobody_made(admin: httpx2.AsyncClient, request_id: str) -> None:
    body = {"request_id": request_id, "reference": "r", "reason": "why"}
    error_of(await admin.post("/admin/v1/reversals", json=body), 404)
    error_of(await admin.get(f"/admin/v1/receipts/{request_id}"), 404)


async def test_200_a_statement_by_pages(admin: httpx2.AsyncClient, bank: Bank) -> None:
    account, key = await bank.open_account(100)
    reserve, _ = await bank.reserve(key, 50)
    await bank.finalize(reserve, 50, usage=Usage(output=50))
    path = f"/admin/v1/accounts/{account.id}/transactions"
    first = (await admin.get(path, params={"limit": "1"})).json()
    assert first["has_more"] is True
    assert (first["data"][0]["kind"], first["data"][0]["amount"]) == ("charge", "-0.00005")
    second = (await admin.get(path, params={"after": first["last_id"]})).json()
    assert [t["kind"] for t in second["data"]] == ["grant"]
    assert second["has_more"] is False
    other, _ = await bank.open_account(5)
    strange = await admin.get(f"/admin/v1/accounts/{other.id}/transactions", params={"after": first["last_id"]})
    assert error_of(strange, 400)["param"] == "after"


async def test_405_for_a_method_that_is_not_served(admin: httpx2.AsyncClient) -> None:
    assert error_of(await admin.delete("/admin/v1/accounts"), 405)["code"] == "method_not_allowed"


async def test_503_where_the_database_is_away(admin: httpx2.AsyncClient, bank: Bank) -> None:
    await bank.control._pool.close()
    answer = await admin.get("/admin/v1/accounts")
    assert error_of(answer, 503)["code"] == "ledger_unavailable"
    assert answer.headers["retry-after"] == "1"
