"""Farebox that dies where it is told to: the real command, in a process of its own, killed by SIGKILL at a point.

    python -m tests.faults.dying --at finalize.committed --note FILE --hurry 10 -- serve --port 0 --json

The production code knows nothing of this. Before the command runs, the point's function is replaced by one that calls
it, and ends the process before, during or after the call. What is written to ``--note`` first proves that the point
was reached. ``--hurry`` divides the times of leases and sweeps: the database's own lease must be divided alike.

``--nursery`` is the same for many: it imports everything once and forks a process for each line that it reads, since
starting Python takes longer than most of what is tested (``nursery.py`` is its other end).
"""

import argparse
import asyncio
import contextlib
import functools
import importlib
import inspect
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import asyncpg

from proxy import app as composition
from proxy.cli import app as command
from proxy.gateway import tokens
from proxy.ledger.bookkeeper import Bookkeeper
from tests.faults.money_in.points import MONEY_IN
from tests.faults.points import POINTS, Moment, Point, Seen

ALL_POINTS = POINTS | MONEY_IN

_DOOMED: ContextVar[bool] = ContextVar("doomed", default=False)
"""Set in the task whose next statement is the last thing that this process sends."""

# uvloop sends what was written at the end of a turn.
TURNS_TO_SEND = 3


class Fuse:
    """Ends the process at the point's nth call, after a note has been left."""

    def __init__(self, point: Point, note: Path) -> None:
        self._point = point
        self._note = note
        self._met = 0

    def is_it(self, seen: Seen) -> bool:
        """Whether this call is the one."""
        if not self._point.when(seen):
            return False
        self._met += 1
        return self._met == self._point.nth

    def burn(self) -> NoReturn:
        self._note.write_text(f"{self._point.label}\n")
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
        raise AssertionError("nothing runs after SIGKILL")


def arm(point: Point, note: Path) -> None:
    """Put the fuse into the point's function."""
    fuse = Fuse(point, note)
    place, name = find(point.target)
    original = inspect.getattr_static(place, name)
    assert not isinstance(original, classmethod | staticmethod), f"{point.target} can't be replaced"
    wrap = _WRAPS[point.moment]
    if point.moment is Moment.IN_FLIGHT:
        _watch_statements(fuse)
    setattr(place, name, wrap(original, fuse))


def find(target: str) -> tuple[Any, str]:
    """``package.module:Class.function`` -> the class (or module) and the function's name. Raises where none is."""
    module, _, path = target.partition(":")
    place: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for word in classes:
        place = getattr(place, word)
    getattr(place, name)
    return place, name


# Loops whose time isn't in ``app.Timing``: the function whose keyword it is.
_LOOPS = {
    "refunds_seconds": ("proxy.control.billing.resume_refunds:RefundResumer.__init__", "seconds"),
    "refunds_age_seconds": ("proxy.control.billing.resume_refunds:RefundResumer.__init__", "age_seconds"),
    "topups_silent_seconds": ("proxy.control.billing.autotopup:AutoTopups.__init__", "silent_seconds"),
    "reconcile_seconds": ("proxy.control.billing.reconcile_loop:ReconcileLoop.__init__", "look_seconds"),
}


def hurry(factor: float, timing: Mapping[str, float] | None = None) -> None:
    """Divide every time that leases and sweeps are made of; ``timing`` has those that are something of their own."""
    usual = composition.Timing()
    times = {field.name: getattr(usual, field.name) / factor for field in fields(usual)}
    for name, seconds in (timing or {}).items():
        if name in _LOOPS:
            target, keyword = _LOOPS[name]
            place, function = find(target)
            getattr(place, function).__kwdefaults__[keyword] = seconds
        else:
            times[name] = seconds
    shorter = replace(usual, **times)
    # What the composition root makes where it is given none.
    composition.Timing = lambda: shorter  # type: ignore[assignment,misc]
    rounds: Any = Bookkeeper.__init__.__kwdefaults__
    rounds.update({name: rounds[name] / factor for name in ("seal_seconds", "audit_seconds")})


# The ways to be wrapped.


