"""A word of an account stands for one hold: whoever says it again, at the same moment or later, and whoever dies."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.core.usage import Usage
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.idempotency import Claim, Claimed, ClaimOutcome, IdempotencyLedger
from proxy.ledger.records import ApiKey, FinalizeOutcome, Mark, Reserve, ReserveOutcome
from tests.ledger.bank import Bank, uuid7

CLAIMED, RUNNING, FINISHED, MISMATCH = ClaimOutcome


@pytest.fixture
async def words(bank: Bank) -> IdempotencyLedger:
    return IdempotencyLedger(bank.pool)


@pytest.fixture
async def key(bank: Bank) -> ApiKey:
    _, key = await bank.open_account(1_000)
    return key


@pytest.fixture
async def other_worker(bank: Bank) -> AsyncIterator[UUID]:
    worker_id = uuid4()
    await bank.holds.start_worker(worker_id, "elsewhere", "0.1")
    yield worker_id
    await bank.holds.stop_worker(worker_id)


def a_claim(bank: Bank, key: ApiKey, word: str = "word", body: str = "body", worker_id: UUID | None = None) -> Claim:
    key_hash, fingerprint = (hashlib.sha256(text.encode()).digest() for text in (word, body))
    return Claim(key.account_id, key_hash, fingerprint, uuid7(), worker_id or bank.worker_id)


def a_reserve(bank: Bank, key: ApiKey, claim: Claim, want: int = 100) -> Reserve:
    return bank.a_reserve(key, want, hold_id=claim.hold_id, worker_id=claim.worker_id)


async def held(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> tuple[Claim, Reserve]:
    """A claim whose hold is open."""
    claim = a_claim(bank, key)
    assert await words.claim(claim) == Claimed(CLAIMED, claim.hold_id)
    row = a_reserve(bank, key, claim)
    assert (await bank.holds.reserve(row)).outcome is ReserveOutcome.GRANTED
    return claim, row


async def test_a_word_is_one_holds_from_its_claim_to_its_end(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    first, again = a_claim(bank, key), a_claim(bank, key)
    assert await words.claim(first) == Claimed(CLAIMED, first.hold_id)
    assert await words.claim(first) == Claimed(CLAIMED, first.hold_id), "said again, since its answer was lost"
    assert await words.claim(again) == Claimed(RUNNING, first.hold_id), "about to be reserved"
    row = a_reserve(bank, key, first)
    await bank.holds.reserve(row)
    assert await words.claim(again) == Claimed(RUNNING, first.hold_id)
    await bank.finalize(row, 10)
    assert await words.claim(again) == Claimed(FINISHED, first.hold_id)


async def test_another_body_is_a_mismatch_as_long_as_the_word_is_taken(
    bank: Bank, words: IdempotencyLedger, key: ApiKey
) -> None:
    claim, row = await held(bank, words, key)
    another = a_claim(bank, key, body="another")
    assert await words.claim(another) == Claimed(MISMATCH, claim.hold_id)
    await bank.finalize(row, 10)
    assert await words.claim(another) == Claimed(MISMATCH, claim.hold_id)


async def test_a_release_frees_the_word_for_any_body(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    _, row = await held(bank, words, key)
    await bank.release(row)
    another = a_claim(bank, key, body="another")
    assert await words.claim(another) == Claimed(CLAIMED, another.hold_id)
    assert await words.claim(a_claim(bank, key)) == Claimed(MISMATCH, another.hold_id)


async def test_a_refused_reserve_frees_the_word(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    refused = a_claim(bank, key)
    await words.claim(refused)
    result = await bank.holds.reserve(a_reserve(bank, key, refused, want=5_000))
    assert result.outcome is ReserveOutcome.INSUFFICIENT
    assert await words.free(refused)
    assert not await words.free(refused)
    again = a_claim(bank, key)
    assert await words.claim(again) == Claimed(CLAIMED, again.hold_id)
    assert not await words.free(refused), "it is another's by now"
    assert await words.claim(a_claim(bank, key)) == Claimed(RUNNING, again.hold_id)


async def test_a_claim_with_a_hold_is_not_given_up(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    claim, _ = await held(bank, words, key)
    assert not await words.free(claim)
    assert await words.claim(a_claim(bank, key)) == Claimed(RUNNING, claim.hold_id)


async def test_accounts_do_not_share_words(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    await held(bank, words, key)
    _, other = await bank.open_account(1_000)
    theirs = a_claim(bank, other)
    assert await words.claim(theirs) == Claimed(CLAIMED, theirs.hold_id)


async def test_keys_of_one_account_do(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    """A rotated key's retry is the same call."""
    claim, _ = await held(bank, words, key)
    second = await bank.open_key(key.account_id)
    assert await words.claim(a_claim(bank, second)) == Claimed(RUNNING, claim.hold_id)


