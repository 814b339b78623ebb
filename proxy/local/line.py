"""The line between the supervisor and one of its workers: a socket pair, one JSON object a line, both ways.

The supervisor first says how the worker is to serve (``Briefing``); the worker answers ``ready`` or ``failed``; later
the supervisor gives orders. An end of file is as good as a word: the other one is gone, by whatever means. Workers may
be of a later release than their supervisor, so ``VERSION`` changes whenever an older side would misunderstand.
"""

import asyncio
import json
import socket
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from proxy.local.state import LocalError

__all__ = ["Briefing", "Order", "Peer", "read_briefing"]

VERSION = 1
LINE_BYTES_MAX = 1_000_000
BRIEFING_SECONDS = 30.0


class Order(StrEnum):
    """What a supervisor may want of a worker."""

    RETIRE = "retire"
    """Another one serves in its place: end what runs, however long it takes, and then yourself."""
    STOP = "stop"
    """End what runs within the shutdown's limit, and then yourself."""
    HURRY = "hurry"
    """Cut what runs, and end."""


@dataclass(frozen=True, slots=True)
class Briefing:
    """How a worker is to serve. It travels over the line, for it holds secrets, and arguments can be read by others."""

    slot: int
    """Its place among the workers, from 1; whoever replaces it gets the same."""
    options: dict[str, Any]
    """Settings that don't stand in the environment, or not as they are: the command line's, the embedded database."""
    users_lock: str | None = None
    """A lock file to hold (shared) while the embedded database is used: its owner's end waits for that."""
    version: int = VERSION

    def line(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode() + b"\n"


def read_briefing(line: socket.socket) -> Briefing:
    """Wait for the supervisor's first words. Raises LocalError."""
    line.settimeout(BRIEFING_SECONDS)
    data = bytearray()
    # Byte by byte: what follows the line is an order, and is read elsewhere.
    while not data.endswith(b"\n"):
        try:
            byte = line.recv(1)
        except OSError as error:
            raise LocalError(f"the supervisor can't be heard: {error}") from error
        if not byte or len(data) > LINE_BYTES_MAX:
            raise LocalError("the supervisor is gone, or says nothing that makes sense")
        data += byte
    try:
        words = json.loads(data)
        if words["version"] != VERSION:
            raise LocalError(
                "the supervisor is of another release and can't run this release's workers: restart it as a whole"
            )
        return Briefing(**words)
    except (ValueError, TypeError, KeyError) as error:
        raise LocalError("the supervisor says nothing that makes sense") from error


class Peer:
    """The line's other side. ``said`` is everything that it says, until it is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def on(cls, line: socket.socket) -> "Peer":
        """The peer at the other end of ``line``, which belongs to this object from now on."""
        return cls(*await asyncio.open_unix_connection(sock=line, limit=LINE_BYTES_MAX))

    def say(self, **words: Any) -> None:
        """Say it. Where nobody listens any more, nothing happens."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(words).encode() + b"\n")

    def brief(self, briefing: Briefing) -> None:
        """The supervisor's first words to a worker."""
        self._writer.write(briefing.line())

    async def hear(self) -> dict[str, Any] | None:
        """What it says next; None once it is gone."""
        try:
            line = await self._reader.readline()
            words = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return words if isinstance(words, dict) else None

    async def close(self) -> None:
        """Let go of the line, once all was sent."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return
