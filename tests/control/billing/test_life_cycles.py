"""Whatever order the webhooks of a purchase come in, however often, and eight at once: the ledger is what an oracle
says. A part of what `make chaos` does with all orders."""

from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from tests.control.billing.lives import KINDS, ORDERS, at_once, held_up, lived, one_by_one, order_of, plan_of, troubled
from tests.control.billing.lives_scene import Scene, open_scene
from tests.fakes.stripe import FakeStripe
from tests.postgres import Database

ONE_BY_ONE = range(0, ORDERS, 131)
"""Some of all orders: the step is a prime, so that each slot comes at each place."""
AT_ONCE = range(60, ORDERS, 173)
HELD_UP = range(20, ORDERS, 173)
OTHERS = range(ORDERS, ORDERS + 4 * len(KINDS))


@pytest.fixture
async def scene(module_database: Database) -> AsyncIterator[Scene]:
    with FakeStripe() as stripe:
        async with open_scene(module_database, stripe) as opened:
            yield opened


async def test_in_whatever_order_webhooks_come_the_ledger_is_what_is_known(scene: Scene) -> None:
    assert await lived(scene, one_by_one, ONE_BY_ONE) == []
    assert await scene.audit() == []


async def test_eight_at_once_in_two_copies_come_to_the_same(scene: Scene) -> None:
    troubled(scene.stripe, seed=1)
    assert await lived(scene, at_once, AT_ONCE) == []
    assert len({type(fault) for _, fault in scene.stripe.faults.hit}) >= 4
    assert await scene.audit() == []


async def test_what_arrives_late_undoes_nothing(scene: Scene) -> None:
    assert await lived(scene, held_up, HELD_UP) == []
    assert await scene.audit() == []


async def test_other_ways_to_pay_or_not_to(scene: Scene) -> None:
    assert await lived(scene, one_by_one, OTHERS) == []
    assert await lived(scene, held_up, OTHERS) == []
    troubled(scene.stripe, seed=2)
    assert await lived(scene, at_once, OTHERS) == []
    assert await scene.audit() == []


def test_a_number_is_an_order() -> None:
    orders = [tuple(order_of(number)) for number in range(ORDERS)]
    assert len(set(orders)) == ORDERS >= 5_000
    assert all(one < other for one, other in pairwise(tuple(map(_place, order)) for order in orders))
    for numbers in (ONE_BY_ONE, AT_ONCE, HELD_UP):
        assert {(place, slot) for number in numbers for place, slot in enumerate(orders[number])} == {
            (place, slot) for place in range(7) for slot in orders[0]
        }
    assert {plan_of(number, "at_once").kind for number in OTHERS} == set(KINDS)


def _place(slot: str) -> int:
    return order_of(0).index(slot)
