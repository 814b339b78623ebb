"""Scenes: how a process is brought to the point where it dies, and what is done after it."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from proxy.ledger.audit import book_state
from proxy.ledger.connect import Role, connect
from proxy.ledger.migrate import schema_state
from proxy.local.postgres import APP, OWNER
from tests.e2e.proxy import PEPPER
from tests.faults.caller import Call
from tests.faults.judge import audited, counted, reported
from tests.faults.nursery import Process
from tests.faults.points import Owes, Point
from tests.faults.provider import Answer
from tests.faults.scene import LEASE_SECONDS, Customer, Scene

__all__ = ["die_and_recover"]

TRUE_UP_SECONDS_MAX = 20.0
SERVED_SECONDS_MAX = 20.0


async def die_and_recover(scene: Scene, point: Point) -> list[str]:
    """Bring a process to the point, see what it leaves, start it again, and wait until its call is settled.

    Returns what went wrong, in sentences. What all calls came to is for ``judge`` to say, at the end.
    """
    if point.scene in _COMMANDS:
        return await _COMMANDS[point.scene](scene, point)
    customer = await scene.customer()
    doomed, call = await _SCENES[point.scene](scene, point, customer)
    wrongs = await _reached(scene, point, doomed)
    left: list[str | None] = [_state_then(point, hold) for hold in await scene.holds(customer)]
    left = left or [None]
    if len(left) > 1 or left[0] not in point.leaves:
        wrongs.append(f"{point.label} left {left}, not one of {set(point.leaves)}")
    again = await scene.worker(point.label)
    wrongs += await _serves(scene, point, again, customer)
    await scene.settled(customer)
    if call is not None:
        wrongs += await _come_to_its_charge(scene, point, customer, call)
    if call is not None and call.word is not None:
        wrongs += await _said_again(scene, point, again, customer, call)
    if point.scene == "sealed":
        wrongs += await _sealed(scene, point)
    again.signal(signal.SIGTERM)
    if (status := await again.ended()) != 0:
        wrongs.append(f"the process that came after {point.label} ended with {status}: {again.errors[-1000:]}")
    wrongs += [f"after {point.label}: {wrong}" for wrong in await audited(scene)]
    return wrongs


async def _reached(scene: Scene, point: Point, doomed: Process) -> list[str]:
    """What speaks against its having died there."""
    try:
        status: int | None = await scene.died(doomed)
    except TimeoutError:
        status = None
    if status != -signal.SIGKILL or doomed.note != point.label:
        return [f"{point.label} was not reached: {doomed.note}, status {status}: {doomed.errors[-1500:]}"]
    return []


def _state_then(point: Point, hold: dict[str, Any]) -> str:
    """The state in which the hold was left: on a busy machine another process may have swept it before we looked."""
    swept = hold["state"] == "provisional" and point.scene not in ("sweep", "true_up")
    return "open" if swept else str(hold["state"])


async def _serves(scene: Scene, point: Point, process: Process, customer: Customer) -> list[str]:
    """Whether a call is served; a busy machine may need a moment for it."""
    deadline = time.monotonic() + SERVED_SECONDS_MAX
    while True:
        call = await scene.call(process, customer, Answer(words=3))
        if call.outcome == "whole":
            return []
        if time.monotonic() > deadline:
            told = process.errors[-1500:]
            return [f"after {point.label} a call is {call.outcome} ({call.status}, {call.code}): {told}"]
        await asyncio.sleep(0.5)


async def _sealed(scene: Scene, point: Point) -> list[str]:
    """The sealing goes on where it was left."""
    deadline = time.monotonic() + SERVED_SECONDS_MAX
    connection = await connect(scene.database.owner)
    try:
        while (state := await book_state(connection)).unsealed:
            if time.monotonic() > deadline:
                return [f"after {point.label} the book stays unsealed: {state}"]
            await asyncio.sleep(0.2)
    finally:
        await connection.close()
    return [] if state.transfers else [f"after {point.label} there is no book"]


async def _come_to_its_charge(scene: Scene, point: Point, customer: Customer, call: Call) -> list[str]:
    """What the call owes by its point. A provisional charge may have to wait for the journal's true-up."""
    answer = scene.provider.answer(call.name)
    all_of_it = reported(answer.words) if answer.reports else counted(answer.words)
    least = all_of_it if point.owes is Owes.ALL else 0
    most = 0 if point.owes is Owes.NOTHING else all_of_it
    deadline = time.monotonic() + TRUE_UP_SECONDS_MAX
    while True:
        charge = sum(hold["charge"] for hold in await scene.holds(customer) if hold["cap"] == call.cap)
        if least <= charge <= most:
            return []
        if time.monotonic() > deadline:
            told = [_brief(hold) for hold in await scene.holds(customer)]
            return [f"{point.label} owes {point.owes.value} of {all_of_it}: {charge}, by {told}"]
        await asyncio.sleep(0.1)