# A worker that dies, at each step.


async def test_dead_before_its_reserve_the_word_is_free_and_the_late_reserve_is_told(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    lost = a_claim(bank, key, worker_id=other_worker)
    await words.claim(lost)
    await bank.lapse(other_worker)
    mine = a_claim(bank, key)
    assert await words.claim(mine) == Claimed(CLAIMED, mine.hold_id)
    # It was only asleep: its lease is renewed, and its reserve arrives.
    assert await bank.holds.heartbeat(other_worker, [])
    assert (await bank.holds.reserve(a_reserve(bank, key, lost))).outcome is ReserveOutcome.ENDED
    assert await bank.money(key.account_id) == (1_000, 0, 0)
    assert not await words.free(lost)


async def test_asleep_for_a_leases_length_the_word_is_free_too(
    bank: Bank, words: IdempotencyLedger, key: ApiKey
) -> None:
    """Whatever the reserve of a live worker waits for, the client's retry doesn't wait for ever."""
    lost = a_claim(bank, key)
    await words.claim(lost)
    await bank.owner.execute(
        "UPDATE farebox.idempotency_keys SET claimed_at = claimed_at - farebox.lease_length() WHERE hold_id = $1",
        lost.hold_id,
    )
    mine = a_claim(bank, key)
    assert await words.claim(mine) == Claimed(CLAIMED, mine.hold_id)
    assert (await bank.holds.reserve(a_reserve(bank, key, lost))).outcome is ReserveOutcome.ENDED


async def test_dead_with_an_open_hold_the_word_runs_until_the_sweep_and_is_then_finished(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    claim = a_claim(bank, key, worker_id=other_worker)
    await words.claim(claim)
    await bank.holds.reserve(a_reserve(bank, key, claim))
    await bank.holds.heartbeat(other_worker, [Mark(claim.hold_id, Usage(output=7))])
    await bank.lapse(other_worker)
    assert await words.claim(a_claim(bank, key)) == Claimed(RUNNING, claim.hold_id)
    assert (await bank.expire())[claim.hold_id] == 7
    assert await words.claim(a_claim(bank, key)) == Claimed(FINISHED, claim.hold_id)


async def test_dead_before_anything_was_delivered_the_word_is_free_after_the_sweep_and_charged_once(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    lost = a_claim(bank, key, worker_id=other_worker)
    await words.claim(lost)
    lost_row = a_reserve(bank, key, lost)
    await bank.holds.reserve(lost_row)
    await bank.lapse(other_worker)
    assert (await bank.expire())[lost.hold_id] == 0
    mine = a_claim(bank, key, body="another")
    assert await words.claim(mine) == Claimed(CLAIMED, mine.hold_id)
    # Its journal comes back, and would charge the first call as well.
    assert (await bank.finalize(lost_row, 40)).outcome is FinalizeOutcome.CONFLICT
    row = a_reserve(bank, key, mine)
    await bank.holds.reserve(row)
    await bank.finalize(row, 30)
    assert await bank.money(key.account_id) == (970, 0, 0)
    assert await words.claim(a_claim(bank, key, body="another")) == Claimed(FINISHED, mine.hold_id)


async def test_a_charge_from_the_journal_that_comes_before_the_retry_uses_the_word_up(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    lost = a_claim(bank, key, worker_id=other_worker)
    await words.claim(lost)
    row = a_reserve(bank, key, lost)
    await bank.holds.reserve(row)
    await bank.lapse(other_worker)
    await bank.expire()
    await bank.finalize(row, 40)
    assert await words.claim(a_claim(bank, key)) == Claimed(FINISHED, lost.hold_id)
    assert await bank.money(key.account_id) == (960, 0, 0)


async def test_a_journal_and_a_retry_at_once_are_one_charge(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    lost = [a_claim(bank, key, word=f"journal {number}", worker_id=other_worker) for number in range(30)]
    rows = [a_reserve(bank, key, claim, 10) for claim in lost]
    for claim, row in zip(lost, rows, strict=True):
        await words.claim(claim)
        await bank.holds.reserve(row)
    await bank.lapse(other_worker)
    await bank.expire()
    for claim, row in zip(lost, rows, strict=True):
        mine = replace(claim, hold_id=uuid7(), worker_id=bank.worker_id)
        taken, charged = await asyncio.gather(words.claim(mine), bank.finalize(row, 10))
        outcomes = (taken.outcome, charged.outcome)
        assert outcomes in ((CLAIMED, FinalizeOutcome.CONFLICT), (FINISHED, FinalizeOutcome.FINAL))


async def test_swept_and_then_given_back_by_its_worker_the_word_is_free(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    claim = a_claim(bank, key, worker_id=other_worker)
    await words.claim(claim)
    row = a_reserve(bank, key, claim)
    await bank.holds.reserve(row)
    await bank.lapse(other_worker)
    await bank.expire()
    assert (await bank.release(row)).state == "final"
    mine = a_claim(bank, key)
    assert await words.claim(mine) == Claimed(CLAIMED, mine.hold_id)


async def test_a_take_over_waits_for_no_lock_for_long(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    lost = a_claim(bank, key, worker_id=other_worker)
    await words.claim(lost)
    await bank.lapse(other_worker)
    pool = await create_pool(bank.database.app, Role.GATEWAY, size=1, lock_ms=50)
    try:
        async with bank.owner.transaction():
            await bank.owner.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", key.account_id)
            with pytest.raises(LedgerUnavailable):
                await IdempotencyLedger(pool).claim(a_claim(bank, key))
        mine = a_claim(bank, key)
        assert (await words.claim(mine)).hold_id == mine.hold_id
    finally:
        await pool.close()


# At the same moment.


@pytest.mark.parametrize("before", ["nobody", "a dead worker", "a given back hold"])
async def test_of_many_at_once_one_gets_the_word(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID, before: str
) -> None:
    if before == "a dead worker":
        await words.claim(a_claim(bank, key, worker_id=other_worker))
        await bank.lapse(other_worker)
    elif before == "a given back hold":
        _, row = await held(bank, words, key)
        await bank.release(row)
    claims = [a_claim(bank, key) for _ in range(24)]
    results = await asyncio.gather(*(words.claim(claim) for claim in claims))
    [winner] = [c for c, r in zip(claims, results, strict=True) if r.outcome is CLAIMED]
    assert {r.outcome for r in results} == {CLAIMED, RUNNING}
    assert await words.claim(a_claim(bank, key)) == Claimed(RUNNING, winner.hold_id)


async def test_of_many_that_wait_to_take_a_free_word_over_one_gets_it(
    bank: Bank, words: IdempotencyLedger, key: ApiKey
) -> None:
    """They all have found it free, and stand before its row when it is let go."""
    _, row = await held(bank, words, key)
    await bank.release(row)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.idempotency_keys WHERE hold_id = $1 FOR UPDATE", row.hold_id)
        claims = [asyncio.create_task(words.claim(a_claim(bank, key))) for _ in range(5)]
        async with asyncio.timeout(8):
            watcher = await asyncpg.connect(bank.database.superuser)
            while await watcher.fetchval(waiting) < 5:  # noqa: ASYNC110 - the server's view, to be asked for
                await asyncio.sleep(0.01)
            await watcher.close()
    outcomes = [(await claim).outcome for claim in claims]
    assert sorted(outcomes) == [CLAIMED] + [RUNNING] * 4


async def test_a_reserve_and_a_take_over_at_once_end_in_one_open_hold(
    bank: Bank, words: IdempotencyLedger, key: ApiKey, other_worker: UUID
) -> None:
    """Its claim was long ago, and now both want it: never two holds under one word, and never none for both."""
    for number in range(40):
        first = a_claim(bank, key, word=f"race {number}", worker_id=other_worker)
        await words.claim(first)
        await bank.owner.execute(
            "UPDATE farebox.idempotency_keys SET claimed_at = claimed_at - interval '1 hour' WHERE hold_id = $1",
            first.hold_id,
        )
        second = a_claim(bank, key, word=f"race {number}")
        reserved, taken = await asyncio.gather(bank.holds.reserve(a_reserve(bank, key, first, 10)), words.claim(second))
        if reserved.outcome is ReserveOutcome.GRANTED:
            assert taken == Claimed(RUNNING, first.hold_id)
        else:
            assert (reserved.outcome, taken) == (ReserveOutcome.ENDED, Claimed(CLAIMED, second.hold_id))
        await bank.release(a_reserve(bank, key, first))
    assert (await bank.money(key.account_id))[1] == 0


# Kept answers.


async def test_a_kept_answer_comes_with_the_finished_word_and_nobody_elses(
    bank: Bank, words: IdempotencyLedger, key: ApiKey
) -> None:
    claim, row = await held(bank, words, key)
    body = bytes(range(256))
    assert await words.keep_answer(claim.hold_id, '{"status": 200}', body, seconds=60)
    assert not await words.keep_answer(claim.hold_id, "{}", b"later", seconds=60)
    assert await words.claim(a_claim(bank, key)) == Claimed(RUNNING, claim.hold_id)
    await bank.finalize(row, 10)
    assert await words.claim(a_claim(bank, key)) == Claimed(FINISHED, claim.hold_id, '{"status": 200}', body)
    assert await words.claim(a_claim(bank, key, body="another")) == Claimed(MISMATCH, claim.hold_id)


async def test_an_answer_whose_time_is_over_is_not_given_and_is_removed(
    bank: Bank, words: IdempotencyLedger, key: ApiKey
) -> None:
    claim, row = await held(bank, words, key)
    await words.keep_answer(claim.hold_id, "{}", b"secret", seconds=0)
    await bank.finalize(row, 10)
    assert await words.claim(a_claim(bank, key)) == Claimed(FINISHED, claim.hold_id)
    assert await words.forget(100, keep_seconds=86_400) == 1
    assert await bank.owner.fetch("SELECT FROM farebox.idempotency_answers WHERE body = 'secret'") == []
    assert await words.claim(a_claim(bank, key)) == Claimed(FINISHED, claim.hold_id), "the word stays used up"


async def test_old_words_are_forgotten_in_bounded_steps_but_no_running_one(
    own_bank: Bank,
) -> None:
    bank, words = own_bank, IdempotencyLedger(own_bank.pool)
    _, key = await bank.open_account(1_000)
    running, _ = await held(bank, words, key)
    for number in range(5):
        await words.claim(a_claim(bank, key, word=f"old {number}"))
    await bank.owner.execute("UPDATE farebox.idempotency_keys SET claimed_at = claimed_at - interval '31 days'")
    young = a_claim(bank, key, word="young")
    await words.claim(young)
    removed = [await words.forget(2, keep_seconds=30 * 86_400) for _ in range(4)]
    assert removed == [2, 2, 1, 0]
    left = {row["hold_id"] for row in await bank.owner.fetch("SELECT hold_id FROM farebox.idempotency_keys")}
    assert left == {running.hold_id, young.hold_id}


async def test_the_word_itself_is_nowhere(bank: Bank, words: IdempotencyLedger, key: ApiKey) -> None:
    claim = replace(a_claim(bank, key), key_hash=b"ada@example.com")
    with pytest.raises(Exception, match="check constraint"):
        await words.claim(claim)
