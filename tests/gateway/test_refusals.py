"""Every outcome of a reserve becomes an error that says the right thing."""

import pytest

from proxy.core.errors import Unavailable
from proxy.gateway.refusals import refusal_for
from proxy.ledger.records import Reserved, ReserveOutcome

EXPECTED = {
    ReserveOutcome.INSUFFICIENT: (402, "insufficient_quota", "false"),
    ReserveOutcome.CREDITS_HELD: (402, "credits_held", "true"),
    ReserveOutcome.SPEND_LIMIT: (402, "spend_limit_reached", "false"),
    ReserveOutcome.KEY_EXPIRED: (401, "api_key_expired", None),
}


@pytest.mark.parametrize("outcome", [one for one in ReserveOutcome if one is not ReserveOutcome.GRANTED])
def test_each_outcome(outcome: ReserveOutcome) -> None:
    refusal = refusal_for(Reserved(outcome, balance=5_000_000, held=2_000_000), 9_500_000)
    status, code, retry = EXPECTED.get(outcome, (503, "ledger_unavailable", None))
    assert (refusal.status, refusal.code, refusal.headers.get("x-should-retry")) == (status, code, retry)
    if status == 402:
        assert refusal.details["available"] == "3"
        assert refusal.details["held"] == "2"
        assert refusal.details["needed"] == "9.5"
    if isinstance(refusal, Unavailable):
        assert refusal.headers["retry-after"]


def test_debt_leaves_nothing_available() -> None:
    refusal = refusal_for(Reserved(ReserveOutcome.INSUFFICIENT, balance=7, held=7, debt=1_500_000), 1)
    assert refusal.details["available"] == "0"
    assert "1.5" in refusal.message