async def _said_again(scene: Scene, point: Point, process: Process, customer: Customer, call: Call) -> list[str]:
    """The same call under the same word: carried out if the first wasn't charged, refused for good if it was."""
    holds = [hold for hold in await scene.holds(customer) if hold["cap"] == call.cap]
    spent = sum(hold["charge"] for hold in holds)
    deadline = time.monotonic() + SERVED_SECONDS_MAX
    while True:
        again = Call(call.name, call.account_id, call.cap, call.stream, call.word)
        await scene.make(process, customer, again)
        # The dead worker's claim counts for as long as its lease: "come again".
        if again.code != "idempotency_key_in_use" or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    # The judge takes the one that was answered for the call.
    if spent:
        refused = again.status == 409 and again.code == "idempotency_key_used"
        return [] if refused else [f"{point.label}: charged {spent}, and said again it is {again.status} {again.code}"]
    scene.calls[scene.calls.index(call)] = again
    await scene.settled(customer)
    return [] if again.outcome == "whole" else [f"{point.label}: said again it is {again.outcome} {again.status}"]


def _brief(hold: dict[str, Any]) -> str:
    return f"{hold['cap']} {hold['state']} {hold['charge']} {hold['ending']}"


# Scenes of a server. Each gives the process that is to die and the call that it dies on.

Driven = tuple[Process, Call | None]


def _answered(answer: Answer, **how: Any) -> "Drive":
    async def drive(scene: Scene, point: Point, customer: Customer) -> Driven:
        doomed = await scene.worker(point.label, at=point.label)
        return doomed, await scene.call(doomed, customer, answer, **how)

    return drive


async def _growing(scene: Scene, point: Point, customer: Customer) -> Driven:
    """An answer that is longer than what is held for it at first."""
    doomed = await scene.worker(point.label, at=point.label, HOLD_STEP_TOKENS="64")
    call = scene.plan(customer, Answer(words=1_000, pace=0.005))
    call.cap = 2_000
    return doomed, await scene.make(doomed, customer, call)


async def _start(scene: Scene, point: Point, customer: Customer) -> Driven:
    return await scene.worker(point.label, at=point.label), None


async def _stop(scene: Scene, point: Point, customer: Customer) -> Driven:
    doomed = await scene.worker(point.label, at=point.label)
    call = await _under_way(scene, doomed, customer)
    doomed.signal(signal.SIGTERM)
    return doomed, call


async def _sweep(scene: Scene, point: Point, customer: Customer) -> Driven:
    victim = await scene.worker(f"{point.label}.victim")
    call = await _under_way(scene, victim, customer)
    await scene.kill(victim)
    await asyncio.sleep(LEASE_SECONDS + 0.2)
    return await scene.worker(point.label, at=point.label), call


async def _stopped(scene: Scene, point: Point, customer: Customer) -> Driven:
    """Told to stop after a call: what was left for later is done then."""
    doomed, call = await _answered(Answer(words=15))(scene, point, customer)
    doomed.signal(signal.SIGTERM)
    return doomed, call


async def _takeover(scene: Scene, point: Point, customer: Customer) -> Driven:
    """Another has died with a charge in its journal; the one in its place is to die of it, too."""
    call = await _left_in_journal(scene, point, customer)
    return await scene.worker(point.label, at=point.label), call


async def _true_up(scene: Scene, point: Point, customer: Customer) -> Driven:
    """The same, and a process of another directory has swept the hold meanwhile."""
    call = await _left_in_journal(scene, point, customer)
    sweeper = await scene.worker(f"{point.label}.sweeper")
    await scene.settled(customer)
    await scene.kill(sweeper)
    return await scene.worker(point.label, at=point.label), call


async def _left_in_journal(scene: Scene, point: Point, customer: Customer) -> Call:
    victim = await scene.worker(point.label, at="journal.synced")
    call = await scene.call(victim, customer, Answer(words=15))
    assert await scene.died(victim) == -signal.SIGKILL
    return call


