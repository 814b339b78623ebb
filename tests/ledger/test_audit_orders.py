"""The audit of orders: paid is credited, and no altered row of either escapes it."""

import pytest

from proxy.ledger.audit import audit
from proxy.ledger.orders import OrderLedger
from tests.ledger.bank import Bank
from tests.ledger.test_orders import a_new_order, a_payment

PAID, HAVE = "paid_orders_were_credited", "purchases_have_their_order"
TAMPERED = [
    ("UPDATE farebox.orders SET credits = credits + 1 WHERE state = 'paid'", {PAID}),
    ("UPDATE farebox.orders SET bonus = bonus + 1 WHERE bonus > 0", {PAID}),
    ("UPDATE farebox.orders SET bonus = 7 WHERE bonus = 0 AND state = 'paid'", {PAID}),
    ("UPDATE farebox.orders SET received = received - 1 WHERE state = 'paid'", {PAID}),
    ("UPDATE farebox.orders SET payment_intent = 'pi_other' WHERE bonus > 0 AND state = 'paid'", {PAID}),
    ("UPDATE farebox.orders SET credit_version = credit_version + 1 WHERE bonus > 0", {PAID, HAVE}),
    (
        "UPDATE farebox.orders SET state = 'open', paid_at = NULL, received = NULL WHERE state = 'paid' AND bonus > 0",
        {HAVE},
    ),
    (
        "UPDATE farebox.orders SET state = 'paid', paid_at = now(), received = 1000, subtotal = 1000, discount = 0,"
        " tax = 0 WHERE state = 'created'",
        {PAID},
    ),
]


@pytest.fixture
async def sold(bank: Bank) -> Bank:
    """A bank with an order that was paid, one with a bonus and one that wasn't paid."""
    if not await bank.owner.fetchval("SELECT EXISTS (SELECT FROM farebox.orders)"):
        orders = OrderLedger(bank.control._pool)
        account, _ = await bank.open_account()
        for bonus in (0, 100):
            created = await orders.create(a_new_order(account.id, bonus=bonus))
            assert created.order is not None
            await orders.pay(a_payment(created.order))
        await orders.create(a_new_order(account.id))
    return bank


async def test_what_was_paid_for_was_credited(sold: Bank) -> None:
    found = {check.name: check for check in await audit(sold.owner)}
    assert [check for check in found.values() if not check.ok] == []
    assert (found[PAID].rows, found[HAVE].rows) == (2, 2)


@pytest.mark.parametrize(("statement", "expected"), TAMPERED, ids=[statement for statement, _ in TAMPERED])
async def test_what_somebody_altered_is_found(sold: Bank, statement: str, expected: set[str]) -> None:
    transaction = sold.owner.transaction()
    await transaction.start()
    try:
        await sold.owner.execute("ALTER TABLE farebox.orders DISABLE TRIGGER USER")
        await sold.owner.execute(statement)
        rows = await sold.owner.fetch("SELECT * FROM farebox.audit_orders()")
    finally:
        await transaction.rollback()
    assert {row["name"] for row in rows if row["violations"]} == expected
