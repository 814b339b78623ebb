"""Orders in the ledger: paid once, whoever says so and however often; what doesn't match waits for an operator."""

import asyncio
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.ledger.errors import Conflict, Unknown
from proxy.ledger.orders import CreateOutcome, NewOrder, Order, OrderLedger, Paid, Payment, PayOutcome
from tests.ledger.bank import Bank


def a_new_order(account_id: UUID, **changes: Any) -> NewOrder:
    """10.00 dollars for 1,000 microcredits and 100 more."""
    given: dict[str, Any] = {
        "id": uuid4(), "account_id": account_id, "kind": "checkout", "pack": "starter", "credits": 1_000, "bonus": 100,
        "currency": "usd", "price": 1_000, "livemode": False, "actor": "test",
    }  # fmt: skip
    return NewOrder(**given | changes)


def a_payment(order: Order, **changes: Any) -> Payment:
    """What the order asked for, paid in full, under a name of its own."""
    name = uuid4().hex
    given: dict[str, Any] = {
        "order_id": order.id, "account_id": order.account_id, "payment": f"pi_{name}", "payment_intent": f"pi_{name}",
        "session_id": f"cs_{name}", "customer": None, "payment_method": None, "livemode": order.livemode,
        "currency": order.currency, "subtotal": order.price, "discount": 0, "tax": 0, "total": order.price,
        "received": order.price,
    }  # fmt: skip
    return Payment(**given | changes)


@pytest.fixture
def orders(bank: Bank) -> OrderLedger:
    return OrderLedger(bank.control._pool)


async def an_order(bank: Bank, orders: OrderLedger, **changes: Any) -> Order:
    account, _ = await bank.open_account()
    created = await orders.create(a_new_order(account.id, **changes))
    assert created.order is not None
    return created.order


async def balance(bank: Bank, order: Order) -> int:
    return (await bank.money(order.account_id))[0]


async def test_a_payment_credits_order_and_bonus_with_their_lots(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders, credits_seconds=864_000, bonus_seconds=86_400)
    payment = a_payment(order)
    assert await orders.pay(payment) == Paid(PayOutcome.PAID, None, fresh=True)
    paid = await orders.find(order.id)
    assert (paid.state, paid.received, paid.payment_intent) == ("paid", 1_000, payment.payment)
    lots = await bank.owner.fetch(
        """
        SELECT kind, amount, order_id, extract(epoch FROM expires_at - created_at)::bigint AS seconds, version
          FROM farebox.lots WHERE account_id = $1 ORDER BY version
        """,
        order.account_id,
    )
    assert [tuple(lot)[:4] for lot in lots] == [("paid", 1_000, order.id, 864_000), ("promo", 100, order.id, 86_400)]
    assert [paid.credit_version, paid.bonus_version] == [lot["version"] for lot in lots]
    [transfer, *_] = [t for t in await bank.control.transfers(order.account_id) if t.kind == "purchase"]
    assert (transfer.debit, transfer.reference) == ("stripe", payment.payment)
    told = await bank.owner.fetch("SELECT payload FROM farebox.outbox WHERE reference = $1", payment.payment)
    assert len(told) == 1


async def test_eight_at_once_and_late_credit_once(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders)
    payment = a_payment(order)
    found = await asyncio.gather(*(orders.pay(payment) for _ in range(8)))
    assert sorted(paid.outcome for paid in found) == ["known"] * 7 + ["paid"]
    assert [paid.fresh for paid in found].count(True) == 1
    assert await balance(bank, order) == 1_100


async def test_what_was_owed_takes_the_credits_first(bank: Bank, orders: OrderLedger) -> None:
    account, key = await bank.open_account(100)
    reserve, _ = await bank.reserve(key, 100)
    await bank.finalize(reserve, 350)
    assert await bank.money(account.id) == (0, 0, 250)
    created = await orders.create(a_new_order(account.id))
    assert created.order is not None
    await orders.pay(a_payment(created.order))
    assert await bank.money(account.id) == (850, 0, 0)


