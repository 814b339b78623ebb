"""Stripe's book against ours: what was missed is applied as if its webhook had come, and what differs is named."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal
from uuid import UUID, uuid4

import pytest
import stripe as stripe_library

from proxy.control.billing.errors import StripeAway
from proxy.control.billing.reconcile import Difference, Reconciliation, Totals
from proxy.control.billing.resume import resume_events
from proxy.ledger.audit import audit
from proxy.ledger.stripe_events import Taken
from tests.control.billing.books import Books, open_books
from tests.control.billing.till import open_desk
from tests.fakes.stripe import ErrorBefore, FakeStripe, LostReply, Unavailable
from tests.ledger.bank import open_bank
from tests.postgres import Database

DAY = timedelta(days=1)


@pytest.fixture
def stripe() -> Iterator[FakeStripe]:
    """One of the test's own: a reconciliation looks at all that it has."""
    with FakeStripe() as running:
        yield running


@pytest.fixture
async def books(database: Database, stripe: FakeStripe) -> AsyncIterator[Books]:
    async with open_bank(database, size=1) as bank, open_books(bank, stripe) as opened:
        yield opened
        assert [check for check in await audit(bank.owner) if not check.ok] == []


def totals(report: Reconciliation) -> dict[tuple[str, str], Totals]:
    return dict(report.totals)


def mended(report: Reconciliation, kind: str) -> set[str]:
    return {one.id for one in report.mended if one.kind == kind}


async def nothing_left(books: Books) -> Reconciliation:
    """A second look finds nothing to do."""
    again = await books.run()
    assert (again.mended, again.differences, again.failures, again.clean) == ([], [], [], True)
    assert all(found.at_stripe == found.here for found in again.totals.values())
    return again


async def test_two_empty_books_agree(books: Books) -> None:
    report = await nothing_left(books)
    assert totals(report) == {}


async def test_without_a_single_webhook_all_of_it_is_applied(books: Books) -> None:
    first, payment = await books.bought(tax=200, bonus=500)
    second, other = await books.bought(currency="jpy", price=1_500)
    for amount in (300, 300):
        books.stripe.refunds.create(payment, amount)
    failed = books.stripe.refunds.create(payment, 100)["id"]
    books.stripe.refunds.settle(failed, "failed")
    books.stripe.disputes.open(other, 1_500)
    account, subscription = await books.subscribed()
    invoice = books.stripe.invoices.bill(subscription)

    report = await books.run()
    assert (report.clean, report.differences) == (True, [])
    assert totals(report) == {
        ("payment", "usd"): Totals(1, 1_200, 1_200),
        ("payment", "jpy"): Totals(1, 1_500, 1_500),
        ("invoice", "usd"): Totals(1, 2_000, 2_000),
        ("refund", "usd"): Totals(2, 600, 600),
        ("dispute", "jpy"): Totals(1, 1_500, 1_500),
    }
    # Half of 1,200 went back: half of the credits, and of the bonus.
    moves = await books.book(first.account_id)
    assert moves[:2] == [("purchase", 1_000), ("promo", 500)]
    assert sum(amount for _, amount in moves) == 750
    assert await books.book(second.account_id) == [("purchase", 1_000), ("dispute", -1_000)]
    assert await books.book(account) == [("plan", 5_000)]
    assert (await books.desk.orders.search(invoice)) is not None
    await nothing_left(books)


@pytest.mark.parametrize("ending", ["won", "lost"])
async def test_a_dispute_in_another_currency_is_compared_as_what_it_counts_as(
    books: Books, ending: Literal["won", "lost"]
) -> None:
    """As one of the whole payment, which is what it has taken here."""
    order, payment = await books.bought(tax=200)
    dispute = books.stripe.disputes.open(payment, 950)
    books.stripe.state.find(dispute)["currency"] = "eur"
    report = await books.run()
    assert (report.clean, report.differences) == (True, [])
    assert totals(report)["dispute", "usd"] == Totals(1, 1_200, 1_200)
    assert await books.book(order.account_id) == [("purchase", 1_000), ("dispute", -1_000)]
    await nothing_left(books)
    books.stripe.disputes.move(dispute, ending)
    report = await books.run()
    assert (report.clean, mended(report, "dispute")) == (True, set())
    won = [("dispute_return", 1_000)] if ending == "won" else []
    assert await books.book(order.account_id) == [("purchase", 1_000), ("dispute", -1_000), *won]
    assert ("dispute", "eur") not in totals(await nothing_left(books))


