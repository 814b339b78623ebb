"""Self-service over HTTP and a real ledger, as the reader's role: an account sees itself and nobody else."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from starlette.requests import Request

from proxy.control.account import account_routes
from proxy.core.errors import Unauthenticated
from proxy.core.usage import TOKEN_CLASSES, Usage
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.control import GrantKind
from proxy.ledger.reader import AccountReader
from proxy.ledger.records import ApiKey
from tests.control.conftest import client_of
from tests.ledger.bank import Bank

# Fixed, since the workers of a test run must agree on the names of the tests.
NOBODY = "01900000-0000-7000-8000-00000000dead"

TODAY = datetime.now(UTC).date()


@pytest.fixture
async def client(bank: Bank) -> AsyncIterator[httpx2.AsyncClient]:
    """A client whose key is the one that the header ``key`` names."""

    async def authenticate(request: Request) -> ApiKey:
        key = await bank.holds.find_key(request.headers.get("key", ""))
        if key is None:
            raise Unauthenticated("No key.", code="invalid_api_key")
        return key

    pool = await create_pool(bank.database.app, Role.READER, size=2)
    async with client_of(account_routes(authenticate, AccountReader(pool))) as opened:
        yield opened
    await pool.close()


async def opened(bank: Bank, balance: int = 1_000) -> ApiKey:
    _, key = await bank.open_account(balance, scopes=["inference", "read"])
    return key


async def get(client: httpx2.AsyncClient, key: ApiKey, path: str, **params: str) -> httpx2.Response:
    return await client.get(f"/v1/{path}", headers={"key": key.id}, params=params)


async def refused(client: httpx2.AsyncClient, key: ApiKey, path: str, **params: str) -> tuple[int, dict[str, Any]]:
    answer = await get(client, key, path, **params)
    return answer.status_code, answer.json()["error"]


PATHS = ["credits", "credits/lots", "transactions", "usage", f"receipts/{NOBODY}"]


@pytest.mark.parametrize("path", PATHS)
async def test_401_without_a_key(client: httpx2.AsyncClient, path: str) -> None:
    assert (await client.get(f"/v1/{path}")).status_code == 401


@pytest.mark.parametrize("path", PATHS)
async def test_403_without_the_scope(client: httpx2.AsyncClient, bank: Bank, path: str) -> None:
    _, key = await bank.open_account(5, scopes=["inference"])
    status, error = await refused(client, key, path)
    assert (status, error["code"]) == (403, "insufficient_scope")


@pytest.mark.parametrize("path", PATHS)
async def test_400_for_a_parameter_that_is_not_known(client: httpx2.AsyncClient, bank: Bank, path: str) -> None:
    status, error = await refused(client, await opened(bank), path, form="json")
    assert (status, error["code"], error["param"]) == (400, "unknown_parameter", "form")


async def test_200_credits(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank, 1_500_000)
    await bank.reserve(key, 500_001)
    answer = await get(client, key, "credits")
    assert answer.json() == {
        "object": "credits",
        "account": str(key.account_id),
        "balance": "1.5",
        "held": "0.500001",
        "available": "0.999999",
        "debt": "0",
        "expiring": [],
        "frozen_at": None,
    }
    assert answer.headers["cache-control"] == "private, no-store"


async def test_200_credits_in_debt(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank, 100)
    reserve, _ = await bank.reserve(key, 100)
    await bank.finalize(reserve, 130)
    view = (await get(client, key, "credits")).json()
    assert (view["balance"], view["available"], view["debt"]) == ("0", "0", "0.00003")


async def test_200_lots_in_drawing_order_and_what_expires_soon(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank, 100)
    soon, late = (datetime.now(UTC) + timedelta(days=days) for days in (5, 60))
    grants: list[tuple[GrantKind, datetime]] = [("promo", late), ("promo", soon), ("grant", soon)]
    for kind, expires_at in grants:
        await bank.control.grant(
            key.account_id, 50, kind=kind, reference=uuid4().hex, actor="test", expires_at=expires_at
        )
    reserve, _ = await bank.reserve(key, 60)
    await bank.finalize(reserve, 60)
    await bank.control.lots(key.account_id)
    lots = (await get(client, key, "credits/lots")).json()
    assert [(lot["kind"], lot["remaining"]) for lot in lots["data"]] == [
        ("promo", "0.00004"),
        ("granted", "0.00005"),
        ("granted", "0.0001"),
    ]
    assert lots["data"][0]["expires_at"] == late.isoformat().replace("+00:00", "Z")
    assert lots["data"][-1]["expires_at"] is None
    assert "priority" not in lots["data"][0]
    assert lots["data"][0]["id"] == f"{key.account_id}-2"
    shown = (await get(client, key, "credits")).json()["expiring"]
    assert shown == [{"amount": "0.00005", "expires_at": soon.isoformat().replace("+00:00", "Z")}]


async def test_200_lots_are_the_accounts_own(client: httpx2.AsyncClient, bank: Bank) -> None:
    await opened(bank, 100)
    nobody = await opened(bank, 0)
    assert (await get(client, nobody, "credits/lots")).json()["data"] == []


async def test_200_transactions_by_pages(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank)
    for _ in range(4):
        reserve, _ = await bank.reserve(key, 10)
        await bank.finalize(reserve, 10)
    seen: list[dict[str, Any]] = []
    params = {"limit": "2"}
    while True:
        page = (await get(client, key, "transactions", **params)).json()
        seen += page["data"]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    assert [t["kind"] for t in seen] == ["charge"] * 4 + ["grant"]
    assert [t["amount"] for t in seen] == ["-0.00001"] * 4 + ["0.001"]
    assert len({t["id"] for t in seen}) == 5
    assert seen[0]["request_id"] == str(reserve.hold_id)
    assert "actor" not in seen[-1]


@pytest.mark.parametrize(
    "after", ["x", "", "\x00", "1", f"{NOBODY}-1", "-1", "{account}-", "{account}-x", "{account}-" + "9" * 30]
)
async def test_400_for_a_cursor_that_is_none(client: httpx2.AsyncClient, bank: Bank, after: str) -> None:
    key = await opened(bank)
    after = after.replace("{account}", str(key.account_id))
    status, error = await refused(client, key, "transactions", after=after)
    assert (status, error["param"]) == (400, "after")


async def test_400_for_another_account_s_cursor(client: httpx2.AsyncClient, bank: Bank) -> None:
    mine, theirs = await opened(bank), await opened(bank)
    cursor = (await get(client, theirs, "transactions")).json()["last_id"]
    status, _ = await refused(client, mine, "transactions", after=cursor)
    assert status == 400


async def test_200_usage_by_day_and_model(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank)
    for charge in (10, 20):
        reserve, _ = await bank.reserve(key, 50)
        await bank.finalize(reserve, charge, usage=Usage(input=charge - 5, output=5))
    released, _ = await bank.reserve(key, 50)
    await bank.release(released)
    view = (await get(client, key, "usage")).json()
    [row] = view["data"]
    assert (row["date"], row["model"], row["requests"], row["charged"]) == (TODAY.isoformat(), "m", 2, "0.00003")
    assert row["tokens"] == dict.fromkeys(TOKEN_CLASSES, 0) | {"input": 20, "output": 10}
    assert (view["charged"], view["requests"], view["to"]) == ("0.00003", 2, TODAY.isoformat())
    yesterday = (TODAY - timedelta(days=1)).isoformat()
    assert (await get(client, key, "usage", to=yesterday)).json()["data"] == []
    today = TODAY.isoformat()
    assert (await get(client, key, "usage", **{"from": today, "to": today})).json()["data"] == [row]


@pytest.mark.parametrize(
    "params",
    [
        {"from": "2027-01-02", "to": "2027-01-01"},
        {"from": "2026-01-01", "to": "2027-01-02"},
        {"from": "yesterday"},
        {"to": "2027-02-30"},
        {"to": "0001-01-01"},
        {"to": "\x00"},
        {"from": "2027-01-01T00:00:00Z"},
    ],
)
async def test_400_for_days_that_are_none(client: httpx2.AsyncClient, bank: Bank, params: dict[str, str]) -> None:
    status, error = await refused(client, await opened(bank), "usage", **params)
    assert status == 400
    assert error["param"] in ("from", "to")


async def test_200_a_receipt_adds_up(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank)
    reserve, _ = await bank.reserve(key, 100, variant="metered")
    await bank.finalize(reserve, 6, usage=Usage(input=1_000, reasoning=2_000), variant="metered")
    view = (await get(client, key, f"receipts/{reserve.hold_id}")).json()
    assert (view["id"], view["object"], view["state"], view["key_id"]) == (
        str(reserve.hold_id),
        "receipt",
        "final",
        key.id,
    )
    assert view["prices"] == [
        {"class": "input", "credits_per_1k": "0.000000333", "tokens": 1_000, "amount": "0.000000333"},
        {"class": "reasoning", "credits_per_1k": "0.000000333", "tokens": 2_000, "amount": "0.000000666"},
        {"class": "per_request", "amount": "0.000005"},
    ]
    assert (view["charge"], view["held"], view["released"]) == ("0.000006", "0.0001", "0.000094")
    assert (view["usage"]["source"], view["ending"], view["quote"]) == ("reported", "stop", {"quote": 1})


async def test_200_a_receipt_of_a_running_and_of_a_released_request(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank)
    reserve, _ = await bank.reserve(key, 100)
    running = (await get(client, key, f"receipts/{reserve.hold_id}")).json()
    assert (running["state"], running["held"], running["charge"], running["prices"]) == ("open", "0.0001", None, [])
    await bank.release(reserve)
    released = (await get(client, key, f"receipts/{reserve.hold_id}")).json()
    assert (released["state"], released["charge"], released["released"]) == ("released", "0", "0.0001")


@pytest.mark.parametrize("request_id", [NOBODY, "nonsense", "%00", "%ED%A0%80", "x" * 5_000, "{" + NOBODY + "}"])
async def test_404_for_a_request_that_nobody_made(client: httpx2.AsyncClient, bank: Bank, request_id: str) -> None:
    status, error = await refused(client, await opened(bank), f"receipts/{request_id}")
    assert (status, error["code"]) == (404, "receipt_not_found")


async def test_404_for_another_account_s_request_is_the_same(client: httpx2.AsyncClient, bank: Bank) -> None:
    mine, theirs = await opened(bank), await opened(bank)
    reserve, _ = await bank.reserve(theirs, 100)
    await bank.finalize(reserve, 10)
    strange = await get(client, mine, f"receipts/{reserve.hold_id}")
    nobody = await get(client, mine, f"receipts/{uuid4()}")
    assert strange.status_code == nobody.status_code == 404
    assert strange.json() == nobody.json()
    assert (await get(client, theirs, f"receipts/{reserve.hold_id}")).status_code == 200


async def test_503_where_the_database_is_away(client: httpx2.AsyncClient, bank: Bank) -> None:
    key = await opened(bank)

    async def authenticate(_: Request) -> ApiKey:
        return key

    pool = await create_pool("postgresql://nobody@127.0.0.1:1/nothing", Role.READER, size=1)
    async with client_of(account_routes(authenticate, AccountReader(pool))) as away:
        answer = await away.get("/v1/credits")
    await pool.close()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
