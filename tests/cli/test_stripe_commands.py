"""`farebox stripe setup`, `check` and `reconcile`: as an operator runs them, against the fake Stripe."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from stripe import StripeClient

from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from tests.cli.conftest import Farebox
from tests.control.billing.till import open_desk
from tests.fakes.stripe import FakeStripe
from tests.ledger.bank import open_bank
from tests.postgres import Database

URL = "https://farebox.example.com"
OTHER = "https://other.example.com"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeStripe]:
    """One for the module, as its database is: a reconciliation looks at all that either has."""
    with FakeStripe() as running:
        yield running


@pytest.fixture
def stripe(fake: FakeStripe, environment: pytest.MonkeyPatch) -> FakeStripe:
    """Stripe, and an environment that knows it."""
    environment.setenv("FAREBOX_STRIPE_KEY", fake.key)
    environment.setenv("FAREBOX_STRIPE_URL", fake.url)
    environment.delenv("FAREBOX_STRIPE_WEBHOOK_SECRETS", raising=False)
    return fake


@pytest.fixture
def priced(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that sell something."""
    (tmp_path / "pricing.yaml").write_text(
        "models:\n  m: {upstream: up, input: 1, output: 1, max_output_tokens: 10}\n"
        "plans:\n  price_1Abc: {credits: 1, price: 1, currency: USD}\n"
    )
    (tmp_path / "upstreams.yaml").write_text(
        "upstreams:\n  up: {dialect: openai, base_url: 'http://127.0.0.1:1/v1', api_key: none}\n"
    )
    environment.setenv("FAREBOX_PRICING", str(tmp_path / "pricing.yaml"))
    environment.setenv("FAREBOX_UPSTREAMS", str(tmp_path / "upstreams.yaml"))


async def a_payment(database: Database, stripe: FakeStripe) -> str:
    """One that nobody has told of: its PaymentIntent."""
    async with open_bank(database, size=1) as bank, open_desk(bank, stripe) as desk:
        order = await desk.order()
        payment = stripe.checkout.pay(await desk.session(order))
        assert payment is not None
        return payment


def test_setup_prints_the_secret_once_and_check_is_content(
    bare: Farebox, stripe: FakeStripe, environment: pytest.MonkeyPatch
) -> None:
    before = set(stripe.webhooks.secrets.values())
    made = bare("stripe", "setup", "--url", URL)
    assert made.code == 0, made.err
    secret = made.out.split()[-1]
    assert set(stripe.webhooks.secrets.values()) - before == {secret}
    again = bare("stripe", "setup", "--url", URL)
    assert (again.code, "whsec_" in again.out) == (0, False)
    assert bare("stripe", "check").code == 1
    environment.setenv("FAREBOX_STRIPE_WEBHOOK_SECRETS", secret)
    checked = bare("stripe", "check", "--url", URL, "--json")
    assert (checked.code, checked.json["ok"]) == (0, True)
    assert secret not in checked.out
    assert "FAIL" not in bare("stripe", "check").out


def test_a_secret_is_rotated_by_a_second_endpoint(bare: Farebox, stripe: FakeStripe) -> None:
    first = bare("stripe", "setup", "--url", OTHER, "--json").json
    stripe.clock.advance(60)
    second = bare("stripe", "setup", "--url", OTHER, "--anew", "--json").json
    assert (first["done"], second["done"]) == ("made", "made")
    assert first["secret"] != second["secret"]
    assert first["url"] == second["url"] == f"{OTHER}/webhooks/stripe"
    retired = bare("stripe", "setup", "--url", OTHER, "--retire-others", "--json").json
    assert (retired["id"], retired["retired"], retired["secret"]) == (second["id"], [first["id"]], None)


def test_what_setup_can_t_do_is_said(bare: Farebox, stripe: FakeStripe, environment: pytest.MonkeyPatch) -> None:
    assert bare("stripe", "setup").code == 2
    assert bare("stripe", "setup", "--url", URL, "--anew", "--retire-others").code == 2
    plain = bare("stripe", "setup", "--url", "http://farebox.example.com", "--json")
    assert (plain.code, plain.json["error"]["code"]) == (1, "invalid_value")
    environment.delenv("FAREBOX_STRIPE_KEY")
    for command in (("setup", "--url", URL), ("check",)):
        off = bare("stripe", *command, "--json")
        assert (off.code, off.json["error"]["code"]) == (1, "settings")
    environment.setenv("FAREBOX_STRIPE_KEY", "sk_test_x")
    environment.setenv("FAREBOX_STRIPE_URL", "http://127.0.0.1:1")
    away = bare("stripe", "setup", "--url", URL, "--json")
    assert (away.code, away.json["error"]["code"]) == (1, "stripe")


@pytest.mark.usefixtures("priced")
def test_reconcile_applies_what_was_missed_and_ends_with_0(
    farebox: Farebox, stripe: FakeStripe, module_database: Database
) -> None:
    payment = asyncio.run(a_payment(module_database, stripe))
    first = farebox("stripe", "reconcile", "--json")
    assert first.code == 0, first.out
    view = first.json
    assert (view["differing"], view["failures"]) == ([], [])
    assert view["ok"] is True
    assert {
        "kind": "payment",
        "currency": "USD",
        "count": 1,
        "at_stripe": "10.00",
        "here": "10.00",
        "difference": "0.00",
    } in view["totals"]
    assert view["mended"] != []
    second = farebox("stripe", "reconcile", "--since", "30d")
    assert second.code == 0
    assert "The books agree: the difference is 0." in second.out
    assert "payments: 1 looked at" in second.err
    assert farebox("stripe", "reconcile", "--since", "30d", "--json").json["mended"] == []
    assert stripe.object(payment)["status"] == "succeeded"


@pytest.mark.usefixtures("priced")
def test_reconcile_ends_with_1_where_something_differs(farebox: Farebox, stripe: FakeStripe) -> None:
    client = StripeClient(stripe.key, base_addresses={"api": stripe.url})
    payment = client.v1.payment_intents.create(
        {
            "amount": 700,
            "currency": "usd",
            "payment_method": "pm_card_visa",
            "confirm": True,
            "metadata": {ORDER_KEY: str(uuid4()), ACCOUNT_KEY: str(uuid4())},
        }
    ).id
    ran = farebox("stripe", "reconcile", "--json")
    assert ran.code == 1
    assert [(one["id"], one["at_stripe"], one["here"], one["why"]) for one in ran.json["differing"]] == [
        (payment, "7.00", None, "in quarantine: unknown_order")
    ]
    told = farebox("stripe", "reconcile")
    assert told.code == 1
    assert payment in told.out
    assert "The books differ" in told.out


@pytest.mark.usefixtures("priced")
@pytest.mark.usefixtures("stripe")
def test_reconcile_says_that_stripe_is_away(farebox: Farebox, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FAREBOX_STRIPE_URL", "http://127.0.0.1:1")
    away = farebox("stripe", "reconcile", "--json")
    assert (away.code, away.json["error"]["code"]) == (1, "stripe")
