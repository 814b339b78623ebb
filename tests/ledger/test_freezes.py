"""A frozen account reserves nothing, by whatever key, in whatever process; what it holds already ends as it would."""

import asyncio
from uuid import uuid4

import pytest

from proxy.ledger.connect import Role, connect, create_pool
from proxy.ledger.errors import Conflict, Unknown
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import ExtendOutcome, FinalizeOutcome, ReserveOutcome
from tests.ledger.bank import Bank
from tests.ledger.test_concurrency import waiting


async def test_a_frozen_account_reserves_nothing_and_an_unfrozen_one_does_again(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    before, _ = await bank.reserve(key, 100)
    await bank.control.freeze(account.id, reference="dp_1", reason="dispute", actor="ann")

    row, refused = await bank.reserve(key, 100)
    assert refused.outcome is ReserveOutcome.KEY_CHANGED
    assert await bank.money(account.id) == (1000, 100, 0)
    # A reserve whose reply was lost, sent again: it holds what it held.
    assert (await bank.holds.reserve(before)).outcome is ReserveOutcome.GRANTED

    await bank.control.unfreeze(account.id, reference=None, actor="ben")
    assert (await bank.holds.reserve(row)).outcome is ReserveOutcome.GRANTED


async def test_what_runs_grows_ends_and_is_charged_while_its_account_is_frozen(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    row, _ = await bank.reserve(key, 100)
    await bank.control.freeze(account.id, reference="dp_1", reason="dispute", actor="ann")

    extended = await bank.holds.extend(bank.an_extend(row, 300))
    assert extended.outcome is ExtendOutcome.EXTENDED
    assert (await bank.finalize(row, 250)).outcome is FinalizeOutcome.FINAL
    assert await bank.money(account.id) == (750, 0, 0)


async def test_a_key_is_loaded_with_whether_its_account_is_frozen(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    _, other = await bank.open_account(1000)
    await bank.control.freeze(account.id, reference="dp_1", reason="dispute", actor="ann")
    loaded = [await bank.holds.find_key(k.id) for k in (key, other)]
    assert [k is not None and k.account_frozen for k in loaded] == [True, False]
    assert await bank.holds.find_key("nothing") is None


async def test_it_stays_frozen_until_its_last_reason_is_lifted(bank: Bank) -> None:
    account, _ = await bank.open_account()
    assert account.frozen_at is None
    for reference in ("dp_1", "dp_2", "dp_1"):
        await bank.control.freeze(account.id, reference=reference, reason=f"{reference} was opened", actor="ann")
    since = (await bank.control.find_account(account.id)).frozen_at
    assert since is not None

    await bank.control.unfreeze(account.id, reference="dp_1", actor="ben")
    assert (await bank.control.find_account(account.id)).frozen_at == since
    await bank.control.unfreeze(account.id, reference="dp_2", actor="ben")
    assert (await bank.control.find_account(account.id)).frozen_at is None
    found = {freeze.reference: freeze for freeze in await bank.control.freezes(account.id)}
    assert found.keys() == {"dp_1", "dp_2"}
    assert {(freeze.actor, freeze.lifted_by) for freeze in found.values()} == {("ann", "ben")}
    told = await bank.owner.fetch("SELECT reference FROM farebox.outbox WHERE account_id = $1", account.id)
    assert sorted(row["reference"] for row in told) == [f"{account.id}:dp_1", f"{account.id}:dp_2"]
    # To lift what is lifted changes nothing.
    await bank.control.unfreeze(account.id, reference=None, actor="carl")
    assert {freeze.reference: freeze for freeze in await bank.control.freezes(account.id)} == found


async def test_what_was_lifted_is_not_put_back_by_its_own_name(bank: Bank) -> None:
    account, _ = await bank.open_account()
    await bank.control.freeze(account.id, reference="case 7", reason="why", actor="ann")
    await bank.control.unfreeze(account.id, reference="case 7", actor="ann")
    with pytest.raises(Conflict, match="lifted"):
        await bank.control.freeze(account.id, reference="case 7", reason="why", actor="ann")
    assert (await bank.control.find_account(account.id)).frozen_at is None


async def test_nobody_is_frozen_and_no_unknown_freeze_is_lifted(bank: Bank) -> None:
    account, _ = await bank.open_account()
    with pytest.raises(Unknown):
        await bank.control.freeze(uuid4(), reference="r", reason="why", actor="ann")
    with pytest.raises(Unknown):
        await bank.control.unfreeze(uuid4(), reference=None, actor="ann")
    with pytest.raises(Unknown, match="never frozen"):
        await bank.control.unfreeze(account.id, reference="r", actor="ann")


async def test_reserves_that_waited_for_the_freeze_to_commit_are_refused(bank: Bank) -> None:
    """They queued with a snapshot from before: what they see after the lock is what counts."""
    account, key = await bank.open_account(1000)
    pool = await create_pool(bank.database.app, Role.GATEWAY, size=4, lock_ms=10_000)
    holds = HoldLedger(pool)
    control = await connect(bank.database.app, Role.CONTROL)
    async with control.transaction():
        await control.fetch("SELECT farebox.freeze_account($1, 'dp_1', 'dispute', 'ann')", account.id)
        queued = [asyncio.create_task(holds.reserve(bank.a_reserve(key, 10), wait_ms=10_000)) for _ in range(4)]
        await waiting(bank, 4)
    await control.close()
    assert {r.outcome for r in await asyncio.gather(*queued)} == {ReserveOutcome.KEY_CHANGED}
    assert await bank.money(account.id) == (1000, 0, 0)
    await pool.close()


async def test_eight_that_freeze_and_unfreeze_at_once_leave_what_the_rows_say(bank: Bank) -> None:
    account, _ = await bank.open_account()
    pool = await create_pool(bank.database.app, Role.CONTROL, size=8, lock_ms=10_000)

    async def one(n: int) -> None:
        await pool.execute("SELECT farebox.freeze_account($1, $2, 'why', 'ann')", account.id, f"r{n % 4}")
        if n % 4 < 2:
            await pool.execute("SELECT farebox.unfreeze_account($1, $2, 'ann')", account.id, f"r{n % 4}")

    await asyncio.gather(*(one(n) for n in range(8)))
    standing = {freeze.reference for freeze in await bank.control.freezes(account.id) if freeze.lifted_at is None}
    assert standing == {"r2", "r3"}
    assert (await bank.control.find_account(account.id)).frozen_at is not None
    await pool.close()