async def test_the_lists_alone_suffice_where_the_events_are_gone(books: Books) -> None:
    """After 30 days Stripe lists no events; and they may have been told to somebody else."""
    order, payment = await books.bought()
    account, subscription = await books.subscribed()
    invoice = books.stripe.invoices.bill(subscription)
    free = books.stripe.invoices.bill(subscription, discount=2_000)
    refund = books.stripe.refunds.create(payment, 400)["id"]
    dispute = books.stripe.disputes.open(payment, 300, inquiry=True)
    for found in books.stripe.events:
        await books.desks.event_ledger.take(books.event(found), outcome="ignored")
    report = await books.run()
    assert report.clean
    assert {(one.kind, one.id) for one in report.mended} == {
        ("payment", payment),
        ("invoice", invoice),
        ("invoice", free),
        ("refund", refund),
        ("dispute", dispute),
    }
    assert await books.book(order.account_id) == [("purchase", 1_000), ("refund", -400)]
    assert await books.book(account) == [("plan", 5_000)] * 2
    await nothing_left(books)


async def test_what_was_missed_is_told_apart_from_what_was_known(books: Books) -> None:
    _, known = await books.bought()
    await books.run()
    _, missed = await books.bought()
    report = await books.run()
    assert known not in {one.id for one in report.mended}
    assert len(mended(report, "webhook")) > 0
    assert totals(report) == {("payment", "usd"): Totals(2, 2_000, 2_000)}
    assert missed != known


async def test_a_hundred_and_more_payments_come_by_pages(books: Books) -> None:
    for _ in range(105):
        await books.bought()
    said: list[str] = []
    report = await books.reconciler.run(datetime.now(UTC) - DAY, progress=said.append)
    assert totals(report) == {("payment", "usd"): Totals(105, 105_000, 105_000)}
    assert {"payments: 100 looked at", "payments: 105 looked at"} <= set(said)


async def test_what_was_decided_about_older_things_is_seen(books: Books) -> None:
    order, payment = await books.bought()
    refund = books.stripe.refunds.create(payment, 500, beginning="pending")["id"]
    other, disputed = await books.bought()
    dispute = books.stripe.disputes.open(disputed)
    assert (await books.run()).clean
    assert await books.book(order.account_id) == [("purchase", 1_000), ("refund", -500)]
    # Forty days later the refund fails and the dispute is won, and nobody tells.
    books.stripe.clock.advance(40 * 86_400)
    books.stripe.refunds.settle(refund, "failed")
    books.stripe.disputes.move(dispute, "won")
    for found in books.stripe.events:
        await books.desks.event_ledger.take(books.event(found), outcome="ignored")
    report = await books.run()
    assert (mended(report, "refund"), mended(report, "dispute"), report.clean) == ({refund}, {dispute}, True)
    assert await books.bank.money(order.account_id) == (1_000, 0, 0)
    assert await books.bank.money(other.account_id) == (1_000, 0, 0)
    await nothing_left(books)


async def test_a_dispute_that_moves_no_money_is_followed_too(books: Books) -> None:
    order, payment = await books.bought()
    dispute = books.stripe.disputes.open(payment, withdraw=False)
    frozen = "SELECT frozen_at IS NOT NULL FROM farebox.accounts WHERE id = $1"
    assert (await books.run()).clean
    assert await books.bank.owner.fetchval(frozen, order.account_id)
    books.stripe.disputes.move(dispute, "won")
    for found in books.stripe.events:
        await books.desks.event_ledger.take(books.event(found), outcome="ignored")
    report = await books.run()
    assert (mended(report, "dispute"), report.clean) == ({dispute}, True)
    assert not await books.bank.owner.fetchval(frozen, order.account_id)
    assert await books.book(order.account_id) == [("purchase", 1_000)]


