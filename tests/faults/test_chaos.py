"""`make chaos` and `make soak` say what they found, and fail where they found something."""

import os
from pathlib import Path
from typing import Any, cast

import pytest

from tests.faults import chaos, soak
from tests.faults.chaos import Row, table
from tests.faults.nursery import Process
from tests.faults.soak import Sample, slope
from tests.faults.trouble import Found


def test_the_table_says_what_was_tried_and_each_wrong() -> None:
    said = table([Row("kills", "10 kills", 12.0, "calls 3"), Row("restarts", "5 stops", 3.0, "", ["a lost charge"])])
    assert "10 kills" in said
    assert "nothing wrong" in said
    assert "1 WRONG" in said
    assert "! a lost charge" in said


def test_trouble_that_met_nothing_proves_nothing() -> None:
    assert chaos._filled(Row("kills", ""), Found(blows=5)).wrongs
    assert not chaos._filled(Row("kills", ""), Found(blows=5, cut_short=9, exact=9)).wrongs


async def test_a_trial_that_breaks_is_a_wrong_and_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(_: Any) -> Row:
        raise RuntimeError("no cluster")

    async def works(_: Any) -> Row:
        return Row("restarts", "1")

    monkeypatch.setattr(chaos, "TRIALS", {"kills": breaks, "restarts": works})
    rows = await chaos.run(cast(Any, None), ["kills", "restarts"])
    assert [bool(row.wrongs) for row in rows] == [True, False]
    assert "no cluster" in rows[0].wrongs[0]


def test_a_slope_is_per_hour() -> None:
    grows = [Sample(float(second), 100 + second / 1800, 1, 1) for second in range(0, 600, 5)]
    assert slope(grows) == pytest.approx(2.0)
    assert slope([Sample(float(second), 100.0, 1, 1) for second in range(9)]) == pytest.approx(0.0)


def test_a_process_is_looked_at_through_the_kernel(tmp_path: Path) -> None:
    sample = soak.look(Process(os.getpid(), tmp_path, "me", None, cast(Any, None)))
    assert sample.mib > 1
    assert sample.descriptors > 2
    assert sample.threads >= 1
