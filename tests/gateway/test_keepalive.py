"""Comments into a silent stream: only in silence, where one may stand, to a client that takes what it gets."""

import asyncio

import pytest

from proxy.gateway.channel import Channel, Head
from proxy.gateway.keepalive import COMMENT, KeepAlive

SECONDS = 0.05


async def started(seconds: float = SECONDS, *, may: bool = True) -> tuple[Channel, KeepAlive]:
    channel = Channel()
    channel.start(Head(200, []))
    keepalive = KeepAlive(channel, seconds, lambda: may)
    keepalive.start()
    return channel, keepalive


async def read_for(channel: Channel, seconds: float) -> bytes:
    read = b""
    try:
        async with asyncio.timeout(seconds):
            while True:
                read += await channel.get()
    except TimeoutError:
        return read


async def test_silence_is_filled_with_comments() -> None:
    channel, keepalive = await started()
    read = await read_for(channel, SECONDS * 10)
    keepalive.stop()
    assert read.startswith(COMMENT * 2)
    assert read == COMMENT * (len(read) // len(COMMENT))
    assert len(read) <= len(COMMENT) * 10


async def test_what_speaks_is_left_alone() -> None:
    channel, keepalive = await started(seconds=5)
    keepalive.spoken()
    assert await read_for(channel, 0.05) == b""
    keepalive.stop()


async def test_a_client_that_does_not_read_gets_one_at_most() -> None:
    channel, keepalive = await started()
    await asyncio.sleep(SECONDS * 8)
    assert await channel.get() == COMMENT
    keepalive.stop()


@pytest.mark.parametrize(("seconds", "may"), [(0.0, True), (SECONDS, False)])
async def test_where_none_may_stand_there_is_none(seconds: float, may: bool) -> None:
    channel, keepalive = await started(seconds, may=may)
    assert await read_for(channel, SECONDS * 4) == b""
    keepalive.stop()


async def test_a_comment_is_no_part_of_an_answer_that_is_kept() -> None:
    class Kept(Channel):
        kept = b""

        def put_at_once(self, data: bytes) -> None:
            self.kept += data
            super().put_at_once(data)

    channel = Kept()
    channel.start(Head(200, []))
    keepalive = KeepAlive(channel, SECONDS, lambda: True)
    keepalive.start()
    await channel.put(b"data: x\n\n")
    read = await read_for(channel, SECONDS * 4)
    keepalive.stop()
    assert read.endswith(COMMENT)
    assert channel.kept == b"data: x\n\n"


async def test_nothing_comes_behind_the_stop() -> None:
    channel, keepalive = await started()
    keepalive.stop()
    assert await read_for(channel, SECONDS * 4) == b""
