"""A worker's process: serves on the socket that its supervisor holds, as that one says, until it is told to stop.

Not a command: `farebox serve --workers` starts it, with three inherited descriptors and nothing else in its arguments.
It logs like any server, each line with its slot. Signals are the supervisor's matter, but SIGTERM is understood.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import structlog
import uvloop

from proxy.app import create_app
from proxy.cli.output import CommandFailed
from proxy.cli.serve import configure_logs, require_good_end, serving_farebox, usable_catalog
from proxy.cli.session import require_schema
from proxy.core.yaml_reader import ConfigError
from proxy.ledger.connect import Role
from proxy.ledger.errors import LedgerError
from proxy.local.line import Briefing, Order, Peer, read_briefing
from proxy.local.locks import FileLock
from proxy.local.serving import Stop
from proxy.local.state import LocalError
from proxy.local.workers_metrics import tell_metrics
from proxy.settings import Settings, SettingsError, load

__all__ = ["main"]

USERS_LOCK_SECONDS = 10.0

log = structlog.get_logger("farebox.workers")


def main(arguments: Sequence[str]) -> int:
    """Serve; the exit status: 0 where it ended as it was told, 1 where it couldn't start."""
    line, listener, metrics = (socket.socket(fileno=int(number)) for number in arguments)
    try:
        briefing = read_briefing(line)
    except LocalError as error:
        log.error("a worker can't start", reason=str(error))
        return 1
    line.setblocking(False)
    listener.setblocking(False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_work(briefing, line, listener, metrics))


async def _work(briefing: Briefing, line: socket.socket, listener: socket.socket, metrics: socket.socket) -> int:
    supervisor = await Peer.on(line)
    stop = Stop()
    hearing = asyncio.create_task(_hear(supervisor, stop))
    try:
        with stop.on_signals():
            await _serve(briefing, listener, metrics, supervisor, stop)
    except Exception as error:
        # Whatever it is, the operator is told; what an operator can mend needs no traceback.
        mendable = isinstance(error, LocalError | LedgerError | ConfigError | SettingsError | CommandFailed)
        log.error("the worker ends", reason=str(error), exc_info=None if mendable else error)
        supervisor.say(said="failed", reason=str(error))
        return 1
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await supervisor.close()
    return 0


async def _serve(
    briefing: Briefing, listener: socket.socket, metrics: socket.socket, supervisor: Peer, stop: Stop
) -> None:
    # One port for all workers' metrics, and it is the supervisor's.
    settings = load(**briefing.options).model_copy(update={"metrics_port": 0})
    configure_logs(settings, {"slot": briefing.slot, "pid": os.getpid()})
    usable_catalog(settings)
    users = _users_lock(briefing)
    try:
        await _serve_on(listener, settings, metrics, supervisor, stop)
    finally:
        if users is not None:
            users.close()


async def _serve_on(
    listener: socket.socket, settings: Settings, metrics: socket.socket, supervisor: Peer, stop: Stop
) -> None:
    login = settings.database_url_of("gateway")
    assert login is not None, "the briefing has it"
    await require_schema(login, Role.GATEWAY)
    app = create_app(settings)
    tell_metrics(metrics, app.metrics.registry)
    try:
        async with serving_farebox(app, listener, settings, stop):
            supervisor.say(said="ready")
            await stop.wait(lambda: app.broken)
    except LocalError as error:
        raise LocalError(app.failure or str(error)) from error
    require_good_end(app)


async def _hear(supervisor: Peer, stop: Stop) -> None:
    """Do as the supervisor says. Its end is an order, too."""
    while (words := await supervisor.hear()) is not None:
        match words.get("order"):
            case Order.STOP:
                stop.ask()
            case Order.HURRY:
                stop.hurry_up()
            case Order.RETIRE:
                stop.retire()
    if not stop.asked.is_set() and not stop.retiring.is_set():
        log.error("the supervisor is gone: this worker stops")
    stop.orphaned = True
    stop.ask()


def _users_lock(briefing: Briefing) -> FileLock | None:
    """Held as long as the embedded database is used. Raises LocalError."""
    if briefing.users_lock is None:
        return None
    lock = FileLock(Path(briefing.users_lock))
    if not lock.acquire(shared=True, timeout_seconds=USERS_LOCK_SECONDS):
        raise LocalError("the embedded database is being stopped")
    return lock
