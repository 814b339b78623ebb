"""Promo codes: each account once, no more often in all than allowed, and not to be found by trying."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from proxy.ledger.connect import Role, create_pool
from proxy.ledger.errors import Conflict, InvalidValue, Unknown
from proxy.ledger.promos import CREDITS_SECONDS_MAX, PromoLedger, PromoOutcome, PromoTerms
from tests.ledger.bank import Bank

HOUR = timedelta(hours=1)
CONNECTIONS = 10
WAITING = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted AND locktype IN ('transactionid', 'tuple')"


@pytest.fixture
async def promos(bank: Bank) -> AsyncIterator[PromoLedger]:
    pool = await create_pool(bank.database.app, Role.CONTROL, size=CONNECTIONS, lock_ms=10_000, statement_seconds=30)
    yield PromoLedger(pool)
    await pool.close()


async def code_of(promos: PromoLedger, credits: int = 50, **terms: Any) -> str:
    code = uuid4().hex.upper()
    await promos.create(code, PromoTerms(credits=credits, **terms), actor="test")
    return code


async def test_a_code_credits_each_account_once(bank: Bank, promos: PromoLedger) -> None:
    code = await code_of(promos, 50, credits_seconds=3600)
    before = datetime.now(UTC)
    for _ in range(2):
        account, _ = await bank.open_account()
        first = await promos.redeem(account.id, code, actor="key:k")
        again = await promos.redeem(account.id, code, actor="key:other")
        assert (first.outcome, again.outcome) == (PromoOutcome.DONE, PromoOutcome.AGAIN)
        assert first.transfer == again.transfer
        assert first.transfer is not None
        assert (first.transfer.kind, first.transfer.debit, first.transfer.amount) == ("promo", "grants", 50)
        assert (first.transfer.actor, first.transfer.reason) == ("key:k", f"promo code {code}")
        assert first.expires_at is not None
        assert before + HOUR <= first.expires_at <= datetime.now(UTC) + HOUR
        assert await bank.book(account.id) == [("promo", 50)]
        lots = await bank.owner.fetch("SELECT * FROM farebox.lots WHERE account_id = $1", account.id)
        assert [(lot["kind"], lot["amount"], lot["remaining"], lot["priority"]) for lot in lots] == [
            ("promo", 50, 50, 100)
        ]
    assert (await promos.find(code)).redeemed == 2


async def test_fifty_accounts_race_for_the_last_redemption(bank: Bank, promos: PromoLedger) -> None:
    code = await code_of(promos, 7, redemptions_max=3)
    accounts = [account.id for account, _ in [await bank.open_account() for _ in range(50)]]
    for account in accounts[:2]:
        assert (await promos.redeem(account, code, actor="x")).outcome is PromoOutcome.DONE
    # Somebody has the code in hand, so that as many as there are connections come to it together.
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.promo_codes WHERE code = $1 FOR UPDATE", code)
        racing = [asyncio.create_task(promos.redeem(account, code, actor="x")) for account in accounts[2:] * 2]
        async with asyncio.timeout(30):
            while await bank.owner.fetchval(WAITING) < CONNECTIONS:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.01)
    found = await asyncio.gather(*racing)
    outcomes = [redemption.outcome for redemption in found]
    assert outcomes.count(PromoOutcome.DONE) == 1
    assert outcomes.count(PromoOutcome.DONE) + outcomes.count(PromoOutcome.AGAIN) == 2
    assert set(outcomes) == {PromoOutcome.DONE, PromoOutcome.AGAIN, PromoOutcome.USED_UP}
    credited = [account for account in accounts if await bank.book(account) == [("promo", 7)]]
    assert len(credited) == 3
    assert (await promos.find(code)).redeemed == 3


async def test_one_account_at_once_gets_it_once(bank: Bank, promos: PromoLedger) -> None:
    code = await code_of(promos, 7)
    account, _ = await bank.open_account()
    found = await asyncio.gather(*(promos.redeem(account.id, code, actor="x") for _ in range(20)))
    assert [redemption.outcome for redemption in found].count(PromoOutcome.DONE) == 1
    assert len({redemption.transfer for redemption in found}) == 1
    assert await bank.book(account.id) == [("promo", 7)]
    assert (await promos.find(code)).redeemed == 1


@pytest.mark.parametrize(
    ("terms", "outcome"),
    [
        ({"starts_at": datetime.now(UTC) + HOUR}, PromoOutcome.NOT_STARTED),
        ({"ends_at": datetime.now(UTC) - HOUR}, PromoOutcome.ENDED),
        ({"starts_at": datetime.now(UTC) - HOUR, "ends_at": datetime.now(UTC) + HOUR}, PromoOutcome.DONE),
    ],
    ids=["before", "after", "within"],
)
async def test_a_code_has_its_time(
    bank: Bank, promos: PromoLedger, terms: dict[str, Any], outcome: PromoOutcome
) -> None:
    code = await code_of(promos, **terms)
    account, _ = await bank.open_account()
    assert (await promos.redeem(account.id, code, actor="x")).outcome is outcome
    assert (await bank.book(account.id) == []) == (outcome is not PromoOutcome.DONE)


async def test_a_code_that_was_ended_stays_so(bank: Bank, promos: PromoLedger) -> None:
    code = await code_of(promos)
    account, _ = await bank.open_account()
    other, _ = await bank.open_account()
    await promos.redeem(account.id, code, actor="x")
    ended = await promos.end(code)
    assert ended.ended_at is not None
    assert await promos.end(code) == ended
    assert (await promos.redeem(other.id, code, actor="x")).outcome is PromoOutcome.ENDED
    assert (await promos.redeem(account.id, code, actor="x")).outcome is PromoOutcome.AGAIN
    with pytest.raises(Conflict):
        await promos.create(code, PromoTerms(credits=50), actor="test")


async def test_codes_can_t_be_found_by_trying(bank: Bank, promos: PromoLedger) -> None:
    good = await code_of(promos)
    account, _ = await bank.open_account(5)
    neighbour, _ = await bank.open_account()
    guesses = [f"GUESS{number}" for number in range(30)]
    found = await asyncio.gather(*(promos.redeem(account.id, guess, actor="x") for guess in guesses))
    outcomes = [redemption.outcome for redemption in found]
    assert outcomes.count(PromoOutcome.UNKNOWN) == 10
    assert outcomes.count(PromoOutcome.WAIT) == 20
    # The right one, too, has to wait, and others don't.
    waiting = await promos.redeem(account.id, good, actor="x")
    assert waiting.outcome is PromoOutcome.WAIT
    assert waiting.retry_at is not None
    assert timedelta(0) < waiting.retry_at - datetime.now(UTC) <= HOUR
    assert (await promos.redeem(neighbour.id, good, actor="x")).outcome is PromoOutcome.DONE
    # What was refused while it waited didn't make it longer: an hour after the first, ten more may be tried.
    await bank.owner.execute(
        "UPDATE farebox.promo_refusals SET since = since - interval '1 hour' WHERE account_id = $1", account.id
    )
    assert (await promos.redeem(account.id, "GUESS", actor="x")).outcome is PromoOutcome.UNKNOWN
    assert (await promos.redeem(account.id, good, actor="x")).outcome is PromoOutcome.DONE
    assert await bank.money(account.id) == (55, 0, 0)


async def test_the_same_code_with_other_terms_is_a_conflict(promos: PromoLedger) -> None:
    code = await code_of(promos, 50)
    assert (await promos.create(code, PromoTerms(credits=50), actor="other")).actor == "test"
    for terms in (PromoTerms(credits=51), PromoTerms(credits=50, redemptions_max=1)):
        with pytest.raises(Conflict):
            await promos.create(code, terms, actor="test")


async def test_codes_come_newest_first_and_by_pages(promos: PromoLedger) -> None:
    first, second, third = [await code_of(promos) for _ in range(3)]
    assert [promo.code for promo in await promos.codes(limit=2)] == [third, second]
    assert [promo.code for promo in await promos.codes(after=second, limit=1)] == [first]


async def test_what_can_t_be_is_refused(bank: Bank, promos: PromoLedger) -> None:
    for terms in (
        PromoTerms(credits=0),
        PromoTerms(credits=1, credits_seconds=CREDITS_SECONDS_MAX + 1),
        PromoTerms(credits=1, credits_seconds=0),
        PromoTerms(credits=1, redemptions_max=0),
    ):
        with pytest.raises(InvalidValue):
            await promos.create("NEVER", terms, actor="x")
    for unknown in (promos.find("NEVER"), promos.end("NEVER"), promos.redeem(uuid4(), "NEVER", actor="x")):
        with pytest.raises(Unknown):
            await unknown