async def _under_way(scene: Scene, process: Process, customer: Customer) -> Call:
    """A call that has been given some words and will be given more."""
    call = scene.plan(customer, Answer(words=200, pace=0.05))
    scene.background.append(asyncio.create_task(scene.make(process, customer, call)))
    deadline = time.monotonic() + SERVED_SECONDS_MAX
    while len(call.words) < 4:
        assert call.outcome == "running", f"{call.outcome} ({call.status}, {call.code}): {process.errors[-1500:]}"
        assert time.monotonic() < deadline, process.errors[-1500:]
        await asyncio.sleep(0.01)
    return call


Drive = Callable[[Scene, Point, Customer], Awaitable[Driven]]

_SCENES: Mapping[str, Drive] = {
    "stream": _answered(Answer(words=15)),
    "unreported": _answered(Answer(words=15, reports=False)),
    "long": _answered(Answer(words=100, pace=0.1)),
    "leaver": _answered(Answer(words=60), leave_after=5),
    "broken": _answered(Answer(words=8, breaks=True)),
    "whole": _answered(Answer(words=15), stream=False),
    "growing": _growing,
    "refused": _answered(Answer(status=503)),
    "start": _start,
    "sealed": _answered(Answer(words=3)),
    "stop": _stop,
    "stopped": _stopped,
    "sweep": _sweep,
    "takeover": _takeover,
    "true_up": _true_up,
    "word": _answered(Answer(words=15), word="once"),
}


# Scenes of a command, which is said again after it died.


async def _grant(scene: Scene, point: Point) -> list[str]:
    customer = await scene.customer()
    arguments = ["credits", "grant", str(customer.id), "12.5", "--ref", point.label, "--json"]
    wrongs = await _say_twice(scene, point, arguments)
    customer.granted += 12_500_000
    granted = await scene.sql.fetchval("SELECT count(*) FROM farebox.transfers WHERE reference = $1", point.label)
    return wrongs if granted == 1 else [*wrongs, f"{point.label}: {granted} grants"]


async def _reverse(scene: Scene, point: Point) -> list[str]:
    customer = await scene.customer()
    worker = await scene.worker(f"{point.label}.worker")
    call = await scene.call(worker, customer, Answer(words=5))
    await scene.settled(customer)
    worker.signal(signal.SIGTERM)
    await worker.ended()
    assert call.request_id is not None
    wrongs = await _say_twice(scene, point, ["credits", "reverse", call.request_id, "--reason", "sorry", "--json"])
    reversed_all = sum(hold["reversed"] for hold in await scene.holds(customer))
    return wrongs if reversed_all == reported(5) else [*wrongs, f"{point.label}: {reversed_all} reversed"]


async def _migrate(scene: Scene, point: Point) -> list[str]:
    """On a database of its own, that has nothing."""
    name = f"{scene.database.name}_{point.label.partition('.')[2]}"
    await scene.sql.execute(f"CREATE DATABASE {name} OWNER {OWNER}")
    owner = scene.database.owner.replace(scene.database.name, name)
    wrongs = await _say_twice(scene, point, ["migrate", "--grant-to", APP, "--json"], owner)
    connection = await connect(owner)
    try:
        state = await schema_state(connection)
        applied = await connection.fetchval("SELECT count(*) FROM farebox.schema_migrations")
    finally:
        await connection.close()
    if state.word != "current" or applied != state.known:
        wrongs.append(f"after {point.label} the schema is {state}, {applied} migrations")
    # The login that was granted to may serve.
    login = await connect(scene.database.app.replace(scene.database.name, name), Role.GATEWAY)
    await login.close()
    return wrongs


async def _say_twice(scene: Scene, point: Point, arguments: list[str], dsn: str | None = None) -> list[str]:
    """The command dies at the point; said once more it is carried out, once."""
    values = {"DATABASE_URL": dsn or scene.database.app, "KEY_PEPPER": PEPPER}
    doomed = await scene.run(f"{point.label}.doomed", arguments, at=point.label, **values)
    wrongs = await _reached(scene, point, doomed)
    again = await scene.run(f"{point.label}.again", arguments, **values)
    if (status := await again.ended()) != 0:
        wrongs.append(f"after {point.label} the command ends with {status}: {again.output} {again.errors[-1000:]}")
    return wrongs


_COMMANDS: Mapping[str, Callable[[Scene, Point], Awaitable[list[str]]]] = {
    "grant": _grant,
    "reverse": _reverse,
    "migrate": _migrate,
}
