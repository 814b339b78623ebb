"""Several workers' metrics on one page: labelled, put together by name, and without the one that doesn't answer."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.local import workers_metrics
from proxy.local.workers_metrics import WorkersMetrics, tell_metrics
from proxy.metrics import Metrics


@dataclass(frozen=True, eq=False)
class Told:
    """A worker, as far as its metrics go."""

    slot: int
    pid: int
    metrics: socket.socket | None


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def worker(ends: ExitStack, slot: int, registry: CollectorRegistry | None) -> Told:
    """A worker that tells its registry; without one it says nothing."""
    ours, theirs = socket.socketpair()
    ends.enter_context(ours)
    if registry is None:
        ends.enter_context(theirs)
    else:
        tell_metrics(theirs, registry)
    return Told(slot, 1000 + slot, ours)


def counting(calls: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("farebox_calls", "Calls.", ("route",), registry=registry)
    counter.labels("chat").inc(calls)
    Histogram("farebox_seconds", "Seconds.", registry=registry).observe(0.2)
    return registry


def page(metrics: WorkersMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_every_sample_says_whose_it_is_and_a_family_is_announced_once(ends: ExitStack) -> None:
    metrics = WorkersMetrics()
    for slot, calls in ((1, 3), (2, 4)):
        metrics.add(worker(ends, slot, counting(calls)))
    text = page(metrics)
    assert 'farebox_calls_total{pid="1001",route="chat",worker="1"} 3.0' in text
    assert 'farebox_calls_total{pid="1002",route="chat",worker="2"} 4.0' in text
    assert text.count("# TYPE farebox_calls_total counter") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["farebox_calls"].type == "counter"
    assert families["farebox_seconds"].type == "histogram"


def test_all_of_a_server_s_metrics_come_through(ends: ExitStack) -> None:
    metrics = WorkersMetrics()
    served = Metrics()
    served.request("chat", 200, 0.5)
    served.catalog_loaded("v1", 3)
    metrics.add(worker(ends, 1, served.registry))
    text = page(metrics)
    for name in (family.name for family in served.registry.collect()):
        assert f"{name}" in text
    assert 'farebox_price_version_info{pid="1001",version="v1",worker="1"} 1.0' in text


def test_one_that_is_gone_or_silent_is_left_out(ends: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_metrics, "ANSWER_SECONDS", 0.5)
    metrics = WorkersMetrics()
    gone, silent = worker(ends, 1, None), worker(ends, 2, None)
    assert gone.metrics is not None
    gone.metrics.shutdown(socket.SHUT_RDWR)
    for one in (gone, silent, worker(ends, 3, counting(5))):
        metrics.add(one)
    text = page(metrics)
    assert 'farebox_calls_total{pid="1003",route="chat",worker="3"} 5.0' in text
    assert 'worker="1"' not in text
    assert 'worker="2"' not in text


def test_an_answer_that_came_too_late_isnt_taken_for_the_next(ends: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_metrics, "ANSWER_SECONDS", 0.3)
    registry, go_on, calls = CollectorRegistry(), threading.Event(), Counter("farebox_calls", "Calls.", registry=None)

    class Slow:
        def collect(self) -> Iterator[object]:
            go_on.wait(20)
            calls.inc()
            yield from calls.collect()

    registry.register(Slow())  # type: ignore[arg-type]
    go_on.set()
    metrics = WorkersMetrics()
    metrics.add(worker(ends, 1, registry))
    first = page(metrics)
    go_on.clear()
    assert "farebox_calls_total{" not in page(metrics)
    go_on.set()
    monkeypatch.setattr(workers_metrics, "ANSWER_SECONDS", 20)
    # The second question's answer lies there by now: it is passed over, and the third one's is taken.
    before = float(first.split('farebox_calls_total{pid="1001",worker="1"} ')[1].split()[0])
    last = page(metrics)
    assert f'farebox_calls_total{{pid="1001",worker="1"}} {before + 2}' in last


def test_a_worker_that_was_removed_is_asked_no_more_and_its_line_is_closed(ends: ExitStack) -> None:
    metrics = WorkersMetrics()
    one = worker(ends, 1, counting(1))
    metrics.add(one)
    metrics.remove(one)
    assert one.metrics is not None
    assert one.metrics.fileno() == -1
    assert 'worker="1"' not in page(metrics)


def test_where_they_stand_is_counted() -> None:
    metrics = WorkersMetrics()
    metrics.watch(lambda: {"serving": 3, "retiring": 1})
    metrics.died()
    metrics.restarted(ok=False)
    text = page(metrics)
    assert 'farebox_workers{state="serving"} 3.0' in text
    assert "farebox_worker_deaths_total 1.0" in text
    assert 'farebox_worker_restarts_total{outcome="given_up"} 1.0' in text
    assert "farebox_worker_start_failures_total 1.0" in text