MISMATCHES: list[tuple[dict[str, Any], str]] = [
    ({"account_id": UUID(int=1)}, "other_account"),
    ({"account_id": None}, "other_account"),
    ({"livemode": True}, "other_mode"),
    ({"currency": "eur"}, "other_currency"),
    ({"currency": "USD"}, "other_currency"),
    ({"subtotal": 999, "total": 999, "received": 999}, "other_amount"),
    ({"subtotal": 1_001, "total": 1_001, "received": 1_001}, "other_amount"),
    ({"discount": 1, "total": 999, "received": 999}, "discount"),
    ({"discount": -1, "total": 1_001, "received": 1_001}, "discount"),
    ({"received": 999}, "short"),
    ({"received": 0}, "short"),
    ({"received": 1_001}, "short"),
    ({"total": 999, "received": 999}, "other_amount"),
    ({"tax": 190, "total": 1_191, "received": 1_191}, "other_amount"),
    ({"total": 1_190, "received": 1_190}, "other_amount"),
    ({"problem": "not_named"}, "not_named"),
]


@pytest.mark.parametrize(("changes", "reason"), MISMATCHES, ids=str)
async def test_what_doesnt_match_brings_nothing_and_waits(
    bank: Bank, orders: OrderLedger, changes: dict[str, Any], reason: str
) -> None:
    order = await an_order(bank, orders)
    payment = a_payment(order, **changes)
    assert await orders.pay(payment) == Paid(PayOutcome.QUARANTINED, reason, fresh=True)
    assert await orders.pay(payment) == Paid(PayOutcome.QUARANTINED, reason, fresh=False)
    # Not even where it is told otherwise later: somebody has to look at it.
    assert await orders.pay(a_payment(order, payment=payment.payment)) == Paid(
        PayOutcome.QUARANTINED, reason, fresh=False
    )
    assert await balance(bank, order) == 0
    assert (await orders.find(order.id)).state == "created"
    waiting = await orders.quarantined(payment.payment)
    assert (waiting.reason, waiting.order_id, waiting.received) == (reason, order.id, payment.received)


@pytest.mark.parametrize(
    "changes",
    [
        {"tax": 190, "total": 1_190, "received": 1_190},
        {"tax": 160},
        {"discount": 250, "total": 750, "received": 750},
        {"discount": 250, "tax": 140, "total": 890, "received": 890},
        {"discount": 1_000, "total": 0, "received": 0, "payment_intent": None},
    ],
    ids=["tax on top", "tax inside", "discounted", "both", "a whole price off"],
)
async def test_what_the_operator_allows_matches(bank: Bank, orders: OrderLedger, changes: dict[str, Any]) -> None:
    order = await an_order(bank, orders, discount_max=1_000)
    payment = a_payment(order, **changes)
    if payment.payment_intent is None:
        assert payment.session_id is not None
        payment = replace(payment, payment=payment.session_id)
    assert (await orders.pay(payment)).outcome is PayOutcome.PAID
    paid = await orders.find(order.id)
    assert (paid.received, paid.discount, paid.tax) == (payment.received, payment.discount, payment.tax)
    assert paid.payment == payment.payment
    assert (await orders.pay(payment)).outcome is PayOutcome.KNOWN


async def test_an_order_that_nobody_made_waits(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders)
    payment = a_payment(order, order_id=uuid4())
    assert (await orders.pay(payment)).reason == "unknown_order"
    with pytest.raises(Conflict, match="farebox credits grant"):
        await orders.resolve(payment.payment, "credited", actor="test", new_id=uuid4())
    await orders.resolve(payment.payment, "dismissed", actor="test", new_id=uuid4())
    assert (await orders.pay(payment)).outcome is PayOutcome.DISMISSED


