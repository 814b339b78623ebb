"""The composition root: the one place where objects are made from the settings and handed to each other.

``create_app`` gives the ASGI app. Its lifespan makes the ``Services`` and ends them in reverse order.

To add routes: write a function in your module that takes the objects it needs and returns Starlette routes, and add one
line to ``_routes`` below. Endpoints raise ``core.errors.Refusal``; ``gateway/front.py`` writes every error, adds
x-request-id (also in ``request.state.request_id``) and CORS headers, and forgives base URLs without /v1.
"""

import asyncio
import platform
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from uuid import UUID

import structlog
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.routing import BaseRoute, Router

from proxy.billing import Billing, open_billing
from proxy.control.account import account_routes
from proxy.control.admin import AdminToken, admin_routes
from proxy.control.billing.messages import HttpPost, MessageSender
from proxy.control.billing.promo_codes import Promos, promo_routes
from proxy.control.health import CatalogStatus, Health, Problem, health_routes
from proxy.control.operations import Operations
from proxy.control.reload import CatalogReloader
from proxy.core.catalog import Catalog
from proxy.core.yaml_reader import ConfigError
from proxy.dialects.registry import DIALECTS
from proxy.gateway import models
from proxy.gateway.auth import Authenticator
from proxy.gateway.chat import Chat, ChatSettings
from proxy.gateway.exchange import Ending
from proxy.gateway.front import Front, Receive, Scope, Send
from proxy.gateway.idempotency import Idempotency, IdempotencySettings
from proxy.gateway.limits import DEFAULT, Limits, LimitsProfile
from proxy.gateway.marks import Marks
from proxy.gateway.measured import MeasuredLedger
from proxy.gateway.relay import Relay
from proxy.gateway.settle import Settler
from proxy.gateway.steps import Stepper, StepSettings
from proxy.gateway.tokens import TokenCounter
from proxy.gateway.upstream import HttpClient
from proxy.gateway.upstream_keys import UpstreamKeys
from proxy.ledger.alerts import Alerts
from proxy.ledger.audit import BookState, Check
from proxy.ledger.batch import BatchedLedger, BatchLimits
from proxy.ledger.bookkeeper import Bookkeeper
from proxy.ledger.connect import Pool, Role, create_pool
from proxy.ledger.control import ControlLedger
from proxy.ledger.errors import LedgerError, LedgerUnavailable, SchemaMismatch
from proxy.ledger.holds import HoldLedger
from proxy.ledger.idempotency import IdempotencyLedger
from proxy.ledger.journaling import Journaling, JournalTerms
from proxy.ledger.lease import WorkerLease
from proxy.ledger.lines import lines_to
from proxy.ledger.lots import LotKeeper, LotState
from proxy.ledger.migrate import schema_state
from proxy.ledger.outbox import Outbox
from proxy.ledger.promos import PromoLedger
from proxy.ledger.reader import AccountReader
from proxy.ledger.records import ApiKey
from proxy.ledger.sweeper import Sweeper
from proxy.metrics import Metrics, MetricsServer
from proxy.settings import Settings, SettingsError, environment

__all__ = ["Adapt", "Farebox", "Services", "Timing", "create_app", "serve_metrics"]

log = structlog.get_logger("farebox.app")

Adapt = Callable[[Catalog], Catalog]
"""Changes a catalog before it serves: how the demo puts its own upstream in the place of every other."""

try:
    RELEASE = version("farebox")
except PackageNotFoundError:  # run from a checkout that isn't installed
    RELEASE = "unknown"

