"""The supervisor over scripted workers: what it does when they can't start, die, loop, hang, or are told to end."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from proxy.local.line import Briefing
from proxy.local.serving import Stop, listen
from proxy.local.state import LocalError
from proxy.local.supervisor import Supervisor, SupervisorLimits
from proxy.local.workers_metrics import WorkersMetrics

FAKE = textwrap.dedent(
    """
    import json, os, signal, socket, sys, time
    line = socket.socket(fileno=int(sys.argv[1]))
    words = line.makefile("rb")
    does = json.loads(words.readline())["options"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    def say(**what):
        line.sendall(json.dumps(what).encode() + b"\\n")
    if "fail" in does:
        say(said="failed", reason=does["fail"])
        sys.exit(1)
    if "exit" in does:
        sys.exit(does["exit"])
    if "hang" in does:
        time.sleep(60)
    say(said="ready")
    if "die_after" in does:
        time.sleep(does["die_after"])
        os.kill(os.getpid(), signal.SIGKILL)
    for word in words:
        order = json.loads(word)["order"]
        if order == "retire":
            time.sleep(does.get("retire_seconds", 0))
            sys.exit(0)
        if order == "stop" and not does.get("deaf"):
            sys.exit(does.get("status", 0))
        if order == "hurry":
            sys.exit(0)
    sys.exit(7)
    """
)
QUICK = SupervisorLimits(start=20, stop=20, steady=60, pause_min=0.05, pause_max=0.2)


class Script:
    """What the workers do: one set of options for each start in a slot, the last one stays."""

    def __init__(self, *options: dict[str, Any]) -> None:
        self.options = list(options) or [{}]
        self.starts: list[int] = []

    def __call__(self, slot: int) -> Briefing:
        self.starts.append(slot)
        does = self.options.pop(0) if len(self.options) > 1 else self.options[0]
        return Briefing(slot, does)


class Running:
    """A supervisor at work."""

    def __init__(self, supervisor: Supervisor, stop: Stop, metrics: WorkersMetrics, port: int) -> None:
        self.supervisor = supervisor
        self.port = port
        self.stop = stop
        self._metrics = metrics
        self.ended: asyncio.Task[None]

    def number(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(name, labels) or 0.0

    def pids(self) -> list[int]:
        return [slot.worker.pid for slot in self.supervisor._slots if slot.worker is not None]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def supervising(
    script: Script, *, count: int = 2, limits: SupervisorLimits = QUICK, failed: Callable[[], str | None] = lambda: None
) -> AsyncIterator[Running]:
    """A supervisor whose workers are all up; at the end it is stopped, and must leave no process."""
    command = (sys.executable, "-I", "-S", "-c", FAKE)
    metrics, ready = WorkersMetrics(), asyncio.Event()
    with listen("127.0.0.1", 0) as listener:
        supervisor = Supervisor(command, listener, script, count=count, metrics=metrics, limits=limits)
        running = Running(supervisor, Stop(), metrics, listener.getsockname()[1])
        running.ended = asyncio.create_task(supervisor.run(running.stop, on_ready=ready.set, failed=failed))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({running.ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            yield running
        finally:
            running.stop.ask()
            await asyncio.gather(running.ended, return_exceptions=True)
            assert supervisor._alive == set()


async def test_it_is_ready_when_all_are_and_ends_when_all_have() -> None:
    async with supervising(Script(), count=3) as running:
        pids = running.pids()
        assert len(set(pids)) == 3
        assert running.number("farebox_workers", state="serving") == 3
        running.stop.ask()
        await running.ended
    assert not any(is_there(pid) for pid in pids)


async def test_a_first_start_that_fails_ends_it_with_the_reason() -> None:
    async with supervising(Script({}, {"fail": "no database"}, {})) as running:
        with pytest.raises(LocalError, match="no database"):
            await running.ended


async def test_a_worker_that_ends_without_a_word_is_a_failure_too() -> None:
    async with supervising(Script({"exit": 3})) as running:
        with pytest.raises(LocalError, match="ended with status 3 before it was ready"):
            await running.ended


async def test_a_worker_that_is_never_ready_is_killed() -> None:
    limits = SupervisorLimits(start=1, stop=10)
    async with supervising(Script({"hang": True}), count=1, limits=limits) as running:
        with pytest.raises(LocalError, match="not ready within 1 seconds"):
            await running.ended


async def test_a_restart_replaces_each_one_and_only_then_retires_it() -> None:
    async with supervising(Script({"retire_seconds": 0.5})) as running:
        before = running.pids()
        running.supervisor.restart_soon()
        await running.until(lambda: running.number("farebox_worker_restarts_total", outcome="done") == 1)
        assert set(running.pids()).isdisjoint(before)
        assert running.number("farebox_workers", state="serving") == 2
        await running.until(lambda: not any(is_there(pid) for pid in before))
        assert running.number("farebox_worker_deaths_total") == 0


async def test_a_restart_during_a_restart_is_done_once_more_and_not_twice() -> None:
    script = Script({})
    async with supervising(script) as running:
        for _ in range(2):
            running.supervisor.restart_soon()
            await running.until(lambda: len(script.starts) == 3)
        for _ in range(5):
            running.supervisor.restart_soon()
        await running.until(lambda: running.number("farebox_worker_restarts_total", outcome="done") == 2)
        await asyncio.sleep(0.2)
        assert script.starts == [1, 2] * 3


async def test_a_restart_is_given_up_where_a_new_worker_cant_start() -> None:
    async with supervising(Script({}, {}, {}, {"fail": "pricing.yaml:1:1"}, {})) as running:
        before = running.pids()
        running.supervisor.restart_soon()
        await running.until(lambda: running.number("farebox_worker_restarts_total", outcome="given_up") == 1)
        assert running.pids()[0] not in before
        assert running.pids()[1] == before[1]
        assert running.number("farebox_workers", state="serving") == 2
        # It is no dead end.
        running.supervisor.restart_soon()
        await running.until(lambda: running.number("farebox_worker_restarts_total", outcome="done") == 1)


async def test_only_so_many_retire_at_once() -> None:
    script = Script({"retire_seconds": 1.5})
    async with supervising(script) as running:
        most = 0.0
        running.supervisor.restart_soon()
        await running.until(lambda: len(script.starts) == 4)
        running.supervisor.restart_soon()
        async with asyncio.timeout(30):
            while running.number("farebox_worker_restarts_total", outcome="done") < 2:
                most = max(most, running.number("farebox_workers", state="retiring"))
                await asyncio.sleep(0.02)
        assert most == 2


async def test_a_retired_worker_that_hangs_is_killed() -> None:
    limits = SupervisorLimits(start=20, stop=20, retire=0.3)
    async with supervising(Script({"retire_seconds": 60}, {}), count=1, limits=limits) as running:
        [before] = running.pids()
        running.supervisor.restart_soon()
        await running.until(lambda: before not in running.pids() and not is_there(before))
        assert running.number("farebox_worker_deaths_total") == 0


async def test_a_dead_worker_is_replaced_at_once() -> None:
    limits = SupervisorLimits(steady=0, pause_min=60)
    async with supervising(Script(), limits=limits) as running:
        first, second = running.pids()
        os.kill(first, signal.SIGKILL)
        await running.until(lambda: len(running.pids()) == 2 and first not in running.pids())
        assert running.pids()[1] == second
        assert running.number("farebox_worker_deaths_total") == 1


async def test_a_crash_loop_is_slowed_down_and_leaves_the_others_alone() -> None:
    limits = SupervisorLimits(start=20, stop=20, steady=60, pause_min=0.2, pause_max=0.4)
    script = Script({}, {"die_after": 0.05})
    async with supervising(script, limits=limits) as running:
        began, survivor = time.monotonic(), running.pids()[0]
        await running.until(lambda: len(script.starts) >= 2 + 5)
        # The first at once, then 0.2, 0.4, 0.4 and 0.4 s, each at least three quarters of it.
        assert time.monotonic() - began > 0.75 * (0.2 + 3 * 0.4)
        assert running.pids()[0] == survivor
        # A restart doesn't wait for the one that isn't there.
        running.supervisor.restart_soon()
        await running.until(lambda: survivor not in running.pids())


async def test_a_replacement_that_cant_start_is_tried_until_it_can() -> None:
    script = Script({}, {"die_after": 0.1}, {"fail": "the database is away"}, {"fail": "the database is away"}, {})
    async with supervising(script) as running:
        await running.until(lambda: len(script.starts) == 5 and len(running.pids()) == 2)
        assert running.number("farebox_worker_start_failures_total") == 2


async def test_a_stop_during_a_restart_stops_all_of_them() -> None:
    async with supervising(Script({}, {}, {"hang": True}), limits=SupervisorLimits(stop=1)) as running:
        running.supervisor.restart_soon()
        await running.until(lambda: running.number("farebox_workers", state="starting") == 1)
        running.stop.ask()
        # The one that hangs had to be killed, and that is said.
        with pytest.raises(LocalError, match="was killed by SIGKILL"):
            await running.ended


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 20])
async def test_a_stop_at_any_moment_of_a_start_leaves_no_process(turns: int) -> None:
    metrics, stop, limits = WorkersMetrics(), Stop(), SupervisorLimits(stop=60)
    with listen("127.0.0.1", 0) as listener:
        command = (sys.executable, "-I", "-S", "-c", FAKE)
        supervisor = Supervisor(command, listener, Script(), count=3, metrics=metrics, limits=limits)
        running = asyncio.create_task(supervisor.run(stop, on_ready=lambda: None, failed=lambda: None))
        for _ in range(turns):
            await asyncio.sleep(0)
        stop.ask()
        await asyncio.wait_for(running, 30)
        assert supervisor._alive == set()


async def test_a_restart_tries_at_once_what_waits_for_its_next_attempt() -> None:
    limits = SupervisorLimits(start=20, stop=20, steady=60, pause_min=1000, pause_max=1000)
    script = Script({}, {"die_after": 0.1}, {"fail": "the database is away"}, {})
    async with supervising(script, limits=limits) as running:
        await running.until(lambda: running.number("farebox_worker_start_failures_total") == 1)
        running.supervisor.restart_soon()
        await running.until(lambda: len(running.pids()) == 2)


async def test_while_no_worker_serves_the_supervisor_says_so() -> None:
    limits = SupervisorLimits(start=20, stop=20, steady=60, pause_min=1000, pause_max=1000, nobody=0.1, look=0.05)
    script = Script({}, {"fail": "the database is away"}, {})
    async with supervising(script, count=1, limits=limits) as running:
        os.kill(running.pids()[0], signal.SIGKILL)
        await running.until(lambda: running.number("farebox_worker_start_failures_total") == 1)
        for body in (b"", b"x" * 3_000_000):
            head, answer = await asyncio.wait_for(asked(running.port, body), 20)
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 5\r\n" in head
            assert json.loads(answer)["error"]["code"] == "no_worker"
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"no request at all" * 10_000 + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()
        # Once there is a worker, the connections are its own.
        running.supervisor.restart_soon()
        await running.until(lambda: len(running.pids()) == 1 and not running.supervisor._stand_in.answers)


async def asked(port: int, body: bytes) -> tuple[bytes, bytes]:
    """What is answered: head and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
    writer.write(body)
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head, answer


async def test_a_worker_that_doesnt_stop_is_killed_and_that_is_said() -> None:
    limits = SupervisorLimits(stop=0.5)
    async with supervising(Script({"deaf": True}), count=1, limits=limits) as running:
        running.stop.ask()
        with pytest.raises(LocalError, match="1 was killed by SIGKILL"):
            await running.ended


async def test_a_second_signal_is_handed_on() -> None:
    async with supervising(Script({"deaf": True}), count=1) as running:
        running.stop.signalled()
        await asyncio.sleep(0.2)
        assert not running.ended.done()
        running.stop.signalled()
        await asyncio.wait_for(running.ended, 10)


async def test_a_worker_that_ends_badly_is_not_passed_over() -> None:
    async with supervising(Script({"status": 1})) as running:
        running.stop.ask()
        with pytest.raises(LocalError, match="1 ended with status 1, 2 ended with status 1"):
            await running.ended


async def test_it_ends_with_what_it_watches() -> None:
    reason: list[str] = []
    async with supervising(Script(), failed=lambda: reason[0] if reason else None) as running:
        reason.append("the embedded PostgreSQL ended by itself")
        with pytest.raises(LocalError, match="ended by itself"):
            await running.ended


async def test_no_process_can_be_started() -> None:
    metrics = WorkersMetrics()
    with listen("127.0.0.1", 0) as listener:
        supervisor = Supervisor(("/nowhere/at/all",), listener, Script(), count=1, metrics=metrics)
        with pytest.raises(LocalError, match="no process can be started"):
            await supervisor.run(Stop(), on_ready=lambda: None, failed=lambda: None)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
