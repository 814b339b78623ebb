"""Who owes what, by how the answer ended and what was seen of it; and that it is settled once, by its owner."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.core.catalog import STANDARD, Route, Upstream, Variant
from proxy.core.excerpt import Said
from proxy.core.meter import Meter
from proxy.core.pricing import Bounds, Price
from proxy.gateway.exchange import Count, Ending, Exchange, Ticket
from proxy.gateway.settle import Settler
from proxy.ledger.errors import LedgerUnavailable
from proxy.ledger.records import Finalize, Finalized, FinalizeOutcome, Released
from proxy.metrics import Metrics

# A credit a token in, three a token out: microcredits are tokens.
PRICE = Price(*([1_000_000] * 4), *([3_000_000] * 3))
COUNTED = (7, 2)
FREE = {
    Ending.CLIENT_LEFT_UNSENT,
    Ending.UPSTREAM_REFUSED,
    Ending.UPSTREAM_UNREACHABLE,
}
# Endings after which the prompt is paid for even though nothing came: the work was done, or the client gave it up.
PROMPT_PAID = {
    *(Ending.COMPLETE, Ending.CLIENT_LEFT, Ending.CLIENT_LEFT_CUT),
    *(Ending.OUT_OF_CREDITS, Ending.SPEND_LIMIT),
}


class Ledger:
    """Takes what it is given and answers at once, or never, or with an error."""

    def __init__(self) -> None:
        self.finalized: list[Finalize] = []
        self.released: list[UUID] = []
        self.error: Exception | None = None
        self.silent = False

    def finalize(self, row: Finalize) -> "asyncio.Future[Finalized]":
        self.finalized.append(row)
        return self._answer(Finalized(FinalizeOutcome.FINAL, charge=row.charge))

    def release(self, hold_id: UUID, _account_id: UUID, _worker_id: UUID) -> "asyncio.Future[Released]":
        self.released.append(hold_id)
        return self._answer(Released(1, "released"))

    def _answer(self, answer: Any) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.error is not None:
            future.set_exception(self.error)
        elif not self.silent:
            future.set_result(answer)
        return future


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def settler(ledger: Ledger) -> AsyncIterator[Settler]:
    settler = Settler(ledger, metrics=Metrics(), tick_seconds=0.01)
    settler.start()
    yield settler
    await settler.drain(0)


async def count(_said: Said | None) -> tuple[int, int]:
    return COUNTED


def ticket(*, granted: int = 1_000, count: Count = count) -> Ticket:
    upstream = Upstream("up", "openai", "http://127.0.0.1/v1")
    variant = Variant(STANDARD, PRICE)
    route = Route("m", upstream, "up-m", "gpt-4", 100, MappingProxyType({STANDARD: variant}))
    return Ticket(
        hold_id=uuid4(),
        account_id=uuid4(),
        key_id="k",
        worker_id=uuid4(),
        route=route,
        variant=variant,
        price_version="0" * 64,
        bounds=Bounds(input=20, output=50),
        output_possible=50,
        granted=granted,
        stream=True,
        cap_sent=None,
        count=count,
    )


def meter(*chunks: dict[str, Any]) -> Meter:
    seen = Meter()
    for chunk in chunks:
        seen.observe(chunk)
    return seen


def said(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


async def settle(settler: Settler, ending: Ending, seen: Meter | None, **more: Any) -> Exchange:
    exchange = settler.open(ticket(**more))
    exchange.meter = seen
    exchange.close(ending)
    assert await settler.drain(2)
    return exchange


@pytest.mark.parametrize("ending", list(Ending))
async def test_an_answer_of_which_nothing_came(settler: Settler, ledger: Ledger, ending: Ending) -> None:
    exchange = await settle(settler, ending, meter())
    if ending in PROMPT_PAID:
        [row] = ledger.finalized
        assert (row.charge, row.usage.input, row.usage_source) == (7, 7, "counted")
    else:
        assert ledger.released == [exchange.ticket.hold_id]


@pytest.mark.parametrize("ending", list(Ending))
async def test_an_answer_without_a_report_is_counted(settler: Settler, ledger: Ledger, ending: Ending) -> None:
    await settle(settler, ending, meter(said("Hello")))
    if ending in FREE:
        assert len(ledger.released) == 1
        return
    [row] = ledger.finalized
    assert (row.charge, row.usage_source, row.ending) == (7 + 2 * 3, "counted", ending)


@pytest.mark.parametrize("ending", list(Ending))
async def test_a_report_is_charged(settler: Settler, ledger: Ledger, ending: Ending) -> None:
    await settle(settler, ending, meter(said("Hello", "stop"), usage(10, 5)))
    if ending in FREE:
        assert len(ledger.released) == 1
        return
    [row] = ledger.finalized
    assert (row.charge, row.usage_source, row.capped) == (10 + 5 * 3, "reported", None)
    assert json.loads(row.receipt)["usage_reported"] == usage(10, 5)["usage"]


async def test_a_running_report_is_completed_by_counting(settler: Settler, ledger: Ledger) -> None:
    running = {**said("He"), "usage": {"prompt_tokens": 10, "completion_tokens": 1}}
    await settle(settler, Ending.UPSTREAM_INCOMPLETE, meter(running, said("llo")))
    [row] = ledger.finalized
    assert (row.usage.input, row.usage.output, row.usage_source) == (10, 2, "partly_counted")


async def test_a_report_of_a_total_alone_is_none(settler: Settler, ledger: Ledger) -> None:
    await settle(settler, Ending.COMPLETE, meter({"choices": [], "usage": {"total_tokens": 500}}))
    [row] = ledger.finalized
    assert (row.charge, row.usage_source) == (7, "counted")


async def test_a_counted_charge_stays_within_the_hold(settler: Settler, ledger: Ledger) -> None:
    await settle(settler, Ending.COMPLETE, meter(said("Hello")), granted=9)
    [row] = ledger.finalized
    assert (row.charge, row.capped) == (9, "counted_above_hold")


@pytest.mark.parametrize(
    ("prompt", "completion", "granted", "charge", "capped"),
    [
        (10, 60, 100, 190, None),  # above the hold, and within four times the bound
        (10, 201, 100, 100, "implausible_usage"),
        (81, 45, 90, 90, "implausible_usage"),
        (81, 5, 90, 96, None),  # odd, but no more than the whole answer could have cost
        (81, 5, 100, 96, None),  # far above the bound, and still within the hold
    ],
)
async def test_a_report_above_the_bound(
    settler: Settler, ledger: Ledger, prompt: int, completion: int, granted: int, charge: int, capped: str | None
) -> None:
    await settle(settler, Ending.COMPLETE, meter(said("x", "stop"), usage(prompt, completion)), granted=granted)
    [row] = ledger.finalized
    assert (row.charge, row.capped) == (charge, capped)


async def test_only_the_first_ending_counts(settler: Settler, ledger: Ledger) -> None:
    exchange = settler.open(ticket())
    exchange.close(Ending.UPSTREAM_REFUSED)
    exchange.close(Ending.COMPLETE)
    await settler.drain(1)
    assert (len(ledger.released), ledger.finalized) == (1, [])


async def test_what_cannot_be_counted_is_no_gift(settler: Settler, ledger: Ledger) -> None:
    async def fail(_said: Said | None) -> tuple[int, int]:
        raise ValueError("no count")

    await settle(settler, Ending.COMPLETE, meter(said("Hello")), count=fail, granted=50)
    [row] = ledger.finalized
    assert (row.charge, row.capped) == (50, "uncountable")


async def test_a_ledger_that_stopped_leaves_the_hold_to_the_sweeper(settler: Settler, ledger: Ledger) -> None:
    ledger.error = LedgerUnavailable("stopped")
    await settle(settler, Ending.COMPLETE, meter(said("x")))
    assert settler.unsettled == 0


async def test_an_answer_may_not_run_for_ever(ledger: Ledger) -> None:
    settler = Settler(ledger, metrics=Metrics(), tick_seconds=0.01)
    settler.start()
    terms = ticket()
    exchange = settler.open(replace(terms, route=replace(terms.route, seconds_max=0.05)))
    other = settler.open(ticket())
    async with asyncio.timeout(5):
        while exchange.ending is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert exchange.ending is Ending.TOO_LONG
    assert other.ending is None, "each model has its own limit"
    other.close(Ending.UPSTREAM_REFUSED)
    assert await settler.drain(1)


async def test_drain_waits_for_what_is_open_and_then_cuts_it(settler: Settler, ledger: Ledger) -> None:
    first, second = settler.open(ticket()), settler.open(ticket())
    asyncio.get_running_loop().call_later(0.05, first.close, Ending.UPSTREAM_REFUSED)
    assert await settler.drain(0.1)
    assert (first.ending, second.ending) == (Ending.UPSTREAM_REFUSED, Ending.SHUTDOWN)
    assert settler.stopping
    assert len(ledger.released) == 2


async def test_drain_says_what_was_not_settled(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.gateway.settle.SETTLE_SECONDS", 0.05)
    ledger.silent = True
    settler = Settler(ledger, metrics=Metrics())
    settler.start()
    settler.open(ticket()).close(Ending.UPSTREAM_REFUSED)
    assert not await settler.drain(0)
    assert settler.unsettled == 1
    for task in list(settler._tasks):
        task.cancel()
