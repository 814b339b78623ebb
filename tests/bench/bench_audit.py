"""How long the audit takes on a million transfers: in full, with and without seals, and of what is new; sealing,
and drawing lots.

``python -m tests.bench.bench_audit`` or ``make bench``. On a PostgreSQL with its defaults. A busy machine makes every
figure longer; the full audit takes as many processes as Postgres gives it, two by default.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from proxy.ledger.audit import Check, audit, audit_since_last, book_state
from proxy.ledger.bookkeeper import SEAL_ROWS, seal
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.lots import draw_behind
from proxy.ledger.records import ApiKey
from tests.ledger.bank import Bank, open_bank
from tests.ledger.crowd import fill
from tests.postgres import Database, fresh_database, remove_cluster, running_cluster

pytestmark = pytest.mark.bench

ACCOUNTS, CALLS = 1_000, 999
FULL_SECONDS_MAX, SINCE_LAST_SECONDS_MAX = 10.0, 0.1
NEW_CALLS = 1_000
ROUNDS = 3

T = TypeVar("T")


async def timed(what: str, work: Callable[[], Awaitable[T]], *, bar: float | None = None, rounds: int = 1) -> T:
    """Do it so often; prints the shortest time, and whether the bar was met."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        result = await work()
        best = min(best, time.perf_counter() - began)
    verdict = "" if bar is None else f"   bar of {bar:g} s: {'met' if best <= bar else 'not met'}"
    print(f"{what:<62} {best:>8.3f} s{verdict}", flush=True)
    return result


def require_clean(checks: list[Check]) -> None:
    assert checks
    assert [check for check in checks if not check.ok] == []


async def run(database: Database) -> None:
    """Everything, printed as it is done."""
    keeper = await connect(database.app, Role.CONTROL, statement_seconds=0)
    async with open_bank(database, size=4) as bank:
        await timed(
            "a million transfers and holds are written", lambda: fill(bank.owner, accounts=ACCOUNTS, calls=CALLS)
        )
        await timed("all of it is drawn from lots, in stretches", lambda: draw_behind(keeper, breath_seconds=0))
        require_clean(await timed("full audit, nothing sealed", lambda: audit(keeper), rounds=ROUNDS))
        await timed("all of it is sealed, in steps", lambda: _seal_all(keeper))
        await bank.owner.execute("ANALYZE farebox.seals")
        checks = await timed("full audit, all sealed", lambda: audit(keeper), bar=FULL_SECONDS_MAX, rounds=ROUNDS)
        require_clean(checks)
        rows = {check.name: check.rows for check in checks}
        assert rows["sealed_transfers_are_as_they_were"] >= ACCOUNTS * (CALLS + 1)
        assert rows["transfers_are_drawn_from_lots"] >= ACCOUNTS * (CALLS + 1)
        await timed("all of it is audited as new, in steps", lambda: _audit_all(keeper))
        require_clean(await timed("audit since last, nothing new", lambda: audit_since_last(keeper), rounds=ROUNDS))
        _, key = await bank.open_account(10**9)
        for _ in range(2):
            await _calls(bank, key)
            require_clean(
                await timed(
                    f"audit since last, {NEW_CALLS} new calls",
                    lambda: audit_since_last(keeper),
                    bar=SINCE_LAST_SECONDS_MAX,
                )
            )
            await timed(f"{NEW_CALLS} new calls are sealed", lambda: seal(keeper))
            await timed(f"{NEW_CALLS} new calls are drawn from lots", lambda: draw_behind(keeper))
    await keeper.close()


async def _seal_all(keeper: Connection) -> None:
    while (await seal(keeper) or 0) >= SEAL_ROWS // 2:
        pass
    assert (await book_state(keeper)).unsealed == 0


async def _audit_all(keeper: Connection) -> None:
    while (await book_state(keeper)).unaudited:
        require_clean(await audit_since_last(keeper))


async def _calls(bank: Bank, key: ApiKey) -> None:
    """So many calls, as a gateway's batches write them."""
    rows = [bank.a_reserve(key, 20) for _ in range(NEW_CALLS)]
    for begin in range(0, NEW_CALLS, 100):
        batch = rows[begin : begin + 100]
        await bank.holds.batch([], batch)
        await bank.holds.batch([bank.a_finalize(row, 3) for row in batch], [])


@pytest.mark.timeout(900)
def test_the_audit_of_a_million_transfers(database: Database) -> None:
    print()
    asyncio.run(run(database))


def main() -> None:
    """A cluster of its own, the measurement, and nothing left."""
    run_id = secrets.token_hex(6)
    try:
        with running_cluster(run_id) as address, fresh_database(address) as database:
            asyncio.run(run(database))
    finally:
        remove_cluster(run_id)


if __name__ == "__main__":
    main()
