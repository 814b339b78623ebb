"""Metrics: what an operator watches, on a registry of its own and a loopback port of its own.

Every label is bound beforehand from a closed set, so that a client can't make a new time series. Amounts are whole
microcredits; Prometheus keeps them as floats, so they are for watching. The ledger alone is the truth.
"""

import threading
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import start_http_server
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from proxy.core.usage import TOKEN_CLASSES, Usage

__all__ = ["CLAIM_OUTCOMES", "LEDGER_OPERATIONS", "ROUTES", "Metrics", "MetricsServer"]

ROUTES = (
    "chat",
    "models",
    "credits",
    "transactions",
    "usage",
    "receipts",
    "billing",
    "webhooks",
    "admin",
    "health",
    "other",
)
"""The values of the label ``route``; a path that is none of ours counts as ``other``."""

LEDGER_OPERATIONS = (
    "reserve",
    "extend",
    "finalize",
    "release",
    "batch",
    "other",
)
"""The values of the label ``operation``. ``batch`` is a call on the database; the others include the wait for it."""

CLAIM_OUTCOMES = ("claimed", "running", "finished", "replayed", "mismatch")
"""What became of requests with an Idempotency-Key."""

DEPARTURES = ("read_on", "unsent", "refused", "on_disconnect", "drain_seconds", "drain_tokens", "drains_max", "hold")
"""The values of the label ``outcome``: what became of an answer whose client left, or what cut it off."""

STRIPE_EVENT_OUTCOMES = ("applied", "known", "ignored", "not_ours", "refused", "failed")
"""What became of webhooks: the values of the label ``outcome``."""

PAYMENT_OUTCOMES = ("paid", "quarantined")
"""What became of payments that were new: the values of the label ``outcome``."""

AUTO_TOPUP_OUTCOMES = ("paid", "pending", "failed", "unresolved", "blocked")
"""What became of automatic top-ups, each time one was looked at."""

RETURN_OUTCOMES = ("taken", "returned", "conflict", "unknown_status")
"""What became of refunds and disputes that moved credits, or should have: the values of the label ``outcome``."""

RECONCILIATION_SPANS = ("recent", "month")
"""Over how long the books were compared with Stripe's: the values of the label ``span``."""

MESSAGE_OUTCOMES = ("delivered", "failed", "given_up")
"""What became of an attempt to send a message to the operator's endpoint."""

