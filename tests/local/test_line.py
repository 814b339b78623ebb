"""The line between supervisor and worker: first the briefing, then words, and an end that says as much as a word."""

import asyncio
import json
import socket

import pytest

from proxy.local import serving
from proxy.local.line import VERSION, Briefing, Order, Peer, read_briefing
from proxy.local.serving import Stop, hung_up
from proxy.local.state import LocalError


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_a_briefing_arrives_as_it_was_and_takes_no_order_with_it() -> None:
    briefing = Briefing(3, {"pricing": "a b.yaml", "key_pepper": "1:ä"}, "/state/users")
    ours, theirs = pair()
    with ours, theirs:
        ours.sendall(briefing.line() + b'{"order": "stop"}\n')
        assert read_briefing(theirs) == briefing
        assert theirs.recv(100) == b'{"order": "stop"}\n'


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "gone"),
        (b'{"slot": 1', "gone"),
        (b"hello\n", "no sense|makes sense"),
        (b"[]\n", "makes sense"),
        (b"{}\n", "makes sense"),
        (json.dumps({"version": VERSION, "slot": 1}).encode() + b"\n", "makes sense"),
        (json.dumps({"version": VERSION + 1, "slot": 1, "options": {}}).encode() + b"\n", "another release"),
    ],
)
def test_what_is_no_briefing_is_refused(said: bytes, problem: str) -> None:
    ours, theirs = pair()
    with theirs:
        ours.sendall(said)
        ours.close()
        with pytest.raises(LocalError, match=problem):
            read_briefing(theirs)


async def peers() -> tuple[Peer, Peer]:
    ours, theirs = pair()
    for end in (ours, theirs):
        end.setblocking(False)
    return await Peer.on(ours), await Peer.on(theirs)


async def test_what_one_says_the_other_hears_until_it_is_gone() -> None:
    supervisor, worker = await peers()
    supervisor.say(order=Order.RETIRE)
    supervisor.say(order=Order.HURRY)
    await supervisor.close()
    assert [await worker.hear() for _ in range(3)] == [{"order": "retire"}, {"order": "hurry"}, None]
    # Nobody hears this, and nobody minds.
    worker.say(said="ready")
    supervisor.say(order=Order.STOP)
    await worker.close()


async def test_half_a_word_is_none() -> None:
    ours, theirs = pair()
    theirs.setblocking(False)
    peer = await Peer.on(theirs)
    ours.sendall(b'{"order": "st')
    ours.close()
    assert await peer.hear() is None
    await peer.close()


@pytest.mark.parametrize(("terminal", "stops"), [(True, False), (False, True)])
async def test_sighup_restarts_unless_the_terminal_was_closed(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, stops: bool
) -> None:
    has_terminal = True
    monkeypatch.setattr(serving, "_has_terminal", lambda: has_terminal)
    stop, restarts = Stop(), asyncio.Event()
    signalled = hung_up(stop, restarts.set)
    has_terminal = terminal
    signalled()
    assert (stop.asked.is_set(), restarts.is_set()) == (stops, not stops)


async def test_a_server_that_never_had_a_terminal_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_has_terminal", lambda: False)
    stop, restarts = Stop(), asyncio.Event()
    hung_up(stop, restarts.set)()
    assert restarts.is_set()
    assert not stop.asked.is_set()
