"""The channel between pump and client: order, bounds, ends, and either side leaving first."""

import asyncio

import pytest

from proxy.core.errors import UpstreamError
from proxy.gateway.channel import BUFFER_BYTES_MAX, TAKEN_BYTES_MAX, Abandoned, BrokenOff, Channel, Head

HEAD = Head(200, [(b"a", b"b")])


async def test_bytes_come_out_as_they_went_in() -> None:
    channel = Channel()
    channel.start(HEAD)
    await channel.put(b"one")
    await channel.put(b"two")
    channel.end()
    assert await channel.head() is HEAD
    assert not channel.finished
    assert await channel.get() == b"onetwo"
    assert channel.finished
    assert await channel.get() == b""


async def test_a_reader_waits_for_the_head_and_for_each_piece() -> None:
    channel = Channel()
    seen: list[bytes] = []

    async def read() -> None:
        await channel.head()
        while data := await channel.get():
            seen.append(data)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    channel.start(HEAD)
    for piece in (b"1", b"2", b"3"):
        await channel.put(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen[-1] == piece
    channel.end()
    await reading


@pytest.mark.parametrize(
    "sizes", [[10 * TAKEN_BYTES_MAX + 1], [1] * 50_000, [TAKEN_BYTES_MAX, 1], [7, 3 * TAKEN_BYTES_MAX, 5]]
)
async def test_never_too_much_is_handed_over_at_once_and_nothing_is_lost(sizes: list[int]) -> None:
    channel = Channel()
    channel.start(HEAD)
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    for piece in pieces:
        channel.put_at_once(piece)
    channel.end()
    taken = []
    while data := await channel.get():
        assert type(data) is bytes
        assert len(data) <= TAKEN_BYTES_MAX
        taken.append(data)
    assert b"".join(taken) == b"".join(pieces)
    assert channel.finished


async def test_a_writer_waits_where_nobody_reads() -> None:
    channel = Channel()
    writing = asyncio.create_task(channel.put(b"x" * (BUFFER_BYTES_MAX + 1)))
    await asyncio.sleep(0)
    assert not writing.done()
    await channel.get()
    await writing


async def test_a_writer_goes_on_without_a_reader_that_left() -> None:
    channel = Channel()
    writing = asyncio.create_task(channel.put(b"x" * (BUFFER_BYTES_MAX + 1)))
    await asyncio.sleep(0)
    channel.abandon()
    await writing
    await channel.put(b"y" * (BUFFER_BYTES_MAX + 1))
    with pytest.raises(Abandoned):
        await channel.get()
    with pytest.raises(Abandoned):
        await channel.head()


async def test_a_reader_that_waits_is_told_that_it_was_abandoned() -> None:
    channel = Channel()
    reading = asyncio.create_task(channel.head())
    await asyncio.sleep(0)
    channel.abandon()
    with pytest.raises(Abandoned):
        await reading


async def test_a_broken_end_comes_after_everything_that_was_put() -> None:
    channel = Channel()
    channel.start(HEAD)
    channel.put_at_once(b"half ")
    channel.break_off(b"error")
    assert await channel.get() == b"half error"
    assert not channel.finished
    with pytest.raises(BrokenOff):
        await channel.get()


async def test_nothing_breaks_off_what_is_whole() -> None:
    channel = Channel()
    channel.start(HEAD)
    channel.end()
    channel.break_off(b"error")
    assert await channel.get() == b""


async def test_a_refusal_comes_instead_of_a_head() -> None:
    channel = Channel()
    channel.fail(UpstreamError("no", code="c"))
    with pytest.raises(UpstreamError):
        await channel.head()
