"""The judge of money in can fail: it acquits a shop where all went well, and sees each damage."""

import random
import signal
from pathlib import Path

import pytest

from tests.faults.money_in.judge import judge
from tests.faults.money_in.points import MONEY_IN
from tests.faults.money_in.shop import LOOPS, open_shop
from tests.faults.money_in.stories import Round, bought, hear
from tests.faults.nursery import running_nursery
from tests.postgres import Database

UNGUARDED = "SET session_replication_role = replica; "
"""What never happens, since triggers forbid it, has to be seen all the same."""
DAMAGE = (
    ("UPDATE farebox.orders SET taken = taken + 1", "UPDATE farebox.orders SET taken = taken - 1", "went back"),
    (
        "UPDATE farebox.accounts SET balance = balance + 1",
        "UPDATE farebox.accounts SET balance = balance - 1",
        "come to",
    ),
    ("UPDATE farebox.accounts SET held = held + 1", "UPDATE farebox.accounts SET held = held - 1", "holds 1"),
    (
        "UPDATE farebox.transfers SET amount = amount + 1 WHERE kind = 'promo'",
        "UPDATE farebox.transfers SET amount = amount - 1 WHERE kind = 'promo'",
        "credited",
    ),
    (
        "UPDATE farebox.transfers SET amount = amount - 1 WHERE kind = 'refund' AND reference NOT LIKE '%bonus'",
        "UPDATE farebox.transfers SET amount = amount + 1 WHERE kind = 'refund' AND reference NOT LIKE '%bonus'",
        "should have taken",
    ),
    (
        "UPDATE farebox.orders SET payment_intent = payment_intent || 'x'",
        "UPDATE farebox.orders SET payment_intent = rtrim(payment_intent, 'x')",
        "received",
    ),
    (
        "UPDATE farebox.stripe_events SET processed_at = NULL, outcome = NULL",
        "UPDATE farebox.stripe_events SET processed_at = received_at, outcome = 'paid'",
        "unprocessed",
    ),
    (
        "UPDATE farebox.stripe_customers SET customer = customer || 'x'",
        "UPDATE farebox.stripe_customers SET customer = rtrim(customer, 'x')",
        "paid as",
    ),
    (
        "UPDATE farebox.outbox SET delivered_at = NULL",
        "UPDATE farebox.outbox SET delivered_at = created_at",
        "did not arrive",
    ),
)


@pytest.mark.timeout(120)
async def test_the_judge_acquits_what_is_right_and_sees_each_damage(database: Database, state_path: Path) -> None:
    async with running_nursery() as nursery, open_shop(database, nursery, state_path) as shop:
        server = await shop.serve("server", swift=LOOPS)
        round = Round(MONEY_IN["webhook.paid"], await shop.buyer(), random.Random(1), lost=False)
        await bought(shop, round, server)
        shop.fake.refunds.create(round.intent, 333)
        await hear(shop, round, server)
        await shop.settled()
        # Its loops would mend some of what follows.
        server.signal(signal.SIGTERM)
        assert await server.ended() == 0
        assert await judge(shop) == []
        for damage, repair, complaint in DAMAGE:
            await shop.sql.execute(UNGUARDED + damage)
            found = await judge(shop)
            assert any(complaint in wrong for wrong in found), (damage, found)
            await shop.sql.execute(UNGUARDED + repair)
        assert await judge(shop) == []
        # What went on at Stripe, and nobody here has heard of.
        with shop.fake.state.lock:
            intent = shop.fake.payments.new_intent(False, 1_000, "usd", metadata={"farebox_order": round.order})
            shop.fake.payments.succeed(intent)
        assert any("was charged 2 times" in wrong for wrong in await judge(shop))
        shop.fake.refunds.create(round.intent, 1)
        assert any("went back" in wrong for wrong in await judge(shop))
        shop.inbox.got.clear()
        assert any("did not arrive" in wrong for wrong in await judge(shop))
