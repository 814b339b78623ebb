"""The audit against a forger who keeps the sums right: what a row is called must agree with what it did."""

import asyncpg
import pytest

from proxy.core.usage import Usage
from proxy.ledger.audit import audit
from proxy.ledger.records import Mark
from tests.ledger.bank import Bank

KINDS = "transfers_move_between_the_sides_of_their_kind"
STATES = "every_hold_ended_as_its_state_says"
RECOMPUTE = "charges_recompute_from_usage_and_price"
LIMITS = "spend_limits_count_what_was_spent"

FORGERIES = [
    ("UPDATE farebox.transfers SET system_account = 'stripe' WHERE kind = 'grant'", {KINDS}),
    ("UPDATE farebox.transfers SET system_account = 'refunds' WHERE kind = 'charge'", {KINDS}),
    ("UPDATE farebox.transfers SET system_account = 'refunds' WHERE kind = 'true_up'", {KINDS}),
    ("UPDATE farebox.transfers SET system_account = 'disputes' WHERE kind = 'reversal'", {KINDS}),
    ("UPDATE farebox.transfers SET kind = 'grant' WHERE kind = 'debt_payment'", {KINDS}),
    ("UPDATE farebox.transfers SET hold_id = gen_random_uuid() WHERE kind = 'grant'", {KINDS}),
    ("UPDATE farebox.holds SET state = 'released' WHERE state = 'final' AND charge > 0", {STATES}),
    ("UPDATE farebox.holds SET state = 'provisional' WHERE state = 'final'", {STATES}),
    ("UPDATE farebox.holds SET state = 'final' WHERE state = 'provisional'", {STATES}),
    ("UPDATE farebox.holds SET amount = amount + 1 WHERE capped IS NOT NULL", {RECOMPUTE}),
    ("UPDATE farebox.spend_limits SET family = 'nobody'", {LIMITS}),
    ("UPDATE farebox.spend_limits SET account_id = gen_random_uuid()", {LIMITS}),
]


async def busy_day(bank: Bank) -> None:
    """Every kind of transfer, and a hold in every state."""
    _, key = await bank.open_account(1_000, spend_limit=1_000_000)
    trued_up, capped, left, overrun = [(await bank.reserve(key, 100))[0] for _ in range(4)]
    await bank.finalize(capped, 150, usage_source="counted")
    await bank.holds.heartbeat(bank.worker_id, [Mark(left.hold_id, Usage(output=30))])
    await bank.lapse()
    await bank.expire()
    await bank.holds.start_worker(bank.worker_id, "host", "0.1")
    await bank.finalize(trued_up, 40)
    await bank.finalize(overrun, 2_000)
    await bank.control.reverse(overrun.hold_id, 300, reference="r", actor="test", reason=None)
    await bank.control.grant(key.account_id, 5_000, reference="g", actor="test")
    await bank.release((await bank.reserve(key, 10))[0])
    await bank.reserve(key, 10)
    ended = await bank.control.ended(left.hold_id)
    assert ended is not None
    assert ended.state == "provisional"


async def test_a_forged_name_is_found(own_bank: Bank) -> None:
    await busy_day(own_bank)
    assert [check.name for check in await audit(own_bank.owner) if not check.ok] == []
    superuser = await asyncpg.connect(own_bank.database.superuser)
    try:
        # Past the triggers and the foreign keys.
        await superuser.execute("SET session_replication_role = replica")
        for statement, expected in FORGERIES:
            transaction = superuser.transaction()
            await transaction.start()
            changed = await superuser.execute(statement)
            assert not changed.endswith(" 0"), statement
            rows = await superuser.fetch("SELECT * FROM farebox.audit()")
            assert {row["name"] for row in rows if row["violations"]} == expected, statement
            await transaction.rollback()
    finally:
        await superuser.close()


@pytest.mark.parametrize("amount", [0, -5])
async def test_a_grant_of_less_than_something_is_refused_by_the_database_too(bank: Bank, amount: int) -> None:
    account, _ = await bank.open_account(100)
    control = await asyncpg.connect(bank.database.app, server_settings={"role": "farebox_control"})
    try:
        with pytest.raises(asyncpg.PostgresError):
            await control.fetch(
                "SELECT * FROM farebox.grant_credits($1, 'grant', $2, NULL, 'test', NULL)", account.id, amount
            )
    finally:
        await control.close()
    assert await bank.money(account.id) == (100, 0, 0)
