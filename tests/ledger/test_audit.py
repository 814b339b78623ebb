"""The audit: passes on what the functions wrote, prints how much it looked at, and finds each single altered row."""

from uuid import uuid4

from proxy.core.usage import Usage
from proxy.ledger.audit import Check, audit
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.records import Mark
from tests.ledger.bank import Bank


async def checks(connection: Connection) -> dict[str, Check]:
    return {check.name: check for check in await audit(connection)}


async def broken(connection: Connection) -> set[str]:
    return {name for name, check in (await checks(connection)).items() if not check.ok}


async def lively(bank: Bank) -> Bank:
    """Accounts on which everything has happened that can: charges, debt, true-ups, tombstones, reversals, limits."""
    for balance in (0, 10, 1_000, 1_000_000):
        account, key = await bank.open_account(balance, spend_limit=None if balance < 1_000 else 5_000_000)
        rows = [bank.a_reserve(key, 300, 0) for _ in range(6)]
        await bank.holds.batch([], rows)
        await bank.finalize(rows[0], 1_000)
        await bank.finalize(rows[1], 1_000, usage_source="counted")
        await bank.finalize(rows[2], 0, usage=Usage())
        await bank.release(rows[3])
        await bank.finalize(bank.a_reserve(key, 1), 77)
        await bank.release(bank.a_reserve(key, 1))
        if balance:
            await bank.control.reverse(rows[0].hold_id, 100, reference=None, actor="test", reason="why")
        await bank.holds.heartbeat(bank.worker_id, [Mark(rows[4].hold_id, Usage(output=20))])
        await bank.lapse()
        await bank.expire()
        await bank.holds.start_worker(bank.worker_id, "host", "0.1")
        await bank.finalize(rows[4], 250)
        await bank.control.grant(account.id, 5_000, reference=uuid4().hex, actor="test")
        await bank.reserve(key, 40)
    return bank


async def test_an_empty_ledger_is_right_and_says_that_it_is_empty(own_bank: Bank) -> None:
    found = await checks(own_bank.owner)
    assert all(check.ok for check in found.values())
    assert found["balance_is_the_sum_of_transfers"].rows == 0


async def test_what_the_functions_write_is_right(own_bank: Bank) -> None:
    await lively(own_bank)
    found = await checks(own_bank.owner)
    assert {name: check for name, check in found.items() if not check.ok} == {}
    assert {name for name, check in found.items() if check.rows == 0} == set()
    assert found["balance_is_the_sum_of_transfers"].rows == 4
    assert found["every_hold_was_charged_what_its_transfers_say"].rows == 4 * 9


async def test_the_control_role_may_audit_and_the_others_may_not(own_bank: Bank) -> None:
    control = await connect(own_bank.database.app, Role.CONTROL)
    assert all(check.ok for check in await audit(control))
    await control.close()
