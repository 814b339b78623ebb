"""`farebox demo`: everything in one process, to try it out. `make run` is this command.

An embedded PostgreSQL, an account with a thousand credits, and, unless the real upstreams are asked for, a demo
upstream that answers every model without a key. It never spends anything by itself: a provider's key that lies in the
shell is no consent.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Annotated

import typer
import uvloop

from proxy.app import create_app
from proxy.cli.arguments import AsJson
from proxy.cli.output import reporting
from proxy.cli.serve import configure_logs, serving_farebox, usable_catalog
from proxy.cli.session import Access, database_access, require_schema
from proxy.control.operations import Operations
from proxy.core.catalog import Catalog
from proxy.gateway.tokens import TokenCounter
from proxy.gateway.upstream_keys import UpstreamKeys
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.control import ControlLedger
from proxy.local.demo import DemoKey, demo_key, instructions, through_demo_upstream
from proxy.local.demo_upstream import DemoUpstream
from proxy.local.postgres import refuse_if_served
from proxy.local.serving import Stop, base_url, listen, serving
from proxy.local.state import LocalError, StateDirectory
from proxy.settings import Settings, environment, load

__all__ = ["demo"]

EXAMPLE_MODEL = "gpt-4o-mini"


@dataclass(frozen=True, slots=True)
class _Demo:
    """What was asked for on the command line."""

    settings: Settings
    demo_upstream: bool
    with_parent: bool
    as_json: bool


def demo(
    host: Annotated[str | None, typer.Option(help="The address to listen on, as FAREBOX_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="The port, as FAREBOX_PORT; 0: any.")] = None,
    pricing: Annotated[Path | None, typer.Option(help="What is sold, as FAREBOX_PRICING.")] = None,
    upstreams: Annotated[Path | None, typer.Option(help="The providers, as FAREBOX_UPSTREAMS.")] = None,
    real_upstreams: Annotated[
        bool, typer.Option("--real-upstreams", help="Use the providers and their keys, which costs money.")
    ] = False,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="Stop when the process that started this one is gone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Try it out: a database, credits and, unless told otherwise, an upstream of its own. Ctrl-C stops everything."""
    with reporting(as_json=as_json):
        settings = load(host=host, port=port, pricing=pricing, upstreams=upstreams)
        catalog = usable_catalog(settings)
        if settings.database_url is None:
            refuse_if_served(StateDirectory(settings.state_dir))
        # Before the database is started, so that a busy port is found out at once.
        listener = listen(settings.host, settings.port)
        try:
            asked = _Demo(_quiet(settings), demo_upstream=not real_upstreams, with_parent=with_parent, as_json=as_json)
            _run(asked, listener, catalog)
        finally:
            listener.close()


def _quiet(settings: Settings) -> Settings:
    """What suits a terminal, where nothing else was said: readable logs, and no failure over the metrics' port."""
    changes: dict[str, object] = {}
    if "log_format" not in settings.model_fields_set:
        changes["log_format"] = "console"
    if "metrics_port" not in settings.model_fields_set:
        try:
            listen(settings.metrics_host, settings.metrics_port).close()
        except LocalError:
            changes["metrics_port"] = 0
            _say(f"Port {settings.metrics_port} is in use: no /metrics this time (FAREBOX_METRICS_PORT).")
    return settings.model_copy(update=changes)


def _run(asked: _Demo, listener: socket, catalog: Catalog) -> None:
    purpose = f"farebox demo at {base_url(listener)}"
    with (
        database_access(asked.settings, purpose=purpose, serving=True, progress=_say) as access,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        configure_logs(access.settings)
        runner.run(_serve(asked, access, listener, catalog))


async def _serve(asked: _Demo, access: Access, listener: socket, catalog: Catalog) -> None:
    settings = access.settings
    await require_schema(access.login_of("gateway"), Role.GATEWAY)
    stop = Stop(with_parent=asked.with_parent)
    with stop.on_signals():
        async with AsyncExitStack() as stack:
            adapt = await _upstream(stack, settings, catalog) if asked.demo_upstream else _as_it_is
            key = await _key(access) if access.embedded else None
            app = create_app(settings, adapt=adapt)
            await stack.enter_async_context(serving_farebox(app, listener, settings, stop))
            typer.echo(_welcome(base_url(listener), key, catalog, asked))
            await stop.wait(lambda: access.failed() or app.broken)
            _say("stopping")


async def _upstream(stack: AsyncExitStack, settings: Settings, catalog: Catalog) -> Callable[[Catalog], Catalog]:
    """Start the demo upstream; what leads a catalog's routes to it."""
    counter = TokenCounter()
    stack.callback(counter.stop)
    await counter.start()
    listener = listen("127.0.0.1", 0)
    upstream = DemoUpstream(counter.count, token_seconds=settings.demo_token_seconds, models=list(catalog.routes))
    await stack.enter_async_context(serving(upstream.app, listener))
    return through_demo_upstream(base_url(listener))


def _as_it_is(catalog: Catalog) -> Catalog:
    return catalog


async def _key(access: Access) -> DemoKey:
    pool = await create_pool(access.login_of("control"), Role.CONTROL, size=1)
    try:
        operations = Operations(ControlLedger(pool), access.settings.peppers())
        return await demo_key(operations, StateDirectory(access.settings.state_dir))
    finally:
        await pool.close()


def _welcome(url: str, key: DemoKey | None, catalog: Catalog, asked: _Demo) -> str:
    if asked.as_json:
        return json.dumps({"ready": True, "base_url": url, "key": None if key is None else key.text})
    model, source = _example(catalog, asked)
    if key is None:
        return f"Farebox is ready: {url}\n{source}\nA key: farebox keys create ACCOUNT"
    return instructions(url, key, model=model, source=source)


def _example(catalog: Catalog, asked: _Demo) -> tuple[str, str]:
    """A model that can be asked now, and where its answers come from."""
    missing: dict[str, str] = {}
    source = "Answers come from a demo upstream. With real providers: make run FAREBOX_DEMO=0"
    if not asked.demo_upstream:
        missing = UpstreamKeys(environment(), asked.settings.upstreams.parent).missing_routes(catalog)
        source = f"Answers come from the providers in {asked.settings.upstreams} and cost money there."
    served = [model for model in catalog.routes if model not in missing]
    if not served:
        reasons = "; ".join(dict.fromkeys(missing.values())) or "no model is priced"
        source = f"No model can be served yet: {reasons}."
    return EXAMPLE_MODEL if EXAMPLE_MODEL in served else next(iter(served), EXAMPLE_MODEL), source


def _say(text: str) -> None:
    typer.echo(f"farebox: {text}", err=True)
