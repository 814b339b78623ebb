"""The shapes: exact amounts, signs and times."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.control.views import (
    exact_credits,
    list_view,
    page,
    receipt_view,
    time_text,
    transaction_id,
    transfer_view,
)
from proxy.core.money import format_credits
from proxy.core.pricing import Price, charge
from proxy.core.usage import Usage
from proxy.ledger.records import Ended, Transfer

ACCOUNT = UUID("01900000-0000-7000-8000-000000000001")
NOW = datetime(2027, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)

TRANSFER = Transfer(
    account_id=ACCOUNT,
    version=7,
    kind="charge",
    debit=str(ACCOUNT),
    credit="revenue",
    amount=1_500,
    balance_after=10**6,
    debt_after=0,
    hold_id=UUID(int=9),
    reference=None,
    actor="cli:ann",
    reason="why",
    created_at=NOW,
)

ENDED = Ended(
    hold_id=UUID(int=9),
    account_id=ACCOUNT,
    key_id="A1b2",
    state="final",
    model="gpt-4o",
    variant="standard",
    price_version="a" * 64,
    amount=10_000,
    charge=4_001,
    overrun=0,
    reversed=0,
    usage=Usage(input=1_000, output=3),
    usage_source="reported",
    capped=None,
    ending="complete",
    quote=json.dumps({"bounds": {"input": 1_000, "output": 16}}),
    receipt=json.dumps({"raw": {"prompt_tokens": 1_000}}),
    opened_at=NOW,
    ended_at=NOW,
    rates=(4_000_000, 0, 0, 0, 333, 0, 0),
    per_request=0,
)


@given(st.integers(0, 10**30), st.integers(1, 15))
def test_an_exact_amount_is_exact(numerator: int, places: int) -> None:
    text = exact_credits(numerator, places)
    assert Fraction(text) * 10**places == numerator
    assert "." not in text or not text.endswith("0")


@pytest.mark.parametrize(("zone", "hour"), [(UTC, "03"), (timezone(timedelta(hours=2)), "01")])
def test_times_are_utc_to_the_microsecond(zone: timezone, hour: str) -> None:
    assert time_text(NOW.replace(tzinfo=zone)) == f"2027-01-02T{hour}:04:05.678901Z"


def test_a_transfer_that_takes_is_negative() -> None:
    view = transfer_view(TRANSFER, internal=False)
    assert view["amount"] == "-0.0015"
    assert view["id"] == transaction_id(TRANSFER) == f"{ACCOUNT}-7"
    back = replace(TRANSFER, debit="grants", credit=str(ACCOUNT))
    assert transfer_view(back, internal=True)["amount"] == "0.0015"
    assert transfer_view(back, internal=True)["other_side"] == "grants"


def test_only_the_operator_sees_who_and_why() -> None:
    assert transfer_view(TRANSFER, internal=False).keys().isdisjoint({"actor", "reason", "other_side"})
    assert transfer_view(TRANSFER, internal=True)["actor"] == "cli:ann"


def test_a_receipt_s_rows_are_exact_and_add_up_to_the_charge() -> None:
    view = receipt_view(ENDED)
    assert view["prices"] == [
        {"class": "input", "credits_per_1k": "0.004", "tokens": 1_000, "amount": "0.004"},
        {"class": "output", "credits_per_1k": "0.000000333", "tokens": 3, "amount": "0.000000000999"},
    ]
    assert (view["held"], view["charge"], view["released"]) == ("0.01", "0.004001", "0.005999")
    assert view["quote"] == {"bounds": {"input": 1_000, "output": 16}}
    assert view["answer"] == {"raw": {"prompt_tokens": 1_000}}
    assert view["usage"]["source"] == "reported"


@given(
    st.tuples(*[st.integers(0, 10**7)] * 7),
    st.tuples(*[st.integers(0, 10**9)] * 7),
    st.integers(0, 10**6),
)
def test_the_rows_round_up_once_to_the_charge(tokens: tuple[int, ...], rates: tuple[int, ...], fee: int) -> None:
    usage, price = Usage(*tokens), replace(Price(*rates), per_request=fee)
    view = receipt_view(replace(ENDED, usage=usage, rates=rates, per_request=fee, charge=charge(price, usage)))
    total = sum((Decimal(row["amount"]) for row in view["prices"]), Decimal(0))
    assert view["charge"] == format_credits(math.ceil(total * 10**6))


def test_a_receipt_of_an_open_request() -> None:
    view = receipt_view(replace(ENDED, state="open", charge=None, usage=None, receipt=None, ended_at=None, rates=None))
    assert (view["charge"], view["released"], view["usage"], view["prices"], view["answer"]) == (
        None,
        None,
        None,
        [],
        None,
    )


def test_a_receipt_of_a_charge_above_its_hold_released_nothing() -> None:
    view = receipt_view(replace(ENDED, amount=1_000, overrun=3_001))
    assert (view["released"], view["overrun"]) == ("0", "0.003001")


@pytest.mark.parametrize("stored", ["", "{", "[" * 10_000, None])
def test_a_receipt_survives_whatever_was_stored(stored: str | None) -> None:
    view = receipt_view(replace(ENDED, quote=stored, receipt=stored))
    assert (view["quote"], view["answer"]) == (None, None)


def test_a_page_says_whether_there_is_more() -> None:
    items = [{"id": str(n)} for n in range(3)]
    assert page(items, 2) == list_view(items[:2], has_more=True)
    assert page(items, 3)["has_more"] is False
    empty = page([], 3)
    assert (empty["first_id"], empty["last_id"], empty["has_more"]) == (None, None, False)
