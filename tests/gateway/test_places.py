"""How many calls of one key run at once."""

import pytest

from proxy.core.errors import TooManyRequests
from proxy.gateway.places import Places


def nothing_open(_key_id: str) -> int:
    return 0


def test_as_many_as_may_and_not_one_more() -> None:
    places = Places(2, nothing_open)
    with places.place() as first, places.place() as second, places.place() as third:
        first.take("key")
        second.take("key")
        with pytest.raises(TooManyRequests) as refused:
            third.take("key")
        assert refused.value.code == "concurrency_limit"
        assert refused.value.headers["retry-after"] == "1"
        first.pass_on()
        third.take("key")
    assert places.arriving == {}


def test_keys_have_places_of_their_own() -> None:
    places = Places(1, nothing_open)
    with places.place() as first, places.place() as second:
        first.take("one")
        second.take("other")


def test_open_exchanges_have_places_and_what_was_passed_on_counts_once() -> None:
    exchanges = {"key": 0}
    places = Places(2, exchanges.__getitem__)
    with places.place() as first, places.place() as second, places.place() as third:
        first.take("key")
        exchanges["key"] += 1
        first.pass_on()
        first.pass_on()
        second.take("key")
        with pytest.raises(TooManyRequests):
            third.take("key")
    assert places.arriving == {}


def fail_in_a_place(places: Places) -> None:
    with places.place() as place:
        place.take("key")
        raise KeyError


def test_a_call_that_fails_gives_its_place_back() -> None:
    places = Places(1, nothing_open)
    for _ in range(3):
        with pytest.raises(KeyError):
            fail_in_a_place(places)
    assert places.arriving == {}


def test_no_limit() -> None:
    places = Places(0, lambda _: 1_000_000)
    with places.place() as place:
        place.take("key")
