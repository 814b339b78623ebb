"""A provider that does what a test says, on a real loopback socket: chunks as they are cut, delays, cuts and stalls.

    upstream.will(Send(head), Send(chunk), Sleep(0.01), Cut())

Each request takes the next script; the last one stays. What was received is kept in ``requests``. An HTTP server of
its own, since no library sends a body that breaks off where it is told to.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "DONE", "Chunk", "Cut", "Do", "Received", "Script", "ScriptedUpstream", "Send", "Sleep", "Step", "Wait",
    "chat_answer", "chunk", "event", "head", "stream", "usage_chunk", "usage_of", "whole",
]  # fmt: skip


@dataclass(frozen=True)
class Send:
    """Bytes onto the socket, as they are."""

    data: bytes


@dataclass(frozen=True)
class Chunk:
    """A piece of a chunked body."""

    data: bytes


@dataclass(frozen=True)
class Sleep:
    """Silence."""

    seconds: float


@dataclass(frozen=True)
class Wait:
    """Silence until the event is set."""

    event: asyncio.Event


@dataclass(frozen=True)
class Do:
    """Something of the test's own, at once."""

    act: Callable[[], None]


@dataclass(frozen=True)
class Cut:
    """Close the connection here; ``reset`` sends RST."""

    reset: bool = False


Step = Send | Chunk | Sleep | Wait | Do | Cut
Script = Sequence[Step]


@dataclass
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    json: Any = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the answer has been sent or the proxy has closed the connection."""
    finished: bool = False
    """Whether the whole script was played."""


class ScriptedUpstream:
    """Use as an async context manager; ``base_url`` is what upstreams.yaml gets."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self._scripts: list[Script] = []
        self._choose: Callable[[Received], Script] | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.base_url = ""
        self.open_connections = 0

    def will(self, *steps: Step) -> None:
        """Answer every request from now on so."""
        self._choose, self._scripts = None, [steps]

    def will_in_turn(self, scripts: Iterable[Script]) -> None:
        """Answer the next requests so, one script each; the last stays."""
        self._choose, self._scripts = None, list(scripts)

    def choose(self, by: Callable[[Received], Script]) -> None:
        """Let a function of the request decide."""
        self._choose = by

    async def __aenter__(self) -> "ScriptedUpstream":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.open_connections += 1
        try:
            while (received := await _read_request(reader)) is not None:
                self.requests.append(received)
                if not await self._play(self._script(received), received, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open_connections -= 1
            writer.close()

    def _script(self, received: Received) -> Script:
        if self._choose is not None:
            return self._choose(received)
        return self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]

    async def _play(
        self, script: Script, received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection can be used again."""
        playing = asyncio.ensure_future(_steps(script, writer))
        # The client says nothing until it has its answer: what can be read before is its leaving.
        left = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({playing, left}, return_when=asyncio.FIRST_COMPLETED)
            if playing.done():
                received.finished = True
                return playing.result()
            return False
        finally:
            received.closed.set()
            for one in (playing, left):
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await one


async def _steps(script: Script, writer: asyncio.StreamWriter) -> bool:
    for step in script:
        match step:
            case Send(data):
                writer.write(data)
                await writer.drain()
            case Chunk(data):
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                await writer.drain()
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Wait(event):
                await event.wait()
            case Do(act):
                act()
            case Cut(reset):
                if reset:
                    writer.transport.abort()
                return False
    return True


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    received = Received(method, path, headers, body)
    with contextlib.suppress(ValueError):
        received.json = json.loads(body)
    return received


def head(status: int = 200, headers: dict[str, str] | None = None) -> Send:
    """An answer's first lines."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    return Send(("\r\n".join(lines) + "\r\n\r\n").encode())


def stream(*pieces: bytes, delay: float = 0.0, headers: dict[str, str] | None = None) -> list[Step]:
    """A chunked event stream that comes to its end; each piece is one write."""
    steps: list[Step] = [
        head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"} | (headers or {}))
    ]
    for piece in pieces:
        if delay:
            steps.append(Sleep(delay))
        steps.append(Chunk(piece))
    return [*steps, Send(b"0\r\n\r\n")]


def whole(body: bytes | dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> list[Step]:
    """An answer in one piece, with its length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = {"content-type": "application/json", "content-length": str(len(data))} | (headers or {})
    return [head(status, more), Send(data)]


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"


def chunk(
    text: str | None = None, *, finish: str | None = None, index: int = 0, usage: Any = ..., **more: Any
) -> bytes:
    """One chunk of a streamed completion, as OpenAI sends it."""
    delta = {} if text is None else {"content": text}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-up",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
        **more,
    }
    if usage is not ...:
        body["usage"] = usage
    return event(body)


def usage_chunk(prompt: int, completion: int) -> bytes:
    """The chunk that ends a stream whose client (or proxy) asked for usage."""
    return chunk(usage=usage_of(prompt, completion), choices=[])


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


DONE = event("[DONE]")


def chat_answer(text: str = "Hello.", prompt: int = 10, completion: int = 5, **more: Any) -> dict[str, Any]:
    """A whole completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-up",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": usage_of(prompt, completion),
        **more,
    }


@contextlib.asynccontextmanager
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """A running one."""
    async with ScriptedUpstream() as upstream:
        yield upstream
