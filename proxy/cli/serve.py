"""`farebox serve`: the proxy, until it is told to stop; in this process, or in workers that this one supervises."""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from proxy.app import Farebox, create_app, serve_metrics
from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import CommandFailed, reporting
from proxy.cli.session import Access, database_access, require_schema
from proxy.control.reload import read_catalog
from proxy.core.catalog import Catalog
from proxy.gateway.limits import DEFAULT
from proxy.gateway.protocol import Parting, guarded_protocol
from proxy.ledger.connect import Role
from proxy.local.draining import Drain, DrainLimits
from proxy.local.line import Briefing
from proxy.local.postgres import refuse_if_served, users_lock_of
from proxy.local.serving import Stop, base_url, hung_up, listen, serving
from proxy.local.state import LocalError, StateDirectory
from proxy.local.supervisor import Supervisor, SupervisorLimits
from proxy.local.worker import worker_command
from proxy.local.workers_metrics import WorkersMetrics
from proxy.logs import Redactor, configure
from proxy.settings import Settings, load

__all__ = ["configure_logs", "require_good_end", "serve", "serving_farebox", "usable_catalog"]

WORKER_STOP_SECONDS = 25.0
"""What a worker gets to end in beside what its answers get: to cut them, to settle, and on a busy machine."""


def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on, as FAREBOX_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="The port, as FAREBOX_PORT; 0: any.")] = None,
    pricing: Annotated[Path | None, typer.Option(help="What is sold, as FAREBOX_PRICING.")] = None,
    upstreams: Annotated[Path | None, typer.Option(help="The providers, as FAREBOX_UPSTREAMS.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Serve in so many processes, as FAREBOX_WORKERS; SIGHUP replaces them."),
    ] = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="Stop when the process that started this one is gone.")
    ] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Serve the proxy until SIGTERM or Ctrl-C. Logs go to standard error, one JSON object a line."""
    with reporting(as_json=as_json):
        settings = load(
            host=host, port=port, pricing=pricing, upstreams=upstreams, workers=workers, database_url=database_url
        )
        usable_catalog(settings)
        if settings.database_url is None:
            refuse_if_served(StateDirectory(settings.state_dir))
        # Before the database is started, so that a busy port is found out at once.
        listener = listen(settings.host, settings.port)
        told = _Told(base_url(listener), as_json=as_json, with_parent=with_parent)
        try:
            with database_access(settings, purpose="farebox serve", serving=True) as access:
                configure_logs(access.settings)
                if settings.workers is None:
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        runner.run(_serve(access, listener, told))
                else:
                    asyncio.run(_supervise(access, listener, told, settings.workers))
        finally:
            listener.close()


@dataclass(frozen=True, slots=True)
class _Told:
    """What was asked for on the command line, and what is to be said when all is up."""

    url: str
    as_json: bool
    with_parent: bool

    def ready(self) -> None:
        ready = json.dumps({"ready": True, "base_url": self.url})
        typer.echo(ready if self.as_json else f"Farebox is ready: base_url {self.url}")


def configure_logs(settings: Settings, tags: Mapping[str, object] | None = None) -> None:
    """This process's logs, as the settings say, guarded against every secret that is in them."""
    secrets = [
        secret.get_secret_value() for secret in (settings.key_pepper, settings.admin_token) if secret is not None
    ]
    urls = (settings.database_url, *(settings.database_url_of(role) for role in ("gateway", "control", "reader")))
    configure(
        Redactor([*secrets, *(url or "" for url in urls)]),
        level=logging.getLevelNamesMapping()[settings.log_level.upper()],
        plain=settings.log_format == "console",
        tags=tags,
    )
    # A line a connection says nothing that the request's own line doesn't.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def serving_farebox(
    app: Farebox, listener: socket.socket, settings: Settings, stop: Stop
) -> AbstractAsyncContextManager[None]:
    """Serve the app as the settings say: slow clients are given up, and a stop drains before it cuts."""
    limits = replace(DEFAULT, header_bytes_max=settings.header_bytes_max, receive_seconds=settings.receive_seconds)
    parting = Parting()
    drains = DrainLimits(delay=settings.shutdown_delay_seconds, retire=settings.restart_drain_seconds)
    stop.hurry.append(app.cut_shutdown)
    return serving(
        app,
        listener,
        http=guarded_protocol(limits, parting),
        shutdown_seconds=settings.shutdown_seconds,
        drain=Drain(app, stop, parting, drains),
    )


async def _serve(access: Access, listener: socket.socket, told: _Told) -> None:
    await require_schema(access.login_of("gateway"), Role.GATEWAY)
    stop = Stop(with_parent=told.with_parent)
    with stop.on_signals():
        app = create_app(access.settings)
        async with serving_farebox(app, listener, access.settings, stop):
            told.ready()
            await stop.wait(lambda: access.failed() or app.broken)
        require_good_end(app)


async def _supervise(access: Access, listener: socket.socket, told: _Told, count: int) -> None:
    await require_schema(access.login_of("gateway"), Role.GATEWAY)
    settings = access.settings
    with ExitStack() as stack:
        metrics = WorkersMetrics()
        serve_metrics(settings, metrics.registry, stack)
        supervisor = Supervisor(
            worker_command(),
            listener,
            lambda slot: _briefing(access, slot),
            count=count,
            metrics=metrics,
            limits=_limits(settings),
        )
        stop = Stop(with_parent=told.with_parent)
        stack.enter_context(stop.on_signals())
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up(stop, supervisor.restart_soon))
        await supervisor.run(stop, on_ready=told.ready, failed=access.failed)


def _limits(settings: Settings) -> SupervisorLimits:
    stop = settings.shutdown_seconds + WORKER_STOP_SECONDS
    return SupervisorLimits(stop=settings.shutdown_delay_seconds + stop, retire=settings.restart_drain_seconds + stop)


def _briefing(access: Access, slot: int) -> Briefing:
    """What a worker can't find in the environment, which it inherits."""
    settings = access.settings
    assert settings.key_pepper is not None, "usable_catalog has looked, or the state directory has it"
    options = {
        "pricing": str(settings.pricing),
        "upstreams": str(settings.upstreams),
        "database_url": settings.database_url,
        "gateway_database_url": settings.gateway_database_url,
        "control_database_url": settings.control_database_url,
        "reader_database_url": settings.reader_database_url,
        "key_pepper": settings.key_pepper.get_secret_value(),
    }
    users_lock = str(users_lock_of(StateDirectory(settings.state_dir))) if access.embedded else None
    return Briefing(slot, options, users_lock)


def require_good_end(app: Farebox) -> None:
    """Raise LocalError where the app has ended and left something undone."""
    if app.failure is not None:
        raise LocalError(app.failure)


def usable_catalog(settings: Settings) -> Catalog:
    """The catalog, if these settings can serve it. Refuses at once, in one line a problem, what the app would only find
    out after everything else is up. Raises CommandFailed and ConfigError."""
    if settings.database_url is not None and settings.key_pepper is None:
        raise CommandFailed(
            "FAREBOX_KEY_PEPPER is not set. It is required with a database of your own: give every process of this "
            "installation the same, as `openssl rand -hex 32` prints it.",
            code="settings",
        )
    return read_catalog(settings.pricing, settings.upstreams)
