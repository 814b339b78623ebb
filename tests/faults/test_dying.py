"""The suite's own tools can fail: points that are nowhere, judges that see nothing, fuses that burn too soon."""

import inspect
import json
import signal
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.fakes.upstream import chunk
from tests.faults import dying
from tests.faults.caller import Call
from tests.faults.judge import Verdict, counted, disturbed, judge, reported
from tests.faults.nursery import running_nursery
from tests.faults.points import Moment, Point, Seen
from tests.faults.provider import WORD, Answer, running_provider
from tests.faults.scene import open_scene
from tests.postgres import Database

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("point", dying.ALL_POINTS.values(), ids=dying.ALL_POINTS)
def test_a_point_is_where_the_table_says(point: Point) -> None:
    place, name = dying.find(point.target)
    function = getattr(place, name)
    if point.moment in (Moment.IN_FLIGHT, Moment.UNDER_WAY):
        assert inspect.iscoroutinefunction(function)


def test_a_fuse_burns_at_the_nth_call_that_counts(tmp_path: Path) -> None:
    point = Point("x", "stream", "os:getpid", Moment.BEFORE, nth=2, when=lambda seen: seen.args[0] > 0)
    fuse = dying.Fuse(point, tmp_path / "note")
    assert [fuse.is_it(Seen((number,), {})) for number in (0, 1, 0, 2, 3)] == [False, False, False, True, False]


def test_a_command_dies_by_itself_too(tmp_path: Path) -> None:
    note = tmp_path / "note"
    dying_there = ["-m", "tests.faults.dying", "--at", "migrate.roles", "--note", str(note), "--", "migrate"]
    # It never gets that far without a database: no note, and an end of its own.
    nowhere = ["--database-url", "postgresql://nobody@127.0.0.1:1/x"]
    ended = subprocess.run([sys.executable, *dying_there, *nowhere], cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert not note.exists()


def test_a_caller_counts_words_across_pieces() -> None:
    call = Call("x", uuid4(), 200)
    data = chunk(WORD) + chunk(WORD) + b": comment\n\n" + chunk(finish="stop")
    for cut in range(1, len(data)):
        call = Call("x", uuid4(), 200)
        call.take(data[:cut])
        call.take(data[cut:])
        assert len(call.words) == 2
        assert call.outcome == "running"
    call.take(b"data: [DO")
    call.take(b"NE]\n\n")
    assert call.outcome == "whole"
    call = Call("x", uuid4(), 200)
    call.take(b"data: " + json.dumps({"error": {"code": "shutting_down"}}).encode() + b"\n\n")
    assert call.code == "shutting_down"


ELSEWHERE = (
    "UPDATE farebox.holds SET quote = replace(quote, '200', '201')",
    "UPDATE farebox.holds SET quote = replace(quote, '201', '200')",
)
DAMAGE = (
    ("UPDATE farebox.holds SET charge = charge + 1", "UPDATE farebox.holds SET charge = charge - 1", "audit"),
    ("UPDATE farebox.accounts SET balance = balance - 1", "UPDATE farebox.accounts SET balance = balance + 1", "grant"),
    ("UPDATE farebox.accounts SET held = held + 1", "UPDATE farebox.accounts SET held = held - 1", "holds 1"),
    (*ELSEWHERE, "no call has made"),
    (*ELSEWHERE, "never held"),
    ("UPDATE farebox.holds SET state = 'open', charge = NULL, ended_at = NULL", "SELECT 1", "still held"),
)


async def test_the_judge_acquits_what_is_right_and_sees_each_damage(database: Database, tmp_path: Path) -> None:
    async with (
        running_provider() as provider,
        running_nursery() as nursery,
        open_scene(database, provider, nursery, tmp_path) as scene,
    ):
        worker = await scene.worker("worker")
        await scene.call(worker, await scene.customer(), Answer(words=3))
        await scene.settled()
        verdict = await judge(scene)
        assert (verdict.wrongs, verdict.calls, verdict.exact, verdict.disturbed) == ([], 1, 1, 0)
        assert verdict.audited > 0
        for damage, repair, complaint in DAMAGE:
            await scene.sql.execute(damage)
            found = (await judge(scene)).wrongs
            assert any(complaint in wrong for wrong in found), (damage, found)
            await scene.sql.execute(repair)


@pytest.mark.parametrize(
    ("charge", "words", "period", "wrong"),
    [
        (counted(9), 9, 1.0, False),
        (counted(9) + 1, 9, 1.0, True),
        (reported(9), 9, 1.0, False),
        # Of nine words seven came in time, of which a mark may leave out four.
        (reported(3), 9, 2.0, False),
        (reported(2), 9, 2.0, True),
        (0, 9, 2.0, True),
        (0, 9, 10.0, False),
        (1, 0, 1.0, True),
    ],
)
def test_the_judge_bounds_what_a_killed_call_costs(charge: int, words: int, period: float, wrong: bool) -> None:
    # A word each second, the kill with the last: within two seconds of it came all but three.
    call = Call("x", uuid4(), 200, words=[float(second) for second in range(words)])
    hold = dict.fromkeys(("id", "state", "ending", "usage", "usage_source", "mark", "capped")) | {"charge": charge}
    verdict = Verdict()
    disturbed(verdict, call, hold, died=words - 1.0, sent=words, period=period)
    assert bool(verdict.wrongs) is wrong