def _before(original: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    @functools.wraps(original)
    def dying(*args: Any, **kwargs: Any) -> Any:
        if fuse.is_it(Seen(args, kwargs)):
            fuse.burn()
        return original(*args, **kwargs)

    return dying


def _after(original: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    if not inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        def dying(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if fuse.is_it(Seen(args, kwargs, result)):
                fuse.burn()
            return result

        return dying

    @functools.wraps(original)
    async def dying_later(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        if fuse.is_it(Seen(args, kwargs, result)):
            fuse.burn()
        return result

    return dying_later


def _under_way(original: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    """Dies a few turns of the loop after the call began: what it sent first is on its way, the answer isn't here."""

    @functools.wraps(original)
    async def dying(*args: Any, **kwargs: Any) -> Any:
        if not fuse.is_it(Seen(args, kwargs)):
            return await original(*args, **kwargs)
        await _begun(original(*args, **kwargs))
        return fuse.burn()

    return dying


def _in_flight(original: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    """Dies when the statement that the call sends is on its way to PostgreSQL, which then carries it out or doesn't."""

    @functools.wraps(original)
    async def dying(*args: Any, **kwargs: Any) -> Any:
        if fuse.is_it(Seen(args, kwargs)):
            _DOOMED.set(True)
        return await original(*args, **kwargs)

    return dying


def _half(original: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    """Dies with the first half of the bytes written: ``original`` takes a file, bytes, and their place in it."""

    @functools.wraps(original)
    def dying(file: Any, data: bytes, *more: Any) -> Any:
        if not fuse.is_it(Seen((file, data, *more), {})):
            return original(file, data, *more)
        original(file, bytes(data)[: len(data) // 2], *more)
        return fuse.burn()

    return dying


_WRAPS = {
    Moment.BEFORE: _before,
    Moment.AFTER: _after,
    Moment.UNDER_WAY: _under_way,
    Moment.IN_FLIGHT: _in_flight,
    Moment.HALF: _half,
}


def _watch_statements(fuse: Fuse) -> None:
    """The doomed task's next statement is sent, and nothing after it."""
    connection: Any = asyncpg.connection.Connection
    do_execute, execute = connection._do_execute, connection.execute

    async def prepared(self: Any, query: Any, executor: Any, timeout: Any, *args: Any, **kwargs: Any) -> Any:
        async def last(*arguments: Any) -> Any:
            await _begun(executor(*arguments))
            fuse.burn()

        return await do_execute(self, query, last if _DOOMED.get() else executor, timeout, *args, **kwargs)

    async def script(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        if _DOOMED.get() and not args:
            await _begun(execute(self, query, *args, **kwargs))
            fuse.burn()
        return await execute(self, query, *args, **kwargs)

    connection._do_execute, connection.execute = prepared, script


async def _begun(work: Any) -> None:
    task = asyncio.ensure_future(work)
    for _ in range(TURNS_TO_SEND):
        await asyncio.sleep(0)
        if task.done():
            break


# Running the command, once or in a forked process for each line.


def run(
    arguments: list[str],
    *,
    at: str | None,
    note: str | None,
    factor: float,
    timing: Mapping[str, float] | None = None,
) -> NoReturn:
    """Run ``farebox ARGUMENTS`` in this process, to its end or to the point."""
    if factor != 1 or timing:
        hurry(factor, timing)
    if at is not None:
        assert note is not None, "a point needs a note to leave"
        arm(ALL_POINTS[at], Path(note))
    command(arguments, prog_name="farebox")
    raise AssertionError("a command ends its process")


class Nursery:
    """Forks a process for each line on standard input, and says on standard output which ones have ended."""

    def __init__(self) -> None:
        self._running: set[int] = set()

    def serve(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        warm_up()
        _say({"ready": True})
        left = b""
        while True:
            readable, _, _ = select.select([0, wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 512)
                self._bury()
            if 0 in readable:
                data = os.read(0, 65536)
                if not data:
                    break
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    self._bear(json.loads(line))
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _bear(self, order: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            _become(order)
        self._running.add(pid)
        _say({"born": order["number"], "pid": pid})

    def _bury(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._running.discard(pid)
            _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _become(order: dict[str, Any]) -> NoReturn:
    """The child's whole life."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for descriptor, path in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["directory"])
        run(
            order["arguments"],
            at=order["at"],
            note=order["note"],
            factor=order["factor"],
            timing=order["timing"],
        )
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - said where the test reads it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Make what every process would make for itself, slowly and alike. No thread may be started here."""
    tokens._load_ranks = functools.cache(tokens._load_ranks)
    tokens.build_encoding("o200k_base")


def _say(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.dying", description=__doc__)
    parser.add_argument("--nursery", action="store_true", help="fork a process for each line of standard input")
    parser.add_argument("--at", choices=ALL_POINTS, help="where to die; without it the command lives")
    parser.add_argument("--note", help="the file that says that the point was reached")
    parser.add_argument("--hurry", type=float, default=1.0, help="what the times of leases and sweeps are divided by")
    parser.add_argument("arguments", nargs="*", help="those of farebox, behind --")
    given = parser.parse_args()
    if given.nursery:
        Nursery().serve()
    else:
        run(given.arguments, at=given.at, note=given.note, factor=given.hurry)


if __name__ == "__main__":
    main()
