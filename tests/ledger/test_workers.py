"""Workers: a lease, progress marks, and what the sweeper settles when a worker is gone."""

import asyncio
import time
from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from proxy.core.usage import Usage
from proxy.ledger.audit import audit
from proxy.ledger.connect import Role, connect
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import Finalized, FinalizeOutcome, Mark, Released, Reserve, ReserveOutcome
from tests.ledger.bank import Bank

PAUSE_BEFORE_THE_LOCK = (
    "ALTER FUNCTION farebox.lock_lapsed RENAME TO lock_lapsed_then",
    """
    CREATE FUNCTION farebox.lock_lapsed(_worker_ids uuid[], _at timestamptz) RETURNS uuid[] LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(1);
        RETURN farebox.lock_lapsed_then(_worker_ids, _at);
    END
    $$
    """,
)
SOMEBODY_WAITS = """
    SELECT true FROM pg_locks l JOIN pg_database d ON d.oid = l.database
     WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted
"""


async def gone(bank: Bank, reserve: Reserve, mark: Usage | None = None) -> dict[UUID, int]:
    """Let the worker die after that mark, and sweep."""
    if mark is not None:
        assert await bank.holds.heartbeat(bank.worker_id, [Mark(reserve.hold_id, mark)])
    await bank.lapse()
    return await bank.expire()