async def test_a_payment_that_does_not_match_differs_until_somebody_decides(books: Books) -> None:
    order, _ = await books.bought()
    assert (await books.run()).clean
    session = await books.desk.session(order)
    second = books.stripe.checkout.pay(session)
    assert second is not None
    for _ in range(2):
        report = await books.run()
        assert not report.clean
        assert report.differences == [
            Difference("payment", second, "usd", 1_000, None, "in quarantine: second_payment")
        ]
        assert report.totals["payment", "usd"] == Totals(2, 2_000, 1_000)
    await books.desk.orders.resolve(second, "dismissed", actor="test", new_id=uuid4())
    report = await nothing_left(books)
    assert report.totals["payment", "usd"] == Totals(1, 1_000, 1_000)


async def test_a_payment_that_an_operator_credited_agrees(books: Books) -> None:
    order, _ = await books.bought()
    await books.run()
    second = books.stripe.checkout.pay(await books.desk.session(order))
    assert second is not None
    await books.run()
    await books.desk.orders.resolve(second, "credited", actor="test", new_id=uuid4())
    report = await nothing_left(books)
    assert report.totals["payment", "usd"] == Totals(2, 2_000, 2_000)


async def test_what_went_back_of_a_payment_in_quarantine_is_taken_once_it_is_credited(books: Books) -> None:
    order, _ = await books.bought()
    second = books.stripe.checkout.pay(await books.desk.session(order))
    assert second is not None
    books.stripe.refunds.create(second, 400)
    assert not (await books.run()).clean
    # Events that have been processed are resumed by nobody.
    resume = partial(resume_events, books.desks.event_ledger, books.desks.events, livemode=False, pause_seconds=0.0)
    assert await resume() == (0, 0)
    await books.desk.orders.resolve(second, "credited", actor="test", new_id=uuid4())
    done, failed = await resume()
    assert done > 0
    assert failed == 0
    assert await books.book(order.account_id) == [("purchase", 1_000), ("purchase", 1_000), ("refund", -400)]
    await nothing_left(books)


async def test_a_payment_that_can_t_be_applied_keeps_no_other_waiting(books: Books) -> None:
    """Somebody has given credits by hand under the name of a payment, so that its bonus can't be given."""
    stuck, payment = await books.bought(bonus=100)
    await books.bank.control.grant(stuck.account_id, 5, kind="promo", reference=payment, actor="test")
    other, its = await books.bought()
    books.stripe.refunds.create(its, 250)
    for found in books.stripe.events:
        await books.desks.event_ledger.take(books.event(found), outcome="ignored")
    report = await books.run()
    assert [(one.id, one.here) for one in report.differences] == [(payment, None)]
    assert "could not be credited" in report.differences[0].why
    assert await books.book(other.account_id) == [("purchase", 1_000), ("refund", -250)]


