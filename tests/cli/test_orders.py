"""`farebox orders`: what was bought, and what an operator decides about payments that don't match."""

import asyncio
from uuid import uuid4

import pytest

from proxy.ledger.connect import Role, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.orders import NewOrder, Order, OrderLedger, Payment
from tests.cli.conftest import Farebox
from tests.postgres import Database


async def an_order(database: Database, *, received: int | None = None) -> Order:
    """An order of a new account; ``received``: of its 1,000 cents, paid."""
    pool = await create_pool(database.app, Role.CONTROL, size=1)
    try:
        account = await ControlLedger(pool).create_account(f"buyer {uuid4().hex[:8]}")
        orders = OrderLedger(pool)
        new = NewOrder(
            id=uuid4(), account_id=account.id, kind="checkout", pack="starter", credits=1_000_000, currency="usd",
            price=1_000, livemode=False, actor="test",
        )  # fmt: skip
        made = (await orders.create(new)).order
        assert made is not None
        if received is not None:
            name = f"pi_{made.id.hex}"
            await orders.pay(
                Payment(
                    order_id=made.id, account_id=account.id, payment=name, payment_intent=name,
                    session_id=f"cs_{made.id.hex}", customer=None, payment_method=None, livemode=False, currency="usd",
                    subtotal=1_000, discount=0, tax=0, total=1_000, received=received,
                )
            )  # fmt: skip
        return await orders.find(made.id)
    finally:
        await pool.close()


def test_orders_are_listed_and_shown(farebox: Farebox, module_database: Database) -> None:
    order = asyncio.run(an_order(module_database, received=1_000))
    listed = farebox("orders", "list", "--account", str(order.account_id), "--state", "paid", "--json")
    assert [found["id"] for found in listed.json["data"]] == [str(order.id)]
    for name in (str(order.id), str(order.payment_intent), str(order.session_id)):
        shown = farebox("orders", "show", name, "--json").json
        assert (shown["id"], shown["received"], shown["account"]) == (str(order.id), "10.00", str(order.account_id))
    text = farebox("orders", "list", "--account", str(order.account_id))
    assert "10.00" in text.out
    assert farebox("orders", "list", "--after", "nothing").code == 1
    assert farebox("orders", "list", "--state", "bought").code == 2
    missing = farebox("orders", "show", "pi_nobodys")
    assert missing.code == 1
    assert "No order and no payment 'pi_nobodys'." in missing.err


@pytest.mark.parametrize(
    ("decision", "resolution", "balance"), [("--credit", "credited", "1"), ("--dismiss", "dismissed", "0")]
)
def test_a_payment_in_quarantine_is_decided_about_once(
    farebox: Farebox, module_database: Database, decision: str, resolution: str, balance: str
) -> None:
    order = asyncio.run(an_order(module_database, received=900))
    payment = f"pi_{order.id.hex}"
    waiting = farebox("orders", "list", "--quarantined", "--json").json["data"]
    [found] = [one for one in waiting if one["id"] == payment]
    assert (found["reason"], found["received"], found["order"]) == ("short", "9.00", str(order.id))
    assert farebox("orders", "show", payment, "--json").json["reason"] == "short"
    for _ in range(2):
        resolved = farebox("orders", "resolve", payment, decision, "--json")
        assert (resolved.code, resolved.json["resolution"]) == (0, resolution)
    other = "--dismiss" if decision == "--credit" else "--credit"
    refused = farebox("orders", "resolve", payment, other)
    assert refused.code == 1
    assert "decided about already" in refused.err
    assert farebox("accounts", "show", str(order.account_id), "--json").json["balance"] == balance
    assert payment not in farebox("orders", "list", "--quarantined").out


def test_a_decision_has_to_be_one(farebox: Farebox) -> None:
    assert farebox("orders", "resolve", "pi_x").code == 2
    assert farebox("orders", "resolve", "pi_x", "--credit", "--dismiss").code == 2
    assert farebox("orders", "resolve", "pi_x", "--credit").code == 1