async def test_a_hold_of_a_lapsed_worker_is_charged_at_its_mark(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    assert await gone(bank, reserve, Usage(output=120)) == {reserve.hold_id: 120}
    assert await bank.money(account.id) == (880, 0, 0)
    ended = await bank.control.ended(reserve.hold_id)
    assert ended is not None
    assert (ended.state, ended.charge, ended.ending) == ("provisional", 120, "worker_gone")
    assert (ended.usage, ended.usage_source) == (Usage(output=120), "counted")
    assert await bank.expire() == {}


async def test_without_a_mark_it_is_charged_nothing(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    assert await gone(bank, reserve) == {reserve.hold_id: 0}
    assert await bank.book(account.id) == [("grant", 1000)]


async def test_a_mark_never_costs_more_than_was_held(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    assert await gone(bank, reserve, Usage(output=120)) == {reserve.hold_id: 100}
    ended = await bank.control.ended(reserve.hold_id)
    assert ended is not None
    assert ended.capped == "counted_above_hold"
    assert await bank.money(account.id) == (900, 0, 0)


async def test_per_request_prices_count_from_the_first_mark(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100, variant="metered")
    assert await gone(bank, reserve, Usage(output=3001)) == {reserve.hold_id: 5 + 1}


@pytest.mark.parametrize(
    ("final", "true_up", "balance"), [(300, -180, 700), (50, 70, 950), (120, 0, 880), (0, 120, 1000)]
)
async def test_the_worker_that_comes_back_trues_up_once(bank: Bank, final: int, true_up: int, balance: int) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await gone(bank, reserve, Usage(output=120))
    finalized = await bank.finalize(reserve, final)
    assert (finalized.outcome, finalized.charge, finalized.balance) == (FinalizeOutcome.FINAL, final, balance)
    assert await bank.finalize(reserve, final) == finalized
    assert (await bank.finalize(reserve, final + 1)).outcome is FinalizeOutcome.CONFLICT
    expected = [("grant", 1000), ("charge", -120), ("true_up", true_up)]
    assert await bank.book(account.id) == [row for row in expected if row[1]]


async def test_a_true_up_may_overrun(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await gone(bank, reserve, Usage(output=120))
    finalized = await bank.finalize(reserve, 1100)
    assert (finalized.charge, finalized.overrun) == (1100, 100)
    assert await bank.money(account.id) == (0, 0, 100)


async def test_a_counted_true_up_stays_within_the_hold(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await gone(bank, reserve, Usage(output=120))
    assert (await bank.finalize(reserve, 500, usage_source="counted")).charge == 400


async def test_a_release_after_the_sweep_gives_the_provisional_charge_back(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await gone(bank, reserve, Usage(output=120))
    assert await bank.release(reserve) == Released(120, "final")
    assert await bank.release(reserve) == Released(0, "final")
    assert (await bank.finalize(reserve, 120)).outcome is FinalizeOutcome.CONFLICT
    assert await bank.money(account.id) == (1000, 0, 0)
    assert (await bank.holds.reserve(reserve)).outcome is ReserveOutcome.ENDED


async def test_a_provisional_charge_cant_be_reversed(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await gone(bank, reserve, Usage(output=120))
    with pytest.raises(Exception, match="no final charge"):
        await bank.control.reverse(reserve.hold_id, None, reference=None, actor="test", reason=None)


async def test_marks_are_totals_and_the_last_one_counts(bank: Bank) -> None:
    """A report may say less than what was counted before it, class by class: the greatest of each would be too much."""
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    other, _ = await bank.reserve(key, 400)
    for beat, usage in enumerate((Usage(input=10, output=50), Usage(input=12, output=60), Usage(7, 5, output=40)), 1):
        marks = [Mark(other.hold_id, Usage()), Mark(reserve.hold_id, usage), Mark(uuid4(), usage)]
        renewed = await bank.holds.heartbeat(bank.worker_id, marks, beat=beat)
        assert renewed.marked == {other.hold_id, reserve.hold_id}
    assert await gone(bank, reserve) == {reserve.hold_id: 52, other.hold_id: 0}


async def test_a_beat_that_comes_late_changes_nothing(bank: Bank) -> None:
    """Its connection was lost, and the server carried it out after the next one: on another connection."""
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    for beat, tokens in ((2, 60), (1, 50), (2, 50)):
        await bank.holds.heartbeat(bank.worker_id, [Mark(reserve.hold_id, Usage(output=tokens))], beat=beat)
    assert await gone(bank, reserve) == {reserve.hold_id: 60}


async def test_a_release_before_this_one_marks_totals_that_never_decrease(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    for usage in ([10, 0, 0, 0, 50, 0, 0], [7, 0, 0, 0, 60, 0, 0]):
        query = "SELECT farebox.heartbeat($1, $2, $3)"
        assert await bank.pool.fetchval(query, bank.worker_id, [reserve.hold_id], usage)
    await bank.lapse()
    assert {row["charge"] for row in await bank.pool.fetch("SELECT * FROM farebox.expire_holds(9, '0 s')")} == {70}


async def test_a_mark_that_wasnt_stored_is_told(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    locked, _ = await bank.reserve(key, 400)
    marks = [Mark(row.hold_id, Usage(output=9)) for row in (reserve, locked)]
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.holds WHERE id = $1 FOR UPDATE", locked.hold_id)
        assert (await bank.holds.heartbeat(bank.worker_id, marks)).marked == {reserve.hold_id}
    assert (await bank.holds.heartbeat(bank.worker_id, marks)).marked == {reserve.hold_id, locked.hold_id}
    await gone(bank, reserve)


async def test_a_worker_marks_its_own_open_holds_only(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    other_worker = uuid4()
    await bank.holds.start_worker(other_worker, "host", "0.1")
    assert await bank.holds.heartbeat(other_worker, [Mark(reserve.hold_id, Usage(output=50))])
    assert await gone(bank, reserve) == {reserve.hold_id: 0}


async def test_only_lapsed_workers_are_swept_whatever_the_age_of_their_holds(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    live, _ = await bank.reserve(key, 100)
    await bank.owner.execute(
        "UPDATE farebox.holds SET opened_at = opened_at - interval '3 days' WHERE id = $1", live.hold_id
    )
    dead = uuid4()
    await bank.holds.start_worker(dead, "host", "0.1")
    left, _ = await bank.reserve(key, 100, worker_id=dead)
    await bank.holds.stop_worker(dead)
    assert await bank.expire() == {left.hold_id: 0}
    assert (await bank.finalize(live, 100)).charge == 100


async def test_a_sweep_is_bounded_and_the_next_goes_on(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    rows = [bank.a_reserve(key, 10) for _ in range(7)]
    await bank.holds.batch([], rows)
    await bank.lapse()
    swept = [await bank.expire(3) for _ in range(4)]
    assert [len(s) for s in swept] == [3, 3, 1, 0]
    assert set().union(*swept) == {row.hold_id for row in rows}


async def test_nothing_is_swept_right_after_a_restart_of_postgres(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    await bank.reserve(key, 400)
    await bank.lapse()
    assert await bank.holds.expire_holds(10, restart_grace_seconds=86_400) == []
    assert (await bank.money(account.id))[1] == 400
    await bank.expire()


async def test_nothing_is_swept_later_than_the_sweeper_could_know_the_clock(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await bank.lapse()
    now = await bank.holds.now()
    late = await bank.holds.expire_holds(10, not_after=now - timedelta(seconds=1), restart_grace_seconds=0)
    assert late == []
    [expired] = await bank.holds.expire_holds(10, not_after=now + timedelta(seconds=60), restart_grace_seconds=0)
    assert expired.hold_id == reserve.hold_id


async def test_a_worker_that_renews_just_before_the_sweeper_locks_it_keeps_its_holds(own_bank: Bank) -> None:
    """The sweeper looks at the leases twice: when it looks for the lapsed, and when it has their locks."""
    bank = own_bank
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    await bank.lapse()
    # The same function, but it waits in between for as long as the test likes.
    for statement in PAUSE_BEFORE_THE_LOCK:
        await bank.owner.execute(statement)
    await bank.owner.execute("SELECT pg_advisory_lock(1)")
    sweep = asyncio.create_task(bank.expire())
    while not await bank.owner.fetchval(SOMEBODY_WAITS):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await bank.holds.heartbeat(bank.worker_id, [Mark(reserve.hold_id, Usage(output=5))])
    await bank.owner.execute("SELECT pg_advisory_unlock(1)")
    assert await sweep == {}
    assert (await bank.finalize(reserve, 100)).charge == 100


async def test_holds_that_cant_be_locked_keep_no_other_waiting(bank: Bank) -> None:
    """However many they are: a sweep takes so many, and the same ones would fill it every time."""
    locked, its_key = await bank.open_account(1000)
    _, key = await bank.open_account(1000)
    for _ in range(5):
        await bank.reserve(its_key, 10)
    free, _ = await bank.reserve(key, 10)
    alone, _ = await bank.reserve(key, 10)
    await bank.lapse()
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", locked.id)
        await bank.owner.execute("SELECT FROM farebox.holds WHERE id = $1 FOR UPDATE", alone.hold_id)
        assert await bank.expire(2) == {free.hold_id: 0}
    assert len(await bank.expire()) == 6


async def test_the_longest_dead_are_settled_first(own_bank: Bank) -> None:
    bank = own_bank
    _, key = await bank.open_account(1000)
    dead = [uuid4() for _ in range(3)]
    rows = {}
    for worker_id in dead:
        await bank.holds.start_worker(worker_id, "host", "0.1")
        rows[worker_id] = (await bank.reserve(key, 10, worker_id=worker_id))[0].hold_id
    for seconds, worker_id in zip((5, 20, 10), dead, strict=True):
        await bank.owner.execute(
            "UPDATE farebox.workers SET lease_until = clock_timestamp() - $2 * interval '1 second' WHERE id = $1",
            *(worker_id, seconds),
        )
    swept = [hold for _ in range(3) for hold in await bank.expire(1)]
    assert swept == [rows[dead[1]], rows[dead[2]], rows[dead[0]]]


async def test_two_sweepers_and_the_worker_that_comes_back_settle_once(bank: Bank) -> None:
    accounts = [await bank.open_account(1000) for _ in range(5)]
    rows = [bank.a_reserve(key, 100) for _, key in accounts for _ in range(6)]
    await bank.holds.batch([], rows)
    await bank.lapse()
    swept: list[UUID] = []
    finalized: list[Finalized] = []

    async def sweep() -> None:
        swept.extend(await bank.expire(4))

    async def come_back(row: Reserve) -> None:
        finalized.append(await bank.finalize(row, 40))

    await asyncio.gather(*(sweep() for _ in range(12)), *(come_back(row) for row in rows))
    assert len(swept) == len(set(swept))
    assert [(f.outcome, f.charge) for f in finalized] == [(FinalizeOutcome.FINAL, 40)] * 30
    for account, _ in accounts:
        assert await bank.money(account.id) == (1000 - 240, 0, 0)
    assert [check.name for check in await audit(bank.owner) if not check.ok] == []


async def test_a_worker_that_renews_while_the_sweeper_waits_keeps_its_holds(bank: Bank) -> None:
    """The sweeper skips what is locked, and looks again at the lease once it holds the lock."""
    account, key = await bank.open_account(1000)
    await bank.reserve(key, 400)
    await bank.lapse()
    renewing = await connect(bank.database.app, Role.GATEWAY)
    async with renewing.transaction():
        assert await HoldLedger(renewing).heartbeat(bank.worker_id, [])
        assert await bank.expire() == {}
    assert await bank.expire() == {}
    assert (await bank.money(account.id))[1] == 400
    await renewing.close()


async def test_a_locked_account_is_left_for_the_next_sweep(bank: Bank) -> None:
    locked, its_key = await bank.open_account(1000)
    _, key = await bank.open_account(1000)
    first, _ = await bank.reserve(its_key, 10)
    second, _ = await bank.reserve(key, 10)
    await bank.lapse()
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.accounts WHERE id = $1 FOR UPDATE", locked.id)
        assert await bank.expire() == {second.hold_id: 0}
    assert await bank.expire() == {first.hold_id: 0}


async def test_a_lease_runs_by_the_database_clock_within_a_transaction(bank: Bank) -> None:
    """now() stands still in a transaction, and lags behind whatever it waited for; a lease must not."""
    account, key = await bank.open_account(1000)
    connection = await connect(bank.database.app, Role.GATEWAY)
    await bank.owner.execute(
        "UPDATE farebox.workers SET lease_until = clock_timestamp() + interval '0.3 seconds' WHERE id = $1",
        bank.worker_id,
    )
    async with connection.transaction():
        await connection.execute("SELECT now()")
        await asyncio.sleep(0.5)
        reserved = await HoldLedger(connection).reserve(bank.a_reserve(key, 10))
    assert reserved.outcome is ReserveOutcome.WORKER_LAPSED
    assert (await bank.money(account.id))[1] == 0
    await connection.close()


async def test_a_heartbeat_doesnt_wait_for_a_hold_that_is_being_settled(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 100)
    async with bank.owner.transaction():
        await bank.owner.execute("SELECT FROM farebox.holds WHERE id = $1 FOR UPDATE", reserve.hold_id)
        mark = Mark(reserve.hold_id, Usage(output=9))
        assert await asyncio.wait_for(bank.holds.heartbeat(bank.worker_id, [mark]), 2)
    finalized = await bank.finalize(replace(reserve), 10)
    assert finalized.charge == 10


async def test_a_mark_costs_the_same_however_many_holds_are_open(bank: Bank) -> None:
    """Asked for the open holds of a worker, a planner that knew an empty table goes through all of them, each time."""
    _, key = await bank.open_account(10_000)
    rows = [bank.a_reserve(key, 1) for _ in range(4_000)]
    marks = [Mark(row.hold_id, Usage(output=1)) for row in rows[:100]]

    async def quickest() -> float:
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            assert len((await bank.holds.heartbeat(bank.worker_id, marks)).marked) == len(marks)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    await bank.holds.batch([], rows[:100])
    alone = await quickest()
    for start in range(100, len(rows), 300):
        await bank.holds.batch([], rows[start : start + 300])
    assert await quickest() < 5 * alone
    await gone(bank, rows[0])


async def test_a_worker_whose_row_was_lost_holds_its_lease_and_its_holds_again(own_bank: Bank) -> None:
    """What a failover that loses commits can take away: the row comes back under the same id, a stopped one doesn't."""
    _, key = await own_bank.open_account(1000)
    reserve, _ = await own_bank.reserve(key, 100)
    await own_bank.owner.execute("DELETE FROM farebox.workers WHERE id = $1", own_bank.worker_id)
    assert not await own_bank.holds.heartbeat(own_bank.worker_id, (), beat=9)
    assert await own_bank.holds.start_worker(own_bank.worker_id, "host", "test")
    assert await own_bank.holds.heartbeat(own_bank.worker_id, (), beat=10)
    assert await own_bank.expire() == {}
    assert (await own_bank.finalize(reserve, 60)).charge == 60
    await own_bank.holds.stop_worker(own_bank.worker_id)
    assert not await own_bank.holds.start_worker(own_bank.worker_id, "host", "test")
