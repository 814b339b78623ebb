"""What must be true of money in when the trouble is over: paid at Stripe = credited here, and given back = taken back.

The judge believes Stripe alone: what was paid, refunded and disputed is what the fake's own objects say; what should
stand in the ledger is computed from that, and from what the orders sold. Every wrong is a sentence; none is acquittal.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from proxy.ledger.audit import audit
from tests.fakes.stripe.shapes import Object
from tests.faults.money_in.shop import Shop

__all__ = ["audited", "judge", "judge_credits"]

Row = dict[str, Any]

GOES_BACK = frozenset({"pending", "requires_action", "succeeded"})
"""What refunds are whose money is with the customer, or on its way."""
FREEZES = frozenset({"needs_response", "under_review", "lost"})
"""What disputes are while the account is to be frozen, inquiries and those that were won left aside."""


@dataclass(frozen=True)
class AtStripe:
    """What Stripe has of all accounts, as plain objects."""

    intents: list[Object]
    sessions: list[Object]
    refunds: list[Object]
    disputes: list[Object]
    customers: list[Object]

    @classmethod
    def of(cls, shop: Shop) -> "AtStripe":
        state = shop.fake.state
        with state.lock:
            kinds = ("payment_intent", "checkout.session", "refund", "dispute", "customer")
            return cls(*([dict(one) for one in state.all(kind)] for kind in kinds))

    def paid(self, order: UUID) -> list[Object]:
        """The payments that succeeded and name the order."""
        named = [one for one in self.intents if one["metadata"].get("farebox_order") == str(order)]
        return [one for one in named if one["status"] == "succeeded"]

    def returned(self, intent: str) -> int:
        """What of a payment is back with the customer, or with their bank: minor units, at most what was paid."""
        refunds = [one for one in self.refunds if one["payment_intent"] == intent and one["status"] in GOES_BACK]
        disputes = [one for one in self.disputes if one["payment_intent"] == intent]
        moved = [move["amount"] for one in disputes for move in one["balance_transactions"]]
        return int(sum(one["amount"] for one in refunds) - sum(moved))


async def judge(shop: Shop) -> list[str]:
    """What is wrong with the accounts of this shop, with its events, and with what was told of it."""
    at_stripe, known = AtStripe.of(shop), [buyer.id for buyer in shop.buyers]
    orders = await _rows(shop, "SELECT * FROM farebox.orders WHERE account_id = ANY($1)", known)
    transfers = await _rows(shop, "SELECT * FROM farebox.transfers WHERE account_id = ANY($1)", known)
    wrongs = await judge_credits(shop, known)
    wrongs += _charged_once(at_stripe, orders)
    wrongs += await _customers(shop, at_stripe, known)
    wrongs += await _accounts(shop, known, transfers)
    wrongs += await _frozen(shop, at_stripe, orders)
    wrongs += await _requests(shop, at_stripe)
    wrongs += await _nothing_waits(shop)
    wrongs += await _told(shop)
    return wrongs + await audited(shop)


async def judge_credits(shop: Shop, accounts: list[UUID]) -> list[str]:
    """Whether these have what they paid for, and nothing of what went back."""
    at_stripe, wrongs = AtStripe.of(shop), []
    for account_id in accounts:
        orders = await _rows(shop, "SELECT * FROM farebox.orders WHERE account_id = $1", account_id)
        moves = await _rows(shop, "SELECT * FROM farebox.transfers WHERE account_id = $1", account_id)
        wrongs += _credited(at_stripe, account_id, orders, moves)
        wrongs += _taken_back(at_stripe, orders, moves)
    return wrongs


async def audited(shop: Shop) -> list[str]:
    """What the audit finds."""
    connection = await asyncpg.connect(shop.database.owner)
    try:
        checks = await audit(connection)
    finally:
        await connection.close()
    found = [f"audit: {c.name}: {c.violations} of {c.rows}, as {c.example}" for c in checks if not c.ok]
    return found if sum(check.rows for check in checks) else ["audit: there was nothing to look at"]


async def _rows(shop: Shop, query: str, *values: Any) -> list[Row]:
    return [dict(row) for row in await shop.sql.fetch(query, *values)]


def _credited(at_stripe: AtStripe, account_id: UUID, orders: list[Row], moves: list[Row]) -> list[str]:
    """Paid at Stripe = credited here, each payment once and with its bonus."""
    due: Counter[tuple[str, str]] = Counter()
    wrongs = []
    for order in orders:
        paid = at_stripe.paid(order["id"])
        if len(paid) > 1:
            wrongs.append(f"order {order['id']} was paid {len(paid)} times: {[one['id'] for one in paid]}")
        if bool(paid) != (order["state"] == "paid"):
            wrongs.append(f"order {order['id']} is {order['state']}, and at Stripe paid by {[o['id'] for o in paid]}")
        for one in paid:
            due["purchase", one["id"]] += order["credits"]
            due["promo", one["id"]] += order["bonus"]
            if order["state"] == "paid" and (order["payment_intent"], order["received"]) != (one["id"], one["amount"]):
                wrongs.append(f"order {order['id']} received {order['received']} by {order['payment_intent']}: {one}")
    got: Counter[tuple[str, str]] = Counter()
    for move in moves:
        if move["kind"] in ("purchase", "promo") and str(move["reference"]).startswith("pi_"):
            got[move["kind"], move["reference"]] += move["amount"]
    if +due != +got:
        wrongs.append(
            f"account {account_id}: paid for {dict(due - got)} not credited, credited {dict(got - due)} unpaid"
        )
    return wrongs


def _taken_back(at_stripe: AtStripe, orders: list[Row], moves: list[Row]) -> list[str]:
    """Refunded or disputed at Stripe = taken back here, to the microcredit."""
    wrongs, due = [], 0
    for order in orders:
        paid = order["payment_intent"] if order["state"] == "paid" else None
        back = min(at_stripe.returned(paid), order["received"]) if paid and order["received"] else 0
        shares = [order[what] * back // order["received"] if back else 0 for what in ("credits", "bonus")]
        due += sum(shares)
        if [order["taken"], order["bonus_taken"]] != shares:
            wrongs.append(
                f"order {order['id']}: {back} of {order['received']} went back, so {shares} of its credits and bonus; "
                f"it has {order['taken']} and {order['bonus_taken']}"
            )
    signs = {"refund": 1, "dispute": 1, "refund_return": -1, "dispute_return": -1}
    took = sum(signs.get(move["kind"], 0) * move["amount"] for move in moves)
    if took != due:
        wrongs.append(f"refunds and disputes should have taken {due}, and took {took}")
    return wrongs


def _charged_once(at_stripe: AtStripe, orders: list[Row]) -> list[str]:
    """Never two charges: no session and no attempt of ours was paid twice, and none that we don't know of."""
    wrongs, known = [], {str(order["id"]) for order in orders}
    named = Counter(one["metadata"].get("farebox_order") for one in at_stripe.intents if one["status"] == "succeeded")
    wrongs += [f"order {name} was charged {times} times" for name, times in named.items() if times > 1]
    wrongs += [f"a payment names {name}, which is no order" for name in named if name not in known]
    sessions = Counter(one["payment_intent"] for one in at_stripe.sessions if one["payment_intent"])
    return wrongs + [f"{intent} belongs to {times} sessions" for intent, times in sessions.items() if times > 1]


