"""Lines: what an error means for the call, and how a line comes back."""

import asyncio

import asyncpg
import pytest

from proxy.ledger.errors import InvalidValue, LedgerUnavailable
from proxy.ledger.lines import Calls, Keeper, Verdict, judge
from tests.fakes.ledger import FakeLedger


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (asyncpg.ConnectionDoesNotExistError("gone"), Verdict.REOPEN),
        (asyncpg.AdminShutdownError("restarting"), Verdict.REOPEN),
        (asyncpg.CannotConnectNowError("starting"), Verdict.REOPEN),
        (asyncpg.TooManyConnectionsError("full"), Verdict.REOPEN),
        (asyncpg.DiskFullError("full"), Verdict.REOPEN),
        (asyncpg.ReadOnlySQLTransactionError("a standby"), Verdict.REOPEN),
        (asyncpg.UndefinedFunctionError("not migrated"), Verdict.REOPEN),
        (asyncpg.InterfaceError("connection is closed"), Verdict.REOPEN),
        (asyncpg.InternalClientError("confused"), Verdict.REOPEN),
        (ConnectionResetError("reset"), Verdict.REOPEN),
        (TimeoutError(), Verdict.REOPEN),
        (asyncpg.LockNotAvailableError("locked"), Verdict.APART),
        (asyncpg.DeadlockDetectedError("crossed"), Verdict.APART),
        (asyncpg.QueryCanceledError("statement timeout"), Verdict.APART),
        (asyncpg.DataCorruptedError("damaged"), Verdict.APART),
        (asyncpg.CheckViolationError("below zero"), Verdict.REJECT),
        (asyncpg.CharacterNotInRepertoireError("NUL"), Verdict.REJECT),
        (asyncpg.RaiseError("must never happen"), Verdict.REJECT),
        (asyncpg.exceptions._base.DataError("not an integer"), Verdict.REJECT),
        (InvalidValue("a lone surrogate"), Verdict.REJECT),
        (LedgerUnavailable("not now"), Verdict.REOPEN),
        (KeyError("a bug"), Verdict.REJECT),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.value,
)
def test_what_an_error_means(error: Exception, verdict: Verdict) -> None:
    assert judge(error) is verdict


def test_a_translated_error_means_what_its_cause_means() -> None:
    outer = LedgerUnavailable("translated")
    outer.__cause__ = asyncpg.LockNotAvailableError("locked")
    assert judge(outer) is Verdict.APART


async def test_a_line_comes_back_when_the_server_does() -> None:
    fake = FakeLedger(down=True)
    keeper = Keeper(fake.open_line, "test")
    line = asyncio.create_task(keeper.line())
    await asyncio.sleep(0.1)
    assert not line.done()
    fake.down = False
    assert await asyncio.wait_for(line, 2) is await keeper.line()
    assert fake.lines_opened == 1
    await keeper.close()
    assert fake.lines_open == 0


async def test_a_cancel_is_never_lost_while_a_line_is_opened() -> None:
    for steps in range(12):
        fake = FakeLedger()
        keeper = Keeper(fake.open_line, "test")
        line = asyncio.create_task(keeper.line())
        for _ in range(steps):
            await asyncio.sleep(0)
        late = line.done()
        line.cancel()
        await asyncio.gather(line, return_exceptions=True)
        assert line.cancelled() is not late, steps
        await keeper.close()


async def test_a_call_that_takes_too_long_is_cut_off_with_its_connection() -> None:
    fake = FakeLedger()
    fake.gate.clear()
    keeper = Keeper(fake.open_line, "test")
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await keeper.call(lambda calls: calls.expire_holds(1), seconds=0.05)
    assert not keeper.is_open
    fake.gate.set()
    assert await keeper.call(lambda calls: calls.expire_holds(1), seconds=0.05) == []
    assert fake.lines_opened == 2
    await keeper.close()


async def test_a_call_that_is_cut_off_takes_its_line_with_it_whatever_error_that_gives() -> None:
    fake = FakeLedger(confused=True)
    fake.gate.clear()
    keeper = Keeper(fake.open_line, "test")
    with pytest.raises(AttributeError):
        await keeper.call(lambda calls: calls.expire_holds(1), seconds=0.05)
    assert not keeper.is_open


async def test_a_call_that_is_refused_keeps_the_line() -> None:
    fake = FakeLedger()
    keeper = Keeper(fake.open_line, "test")

    async def refuse(calls: Calls) -> None:
        raise asyncpg.CheckViolationError("no")

    with pytest.raises(asyncpg.CheckViolationError):
        await keeper.call(refuse, seconds=1)
    assert keeper.is_open
    await keeper.close()
