"""Refusals: OpenAI's shape, the status that says whose fault it is, and what SDKs read about retrying."""

import json

import pytest

from proxy.core import errors
from proxy.core.errors import CreditsHeld, InvalidRequest, OutOfCredits, Refusal, Unavailable

REFUSALS = [getattr(errors, name) for name in errors.__all__ if name != "Refusal"]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_every_refusal_is_an_openai_error(refusal: type[Refusal]) -> None:
    body = refusal("Not now.", code="some_code", param="model").body()
    assert set(body) == {"error"}
    assert body["error"] == {"message": "Not now.", "type": refusal.type, "param": "model", "code": "some_code"}
    json.dumps(body)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_no_final_refusal_has_a_status_that_clients_retry(refusal: type[Refusal]) -> None:
    # SDKs retry both, unless they are told not to.
    assert refusal.status not in (408, 409) or refusal.retry is False
    assert 400 <= refusal.status < 600


def test_out_of_credits_asks_clients_not_to_retry_and_held_credits_ask_them_to() -> None:
    assert OutOfCredits("Empty.", code="insufficient_quota").headers == {"x-should-retry": "false"}
    assert CreditsHeld("Held.", code="credits_held", headers={"retry-after": "1"}).headers == {
        "retry-after": "1",
        "x-should-retry": "true",
    }
    assert OutOfCredits("Empty.", code="x").type == "insufficient_quota"


def test_a_refusal_that_says_nothing_of_retrying_sends_no_header() -> None:
    assert Unavailable("Later.", code="x").headers == {}


def test_the_caller_may_overrule_the_retry_header() -> None:
    assert OutOfCredits("x", code="x", headers={"x-should-retry": "true"}).headers == {"x-should-retry": "true"}


def test_details_stand_beside_the_message() -> None:
    body = InvalidRequest("Too long.", code="too_long", details={"limit": 10}).body()
    assert body["error"]["limit"] == 10


def test_a_refusals_headers_are_its_own() -> None:
    given = {"retry-after": "1"}
    CreditsHeld("x", code="x", headers=given)
    assert given == {"retry-after": "1"}
