"""The ledger as the data plane uses it, with every call's time in the metrics, the wait for its batch included."""

import asyncio
import time
from typing import Protocol
from uuid import UUID

from proxy.ledger.errors import LedgerError
from proxy.ledger.records import Extend, Extended, Finalize, Finalized, Released, Reserve, Reserved
from proxy.metrics import Metrics

__all__ = ["MeasuredLedger"]


class Ledger(Protocol):
    """The part of ``BatchedLedger`` that is measured."""

    async def reserve(self, row: Reserve) -> Reserved: ...
    async def extend(self, row: Extend) -> Extended: ...
    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]": ...
    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]": ...


class MeasuredLedger:
    """Passes every call on as it is. A caller that is cancelled while it waits is neither a time nor a failure."""

    def __init__(self, ledger: Ledger, metrics: Metrics) -> None:
        self._ledger = ledger
        self._metrics = metrics

    async def reserve(self, row: Reserve) -> Reserved:
        """As the ledger's."""
        began = time.perf_counter()
        try:
            reserved = await self._ledger.reserve(row)
        except LedgerError:
            self._metrics.ledger_failed("reserve")
            raise
        self._metrics.ledger_call("reserve", time.perf_counter() - began)
        return reserved

    async def extend(self, row: Extend) -> Extended:
        """As the ledger's."""
        began = time.perf_counter()
        try:
            extended = await self._ledger.extend(row)
        except LedgerError:
            self._metrics.ledger_failed("extend")
            raise
        self._metrics.ledger_call("extend", time.perf_counter() - began)
        return extended

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]":
        """As the ledger's."""
        future = self._ledger.finalize(row)
        self._watch("finalize", future)
        return future

    def release(self, hold_id: UUID, account_id: UUID, worker_id: UUID) -> "asyncio.Future[Released]":
        """As the ledger's."""
        future = self._ledger.release(hold_id, account_id, worker_id)
        self._watch("release", future)
        return future

    def _watch(self, operation: str, future: "asyncio.Future[Finalized] | asyncio.Future[Released]") -> None:
        began = time.perf_counter()

        def answered(done: "asyncio.Future[Finalized] | asyncio.Future[Released]") -> None:
            if done.cancelled():
                return
            if done.exception() is not None:
                self._metrics.ledger_failed(operation)
            else:
                self._metrics.ledger_call(operation, time.perf_counter() - began)

        future.add_done_callback(answered)
