"""Holds: what each outcome is, what it leaves on the account, and that every call may be said twice."""

from proxy.ledger.records import FinalizeOutcome, ReserveOutcome
from tests.ledger.bank import Bank


async def test_a_call_is_reserved_charged_and_the_rest_given_back(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, reserved = await bank.reserve(key, 400)
    assert (reserved.outcome, reserved.granted, reserved.held) == (ReserveOutcome.GRANTED, 400, 400)
    assert await bank.money(account.id) == (1000, 400, 0)
    finalized = await bank.finalize(reserve, 150)
    assert (finalized.outcome, finalized.charge, finalized.overrun) == (FinalizeOutcome.FINAL, 150, 0)
    assert await bank.money(account.id) == (850, 0, 0)
    assert await bank.book(account.id) == [("grant", 1000), ("charge", -150)]
