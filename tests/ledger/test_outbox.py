"""Messages out: written with what they tell of, taken by one at a time, and told once each time there is a reason."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.core.money import format_credits
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.errors import Unknown
from proxy.ledger.outbox import Message, Outbox
from tests.ledger.bank import Bank

CREDIT = 1_000_000


@pytest.fixture
async def bank(own_bank: Bank) -> Bank:
    """A ledger of the test's own: what is due, and whose turn it is, concerns all accounts."""
    return own_bank


@pytest.fixture
async def outbox(bank: Bank) -> AsyncIterator[Outbox]:
    pool = await create_pool(bank.database.app, Role.CONTROL, size=8)
    yield Outbox(pool)
    await pool.close()


async def tell(bank: Bank, account_id: UUID, type: str = "account.frozen", reference: str | None = None) -> None:
    await bank.owner.execute("SELECT farebox.tell($1, $2, $3, $4)", type, account_id, reference, '{"order": "o"}')


def data(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message.payload)["data"]
    return found


async def test_a_message_says_whose_it_is_and_how_the_account_stands(bank: Bank, outbox: Outbox) -> None:
    account = await bank.control.create_account("Ann's", f"ext {uuid4()}")
    await bank.control.grant(account.id, 12_500_001, reference=None, actor="test")
    await tell(bank, account.id)
    [message] = await outbox.claim(10, lease_seconds=60)
    assert json.loads(message.payload) == {
        "type": "account.frozen",
        "timestamp": json.loads(message.payload)["timestamp"],
        "data": {
            "account": str(account.id),
            "name": "Ann's",
            "external_id": account.external_id,
            "balance": "12.500001",
            "debt": "0",
            "order": "o",
        },
    }
    assert (message.state, message.attempts, message.account_id) == ("waiting", 1, account.id)


async def test_it_is_written_once_for_its_reference_and_not_if_its_transaction_fails(
    bank: Bank, outbox: Outbox
) -> None:
    account, _ = await bank.open_account()
    for type in ("a", "a", "b"):
        await tell(bank, account.id, type, "ref")
    for _ in range(2):
        await tell(bank, account.id, "a", None)
    transaction = bank.owner.transaction()
    await transaction.start()
    await tell(bank, account.id, "c", "ref")
    await transaction.rollback()
    assert sorted(message.type for message in await outbox.messages()) == ["a", "a", "a", "b"]


async def test_no_two_get_the_same_message(bank: Bank, outbox: Outbox) -> None:
    account, _ = await bank.open_account()
    for n in range(40):
        await tell(bank, account.id, "a", str(n))
    claims = await asyncio.gather(*(outbox.claim(7, lease_seconds=60) for _ in range(8)))
    taken = [message.id for claim in claims for message in claim]
    assert len(taken) == len(set(taken)) == 40
    assert all(len(claim) <= 7 for claim in claims)
    assert await outbox.claim(10, lease_seconds=60) == []


async def test_what_nothing_was_heard_of_is_due_again(bank: Bank, outbox: Outbox) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id)
    [first] = await outbox.claim(1, lease_seconds=0)
    [second] = await outbox.claim(1, lease_seconds=60)
    assert (second.id, second.payload, second.attempts) == (first.id, first.payload, 2)
    # The first one's failure comes late: the second may still be on its way.
    await outbox.failed(first, "late", again_seconds=None)
    assert [message.state for message in await outbox.messages()] == ["waiting"]
    await outbox.delivered(second.id)
    await outbox.failed(second, "a reply was lost", again_seconds=0)
    assert [(message.state, message.error) for message in await outbox.messages()] == [("delivered", None)]
    assert await outbox.claim(1, lease_seconds=60) == []


async def test_a_message_that_was_given_up_can_be_sent_again(bank: Bank, outbox: Outbox) -> None:
    account, _ = await bank.open_account()
    for reference in ("1", "2"):
        await tell(bank, account.id, "a", reference)
    for message in await outbox.claim(2, lease_seconds=60):
        await outbox.failed(message, "500", again_seconds=None)
    assert await outbox.claim(2, lease_seconds=60) == []
    dead = await outbox.messages(state="given_up")
    assert [message.error for message in dead] == ["500", "500"]
    waiting = await outbox.waiting()
    assert (waiting.messages, waiting.given_up, waiting.oldest_seconds) == (0, 2, 0)
    await outbox.resend(dead[0].id)
    assert [(message.id, message.attempts) for message in await outbox.claim(2, lease_seconds=60)] == [(dead[0].id, 1)]
    assert await outbox.resend_given_up() == 1
    assert [message.id for message in await outbox.claim(2, lease_seconds=60)] == [dead[1].id]
    # One that has arrived may be wanted again, too.
    await outbox.delivered(dead[1].id)
    await outbox.resend(dead[1].id)
    assert [message.id for message in await outbox.claim(2, lease_seconds=60)] == [dead[1].id]
    with pytest.raises(Unknown):
        await outbox.resend(uuid4())


