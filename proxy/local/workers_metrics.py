"""The metrics of several workers on the one port of their supervisor.

Each worker is asked for its numbers, over a socket pair of its own, whenever somebody looks. Every sample gets two
labels, ``worker`` (its slot) and ``pid``: nothing is added up here, since a sum over workers that come
and go would jump.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["WorkersMetrics", "tell_metrics"]

ANSWER_SECONDS = 2.0
_QUESTION = struct.Struct("!Q")
_ANSWER = struct.Struct("!QI")


class Told(Protocol):
    """What is asked of a worker."""

    @property
    def slot(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def metrics(self) -> socket.socket | None: ...


def tell_metrics(line: socket.socket, registry: CollectorRegistry) -> None:
    """The worker's side: answer on ``line`` from a thread, so that a busy event loop can still be watched."""
    threading.Thread(target=_tell, args=(line, registry), name="metrics", daemon=True).start()


def _tell(line: socket.socket, registry: CollectorRegistry) -> None:
    line.settimeout(None)
    with line:
        while True:
            try:
                question = _receive(line, _QUESTION.size)
                answer = json.dumps([_said(family) for family in registry.collect()]).encode()
                line.sendall(_ANSWER.pack(*_QUESTION.unpack(question), len(answer)) + answer)
            except OSError:
                return


def _said(family: Metric) -> list[Any]:
    samples = [[sample.name, sample.labels, sample.value] for sample in family.samples]
    return [family.name, family.documentation, family.type, samples]


class _Cut(OSError):
    """An answer stopped in the middle."""


def _receive(line: socket.socket, size: int) -> bytes:
    """So many bytes. Raises OSError, also where the other side is gone."""
    data = bytearray()
    while len(data) < size:
        try:
            piece = line.recv(size - len(data))
        except TimeoutError as error:
            raise (_Cut if data else TimeoutError)("no answer in time") from error
        if not piece:
            raise ConnectionError("the other side is gone")
        data += piece
    return bytes(data)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A worker that can be asked."""

    labels: dict[str, str]
    line: socket.socket


class WorkersMetrics(Collector):
    """The supervisor's registry: its own numbers, and those of every worker. ``collect`` runs in any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._deaths = Counter("farebox_worker_deaths", "Workers that ended by themselves.", registry=self.registry)
        self._failures = Counter("farebox_worker_start_failures", "Workers that didn't start.", registry=self.registry)
        self._restarts = Counter(
            "farebox_worker_restarts", "Restarts of all workers (SIGHUP).", ("outcome",), registry=self.registry
        )
        for outcome in ("done", "given_up"):
            self._restarts.labels(outcome)
        self._counts: Callable[[], dict[str, int]] = dict
        self._asked: dict[Told, _Asked] = {}
        self._gone: list[socket.socket] = []
        self._asking = threading.Lock()
        self._question = 0
        self.registry.register(self)

    def watch(self, counts: Callable[[], dict[str, int]]) -> None:
        """Ask this for how many workers there are, by where they stand."""
        self._counts = counts

    def died(self) -> None:
        """A worker that served is gone, and nobody had told it to go."""
        self._deaths.inc()

    def start_failed(self) -> None:
        """A worker that was to replace another one couldn't start."""
        self._failures.inc()

    def restarted(self, *, ok: bool) -> None:
        """All workers were replaced, or the first that could not be was told."""
        self._restarts.labels("done" if ok else "given_up").inc()
        if not ok:
            self._failures.inc()

    def add(self, worker: Told) -> None:
        """Ask this worker, too."""
        if worker.metrics is not None:
            self._asked[worker] = _Asked({"worker": str(worker.slot), "pid": str(worker.pid)}, worker.metrics)

    def remove(self, worker: Told) -> None:
        """It is gone. Its line may be in use at this moment: it is closed by whoever asks next, or now."""
        asked = self._asked.pop(worker, None)
        if asked is not None:
            self._gone.append(asked.line)
        if self._asking.acquire(blocking=False):
            try:
                self._close_gone()
            finally:
                self._asking.release()

    def describe(self) -> list[Metric]:
        """Nothing is known beforehand."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every worker's families with the two labels, those of one name together."""
        workers = GaugeMetricFamily("farebox_workers", "Worker processes, by where they stand.", labels=["state"])
        for state, count in self._counts().items():
            workers.add_metric([state], count)
        yield workers
        families: dict[str, Metric] = {}
        for labels, said in self._ask():
            for name, documentation, kind, samples in said:
                family = families.setdefault(name, Metric(name, documentation, kind))
                for sample_name, sample_labels, value in samples:
                    family.add_sample(sample_name, sample_labels | labels, value)
        yield from families.values()

    def _ask(self) -> list[tuple[dict[str, str], list[Any]]]:
        """What each worker says within the time. One that doesn't answer is left out this time."""
        with self._asking:
            self._close_gone()
            self._question += 1
            asked = list(self._asked.values())
            deadline = time.monotonic() + ANSWER_SECONDS
            answers = []
            for one in asked:
                _put(one.line, self._question)
            for one in asked:
                said = _answer(one.line, self._question, deadline)
                if said is not None:
                    answers.append((one.labels, said))
            return answers

    def _close_gone(self) -> None:
        while self._gone:
            self._gone.pop().close()


def _put(line: socket.socket, question: int) -> None:
    try:
        line.settimeout(ANSWER_SECONDS)
        line.sendall(_QUESTION.pack(question))
    except OSError:
        return  # it is gone, or hasn't read for long: it gives no answer either


def _answer(line: socket.socket, question: int, deadline: float) -> list[Any] | None:
    """The answer to this question; those to earlier ones, that came too late, are dropped."""
    try:
        while True:
            line.settimeout(max(0.01, deadline - time.monotonic()))
            answered, size = _ANSWER.unpack(_receive(line, _ANSWER.size))
            said: list[Any] = json.loads(_receive(line, size))
            if answered == question:
                return said
    except _Cut:
        # Where the next answer begins can't be known any more: this worker is left out from now on.
        line.close()
    except OSError:
        pass
    return None
