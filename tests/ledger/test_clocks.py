"""The clocks: both go forward, at the same pace while the machine is awake."""

import time

from proxy.ledger.clocks import awake, elapsed


def test_they_go_forward_together() -> None:
    first = (awake(), elapsed())
    time.sleep(0.05)
    second = (awake(), elapsed())
    assert second[0] > first[0]
    assert second[1] > first[1]
    apart = [a - e for a, e in (first, second)]
    assert abs(apart[0] - apart[1]) < 0.02
    assert elapsed() >= awake() - 0.001, "what was slept through is in the one and not in the other"
