"""Reading fields: each reader takes what is right and names what is wrong."""

from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.control.fields import Fields, clean_text, parse_uuid, storable
from proxy.core.errors import InvalidRequest
from proxy.core.money import AMOUNT_MAX, format_credits


@given(st.integers(1, AMOUNT_MAX))
def test_an_amount_comes_back_as_it_was(amount: int) -> None:
    assert Fields({"amount": format_credits(amount)}).amount("amount") == amount


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
READERS = ("text", "amount", "flag", "words", "moment", "day", "uuid")


@pytest.mark.parametrize("reader", READERS)
@given(value=JSON_VALUES)
def test_a_reader_takes_anything_or_names_it(reader: str, value: Any) -> None:
    refusal = None
    try:
        getattr(Fields({"member": value}), reader)("member")
    except InvalidRequest as error:
        refusal = error
    assert refusal is None or (refusal.param == "member" and "member" in refusal.message)


@given(JSON_VALUES)
def test_seconds_are_whole_and_bounded(value: Any) -> None:
    try:
        found = Fields({"s": value}).seconds("s", most=60)
    except InvalidRequest:
        return
    assert found is None or 0 <= found <= 60


@pytest.mark.parametrize("text", ["0", "101", "000010999999", "1" + "0" * 5000, "-1", "1.0", "\u0661", " 1", "1\n", ""])
def test_a_page_has_a_bound_however_its_size_is_written(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Fields({"limit": text}).limit()
    assert refused.value.param == "limit"
    assert Fields({"limit": "100"}).limit() == 100


def test_a_missing_member_is_none_or_required() -> None:
    fields = Fields({"null": None})
    assert fields.text("missing") is None
    assert fields.given("null")
    assert not fields.given("missing")
    for name in ("missing", "null"):
        with pytest.raises(InvalidRequest, match="is required"):
            fields.required_text(name)


def test_a_member_that_nobody_took_is_refused() -> None:
    fields = Fields({"name": "x", "nmae": "y"})
    fields.text("name")
    with pytest.raises(InvalidRequest, match="known are name") as caught:
        fields.done()
    assert caught.value.code == "unknown_parameter"


def test_times_and_days() -> None:
    fields = Fields({"at": "2027-01-31T12:00:00+02:00", "on": "2027-01-31"})
    assert fields.moment("at") == datetime(2027, 1, 31, 10, tzinfo=UTC)
    assert fields.day("on") == date(2027, 1, 31)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2027-01-31", "31.1.2027"])
def test_a_time_that_the_database_could_not_keep(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Fields({"at": text}).moment("at")


@given(st.text(st.characters(codec=None)))
def test_what_is_storable_is_clean(text: str) -> None:
    assert clean_text(storable(text))
    assert len(storable(text)) == len(text)


@given(st.uuids())
def test_a_uuid_has_one_spelling(value: UUID) -> None:
    assert parse_uuid(str(value)) == value
    assert parse_uuid(str(value).upper()) == value
    for other in (f"{{{value}}}", value.hex, f" {value}", f"urn:uuid:{value}", str(value)[:-1]):
        assert parse_uuid(other) is None
