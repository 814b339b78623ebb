"""`farebox auto-topup`: set, shown and switched off, over a real ledger."""

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from proxy.ledger.connect import connect
from tests.cli.conftest import Farebox
from tests.e2e.proxy import pricing_yaml, upstreams_yaml
from tests.postgres import Database

PACKS = """
packs:
  starter:
    credits: 1000
    price: 10.00
    currency: USD
"""
WISH = ("--pack", "starter", "--below", "5", "--monthly-max", "100")


@pytest.fixture
def shop(farebox: Farebox, environment: pytest.MonkeyPatch, tmp_path: Path) -> Farebox:
    """The command, where packs are sold in Stripe's test mode."""
    (tmp_path / "pricing.yaml").write_text(pricing_yaml() + PACKS)
    (tmp_path / "upstreams.yaml").write_text(upstreams_yaml("http://127.0.0.1:1/v1"))
    environment.setenv("FAREBOX_PRICING", str(tmp_path / "pricing.yaml"))
    environment.setenv("FAREBOX_UPSTREAMS", str(tmp_path / "upstreams.yaml"))
    environment.setenv("FAREBOX_STRIPE_KEY", "sk_test_ofnobody")
    environment.setenv("FAREBOX_STRIPE_WEBHOOK_SECRETS", "whsec_ofnobody")
    return farebox


def account(farebox: Farebox, database: Database, *, method: str | None) -> str:
    made = str(farebox("accounts", "create", f"acme {uuid4()}", "--json").json["id"])

    async def save() -> None:
        owner = await connect(database.owner)
        await owner.execute(
            "INSERT INTO farebox.stripe_customers (account_id, livemode, customer, payment_method)"
            " VALUES ($1, false, $2, $3)",
            *(made, f"cus_{uuid4().hex}", method),
        )
        await owner.close()

    asyncio.run(save())
    return made


def test_it_is_set_shown_and_switched_off(shop: Farebox, module_database: Database) -> None:
    owner = account(shop, module_database, method="pm_1")
    assert shop("auto-topup", "show", owner, "--json").json == {"object": "auto_topup", "state": "off"}
    made = shop("auto-topup", "set", owner, *WISH, "--json")
    assert made.code == 0, made.err
    view = made.json
    assert (view["state"], view["pack"], view["threshold"], view["monthly_max"]) == ("ready", "starter", "5", "100.00")
    assert shop("auto-topup", "show", owner, "--json").json == view
    assert "100.00" in shop("auto-topup", "show", owner).out
    assert shop("auto-topup", "off", owner, "--json").json["state"] == "off"


def test_what_cannot_be_had_is_said(shop: Farebox, module_database: Database) -> None:
    owner = account(shop, module_database, method=None)
    ran = shop("auto-topup", "set", owner, *WISH, "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "payment_method_required")
    ran = shop("auto-topup", "set", owner, "--pack", "none", *WISH[2:], "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "unknown_pack")
    assert shop("auto-topup", "set", "nobody", *WISH).code == 1
    assert shop("auto-topup", "set", owner).code == 2


def test_it_needs_stripe_s_key(shop: Farebox, environment: pytest.MonkeyPatch, module_database: Database) -> None:
    owner = account(shop, module_database, method="pm_2")
    environment.delenv("FAREBOX_STRIPE_KEY")
    environment.delenv("FAREBOX_STRIPE_WEBHOOK_SECRETS")
    ran = shop("auto-topup", "set", owner, *WISH)
    assert ran.code == 1
    assert "FAREBOX_STRIPE_KEY" in ran.err