async def test_what_is_long_over_is_forgotten(bank: Bank, outbox: Outbox) -> None:
    account, _ = await bank.open_account()
    for n in range(3):
        await tell(bank, account.id, "a", str(n))
    done, dead, waiting = await outbox.claim(3, lease_seconds=0)
    await outbox.delivered(done.id)
    await outbox.failed(dead, "500", again_seconds=None)
    assert await outbox.forget(age_seconds=3600, stale_seconds=0) == 0
    assert await outbox.forget(age_seconds=0, stale_seconds=3600) == 2
    assert [message.id for message in await outbox.messages()] == [waiting.id], "it was tried, and waits"


async def test_what_nobody_tried_to_send_is_given_up_and_can_be_sent_later(bank: Bank, outbox: Outbox) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id)
    await outbox.forget(age_seconds=3600, stale_seconds=3600)
    assert [message.state for message in await outbox.messages()] == ["waiting"]
    await outbox.forget(age_seconds=3600, stale_seconds=0)
    assert [message.state for message in await outbox.messages()] == ["given_up"]
    assert await outbox.resend_given_up() == 1
    await outbox.forget(age_seconds=0, stale_seconds=3600)
    assert len(await outbox.claim(1, lease_seconds=60)) == 1


# Alerts


async def told(outbox: Outbox, low_balance: int | None = 10 * CREDIT) -> list[tuple[str, str]]:
    """What one look finds to tell: types, and balance or debt."""
    await outbox.tell_alerts(low_balance, limit=100)
    messages = await outbox.claim(100, lease_seconds=3600)
    return sorted((m.type, data(m)["debt" if m.type == "account.debt" else "balance"]) for m in messages)


async def test_low_balance_is_told_once_each_time_it_gets_there(bank: Bank, outbox: Outbox) -> None:
    account, key = await bank.open_account(10 * CREDIT)
    await bank.open_account()  # has never had anything: it has not run low
    assert await told(outbox) == []
    reserve, _ = await bank.reserve(key, 5 * CREDIT)
    assert await told(outbox) == [], "what is held isn't gone"
    await bank.finalize(reserve, 1)
    assert await told(outbox) == [("account.low_balance", format_credits(10 * CREDIT - 1))]
    assert await told(outbox) == []
    await bank.control.grant(account.id, 1, reference=None, actor="test")
    assert await told(outbox) == []
    reserve, _ = await bank.reserve(key, 5 * CREDIT)
    await bank.finalize(reserve, 2 * CREDIT)
    assert await told(outbox) == [("account.low_balance", "8")]


async def test_debt_is_told_once_each_time(bank: Bank, outbox: Outbox) -> None:
    account, key = await bank.open_account(CREDIT)
    for _ in range(2):
        reserve, _ = await bank.reserve(key, CREDIT)
        await bank.finalize(reserve, 3 * CREDIT)
        assert await told(outbox, None) == [("account.debt", "2")]
        assert await told(outbox, None) == []
        await bank.control.grant(account.id, 3 * CREDIT, reference=None, actor="test")
        assert await told(outbox, None) == []


async def test_an_account_may_have_a_mark_of_its_own(bank: Bank, outbox: Outbox) -> None:
    high, _ = await bank.open_account(50 * CREDIT)
    low, _ = await bank.open_account(5 * CREDIT)
    await outbox.set_low_balance(high.id, 51 * CREDIT)
    await outbox.set_low_balance(low.id, 5 * CREDIT)
    assert await told(outbox) == [("account.low_balance", "50")]
    await outbox.set_low_balance(low.id, None)
    assert await told(outbox) == [("account.low_balance", "5")]
    with pytest.raises(Unknown):
        await outbox.set_low_balance(uuid4(), 1)


async def test_many_looks_at_once_tell_once(bank: Bank, outbox: Outbox) -> None:
    for _ in range(20):
        await bank.open_account(CREDIT)
    found = 0
    while counts := await asyncio.gather(*(outbox.tell_alerts(2 * CREDIT, limit=7) for _ in range(8))):
        assert all(count is None or count <= 7 for count in counts)
        found += sum(count or 0 for count in counts)
        if not any(counts):
            break
    assert found == 20
    assert len(await outbox.messages()) == 20


async def test_amounts_and_times_are_written_as_the_apis_write_them(bank: Bank) -> None:
    for amount in (0, 1, 10, 999_999, CREDIT, 12_500_000, 10 * CREDIT, 10**18):
        assert await bank.owner.fetchval("SELECT farebox.credits_text($1)", amount) == format_credits(amount)
    await bank.owner.execute("SET timezone = 'Asia/Kolkata'; SET datestyle = 'German'")
    written = await bank.owner.fetchval("SELECT farebox.time_text('2027-01-31 01:02:03.4+00')")
    assert written == "2027-01-31T01:02:03.400000Z"
