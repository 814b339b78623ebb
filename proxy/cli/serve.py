"""`farebox serve`: the proxy, in this process, until it is told to stop."""

import asyncio
import json
import logging
import socket
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from proxy.app import Farebox, create_app
from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.output import CommandFailed, reporting
from proxy.cli.session import Access, database_access, require_schema
from proxy.control.reload import read_catalog
from proxy.core.catalog import Catalog
from proxy.gateway.limits import DEFAULT
from proxy.gateway.protocol import guarded_protocol
from proxy.ledger.connect import Role
from proxy.local.postgres import refuse_if_served
from proxy.local.serving import Stop, base_url, listen, serving
from proxy.local.state import StateDirectory
from proxy.logs import Redactor, configure
from proxy.settings import Settings, load

__all__ = ["configure_logs", "serve", "serving_farebox", "usable_catalog"]


def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on, as FAREBOX_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="The port, as FAREBOX_PORT; 0: any.")] = None,
    pricing: Annotated[Path | None, typer.Option(help="What is sold, as FAREBOX_PRICING.")] = None,
    upstreams: Annotated[Path | None, typer.Option(help="The providers, as FAREBOX_UPSTREAMS.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Serve the proxy until SIGTERM or Ctrl-C. Logs go to standard error, one JSON object a line."""
    with reporting(as_json=as_json):
        settings = load(host=host, port=port, pricing=pricing, upstreams=upstreams, database_url=database_url)
        usable_catalog(settings)
        if settings.database_url is None:
            refuse_if_served(StateDirectory(settings.state_dir))
        # Before the database is started, so that a busy port is found out at once.
        listener = listen(settings.host, settings.port)
        try:
            with database_access(settings, purpose="farebox serve", serving=True) as access:
                configure_logs(access.settings)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_serve(access, listener, as_json=as_json))
        finally:
            listener.close()


def configure_logs(settings: Settings) -> None:
    """This process's logs, as the settings say, guarded against every secret that is in them."""
    secrets = [
        secret.get_secret_value() for secret in (settings.key_pepper, settings.admin_token) if secret is not None
    ]
    configure(
        Redactor([*secrets, settings.database_url or ""]),
        level=logging.getLevelNamesMapping()[settings.log_level.upper()],
        plain=settings.log_format == "console",
    )
    # A line a connection says nothing that the request's own line doesn't.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def serving_farebox(
    app: Farebox, listener: socket.socket, settings: Settings, stop: Stop
) -> AbstractAsyncContextManager[None]:
    """Serve the app as the settings say: slow clients are given up, and a stop drains before it cuts."""
    limits = replace(DEFAULT, header_bytes_max=settings.header_bytes_max, receive_seconds=settings.receive_seconds)
    return serving(
        app,
        listener,
        http=guarded_protocol(limits),
        shutdown_seconds=settings.shutdown_seconds,
        stop=stop,
        on_stop=app.begin_shutdown,
        on_hurry=app.cut_shutdown,
    )


async def _serve(access: Access, listener: socket.socket, *, as_json: bool) -> None:
    await require_schema(access.login, Role.GATEWAY)
    stop = Stop()
    with stop.on_signals():
        async with serving_farebox(create_app(access.settings), listener, access.settings, stop):
            url = base_url(listener)
            typer.echo(json.dumps({"ready": True, "base_url": url}) if as_json else f"Farebox is ready: base_url {url}")
            await stop.wait(access.failed)


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