async def test_a_second_payment_of_one_order_waits_and_may_become_an_order_of_its_own(
    bank: Bank, orders: OrderLedger
) -> None:
    order = await an_order(bank, orders)
    first, second = a_payment(order), a_payment(order)
    await orders.pay(first)
    assert await orders.pay(second) == Paid(PayOutcome.QUARANTINED, "second_payment", fresh=True)
    assert await balance(bank, order) == 1_100
    new_id = uuid4()
    resolved = [await orders.resolve(second.payment, "credited", actor="op", new_id=new_id) for _ in range(2)]
    assert resolved == [new_id, new_id]
    assert await balance(bank, order) == 2_200
    copy = await orders.find(new_id)
    assert (copy.state, copy.payment_intent, copy.received) == ("paid", second.payment, 1_000)
    assert (await orders.pay(second)).outcome is PayOutcome.CREDITED
    assert (await orders.pay(first)).outcome is PayOutcome.KNOWN
    with pytest.raises(Conflict, match="decided about already"):
        await orders.resolve(second.payment, "dismissed", actor="op", new_id=uuid4())


async def test_an_operator_may_credit_another_currency(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders)
    payment = a_payment(order, currency="eur", subtotal=900, total=900, received=900)
    await orders.pay(payment)
    found = await asyncio.gather(
        *(orders.resolve(payment.payment, "credited", actor="op", new_id=uuid4()) for _ in range(4))
    )
    assert set(found) == {order.id}
    paid = await orders.find(order.id)
    assert (paid.state, paid.currency, paid.price, paid.received) == ("paid", "eur", 900, 900)
    assert await balance(bank, order) == 1_100
    waiting = await orders.quarantined(payment.payment)
    assert (waiting.resolution, waiting.resolved_by) == ("credited", "op")


async def test_money_of_test_mode_is_never_credited_to_a_live_order(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders, livemode=True)
    payment = a_payment(order, livemode=False)
    await orders.pay(payment)
    with pytest.raises(Conflict, match="test mode is no money"):
        await orders.resolve(payment.payment, "credited", actor="op", new_id=uuid4())
    assert await balance(bank, order) == 0


async def test_a_payment_of_another_order_is_not_taken_twice(bank: Bank, orders: OrderLedger) -> None:
    order, other = await an_order(bank, orders), await an_order(bank, orders)
    payment = a_payment(order)
    await orders.pay(payment)
    stolen = a_payment(other, payment=payment.payment, payment_intent=payment.payment)
    assert (await orders.pay(stolen)).reason == "other_order"
    with pytest.raises(Conflict, match="credited already"):
        await orders.resolve(payment.payment, "credited", actor="op", new_id=uuid4())
    assert await balance(bank, other) == 0


async def test_a_customer_that_isnt_the_orders_waits(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders, customer="cus_one")
    assert (await orders.pay(a_payment(order, customer="cus_two"))).reason == "other_customer"


async def test_a_balance_has_a_limit(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders)
    await bank.owner.execute("UPDATE farebox.accounts SET balance = 999999999999999000 WHERE id = $1", order.account_id)
    payment = a_payment(order)
    assert (await orders.pay(payment)).reason == "above_limit"
    with pytest.raises(Conflict, match="above what one account can have"):
        await orders.resolve(payment.payment, "credited", actor="op", new_id=uuid4())


STATES = ["pending", "failed", "expired", "canceled"]


@pytest.mark.parametrize("first", STATES)
@pytest.mark.parametrize("then", STATES)
async def test_states_only_rise_and_a_late_payment_counts(
    bank: Bank, orders: OrderLedger, first: str, then: str
) -> None:
    order = await an_order(bank, orders)
    assert await orders.advance(order.id, first, problem="first") == first
    risen = then if (first, then) in {("pending", late) for late in STATES[1:]} else first
    assert await orders.advance(order.id, then, problem="then") == risen
    await orders.opened(order.id, f"cs_{uuid4().hex}", "https://stripe.test")
    assert (await orders.find(order.id)).state == risen, "a page that is heard of late changes no state"
    assert (await orders.pay(a_payment(order))).outcome is PayOutcome.PAID
    assert await orders.advance(order.id, then) == "paid"
    assert await balance(bank, order) == 1_100