async def _customers(shop: Shop, at_stripe: AtStripe, known: list[UUID]) -> list[str]:
    """One customer an account: all that it paid, it paid as that one."""
    rows = await _rows(shop, "SELECT account_id, customer FROM farebox.stripe_customers")
    ours = {row["account_id"]: row["customer"] for row in rows}
    wrongs = []
    for account_id in known:
        its = [one["id"] for one in at_stripe.customers if one["metadata"].get("farebox_account") == str(account_id)]
        used = {
            one["customer"]
            for one in (*at_stripe.sessions, *at_stripe.intents)
            if one["metadata"].get("farebox_account") == str(account_id)
        }
        if used - {ours.get(account_id)}:
            wrongs.append(f"account {account_id} is customer {ours.get(account_id)}, and paid as {used}")
        # A 500 that a key remembers may hide a customer that was made; the next key makes another.
        hidden = sum(name == "POST /v1/customers" for name, fault in shop.fake.faults.hit if "Error" in repr(fault))
        if len(its) > 1 + hidden:
            wrongs.append(f"account {account_id} has the customers {its}")
    return wrongs


async def _accounts(shop: Shop, known: list[UUID], transfers: list[Row]) -> list[str]:
    """Credits are neither made nor lost, and nothing is held when all is quiet."""
    wrongs = []
    rows = await _rows(shop, "SELECT id, balance, held, debt FROM farebox.accounts WHERE id = ANY($1)", known)
    for row in rows:
        moves = [one for one in transfers if one["account_id"] == row["id"]]
        owned = sum(one["amount"] if one["account_side"] == "credit" else -one["amount"] for one in moves)
        if owned != row["balance"]:
            wrongs.append(f"account {row['id']} has {row['balance']}, and its transfers come to {owned}")
        if row["held"]:
            wrongs.append(f"account {row['id']} holds {row['held']} when all is quiet")
    return wrongs


