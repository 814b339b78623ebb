"""Credits that are held for a refund, and what disputes and other refunds of the same order take of them meanwhile."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.ledger.audit import audit
from proxy.ledger.orders import Order, OrderLedger
from proxy.ledger.refunds import RefundLedger
from tests.ledger.bank import Bank
from tests.ledger.test_orders import a_new_order, a_payment

_BLOCKED = "SELECT cardinality(pg_blocking_pids($1)) > 0"
DISPUTE = "SELECT * FROM farebox.apply_dispute($1, $2, $3, $4, $5, $6, farebox.ask_dispute())"


async def waits_for_a_row(bank: Bank, pid: int) -> None:
    async with asyncio.timeout(20):
        while not await bank.owner.fetchval(_BLOCKED, pid):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def paid(bank: Bank, account_id: UUID | None = None, **changes: Any) -> Order:
    orders = OrderLedger(bank.control._pool)
    created = await orders.create(a_new_order(account_id or (await bank.open_account())[0].id, **changes))
    assert created.order is not None
    await orders.pay(a_payment(created.order))
    return await orders.find(created.order.id)


async def lots(bank: Bank, account_id: UUID) -> list[tuple[str, int, int, int]]:
    await bank.owner.fetch("SELECT farebox.draw_lots($1, NULL, NULL)", account_id)
    rows = await bank.owner.fetch(
        "SELECT kind, remaining, reserved, owed FROM farebox.lots WHERE account_id = $1 ORDER BY version", account_id
    )
    return [tuple(row) for row in rows]


async def test_who_claims_a_request_while_a_dispute_takes_of_it_changes_nothing(bank: Bank) -> None:
    """The row that the dispute's transaction waits for is a new one then, for which it must not reserve twice."""
    order = await paid(bank)
    refunds = RefundLedger(bank.control._pool)
    opened = await refunds.open(uuid4(), order.id, 600, owing=False, step=1, actor="ann", reason=None)
    assert opened.outcome == "done"
    async with bank.control._pool.acquire() as claiming, bank.control._pool.acquire() as disputing:
        claim = claiming.transaction()
        await claim.start()
        assert await claiming.fetch("SELECT farebox.claim_refund_requests('0', '0', 1000)")
        pid = await disputing.fetchval("SELECT pg_backend_pid()")
        dispute = asyncio.ensure_future(
            disputing.fetchrow(DISPUTE, f"dp_{order.id}", order.payment_intent, 100, "usd", "needs_response", True)
        )
        await waits_for_a_row(bank, pid)
        await claim.commit()
        applied = await dispute
        assert applied is not None
        assert applied["outcome"] == "taken"
    assert await lots(bank, order.account_id) == [("paid", 900, 600, 0), ("promo", 90, 60, 0)]
    assert opened.request_id is not None
    assert await refunds.release(opened.request_id, "refused") == "released"
    assert await lots(bank, order.account_id) == [("paid", 900, 0, 0), ("promo", 90, 0, 0)]
    assert [check for check in await audit(bank.owner) if not check.ok] == []


@pytest.mark.parametrize("running", [0, 300])
async def test_what_a_dispute_took_and_gives_back_is_held_again(bank: Bank, running: int) -> None:
    """It could be spent otherwise, and the refund that is under way would leave a debt."""
    account, key = await bank.open_account(running)
    row, _ = await bank.reserve(key, running, 0)
    order = await paid(bank, account.id)
    refunds = RefundLedger(bank.control._pool)
    opened = await refunds.open(uuid4(), order.id, 800, owing=False, step=1, actor="ann", reason=None)
    assert opened.request_id is not None
    held = await bank.money(account.id)
    assert held == (1100 + running, 880 + running, 0)
    for withdrawn, status in ((True, "needs_response"), (False, "won")):
        await bank.owner.execute(DISPUTE, f"dp_{order.id}", order.payment_intent, 1000, "usd", status, withdrawn)
        assert await bank.money(account.id) == ((running, running, 0) if withdrawn else held)
    assert [lot[:3] for lot in await lots(bank, account.id)][-2:] == [("paid", 1000, 800), ("promo", 100, 80)]
    assert await refunds.release(opened.request_id, "refused") == "released"
    await bank.finalize(row, running)
    assert await bank.money(account.id) == (1100, 0, 0)
    assert [check for check in await audit(bank.owner) if not check.ok] == []