async def test_what_the_key_may_not_look_at_keeps_nothing_else_from_being_looked_at(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restricted key that was made before there were plans."""
    order, payment = await books.bought()
    refund = books.stripe.refunds.create(payment, 250)["id"]
    for found in books.stripe.events:
        await books.desks.event_ledger.take(books.event(found), outcome="ignored")

    def refuse(client: stripe_library.StripeClient, params: object) -> None:
        raise stripe_library.PermissionError("The key may not read invoices.", http_status=403)

    invoices = books.reconciler._sides["invoice"]
    with monkeypatch.context() as patched:
        refused = replace(invoices, listing=replace(invoices.listing, page=refuse))
        patched.setitem(books.reconciler._sides, "invoice", refused)
        report = await books.run()
    assert (mended(report, "payment"), mended(report, "refund")) == ({payment}, {refund})
    [failure] = report.failures
    assert "invoices" in failure
    assert "may not read" in failure
    assert await books.book(order.account_id) == [("purchase", 1_000), ("refund", -250)]
    await nothing_left(books)


async def test_a_payment_that_stripe_does_not_know_is_named(database: Database, stripe: FakeStripe) -> None:
    async with open_bank(database, size=1) as bank:
        with FakeStripe() as other:
            async with open_books(bank, other) as elsewhere:
                _, payment = await elsewhere.bought()
                assert (await elsewhere.run()).clean
        async with open_books(bank, stripe) as books:
            report = await books.run()
    assert [(one.id, one.at_stripe, one.here) for one in report.differences] == [(payment, None, 1_000)]
    assert "knows no such payment" in report.differences[0].why


async def test_another_business_on_the_same_stripe_account_is_left_alone(books: Books) -> None:
    params = {"amount": 700, "currency": "usd", "payment_method": "pm_card_visa", "confirm": True}
    intent = await books.desk.api.call(lambda client: client.v1.payment_intents.create(params).id)  # type: ignore[arg-type]
    books.stripe.refunds.create(intent, 200)
    books.stripe.disputes.open(intent)
    report = await nothing_left(books)
    assert totals(report) == {}


async def test_webhooks_that_were_left_are_resumed(books: Books) -> None:
    order, _ = await books.bought()
    for found in books.stripe.events_of("checkout.session.completed"):
        assert await books.desks.event_ledger.take(books.event(found)) is Taken.TAKEN
    await books.bank.owner.execute("UPDATE farebox.stripe_events SET tried_at = tried_at - interval '1 hour'")
    report = await books.run()
    assert report.finished["webhooks"] == 1
    assert await books.book(order.account_id) == [("purchase", 1_000)]


async def test_an_unfinished_order_is_brought_to_its_end(books: Books) -> None:
    """One that a discount left nothing to pay for has no PaymentIntent to be listed."""
    free, payment = await books.bought(discount=1_000, discount_max=1_000)
    assert payment == ""
    left = await books.desk.order()
    await books.desk.orders.opened(left.id, await books.desk.session(left), None)
    books.stripe.clock.advance(2 * 86_400)
    books.stripe.checkout.tick()
    for found in books.stripe.events:
        await books.desks.event_ledger.take(books.event(found), outcome="ignored")
    await books.bank.owner.execute("UPDATE farebox.orders SET created_at = created_at - interval '26 hours'")
    report = await books.run()
    assert mended(report, "order") == {str(free.id)}
    assert await books.book(free.account_id) == [("purchase", 1_000)]
    assert (await books.desk.orders.find(left.id)).state == "expired"
    await nothing_left(books)


async def test_a_held_refund_request_is_carried_out(books: Books) -> None:
    order, payment = await books.bought()
    await books.run()
    request = uuid4()
    await books.refund_ledger.open(request, order.id, 600, owing=False, step=1, actor="test", reason=None)
    report = await books.run()
    assert (report.finished["refund requests"], report.clean) == (1, True)
    assert await books.book(order.account_id) == [("purchase", 1_000), ("refund", -600)]
    assert report.totals["refund", "usd"] == Totals(1, 600, 600)
    assert books.stripe.object(payment)["amount_received"] == 1_000


async def test_stripe_away_is_said_and_the_next_run_finds_everything(books: Books) -> None:
    order, payment = await books.bought()
    books.stripe.refunds.create(payment, 250)
    books.stripe.faults.on("GET /v1/payment_intents", Unavailable())
    with pytest.raises(StripeAway):
        await books.run()
    await nothing_left_after(books, order.account_id)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_goes_wrong_at_stripe_in_the_end_the_books_agree(books: Books, seed: int) -> None:
    order, payment = await books.bought()
    books.stripe.refunds.create(payment, 250)
    books.stripe.faults.seeded(seed, chance=0.3, among=(Unavailable(), LostReply(), ErrorBefore()))
    for _ in range(3):
        try:
            report = await books.run()
        except StripeAway:
            continue
        # What failed is said; what isn't said is right.
        if report.clean:
            assert sum(amount for _, amount in await books.book(order.account_id)) == 750
    books.stripe.faults.clear()
    await nothing_left_after(books, order.account_id)


async def nothing_left_after(books: Books, account_id: UUID) -> None:
    await books.bank.owner.execute("UPDATE farebox.stripe_events SET tried_at = tried_at - interval '1 hour'")
    assert (await books.run()).clean
    assert await books.book(account_id) == [("purchase", 1_000), ("refund", -250)]
    await nothing_left(books)


async def test_a_ledger_restored_to_an_earlier_time_learns_what_came_after(books: Books) -> None:
    """Of an order that the ledger has lost, the money is in quarantine: nobody is credited by a guess."""
    account, _ = await books.bank.open_account()
    lost = uuid4()
    metadata = {"farebox_order": str(lost), "farebox_account": str(account.id)}
    async with open_desk(books.bank, books.stripe) as desk:
        order = await desk.order(account.id)
        session = await desk.session(
            order, client_reference_id=str(lost), metadata=metadata, payment_intent_data={"metadata": metadata}
        )
    payment = books.stripe.checkout.pay(session)
    report = await books.run()
    assert [(one.id, one.why) for one in report.differences] == [(payment, "in quarantine: unknown_order")]
    assert await books.book(account.id) == []


async def test_an_order_that_never_reached_stripe_waits_no_longer(books: Books) -> None:
    order = await books.desk.order()
    assert (await books.run()).clean
    assert (await books.desk.orders.find(order.id)).state == "created"
    await books.bank.owner.execute("UPDATE farebox.orders SET created_at = created_at - interval '26 hours'")
    assert (await books.run()).clean
    assert (await books.desk.orders.find(order.id)).state == "expired"


async def test_quarantine_is_named_however_old_it_is(books: Books) -> None:
    order, _ = await books.bought()
    await books.run()
    second = books.stripe.checkout.pay(await books.desk.session(order))
    await books.run()
    books.stripe.clock.advance(60 * 86_400)
    report = await books.run()
    assert [(one.id, one.why) for one in report.differences] == [(second, "in quarantine: second_payment")]


async def test_a_plan_that_was_forgotten_is_credited_once_it_is_sold(books: Books) -> None:
    account, subscription = await books.subscribed()
    [(price, plan)] = books.plans.items()
    books.plans[price] = replace(plan, price=1)
    invoice = books.stripe.invoices.bill(subscription)
    report = await books.run()
    assert [(one.kind, one.id, one.why) for one in report.differences] == [
        ("invoice", invoice, "in quarantine: other_amount")
    ]
    books.stripe.clock.advance(60 * 86_400)
    books.plans[price] = plan
    report = await books.run()
    assert (mended(report, "invoice"), report.clean) == ({invoice}, True)
    assert await books.book(account) == [("plan", 5_000)]
    await nothing_left(books)


@pytest.mark.parametrize("kind", ["refund", "dispute"])
async def test_what_goes_back_of_an_invoice_is_taken_though_nobody_told_of_the_invoice(books: Books, kind: str) -> None:
    account, subscription = await books.subscribed()
    invoice = books.stripe.invoices.bill(subscription)
    [payment] = [
        one["payment"]["payment_intent"]
        for one in books.stripe.state.all("invoice_payment")
        if one["invoice"] == invoice
    ]
    if kind == "refund":
        name = books.stripe.refunds.create(payment, 500)["id"]
        assert await books.desks.refunds.apply(name) == "taken"
    else:
        name = books.stripe.disputes.open(payment, 500)
        assert await books.desks.disputes.apply(name) == "taken"
    assert await books.book(account) == [("plan", 5_000), (kind, -1_250)]
    report = await books.run()
    assert report.clean
    assert (mended(report, "invoice"), mended(report, kind)) == (set(), set())
