"""Reconciliation by itself: when it is due, one server at a time, and what the metrics are told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from proxy.control.billing.errors import StripeAway
from proxy.control.billing.reconcile import Reconciler, Reconciliation
from proxy.control.billing.reconcile_loop import SPANS, ReconcileLoop, reconcile_and_note
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.reconciliation import WINDOWS, LastReconciliation, try_lock
from tests.control.billing.books import Books, open_books
from tests.fakes.stripe import FakeStripe, Unavailable
from tests.ledger.bank import open_bank
from tests.postgres import Database

HOUR = timedelta(hours=1)


@pytest.fixture
async def books(database: Database) -> AsyncIterator[Books]:
    with FakeStripe() as stripe:
        async with open_bank(database, size=1) as bank, open_books(bank, stripe) as opened:
            yield opened


class Server:
    """One of several that reconcile by themselves."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.told: list[dict[str, LastReconciliation]] = []
        self.heard = asyncio.Event()
        self.loop = ReconcileLoop(books.reconciler, books.ledger, self._connection, observe=self._observe)

    async def _connection(self) -> Connection:
        return await connect(self.books.bank.database.app, Role.CONTROL)

    async def round(self) -> None:
        """What is due of both spans, the shorter one first."""
        for name in SPANS:
            await self.loop.round(name)

    def _observe(self, last: Mapping[str, LastReconciliation]) -> None:
        self.told.append(dict(last))
        self.heard.set()

    async def pass_time(self, by: timedelta) -> None:
        """As if it were so much later."""
        await self.books.bank.owner.execute(
            "UPDATE farebox.reconciliations SET finished_at = finished_at - $1::interval", by
        )


def listings(books: Books) -> int:
    """How often payments were listed from the beginning: how often the books were compared."""
    listed = [one for one in books.stripe.asked if one.name == "GET /v1/payment_intents"]
    return sum("starting_after" not in one.params for one in listed)


def test_the_spans_are_those_that_the_ledger_knows() -> None:
    assert set(SPANS) == set(WINDOWS)


async def test_hourly_over_days_and_daily_over_a_month(books: Books) -> None:
    server = Server(books)
    await server.loop.round("recent")
    assert listings(books) == 1
    assert set(server.told[-1]) == {"recent"}
    await server.round()
    assert listings(books) == 2
    assert set(server.told[-1]) == {"month", "recent"}
    await server.round()
    assert listings(books) == 2
    await server.pass_time(HOUR)
    await server.round()
    await server.round()
    assert listings(books) == 3
    assert server.told[-1]["recent"].finished_at - server.told[-1]["month"].finished_at >= HOUR
    await server.pass_time(timedelta(days=1))
    await server.round()
    await server.round()
    assert listings(books) == 5
    # A month's covers three days.
    await server.pass_time(timedelta(days=1))
    await server.loop.round("month")
    await server.loop.round("recent")
    assert listings(books) == 6


async def test_several_servers_compare_once(books: Books) -> None:
    servers = [Server(books) for _ in range(4)]
    order, _ = await books.bought()
    await asyncio.gather(*(server.loop.round("recent") for server in servers))
    assert listings(books) == 1
    assert await books.book(order.account_id) == [("purchase", 1_000)]
    for server in servers:
        await server.loop.round("recent")
        assert server.told[-1]["recent"].differing == 0
    assert listings(books) == 1
    await asyncio.gather(*(server.round() for server in servers))
    assert listings(books) == 2


@pytest.mark.parametrize("name", WINDOWS)
async def test_while_another_is_at_it_nothing_is_compared(books: Books, name: str) -> None:
    server = Server(books)
    holder = await connect(books.bank.database.app, Role.CONTROL)
    assert await try_lock(holder, name)
    await server.loop.round(name)
    assert listings(books) == 0
    # Whoever dies gives it free.
    holder.terminate()
    async with asyncio.timeout(10):
        while listings(books) == 0:
            await server.loop.round(name)


class Stuck:
    """A reconciler whose look back over more than some days never ends, or always fails."""

    def __init__(self, books: Books, *, fails: bool) -> None:
        self._reconciler = books.reconciler
        self._fails = fails
        self.asked = 0

    async def run(self, since: datetime, *, progress: Callable[[str], None] = lambda line: None) -> Reconciliation:
        if datetime.now(UTC) - since < timedelta(days=10):
            return await self._reconciler.run(since, progress=progress)
        self.asked += 1
        if self._fails:
            raise StripeAway("the test says so")
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("fails", [False, True])
async def test_a_month_that_takes_for_ever_or_fails_holds_up_nobody(books: Books, *, fails: bool) -> None:
    server, stuck = Server(books), Stuck(books, fails=fails)
    loop = ReconcileLoop(
        cast(Reconciler, stuck), books.ledger, server._connection, observe=server._observe, look_seconds=0.01
    )
    loop.start()
    try:
        async with asyncio.timeout(30):
            while listings(books) < 3 or not stuck.asked:
                await server.pass_time(HOUR)
                await asyncio.sleep(0.01)
    finally:
        await loop.stop()
    assert set(await books.ledger.last()) == {"recent"}


async def test_what_began_before_the_last_one_takes_its_place_no_more(books: Books) -> None:
    """A month's comparison that ends now has listed hours ago what the hour's must look at again."""
    now = datetime.now(UTC)
    for started_at, differing in ((now - HOUR, 0), (now - 3 * HOUR, 7)):
        await books.ledger.note("recent", started_at, compared=1, mended=0, differing=differing)
    await books.ledger.note("month", now - 3 * HOUR, compared=1, mended=0, differing=7)
    last = await books.ledger.last()
    assert {name: one.differing for name, one in last.items()} == {"recent": 0, "month": 7}


async def test_what_differs_is_told_until_it_is_gone(books: Books) -> None:
    server = Server(books)
    order, _ = await books.bought()
    await server.loop.round("recent")
    clean_at = server.told[-1]["recent"].clean_at
    assert clean_at is not None
    books.stripe.checkout.pay(await books.desk.session(order))
    await server.pass_time(HOUR)
    await server.loop.round("recent")
    told = server.told[-1]["recent"]
    assert (told.differing, told.clean_at) == (1, clean_at)


async def test_where_stripe_is_away_it_is_due_still(books: Books) -> None:
    server = Server(books)
    books.stripe.faults.on("GET /v1/payment_intents", Unavailable())
    with pytest.raises(StripeAway):
        await server.loop.round("month")
    await server.loop.round("month")
    assert listings(books) == 2
    assert set(server.told[-1]) == {"month", "recent"}


async def test_the_loop_outlives_what_goes_wrong(books: Books) -> None:
    server = Server(books)
    books.stripe.faults.on("GET /v1/events", Unavailable(), times=3)
    loop = ReconcileLoop(books.reconciler, books.ledger, server._connection, observe=server._observe, look_seconds=0.01)
    loop.start()
    async with asyncio.timeout(30):
        await server.heard.wait()
    await loop.stop()
    assert len(books.stripe.faults.hit) == 3


async def test_a_command_counts_for_what_it_covers(books: Books) -> None:
    for back, noted in (
        (timedelta(hours=1), []),
        (timedelta(hours=72), ["recent"]),
        (timedelta(days=29), ["recent"]),
        (timedelta(days=30), ["month", "recent"]),
    ):
        await books.bank.owner.execute("DELETE FROM farebox.reconciliations")
        await reconcile_and_note(books.reconciler, books.ledger, datetime.now(UTC) - back)
        assert sorted(await books.ledger.last()) == noted
