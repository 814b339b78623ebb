"""Holds that grow, by themselves: what is known of one while it is being asked for more."""

import asyncio

import pytest

from proxy.core.meter import Meter
from proxy.gateway.exchange import Ending
from proxy.gateway.settle import Settler
from proxy.gateway.steps import Stepper
from proxy.ledger.records import Extend, Extended, ExtendOutcome
from proxy.metrics import Metrics
from tests.gateway.test_settle import Ledger, meter, said, ticket


class SlowLedger:
    """Answers an extension when it is told to."""

    def __init__(self) -> None:
        self.asked: asyncio.Future[Extend] = asyncio.get_running_loop().create_future()
        self.answer: asyncio.Future[Extended] = asyncio.get_running_loop().create_future()

    async def extend(self, row: Extend) -> Extended:
        if not self.asked.done():
            self.asked.set_result(row)
        return await self.answer


async def long_count(_meter: object) -> tuple[int, int]:
    return 7, 40


@pytest.mark.parametrize("answered", [False, True])
async def test_an_answer_that_ends_while_more_is_asked_for_says_that_its_hold_may_be_larger(answered: bool) -> None:
    """The audit takes ``counted_above_hold`` at its word: it would call the charge wrong if the hold had grown."""
    ledger, growing = Ledger(), SlowLedger()
    settler = Settler(ledger, metrics=Metrics())
    stepper = Stepper(growing, own=settler.own, metrics=Metrics())
    # 50 microcredits hold a prompt of 20 tokens and ten tokens of output; what came is far more.
    exchange = settler.open(ticket(granted=50, count=long_count))
    seen: Meter = meter(said("word " * 80))
    exchange.meter = seen
    allowance = stepper.allow(exchange)
    assert allowance is not None
    waiting = asyncio.ensure_future(allowance.secure())
    row = await growing.asked
    if answered:
        growing.answer.set_result(Extended(ExtendOutcome.EXTENDED, total=row.total))
        await waiting
    # As the pump does where its client leaves: closed first, and only then is the waiting cut short.
    exchange.close(Ending.CLIENT_LEFT_CUT)
    waiting.cancel()
    assert await settler.drain(2)
    allowance.stop()
    [charged] = ledger.finalized
    assert charged.charge == (127 if answered else 50)
    assert charged.capped == (None if answered else "counted_above_known_hold")
    assert exchange.hold_in_doubt is not answered
