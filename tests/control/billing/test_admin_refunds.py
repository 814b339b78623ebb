"""Refunds by the operator's API; each test is named by what is answered."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from proxy.control.admin import AdminToken
from proxy.control.billing.admin_refunds import refund_routes
from proxy.control.billing.refunding import Refunder
from tests.control.billing.counter import Counter
from tests.control.conftest import ADMIN_TOKEN, client_of
from tests.fakes.stripe import LostRequest


@pytest.fixture
async def admin_client(counter: Counter) -> AsyncIterator[httpx2.AsyncClient]:
    refunder = Refunder(counter.desk.orders, counter.ledger, counter.refunds, livemode=False)
    async with client_of(refund_routes(AdminToken(ADMIN_TOKEN), refunder)) as client:
        client.headers["authorization"] = f"Bearer {ADMIN_TOKEN}"
        yield client


async def test_200_once_for_each_reference(counter: Counter, admin_client: httpx2.AsyncClient) -> None:
    order, intent = await counter.sold()
    body = {"amount": "2.50", "reference": "ticket 7", "reason": "sorry"}
    headers = {"x-farebox-actor": "ann"}
    answers = [
        await admin_client.post(f"/admin/v1/orders/{name}/refunds", json=body, headers=headers)
        for name in (order.id, intent)
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    [first, second] = [answer.json() for answer in answers]
    assert first == second
    assert (first["state"], first["amount"], first["actor"]) == ("done", "2.50", "admin:ann")
    assert await counter.money(order) == (750, 0, 0)
    all_left = await admin_client.post(
        f"/admin/v1/orders/{order.id}/refunds", json={"all_left": True, "reference": "ticket 8"}
    )
    assert all_left.json()["amount"] == "7.50"


async def test_refusals(counter: Counter, admin_client: httpx2.AsyncClient) -> None:
    order, _ = await counter.sold()
    path = f"/admin/v1/orders/{order.id}/refunds"
    cases = [
        (path, {}, 400, "invalid_value"),
        (path, {"reference": "r", "amount": "1.005"}, 400, "invalid_value"),
        (path, {"reference": "r", "amount": 1}, 400, "invalid_value"),
        (path, {"reference": "r", "amount": "10.01"}, 409, "refund_above_payment"),
        (path, {"reference": "r", "money": "1"}, 400, "unknown_parameter"),
        ("/admin/v1/orders/nobody/refunds", {"reference": "r"}, 404, "not_found"),
    ]
    for where, body, status, code in cases:
        answer = await admin_client.post(where, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    answer = await admin_client.post(path, json={"reference": "r"}, headers={"authorization": "Bearer x"})
    assert answer.status_code == 401
    assert await counter.money(order) == (1000, 0, 0)


async def test_503_where_stripe_gives_no_answer_and_200_when_asked_again(
    counter: Counter, admin_client: httpx2.AsyncClient
) -> None:
    order, _ = await counter.sold()
    counter.desk.stripe.faults.on("POST /v1/refunds", LostRequest())
    path, body = f"/admin/v1/orders/{order.id}/refunds", {"reference": "ticket 9"}
    answer = await admin_client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "refund_unresolved")
    assert await counter.money(order) == (1000, 1000, 0)
    again = await admin_client.post(path, json=body)
    assert (again.status_code, again.json()["state"]) == (200, "done")
    assert await counter.money(order) == (0, 0, 0)