_EXTENSION_OUTCOMES = ("extended", "insufficient", "spend_limit", "credits_held", "failed", "other")
_SOURCES = ("reported", "partly_counted", "counted")
_FAST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_CALL_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """One object per process. Its methods are events in the words of the gateway and take microseconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._make_requests()
        self._make_credits()
        self._make_ledger()
        self._make_journal()
        self._make_catalog()
        self._make_billing()
        self._make_messages()

    # Requests

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered, ``seconds`` after it arrived. An unknown route counts as ``other``."""
        if route not in ROUTES:
            route = "other"
        counter = self._requests.get((route, status))
        if counter is None:
            # Not known beforehand: there are at most 500 statuses, and an upstream's are passed on.
            counter = self._requests[route, status] = self._requests_total.labels(route, str(status))
        counter.inc()
        self._request_seconds[route].observe(seconds)

    def first_byte_added(self, seconds: float) -> None:
        """What Farebox added to the time to the first byte: everything but the wait for the upstream."""
        self._first_byte.observe(max(0.0, seconds))

    def tokens(self, usage: Usage, source: str) -> None:
        """The usage of a settled answer; ``source`` is a ``UsageSource``."""
        bound = self._tokens.get(source)
        if bound is None:
            return
        for counter, count in zip(bound, usage.as_tuple(), strict=True):
            if count:
                counter.inc(count)

    def idempotency(self, outcome: str) -> None:
        """A request with an Idempotency-Key was admitted, refused or replayed: one of CLAIM_OUTCOMES."""
        self._idempotency[outcome].inc()

    def client_left(self, outcome: str) -> None:
        """An answer whose client had left has ended; ``outcome`` is one of DEPARTURES."""
        self._departures.get(outcome, self._departures["read_on"]).inc()

    # Credits

    def hold_opened(self, amount: int) -> None:
        """A reserve was granted ``amount`` microcredits."""
        self._reserved.inc(amount)
        self._open_holds.inc()

    def hold_extended(self, amount: int) -> None:
        """A hold grew by ``amount`` microcredits while its answer ran."""
        self._reserved.inc(amount)
        self._extensions["extended"].inc()

    def hold_not_extended(self, outcome: str) -> None:
        """A hold didn't grow; ``outcome`` is an ``ExtendOutcome``, or ``failed`` where the ledger didn't say."""
        self._extensions.get(outcome, self._extensions["other"]).inc()

    def answer_not_held(self, reason: str) -> None:
        """An answer was ended since its hold couldn't grow: ``out_of_credits``, ``spend_limit`` or ``ledger_lost``."""
        self._not_held[reason].inc()

    def hold_charged(self, *, charge: int, released: int, overrun: int = 0) -> None:
        """A hold ended with a charge. ``overrun`` is the part of the charge that became debt; all in microcredits."""
        self._charged.inc(charge)
        self._released.inc(max(0, released))
        self._open_holds.dec()
        if overrun:
            self._overruns.inc()
            self._overrun.inc(overrun)

    def hold_released(self, amount: int) -> None:
        """A hold ended without a charge and gave ``amount`` microcredits back."""
        self._released.inc(amount)
        self._open_holds.dec()

    def implausible_usage(self) -> None:
        """An upstream reported over four times what is possible: the hold was charged, and the answer wants a look."""
        self._implausible.inc()

    def holds_expired(self, count: int) -> None:
        """The sweeper settled ``count`` holds of workers that are gone."""
        self._expired.inc(count)

    # Ledger

    def ledger_call(self, operation: str, seconds: float) -> None:
        """One call on the ledger; ``operation`` is one of LEDGER_OPERATIONS."""
        self._calls.get(operation, self._calls["other"]).observe(seconds)

    def ledger_failed(self, operation: str) -> None:
        """A call on the ledger raised: the database is away, or refused what must never be asked."""
        self._failures.get(operation, self._failures["other"]).inc()

    def batch(self, rows: int, seconds: float) -> None:
        """One call on the database carried so many reserves, finalizes and releases, and took so long."""
        self._batch_size.observe(rows)
        self._calls["batch"].observe(seconds)

    def marks_gathered(self, seconds: float, *, late: bool) -> None:
        """The open answers were counted for a heartbeat in ``seconds``; ``late``: not all of them in time."""
        self._marks_seconds.observe(seconds)
        if late:
            self._marks_late.inc()

    def book(self, *, unsealed: int, unaudited: int, clean_at: float, broken: int) -> None:
        """How far seals and audit are behind, in transfers; when all was last found right (Unix time, 0: never yet);
        and how many checks the last look found broken."""
        self._unsealed.set(unsealed)
        self._unaudited.set(unaudited)
        self._audit_clean.set(clean_at)
        self._audit_broken.set(broken)

    def lots(self, *, behind: int, broken: int, expired: int) -> None:
        """A pass over lots: transfers left to draw, accounts whose lots can't be, and microcredits that expired."""
        self._lots_behind.set(behind)
        self._lots_broken.set(broken)
        self._lots_expired.inc(expired)

    def watch(
        self,
        *,
        exchanges: Callable[[], float] | None = None,
        unsettled: Callable[[], float] | None = None,
        lease_held: Callable[[], float] | None = None,
        drains: Callable[[], float] | None = None,
        tasks: Callable[[], float] | None = None,
    ) -> None:
        """Read these when scraped, from the server's thread.

        Open exchanges, finalizes not yet written, whether the lease is held, answers without a client, asyncio's tasks.
        """
        watched = (
            (self._exchanges, exchanges),
            (self._unsettled, unsettled),
            (self._lease, lease_held),
            (self._drains, drains),
            (self._tasks, tasks),
        )
        for gauge, read in watched:
            if read is not None:
                gauge.set_function(read)

    # Journal

    def journal_synced(self, rows: int, seconds: float) -> None:
        """So many rows became durable in the journal by one sync."""
        self._journal_rows.inc(rows)
        self._journal_sync.observe(seconds)

    def journal_skipped(self, rows: int) -> None:
        """Rows went to the ledger without being durable in the journal: its disk is full, broken or silent."""
        self._journal_skipped.inc(rows)

    def journal_rejected(self) -> None:
        """The ledger will never carry out a row: it was put aside."""
        self._journal_rejected.inc()

    def journal_replayed(self, rows: int) -> None:
        """Rows were carried out for a process that is gone."""
        self._journal_replayed.inc(rows)

    def journal_damaged(self) -> None:
        """A journal was found damaged in its middle."""
        self._journal_damaged.inc()

    def watch_journal(
        self, *, size: Callable[[], float], waiting: Callable[[], float], admitting: Callable[[], float]
    ) -> None:
        """Read these when scraped: bytes, rows that the ledger hasn't confirmed, whether it takes new work."""
        self._journal_bytes.set_function(size)
        self._journal_waiting.set_function(waiting)
        self._journal_admitting.set_function(admitting)

    # Automatic top-ups

    def auto_topup(self, outcome: str) -> None:
        """An attempt was made or looked at: one of AUTO_TOPUP_OUTCOMES."""
        self._auto_topups[outcome].inc()

    # Messages out

    def message(self, outcome: str) -> None:
        """An attempt to send a message has ended: one of MESSAGE_OUTCOMES."""
        self._messages[outcome].inc()

    def messages_waiting(self, *, waiting: int, given_up: int, oldest_seconds: float) -> None:
        """How many messages wait, how many were given up, and for how long the oldest that waits has done so."""
        self._messages_waiting.set(waiting)
        self._messages_given_up.set(given_up)
        self._messages_oldest.set(oldest_seconds)

    # Catalog

    def catalog_loaded(self, version: str, routes: int) -> None:
        """A catalog of so many routes serves from now on."""
        with self._catalog_lock:
            self._price_version.clear()
            self._price_version.labels(version).set(1)
        self._routes.set(routes)
        self._catalog_stale.set(0)

    def catalog_failed(self) -> None:
        """A changed file was refused; the last good catalog goes on serving."""
        self._reload_failures.inc()
        self._catalog_stale.set(1)

    # Billing

    def stripe_event(self, outcome: str) -> None:
        """A webhook came, or was resumed; one of STRIPE_EVENT_OUTCOMES, all others of which count as ``applied``."""
        self._stripe_events.get(outcome, self._stripe_events["applied"]).inc()

    def payment_applied(self, outcome: str) -> None:
        """A payment was credited, or put into quarantine: one of PAYMENT_OUTCOMES."""
        self._payments[outcome].inc()

    def refund_applied(self, outcome: str) -> None:
        """A refund was applied; those that are none of RETURN_OUTCOMES moved nothing, and aren't counted."""
        if outcome in self._refunds:
            self._refunds[outcome].inc()

    def dispute_applied(self, outcome: str) -> None:
        """A dispute was applied, as ``refund_applied``."""
        if outcome in self._disputes:
            self._disputes[outcome].inc()

    def refunds_held(self, count: int, oldest_at: float) -> None:
        """How many refunds we asked for are unanswered, and since when the oldest is (Unix time; 0: there is none)."""
        self._refunds_held.set(count)
        self._refunds_oldest.set(oldest_at)

    def stripe_events_left(self, count: int, oldest_at: float) -> None:
        """How many webhooks are not processed, and since when the oldest waits (Unix time; 0: there is none)."""
        self._stripe_events_unprocessed.set(count)
        self._stripe_events_oldest.set(oldest_at)

    def reconciliation(self, span: str, *, mended: int, differing: int, clean_at: float) -> None:
        """The last comparison with Stripe's book over one of RECONCILIATION_SPANS. ``clean_at``: when last nothing was
        left between the books (Unix time; 0: never yet)."""
        self._reconciliation_mended[span].set(mended)
        self._reconciliation_differing[span].set(differing)
        self._reconciliation_clean[span].set(clean_at)

    # The metrics themselves

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"farebox_{name}", text, tuple(labels), registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"farebox_{name}", text, tuple(labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
        return Histogram(f"farebox_{name}", text, tuple(labels), buckets=tuple(buckets), registry=self.registry)

    def _make_requests(self) -> None:
        self._requests_total = self._counter("requests_total", "Requests answered.", ("route", "status"))
        self._requests: dict[tuple[str, int], Counter] = {}
        durations = self._histogram(
            "request_seconds", "From a request's arrival to the end of its answer.", _CALL_SECONDS, ("route",)
        )
        self._request_seconds = {route: durations.labels(route) for route in ROUTES}
        self._first_byte = self._histogram(
            "first_byte_added_seconds", "What Farebox added to the time to the first byte.", _FAST_SECONDS
        )
        claims = self._counter("idempotency_keys_total", "Requests with an Idempotency-Key.", ("outcome",))
        self._idempotency = {outcome: claims.labels(outcome) for outcome in CLAIM_OUTCOMES}
        departures = self._counter("departures_total", "Answers whose client left before their end.", ("outcome",))
        self._departures = {outcome: departures.labels(outcome) for outcome in DEPARTURES}
        self._drains = self._gauge("drains", "Answers that are read on for clients that have left.")
        self._tasks = self._gauge("tasks", "Tasks of the event loop.")
        tokens = self._counter("tokens_total", "Tokens settled, by class and by who said so.", ("class", "source"))
        self._tokens = {source: [tokens.labels(name, source) for name in TOKEN_CLASSES] for source in _SOURCES}
        self._implausible = self._counter("implausible_usage_total", "Answers whose reported usage was not believed.")

    def _make_credits(self) -> None:
        self._reserved = self._counter("reserved_microcredits_total", "Microcredits reserved.")
        self._charged = self._counter("charged_microcredits_total", "Microcredits charged.")
        self._released = self._counter("released_microcredits_total", "Microcredits reserved and given back.")
        extensions = self._counter("hold_extensions_total", "Growths of holds that were asked for.", ("outcome",))
        self._extensions = {outcome: extensions.labels(outcome) for outcome in _EXTENSION_OUTCOMES}
        not_held = self._counter("answers_not_held_total", "Answers ended since their hold couldn't grow.", ("reason",))
        self._not_held = {
            reason: not_held.labels(reason) for reason in ("out_of_credits", "spend_limit", "ledger_lost")
        }
        self._overruns = self._counter("overruns_total", "Charges that the account could not carry: they made debt.")
        self._overrun = self._counter("overrun_microcredits_total", "Microcredits that became debt.")
        self._open_holds = self._gauge("open_holds", "Holds that this process opened and has not ended.")
        self._exchanges = self._gauge("open_exchanges", "Requests in flight.")
        self._expired = self._counter("expired_holds_total", "Holds settled for workers that are gone.")

    def _make_ledger(self) -> None:
        calls = self._histogram("ledger_call_seconds", "Time of a call on the ledger.", _FAST_SECONDS, ("operation",))
        self._calls = {operation: calls.labels(operation) for operation in LEDGER_OPERATIONS}
        failures = self._counter("ledger_failures_total", "Calls on the ledger that raised.", ("operation",))
        self._failures = {operation: failures.labels(operation) for operation in LEDGER_OPERATIONS}
        self._batch_size = self._histogram("ledger_batch_size", "Rows in one batched call.", _BATCH_SIZES)
        self._unsettled = self._gauge("unsettled_finalizes", "Ended answers whose charge is not yet in the ledger.")
        self._marks_seconds = self._histogram("marks_seconds", "Counting open answers for a heartbeat.", _FAST_SECONDS)
        self._marks_late = self._counter("marks_late_total", "Heartbeats for which not all open answers were counted.")
        self._unsealed = self._gauge("unsealed_transfers", "Transfers that no seal covers yet.")
        self._unaudited = self._gauge("unaudited_transfers", "Transfers that the running audit has not looked at.")
        self._audit_clean = self._gauge("audit_clean_timestamp_seconds", "When the audit last found nothing wrong.")
        self._audit_broken = self._gauge("audit_broken_checks", "Checks that the last look of the audit found broken.")
        self._lots_behind = self._gauge("undrawn_transfers", "Transfers that are not yet drawn from lots.")
        self._lots_broken = self._gauge("broken_lots_accounts", "Accounts whose lots can't be drawn.")
        self._lots_expired = self._counter("expired_microcredits_total", "Credits that expired, in microcredits.")
        self._lease = self._gauge("worker_lease_held", "1 while this process may admit requests.")

    def _make_journal(self) -> None:
        self._journal_rows = self._counter("journal_rows_total", "Rows made durable in the journal.")
        self._journal_sync = self._histogram("journal_sync_seconds", "Time of a sync of the journal.", _FAST_SECONDS)
        self._journal_bytes = self._gauge("journal_bytes", "Bytes of the journal's files in which rows wait.")
        self._journal_waiting = self._gauge("journal_waiting_rows", "Rows that the ledger has not confirmed.")
        self._journal_admitting = self._gauge("journal_admitting", "1 while the journal takes new work.")
        self._journal_skipped = self._counter("journal_skipped_total", "Rows that went on without being durable.")
        self._journal_rejected = self._counter("journal_rejected_total", "Rows that the ledger will never carry out.")
        self._journal_replayed = self._counter(
            "journal_replayed_total", "Rows carried out for processes that are gone."
        )
        self._journal_damaged = self._counter("journal_damaged_total", "Journals found damaged in their middle.")

    def _make_messages(self) -> None:
        topups = self._counter("auto_topups_total", "Automatic top-ups that were made or looked at.", ("outcome",))
        self._auto_topups = {outcome: topups.labels(outcome) for outcome in AUTO_TOPUP_OUTCOMES}
        total = self._counter("messages_total", "Attempts to send a message to the operator's endpoint.", ("outcome",))
        self._messages = {outcome: total.labels(outcome) for outcome in MESSAGE_OUTCOMES}
        self._messages_waiting = self._gauge("messages_waiting", "Messages that have not arrived yet.")
        self._messages_given_up = self._gauge("messages_given_up", "Messages that will not be tried again.")
        self._messages_oldest = self._gauge("messages_oldest_seconds", "The age of the oldest message that waits.")

    def _make_catalog(self) -> None:
        self._catalog_lock = threading.Lock()
        self._price_version = self._gauge("price_version_info", "The price version that serves.", ("version",))
        self._routes = self._gauge("catalog_routes", "Models for sale.")
        self._reload_failures = self._counter("catalog_reload_failures_total", "Changed files that were refused.")
        self._catalog_stale = self._gauge("catalog_stale", "1 while a changed file is refused and an older one serves.")

    def _make_billing(self) -> None:
        events = self._counter("stripe_events_total", "Webhooks of Stripe's, by what became of them.", ("outcome",))
        self._stripe_events = {outcome: events.labels(outcome) for outcome in STRIPE_EVENT_OUTCOMES}
        payments = self._counter("payments_total", "Payments that came in, by what became of them.", ("outcome",))
        self._payments = {outcome: payments.labels(outcome) for outcome in PAYMENT_OUTCOMES}
        refunds = self._counter("refunds_total", "Refunds that Stripe told of, by what became of them.", ("outcome",))
        self._refunds = {outcome: refunds.labels(outcome) for outcome in RETURN_OUTCOMES}
        disputes = self._counter("disputes_total", "Disputes, by what each news of one did.", ("outcome",))
        self._disputes = {outcome: disputes.labels(outcome) for outcome in RETURN_OUTCOMES}
        self._refunds_held = self._gauge("refunds_held", "Refunds that we asked Stripe for and that are unanswered.")
        self._refunds_oldest = self._gauge(
            "refunds_held_oldest_timestamp_seconds", "Since when the oldest unanswered refund has waited."
        )
        self._stripe_events_unprocessed = self._gauge(
            "stripe_events_unprocessed", "Webhooks that were received and are not processed."
        )
        self._stripe_events_oldest = self._gauge(
            "stripe_events_oldest_timestamp_seconds", "Since when the oldest unprocessed webhook has waited."
        )
        mended = self._gauge(
            "reconciliation_mended", "What the last reconciliation found missed, and applied.", ("span",)
        )
        differing = self._gauge("reconciliation_differing", "What the last reconciliation left differing.", ("span",))
        clean = self._gauge(
            "reconciliation_clean_timestamp_seconds", "When a reconciliation last left no difference.", ("span",)
        )
        self._reconciliation_mended = {span: mended.labels(span) for span in RECONCILIATION_SPANS}
        self._reconciliation_differing = {span: differing.labels(span) for span in RECONCILIATION_SPANS}
        self._reconciliation_clean = {span: clean.labels(span) for span in RECONCILIATION_SPANS}


class MetricsServer:
    """Serves a registry as text over HTTP from a thread of its own, so that a busy event loop can still be watched."""

    def __init__(self, registry: CollectorRegistry, *, host: str = "127.0.0.1", port: int) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Listen, and return the port (chosen by the system if it was 0). Raises OSError where the port is busy."""
        self._server, self._thread = start_http_server(self._port, self._host, self._registry)
        return int(self._server.server_port)

    def stop(self) -> None:
        """Stop listening and wait for the thread. A second call does nothing."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None