async def _frozen(shop: Shop, at_stripe: AtStripe, orders: list[Row]) -> list[str]:
    """Frozen by the disputes that say so, and by no other."""
    account_of = {order["payment_intent"]: order["account_id"] for order in orders}
    due = {(account_of.get(one["payment_intent"]), one["id"]) for one in at_stripe.disputes if one["status"] in FREEZES}
    rows = await _rows(
        shop,
        "SELECT f.account_id, f.reference, a.frozen_at IS NOT NULL AS frozen FROM farebox.freezes f"
        " JOIN farebox.accounts a ON a.id = f.account_id WHERE f.lifted_at IS NULL",
    )
    frozen = {(row["account_id"], row["reference"]) for row in rows}
    wrongs = [f"frozen by {sorted(map(str, frozen - due))}, not by {sorted(map(str, due - frozen))}"] * (frozen != due)
    loose = await _rows(shop, "SELECT id FROM farebox.accounts WHERE frozen_at IS NOT NULL")
    wrongs += [f"{row['account_id']} isn't frozen, though its freeze stands" for row in rows if not row["frozen"]]
    known = {account for account, _ in due}
    return wrongs + [f"{row['id']} is frozen by nothing" for row in loose if row["id"] not in known]


async def _requests(shop: Shop, at_stripe: AtStripe) -> list[str]:
    """A request for a refund: one refund at most, and it says itself what became of it."""
    made: dict[str, list[Object]] = {}
    for refund in at_stripe.refunds:
        if (name := refund["metadata"].get("farebox_refund")) is not None:
            made.setdefault(name, []).append(refund)
    wrongs = [f"request {name} made {len(found)} refunds" for name, found in made.items() if len(found) > 1]
    rows = await _rows(shop, "SELECT * FROM farebox.refund_requests")
    for row in rows:
        found = made.pop(str(row["id"]), [])
        expected = ("done", found[0]["id"]) if found else ("released", None)
        if (row["state"], row["refund"]) != expected:
            wrongs.append(f"request {row['id']} is {row['state']} by {row['refund']}, and at Stripe {expected}")
    return wrongs + [f"refunds of {name}, which nobody has asked for" for name in made]


async def _nothing_waits(shop: Shop) -> list[str]:
    """No hold, attempt, event or request is left in the middle, and no payment is in quarantine."""
    found: Iterable[tuple[str, str]] = (
        ("an open hold", "SELECT id::text AS name FROM farebox.holds WHERE state = 'open'"),
        (
            "an unprocessed event",
            "SELECT id || ' ' || type AS name FROM farebox.stripe_events WHERE processed_at IS NULL",
        ),
        ("a held refund request", "SELECT id::text AS name FROM farebox.refund_requests WHERE state = 'held'"),
        (
            "an automatic attempt without an end",
            "SELECT id || ' ' || state AS name FROM farebox.orders"
            " WHERE kind = 'auto' AND state IN ('created', 'open', 'pending')",
        ),
        ("a payment in quarantine", "SELECT payment || ' ' || reason AS name FROM farebox.quarantine"),
        (
            "reserved credits of a lot",
            "SELECT account_id || ' ' || version AS name FROM farebox.lots WHERE reserved > 0",
        ),
    )
    return [f"{what}: {row['name']}" for what, query in found for row in await _rows(shop, query)]


async def _told(shop: Shop) -> list[str]:
    """Each message came at least once, and none that isn't in the outbox."""
    rows = await _rows(shop, "SELECT id, type, delivered_at, attempts, error FROM farebox.outbox")
    wrongs = [f"a forged message: {what}" for what in shop.inbox.forged]
    came = {name.removeprefix("msg_").replace("-", "") for name in shop.inbox.got}
    for row in rows:
        if row["id"].hex not in came or row["delivered_at"] is None:
            wrongs.append(f"message {row['id']} {row['type']} did not arrive: {row['attempts']}, {row['error']}")
    written = {row["id"].hex for row in rows}
    return wrongs + [f"message {name} was never written" for name in came - written]