async def test_the_same_request_is_the_same_order(bank: Bank, orders: OrderLedger) -> None:
    account, _ = await bank.open_account()
    other, _ = await bank.open_account()
    terms: dict[str, Any] = {"request_key": "k", "request_digest": b"d"}
    created = await asyncio.gather(*(orders.create(a_new_order(account.id, **terms)) for _ in range(8)))
    assert sorted(found.outcome for found in created) == ["done"] + ["known"] * 7
    assert len({found.order.id for found in created if found.order}) == 1
    changed = await orders.create(a_new_order(account.id, request_key="k", request_digest=b"e"))
    assert changed.outcome is CreateOutcome.CONFLICT
    assert (await orders.create(a_new_order(other.id, **terms))).outcome is CreateOutcome.DONE


async def test_one_automatic_order_at_a_time(bank: Bank, orders: OrderLedger) -> None:
    account, _ = await bank.open_account()
    created = await asyncio.gather(*(orders.create(a_new_order(account.id, kind="auto")) for _ in range(8)))
    assert sorted(found.outcome for found in created) == ["busy"] * 7 + ["done"]
    assert len({found.order.id for found in created if found.order}) == 1


async def test_so_many_unpaid_orders_and_no_more(bank: Bank, orders: OrderLedger) -> None:
    account, _ = await bank.open_account()
    outcomes = [(await orders.create(a_new_order(account.id), unfinished_max=2)).outcome for _ in range(3)]
    assert outcomes == ["done", "done", "too_many"]
    with pytest.raises(Unknown):
        await orders.create(a_new_order(uuid4()))


async def test_an_account_is_one_customer_in_each_mode(bank: Bank, orders: OrderLedger) -> None:
    account, _ = await bank.open_account()
    names = [f"cus_{uuid4().hex}" for _ in range(4)]
    put = await asyncio.gather(*(orders.put_customer(account.id, name, livemode=False) for name in names))
    assert len(set(put)) == 1
    live = f"cus_{uuid4().hex}"
    assert await orders.put_customer(account.id, live, livemode=True) == live
    assert await orders.account_of(live, livemode=True) == account.id
    assert await orders.account_of(live, livemode=False) is None
    after = f"cus_{uuid4().hex}"
    assert await orders.put_customer(account.id, after, livemode=False, instead_of="cus_other") == put[0]
    assert await orders.put_customer(account.id, after, livemode=False, instead_of=put[0]) == after


async def test_a_saved_payment_method_is_kept_for_the_customer_that_paid(bank: Bank, orders: OrderLedger) -> None:
    order = await an_order(bank, orders, save_payment_method=True)
    customer = f"cus_{uuid4().hex}"
    await orders.put_customer(order.account_id, customer, livemode=False)
    await orders.pay(a_payment(order, customer=customer, payment_method="pm_1"))
    assert await orders.customer(order.account_id, livemode=False) == (customer, "pm_1")


async def test_lists_go_by_pages_from_the_newest(bank: Bank, orders: OrderLedger) -> None:
    account, _ = await bank.open_account()
    made = [(await orders.create(a_new_order(account.id))).order for _ in range(3)]
    ids = [order.id for order in made if order]
    first = await orders.list_orders(account.id, limit=2)
    assert [order.id for order in first] == [ids[2], ids[1]]
    assert [order.id for order in await orders.list_orders(account.id, after=ids[1])] == [ids[0]]
    await orders.advance(ids[0], "failed")
    assert [order.id for order in await orders.list_orders(account.id, state="failed")] == [ids[0]]
    for name in (str(ids[0]), str(ids[0]).upper()):
        found = await orders.search(name)
        assert found is not None
        assert found.id == ids[0]
    assert await orders.search("pi_nobodys") is None
