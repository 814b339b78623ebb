"""`farebox refund` over a real ledger and the fake Stripe, by the real client."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import pytest

from tests.cli.conftest import Farebox, Ran
from tests.control.billing.books import open_books
from tests.control.billing.till import open_desk
from tests.fakes.stripe import FakeStripe, LostReply
from tests.ledger.bank import open_bank
from tests.postgres import Database

ORDER = "01900000-0000-7000-8000-00000000dead"


@dataclass(frozen=True)
class Sold:
    order: UUID
    account: UUID
    intent: str


@pytest.fixture
def fake(environment: pytest.MonkeyPatch) -> Iterator[FakeStripe]:
    with FakeStripe() as running:
        environment.setenv("FAREBOX_STRIPE_KEY", running.key)
        environment.setenv("FAREBOX_STRIPE_WEBHOOK_SECRETS", running.secret)
        environment.setenv("FAREBOX_STRIPE_URL", running.url)
        yield running


def sold(database: Database, fake: FakeStripe) -> Sold:
    """10 dollars for 1,000 microcredits, paid."""

    async def work() -> Sold:
        async with open_bank(database, size=1) as bank, open_desk(bank, fake) as desk:
            order = await desk.order()
            intent = fake.checkout.pay(await desk.session(order))
            assert intent is not None
            await desk.till.apply_payment(payment_intent=intent)
            return Sold(order.id, order.account_id, intent)

    return asyncio.run(work())


def failed(ran: Ran, code: str) -> str:
    assert (ran.code, ran.json["error"]["code"]) == (1, code), ran.out
    return str(ran.json["error"]["message"])


def test_an_order_is_refunded_by_its_id_and_by_its_payment(
    farebox: Farebox, fake: FakeStripe, module_database: Database
) -> None:
    one = sold(module_database, fake)
    part = farebox("refund", one.intent, "--amount", "2.50", "--reason", "sorry", "--json").json
    assert (part["state"], part["amount"], part["currency"]) == ("done", "2.50", "USD")
    assert (part["order"], part["credits"], part["reason"]) == (str(one.order), "0.00025", "sorry")
    assert part["refund"].startswith("re_")
    rest = farebox("refund", str(one.order))
    assert (rest.code, "7.50" in rest.out) == (0, True)
    assert farebox("accounts", "show", str(one.account), "--json").json["balance"] == "0"
    assert "All of" in failed(farebox("refund", str(one.order), "--json"), "refund_refunded")
    assert "All of" in failed(farebox("refund", str(one.order), "--all-left", "--json"), "refund_refunded")


def test_a_subscription_s_month_is_refunded_by_its_invoice(
    farebox: Farebox, fake: FakeStripe, module_database: Database
) -> None:
    async def billed() -> tuple[UUID, str]:
        async with open_bank(module_database, size=1) as bank, open_books(bank, fake) as books:
            account, subscription = await books.subscribed()
            invoice = fake.invoices.bill(subscription, tax=400)
            assert (await books.desks.plan_desk.apply(invoice)).outcome == "paid"
            return account, invoice

    account, invoice = asyncio.run(billed())
    part = farebox("refund", invoice, "--amount", "6.00", "--json").json
    assert (part["state"], part["credits"]) == ("done", "0.00125")
    assert farebox("accounts", "show", str(account), "--json").json["balance"] == "0.00375"


def test_the_same_name_is_the_same_refund(farebox: Farebox, fake: FakeStripe, module_database: Database) -> None:
    one = sold(module_database, fake)
    options = ("--amount", "1", "--ref", "ticket 7", "--json")
    first = farebox("refund", str(one.order), *options).json
    assert farebox("refund", str(one.order), *options).json == first
    assert farebox("accounts", "show", str(one.account), "--json").json["balance"] == "0.0009"


def test_what_stripe_refuses_ends_with_1_and_its_reason(
    farebox: Farebox, fake: FakeStripe, module_database: Database
) -> None:
    one = sold(module_database, fake)
    fake.disputes.open(one.intent, withdraw=False)
    assert "charged back" in failed(farebox("refund", str(one.order), "--json"), "refund_refused")
    shown = farebox("accounts", "show", str(one.account), "--json").json
    assert (shown["balance"], shown["held"]) == ("0.001", "0")


def test_a_lost_answer_is_resumed(farebox: Farebox, fake: FakeStripe, module_database: Database) -> None:
    one = sold(module_database, fake)
    # The client tries three times, under one key.
    for _ in range(3):
        fake.faults.on("POST /v1/refunds", LostReply())
    assert "--resume" in failed(farebox("refund", str(one.order), "--json"), "refund_unresolved")
    assert farebox("accounts", "show", str(one.account), "--json").json["held"] == "0.001"
    assert "--resume" in failed(farebox("refund", str(one.order), "--json"), "refund_under_way")
    [ended] = farebox("refund", "--resume", "--json").json["data"]
    assert (ended["order"], ended["state"]) == (str(one.order), "done")
    assert farebox("refund", "--resume").out == "No refund is under way.\n"
    assert len(fake.events_of("refund.created")) == 1
    assert farebox("accounts", "show", str(one.account), "--json").json["balance"] == "0"


def test_what_waits_still_ends_with_1(farebox: Farebox, fake: FakeStripe, module_database: Database) -> None:
    one = sold(module_database, fake)
    for _ in range(12):
        fake.faults.on("POST /v1/refunds", LostReply())
        fake.faults.on("GET /v1/refunds", LostReply())
    assert farebox("refund", str(one.order)).code == 1
    ran = farebox("refund", "--resume", "--json")
    assert ran.code == 1
    assert "Stripe can't be asked" in ran.json["data"][0]["waits_for"]
    fake.faults.clear()
    assert farebox("refund", "--resume").code == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((ORDER,), "not_found"), ((ORDER, "--amount", "1"), "not_found"), (("pi_nobodys",), "not_found")],
)
def test_an_order_that_is_none(farebox: Farebox, fake: FakeStripe, arguments: tuple[str, ...], code: str) -> None:
    failed(farebox("refund", *arguments, "--json"), code)


@pytest.mark.parametrize("amount", ["0", "-1", "1.005", "ten", "1e3"])
def test_an_amount_that_is_none(farebox: Farebox, fake: FakeStripe, module_database: Database, amount: str) -> None:
    one = sold(module_database, fake)
    failed(farebox("refund", str(one.order), f"--amount={amount}", "--json"), "invalid_value")


def test_an_order_and_resume_are_two_things(farebox: Farebox, fake: FakeStripe) -> None:
    for arguments in ([], [ORDER, "--resume"]):
        assert farebox("refund", *arguments).code == 2


def test_without_stripe_s_key_nothing_is_refunded(farebox: Farebox, environment: pytest.MonkeyPatch) -> None:
    environment.delenv("FAREBOX_STRIPE_KEY", raising=False)
    assert "FAREBOX_STRIPE_KEY" in failed(farebox("refund", ORDER, "--json"), "settings")
