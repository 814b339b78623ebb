"""The metrics: what is counted, under which names, and that a scrape over HTTP shows it."""

import re
import urllib.request
from pathlib import Path

from prometheus_client import generate_latest

from proxy.core.usage import TOKEN_CLASSES, Usage
from proxy.local.workers_metrics import WorkersMetrics
from proxy.metrics import LEDGER_OPERATIONS, Metrics, MetricsServer


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"farebox_{name}", labels)


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    metrics.request("chat", 200, 0.5)
    metrics.request("chat", 200, 1.5)
    metrics.request("/etc/passwd", 404, 0.001)
    assert value(metrics, "requests_total", route="chat", status="200") == 2
    assert value(metrics, "requests_total", route="other", status="404") == 1
    assert value(metrics, "request_seconds_sum", route="chat") == 2.0


def test_tokens_are_counted_by_class_and_source() -> None:
    metrics = Metrics()
    metrics.tokens(Usage(1, 2, 3, 4, 5, 6, 7), "reported")
    metrics.tokens(Usage(), "none")
    counted = {name: value(metrics, "tokens_total", source="reported", **{"class": name}) for name in TOKEN_CLASSES}
    assert counted == dict(zip(TOKEN_CLASSES, range(1, 8), strict=True))


def test_holds_move_credits_and_the_gauge() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.hold_opened(100)
    metrics.hold_charged(charge=30, released=70)
    metrics.hold_released(100)
    assert value(metrics, "reserved_microcredits_total") == 300
    assert value(metrics, "charged_microcredits_total") == 30
    assert value(metrics, "released_microcredits_total") == 170
    assert value(metrics, "open_holds") == 1
    assert value(metrics, "overruns_total") == 0
    metrics.hold_charged(charge=140, released=0, overrun=40)
    assert value(metrics, "overruns_total") == 1
    assert value(metrics, "overrun_microcredits_total") == 40
    assert value(metrics, "open_holds") == 0


def test_the_price_version_is_one_series() -> None:
    metrics = Metrics()
    metrics.catalog_loaded("aaa", 4)
    metrics.catalog_failed()
    assert value(metrics, "catalog_stale") == 1
    metrics.catalog_loaded("bbb", 5)
    assert value(metrics, "price_version_info", version="aaa") is None
    assert value(metrics, "price_version_info", version="bbb") == 1
    assert value(metrics, "catalog_routes") == 5
    assert value(metrics, "catalog_stale") == 0
    assert value(metrics, "catalog_reload_failures_total") == 1


def test_an_unknown_operation_is_other_and_makes_no_series() -> None:
    metrics = Metrics()
    for operation in (*LEDGER_OPERATIONS, "x'; DROP TABLE"):
        metrics.ledger_call(operation, 0.001)
        metrics.ledger_failed(operation)
    assert value(metrics, "ledger_call_seconds_count", operation="other") == 2
    assert value(metrics, "ledger_failures_total", operation="reserve") == 1
    assert b"DROP" not in generate_latest(metrics.registry)


def test_watched_values_are_read_at_the_scrape() -> None:
    metrics = Metrics()
    unsettled: list[int] = []
    metrics.watch(exchanges=lambda: 3, unsettled=lambda: len(unsettled), lease_held=lambda: True, tasks=lambda: 7)
    unsettled.append(1)
    assert value(metrics, "unsettled_finalizes") == 1
    assert value(metrics, "open_exchanges") == 3
    assert value(metrics, "worker_lease_held") == 1
    assert value(metrics, "tasks") == 7


def test_two_processes_worth_of_metrics_do_not_share() -> None:
    one, other = Metrics(), Metrics()
    one.hold_opened(5)
    assert value(other, "reserved_microcredits_total") == 0


def test_a_scrape_over_http() -> None:
    metrics = Metrics()
    metrics.first_byte_added(0.002)
    metrics.batch(3, 0.001)
    server = MetricsServer(metrics.registry, port=0)
    port = server.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    finally:
        server.stop()
        server.stop()
    assert "farebox_first_byte_added_seconds_count 1.0" in text
    assert 'farebox_ledger_call_seconds_count{operation="batch"} 1.0' in text


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"`(farebox_[a-z_]+)`", page))
    sample_names = {
        family.name + ("_total" if family.type == "counter" else "")
        for registry in (Metrics().registry, WorkersMetrics().registry)
        for family in registry.collect()
        if family.name.startswith("farebox_")
    }
    assert documented == sample_names
