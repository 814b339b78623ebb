"""What the demo adds: an account, a key and a grant, made once; and routes that lead to its upstream."""

import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.control.operations import Operations
from proxy.control.reload import read_catalog
from proxy.core.keys import Peppers
from proxy.core.money import MICROCREDITS_PER_CREDIT
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.control import ControlLedger
from proxy.local.demo import demo_key, instructions, through_demo_upstream
from proxy.local.state import LocalError, StateDirectory
from tests.postgres import Database

ROOT = Path(__file__).parents[2]
THOUSAND = 1000 * MICROCREDITS_PER_CREDIT


@pytest.fixture
async def operations(database: Database) -> AsyncIterator[Operations]:
    pool = await create_pool(database.app, Role.CONTROL, size=1)
    yield Operations(ControlLedger(pool), Peppers.parse("a pepper of sufficient length"))
    await pool.close()


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    found = StateDirectory(tmp_path / "state")
    found.make()
    return found


async def test_the_second_start_finds_the_key_and_grants_nothing(operations: Operations, state: StateDirectory) -> None:
    first = await demo_key(operations, state)
    second = await demo_key(operations, state)
    assert (first.text, first.account.available) == (second.text, THOUSAND)
    assert second.account.available == THOUSAND
    assert stat.S_IMODE((state.path / "demo.json").stat().st_mode) == 0o600
    assert len(await operations.keys(first.account.id)) == 1


async def test_a_revoked_key_is_replaced_without_a_grant(operations: Operations, state: StateDirectory) -> None:
    first = await demo_key(operations, state)
    [key] = await operations.keys(first.account.id)
    await operations.revoke_key(key.id)
    second = await demo_key(operations, state)
    assert second.text != first.text
    assert second.account.available == THOUSAND


async def test_a_key_file_of_another_ledger_is_not_believed(operations: Operations, state: StateDirectory) -> None:
    state.write_json("demo.json", {"account": "x", "id": "000000000000", "key": "fb_other"})
    assert (await demo_key(operations, state)).text != "fb_other"


def test_every_route_leads_to_the_demo_upstream_at_the_same_price() -> None:
    catalog = read_catalog(ROOT / "pricing.yaml", ROOT / "config/upstreams.yaml")
    moved = through_demo_upstream("http://127.0.0.1:1/v1")(catalog)
    assert (moved.version, moved.body) == (catalog.version, catalog.body)
    for model, route in moved.routes.items():
        assert route.upstream.base_url == "http://127.0.0.1:1/v1"
        assert route.upstream.api_key_env is None
        assert route.standard == catalog.routes[model].standard
    assert {upstream.base_url for upstream in moved.upstreams.values()} == {"http://127.0.0.1:1/v1"}


async def test_the_instructions_name_the_key_and_the_address(operations: Operations, state: StateDirectory) -> None:
    demo = await demo_key(operations, state)
    text = instructions("http://127.0.0.1:8080/v1", demo, model="m", source="From here.")
    first = text.splitlines()[0]
    assert "ready" in first
    assert "http://127.0.0.1:8080/v1" in first
    assert "1000 credits" in text
    assert text.count(demo.text) == 4


def test_a_pepper_is_made_once(state: StateDirectory) -> None:
    pepper = state.pepper()
    assert len(pepper) == 64
    assert state.pepper() == pepper
    assert stat.S_IMODE((state.path / "pepper").stat().st_mode) == 0o600


def test_a_file_that_cannot_be_written_is_named(state: StateDirectory) -> None:
    (state.path / "demo.json").mkdir()
    with pytest.raises(LocalError, match=r"demo\.json can't be written"):
        state.write_json("demo.json", {})
    assert list(state.path.glob("*.tmp")) == []