GATEWAY_CONNECTIONS = 4
CONTROL_CONNECTIONS = 4
READER_CONNECTIONS = 4
IDEMPOTENCY_CONNECTIONS = 4
# After the last exchange was cut: for what waits in the ledger's batch, and for connections to close.
LEDGER_STOP_SECONDS = 5.0
LEDGER_AWAY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Timing:
    """How often things are looked at; for tests that can't wait for a lease to lapse. Seconds."""

    lease_seconds: float = 29.0
    """How long a renewal counts on this process's own clock; the ledger gives a second more."""
    renew_seconds: float = 5.0
    sweep_seconds: float = 10.0
    settled_seconds: float = 15.0
    takeover_seconds: float = 5.0
    alerts_seconds: float = 30.0
    messages_seconds: float = 5.0
    events_seconds: float = 30.0
    auto_topup_seconds: float = 10.0
    lots_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that lives as long as the app does."""

    settings: Settings
    metrics: Metrics
    catalog: CatalogReloader
    keys: UpstreamKeys
    pool: Pool
    holds: HoldLedger
    lease: WorkerLease
    authenticator: Authenticator
    operations: Operations
    promos: Promos
    reader: AccountReader
    billing: Billing | None
    settler: Settler
    journaling: Journaling
    chat: Chat
    leaving: asyncio.Event
    """Set when this process is about to end: not ready, though it may still take requests for a while."""


def create_app(settings: Settings, *, adapt: Adapt | None = None, timing: Timing | None = None) -> "Farebox":
    """The ASGI app. Nothing is connected or read until its lifespan starts."""
    return Farebox(settings, adapt or _as_it_is, timing or Timing())


class Farebox:
    """The ASGI app: lifespan, then every request through the front door."""

    def __init__(self, settings: Settings, adapt: Adapt, timing: Timing) -> None:
        self.settings = settings
        self._adapt = adapt
        self._timing = timing
        self._front: Front | None = None
        self._services: Services | None = None
        self._stop_at: float | None = None
        self.metrics = Metrics()
        self.failure: str | None = None
        """Why the lifespan didn't start or end as it should."""

    @property
    def broken(self) -> str | None:
        """Why this process has to end; it admits nothing more. For whoever runs it to ask now and then."""
        return None if self._services is None else self._services.journaling.failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http" and self._front is not None:
            scope["app"] = self
            await self._front(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            raise RuntimeError(f"no {scope['type']} before the lifespan has started")

    @property
    def price_version(self) -> str:
        """The price version that serves."""
        assert self._services is not None, "the lifespan has not started"
        return self._services.catalog.state.version

    @property
    def open_exchanges(self) -> int:
        """Answers on their way, those included whose client has left."""
        return 0 if self._services is None else self._services.settler.open_exchanges

    @property
    def stop_at(self) -> float | None:
        """When, on the loop's clock, what still runs is cut; None while the process stays."""
        return self._stop_at

    def leave(self) -> None:
        """The process will end: /readyz says so from now on. Requests are still taken until ``begin_shutdown``."""
        if self._services is not None:
            self._services.leaving.set()

    def begin_shutdown(self) -> None:
        """The process was told to end: not ready and nothing new from now on; what runs may go on for a while.

        The server calls it before it stops listening. Where it doesn't, the end of the lifespan does.
        """
        if self._services is None or self._stop_at is not None:
            return
        self.leave()
        loop, settler = asyncio.get_running_loop(), self._services.settler
        self._stop_at = loop.time() + self.settings.shutdown_seconds
        settler.stop_admitting()
        loop.call_at(self._stop_at, settler.cut_all, Ending.SHUTDOWN)
        log.info("shutting down", open_exchanges=settler.open_exchanges)

    def cut_shutdown(self) -> None:
        """The process was told again: what runs is cut now, and charged, as if its time were over."""
        if self._services is None:
            return
        self.begin_shutdown()
        self._stop_at = asyncio.get_running_loop().time()
        self._services.settler.cut_all(Ending.SHUTDOWN)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Start, wait for the end, end. A start that fails is told to the server: an exception would not stop it."""
        await receive()
        started = False
        try:
            async with _running(self.settings, self.metrics, self._adapt, self._timing) as services:
                self._front = _front(services)
                self._services = services
                started = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
                self.begin_shutdown()
                await self._drain(services.settler)
        except Exception as error:
            self.failure = str(error)
            # What an operator can mend needs no traceback.
            mendable = isinstance(error, SettingsError | ConfigError | LedgerError)
            what = "can't shut down" if started else "can't start"
            log.error(what, reason=str(error), exc_info=None if mendable else error)
            await send({"type": f"lifespan.{'shutdown' if started else 'startup'}.failed", "message": str(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})

    async def _drain(self, settler: Settler) -> None:
        assert self._stop_at is not None
        left = self._stop_at - asyncio.get_running_loop().time()
        if not await settler.drain(max(0.0, left)):
            log.error("answers were left unsettled", open=settler.open_exchanges, unsettled=settler.unsettled)


@asynccontextmanager
async def _running(settings: Settings, metrics: Metrics, adapt: Adapt, timing: Timing) -> AsyncIterator[Services]:
    """The services, started; on the way out they end in reverse order."""
    dsn, peppers = settings.database_url_of("gateway"), settings.peppers()
    if dsn is None or peppers is None:
        raise SettingsError("FAREBOX_DATABASE_URL and FAREBOX_KEY_PEPPER are needed to serve")
    async with AsyncExitStack() as stack:
        serve_metrics(settings, metrics.registry, stack)
        counter = TokenCounter()
        await counter.start()
        stack.callback(counter.stop)

        pool = await create_pool(dsn, Role.GATEWAY, size=GATEWAY_CONNECTIONS)
        stack.push_async_callback(pool.close)
        holds = HoldLedger(pool)
        journaling = Journaling(_journal_terms(settings, timing), holds, metrics)
        catalog = await _catalog(settings, journaling, metrics, adapt, stack)
        ledger, lease, settler = await _money(settings, dsn, metrics, counter, timing, journaling, stack)
        control_dsn = settings.database_url_of("control") or dsn
        control = await create_pool(control_dsn, Role.CONTROL, size=CONTROL_CONNECTIONS)
        stack.push_async_callback(control.close)
        _keep_the_book(control_dsn, metrics, timing, stack)
        _tell(settings, control_dsn, control, metrics, timing, stack)
        reader = await create_pool(settings.database_url_of("reader") or dsn, Role.READER, size=READER_CONNECTIONS)
        stack.push_async_callback(reader.close)
        authenticator = Authenticator(holds.find_key, peppers)
        keys = UpstreamKeys(environment(), settings.upstreams.parent)
        stepper, relay = _relaying(settings, ledger, settler, metrics, stack)
        chat = Chat(
            catalog=catalog.holder,
            authenticator=authenticator,
            limits=_limits(settings),
            counter=counter,
            keys=keys,
            ledger=ledger,
            lease_held=lease.held,
            worker_id=lease.worker_id,
            settler=settler,
            stepper=stepper,
            relay=relay,
            idempotency=await _idempotency(settings, dsn, lease.worker_id, metrics, stack),
            dialects=DIALECTS,
            metrics=metrics,
            settings=ChatSettings(settings.affordable_cap_tokens_min, settings.send_seconds, settings.key_calls_max),
        )
        yield Services(
            settings=settings,
            metrics=metrics,
            catalog=catalog,
            keys=keys,
            pool=pool,
            holds=holds,
            lease=lease,
            authenticator=authenticator,
            operations=Operations(ControlLedger(control), peppers),
            promos=Promos(PromoLedger(control)),
            reader=AccountReader(reader),
            billing=await open_billing(
                settings,
                metrics,
                lambda: catalog.holder.current.offers,
                stack,
                events_seconds=timing.events_seconds,
                auto_topup_seconds=timing.auto_topup_seconds,
            ),
            settler=settler,
            journaling=journaling,
            chat=chat,
            leaving=asyncio.Event(),
        )


async def _catalog(
    settings: Settings, journaling: Journaling, metrics: Metrics, adapt: Adapt, stack: AsyncExitStack
) -> CatalogReloader:
    """What is sold, read and watched."""
    catalog = CatalogReloader(
        settings.pricing,
        settings.upstreams,
        journaling.put_prices,
        metrics=metrics,
        poll_seconds=settings.reload_seconds,
        adapt=adapt,
    )
    await catalog.load()
    stack.push_async_callback(_cancelled, asyncio.create_task(catalog.run()))
    return catalog


async def _money(
    settings: Settings,
    dsn: str,
    metrics: Metrics,
    counter: TokenCounter,
    timing: Timing,
    journaling: Journaling,
    stack: AsyncExitStack,
) -> tuple[MeasuredLedger, WorkerLease, Settler]:
    """What holds and charges credits. The lease ends last, after everything that it is the right to do."""
    open_line = lines_to(dsn)

    limits = BatchLimits(reserve_seconds=settings.reserve_seconds)
    ledger = BatchedLedger(open_line, limits=limits, observe=metrics.batch)
    lease = WorkerLease(
        open_line,
        hostname=platform.node(),
        release=RELEASE,
        marks=Marks(lambda: settler.exchanges, counter.count_each, metrics=metrics),
        on_lapse=lambda: settler.cut_all(Ending.LEASE_LAPSED),
        lease_seconds=timing.lease_seconds,
        renew_seconds=timing.renew_seconds,
    )
    measured = MeasuredLedger(await journaling.before(ledger, lease.worker_id, stack), metrics)
    settler = Settler(measured, metrics=metrics, count_each=counter.count_each)
    await lease.start()
    stack.push_async_callback(lease.stop)
    await ledger.start()
    stack.push_async_callback(_stop_ledger, ledger, journaling)
    journaling.take_over(ledger, stack)
    settler.start()
    sweeper = Sweeper(
        open_line,
        on_expired=lambda expired: metrics.holds_expired(len(expired)),
        sweep_seconds=timing.sweep_seconds,
        settled_seconds=timing.settled_seconds,
    )
    sweeper.start()
    stack.push_async_callback(sweeper.stop)
    loop = asyncio.get_running_loop()
    metrics.watch(
        exchanges=lambda: settler.open_exchanges,
        unsettled=lambda: settler.unsettled,
        lease_held=lambda: float(lease.held()),
        tasks=lambda: float(len(asyncio.all_tasks(loop))),
    )
    if (journal := journaling.journal) is not None:
        metrics.watch_journal(
            size=lambda: journal.size,
            waiting=lambda: journal.waiting,
            admitting=lambda: float(journal.refusal is None),
        )
    return measured, lease, settler


def _keep_the_book(dsn: str, metrics: Metrics, timing: Timing, stack: AsyncExitStack) -> None:
    def observe(state: BookState, broken: Sequence[Check]) -> None:
        metrics.book(
            unsealed=state.unsealed,
            unaudited=state.unaudited,
            clean_at=state.clean_at.timestamp() if state.clean_at else 0.0,
            broken=len(broken),
        )

    bookkeeper = Bookkeeper(dsn, observe=observe)
    bookkeeper.start()
    stack.push_async_callback(bookkeeper.stop)

    def drawn(state: LotState) -> None:
        metrics.lots(behind=state.behind, broken=state.broken, expired=state.expired)

    lots = LotKeeper(dsn, observe=drawn, lots_seconds=timing.lots_seconds)
    lots.start()
    stack.push_async_callback(lots.stop)


def _tell(settings: Settings, dsn: str, control: Pool, metrics: Metrics, timing: Timing, stack: AsyncExitStack) -> None:
    """Messages to the operator's endpoint; where there is none, what was written for it is only tidied up."""
    post = None
    if settings.webhook_url is not None:
        post = HttpPost(settings.webhook_url)
        stack.push_async_callback(post.close)
        alerts = Alerts(dsn, low_balance=settings.low_balance, look_seconds=timing.alerts_seconds)
        alerts.start()
        stack.push_async_callback(alerts.stop)
    keys = settings.signing_keys()
    sender = MessageSender(Outbox(control), post, keys, observe=metrics, poll_seconds=timing.messages_seconds)
    sender.start()
    stack.push_async_callback(sender.stop)


def _relaying(
    settings: Settings, ledger: MeasuredLedger, settler: Settler, metrics: Metrics, stack: AsyncExitStack
) -> tuple[Stepper, Relay]:
    """What reads answers, and lets their holds grow."""
    steps = StepSettings(settings.hold_step_tokens, settings.affordable_cap_tokens_min, settings.reserve_seconds)
    stepper = Stepper(ledger, own=settler.own, metrics=metrics, settings=steps)
    http = HttpClient()
    stack.push_async_callback(http.close)
    relay = Relay(http, settler, stepper, drains_max=settings.drains_max, keepalive_seconds=settings.keepalive_seconds)
    metrics.watch(drains=lambda: len(relay.drains))
    return stepper, relay


async def _idempotency(
    settings: Settings, dsn: str, worker_id: UUID, metrics: Metrics, stack: AsyncExitStack
) -> Idempotency:
    """Connections of its own, opened when the first Idempotency-Key comes: retries may not hold up key look-ups."""
    pool = await create_pool(dsn, Role.GATEWAY, size=IDEMPOTENCY_CONNECTIONS)
    stack.push_async_callback(pool.close)
    idempotency = Idempotency(
        IdempotencyLedger(pool),
        worker_id=worker_id,
        metrics=metrics,
        settings=IdempotencySettings(
            answer_seconds=settings.idempotency_answer_seconds,
            answer_bytes_max=settings.idempotency_answer_bytes_max,
            key_seconds=settings.idempotency_key_days * 86_400.0,
            claim_seconds=settings.reserve_seconds,
        ),
    )
    idempotency.start()
    stack.push_async_callback(idempotency.stop)
    return idempotency


def _journal_terms(settings: Settings, timing: Timing) -> JournalTerms | None:
    path = settings.journal_path()
    if path is None:
        return None
    return JournalTerms(
        path,
        bytes_max=settings.journal_bytes_max,
        keep_seconds=settings.journal_keep_seconds,
        kept_bytes_max=settings.journal_kept_bytes_max,
        release=RELEASE,
        scan_seconds=timing.takeover_seconds,
    )


async def _stop_ledger(ledger: BatchedLedger, journaling: Journaling) -> None:
    # The settler has waited for it already: without a connection by now there won't be one in time.
    remains = await ledger.stop(LEDGER_STOP_SECONDS if ledger.connected else LEDGER_AWAY_SECONDS)
    lost = "was not written" if journaling.journal is None else "waits in the journal"
    for row in remains.finalizes:
        log.error(f"a charge {lost}", request_id=str(row.hold_id), charge=row.charge)
    if remains.holds:
        log.error("holds are left to the sweeper", holds=[str(hold) for hold in remains.holds])
    if remains.finalizes and journaling.journal is None:
        raise LedgerUnavailable(
            f"{len(remains.finalizes)} charges were not written: the ledger was away at the end, and no journal is kept"
        )


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def serve_metrics(settings: Settings, registry: CollectorRegistry, stack: AsyncExitStack | ExitStack) -> None:
    """Serve the registry on the metrics port, if there is one, as long as the stack lasts. Raises SettingsError."""
    if settings.metrics_port:
        server = MetricsServer(registry, host=settings.metrics_host, port=settings.metrics_port)
        try:
            server.start()
        except OSError as error:
            where = f"{settings.metrics_host}:{settings.metrics_port}"
            raise SettingsError(f"FAREBOX_METRICS_PORT: can't listen on {where}: {error.strerror}") from error
        stack.callback(server.stop)


def _as_it_is(catalog: Catalog) -> Catalog:
    return catalog


def _limits(settings: Settings) -> Limits:
    default = LimitsProfile(
        DEFAULT.name,
        body_bytes_max=settings.body_bytes_max,
        messages_max=settings.messages_max,
        json_depth_max=settings.json_depth_max,
        json_values_max=settings.json_values_max,
        choices_max=settings.choices_max,
        header_bytes_max=settings.header_bytes_max,
        receive_seconds=settings.receive_seconds,
    )
    return Limits.of(default, profile=settings.limits_profile)


def _routes(services: Services) -> list[BaseRoute]:
    """Every route but chat completions: one line a module."""
    secret = services.settings.admin_token
    token = AdminToken(secret.get_secret_value()) if secret else None

    async def fresh_key(request: Request) -> ApiKey:
        # No reserve looks at the key again, so that a revoked one would be read with for the cache's few seconds.
        return await services.authenticator.authenticate(request.headers.raw, age_seconds_max=0)

    return [
        *health_routes(_health(services)),
        *models.routes(
            services.authenticator.authenticate, lambda: services.catalog.holder.current, services.keys.has_key
        ),
        *account_routes(fresh_key, services.reader),
        *promo_routes(fresh_key, services.promos),
        *(services.billing.routes(fresh_key, services.reader, token) if services.billing else ()),
        *(admin_routes(token, services.operations) if token else ()),
    ]


def _health(services: Services) -> Health:
    """What /readyz looks at."""

    async def admitting() -> None:
        if services.leaving.is_set() or services.settler.stopping:
            raise Problem("shutting down")

    async def lease() -> None:
        if not services.lease.held():
            raise Problem("this worker's lease has lapsed")

    async def database() -> None:
        try:
            await services.holds.find_key("")
        except LedgerUnavailable:
            raise Problem("the ledger's database can't be reached") from None

    async def schema() -> None:
        try:
            (await schema_state(services.pool)).require()
        except SchemaMismatch as error:
            raise Problem(str(error)) from None
        except LedgerUnavailable:
            raise Problem("unknown: the ledger's database can't be reached") from None

    async def journal() -> None:
        if (refusal := services.journaling.refusal) is not None:
            raise Problem(refusal)

    def catalog() -> CatalogStatus:
        state = services.catalog.state
        return CatalogStatus(state.version, state.models, state.error)

    checks = {"admitting": admitting, "lease": lease, "database": database, "schema": schema, "journal": journal}
    return Health(checks, catalog)


def _front(services: Services) -> Front:
    settings = services.settings
    return Front(
        services.chat.handle,
        Router(routes=_routes(services), redirect_slashes=False),
        metrics=services.metrics,
        cors_origins=settings.cors_origins,
        exhausted_status=settings.exhausted_status,
    )
