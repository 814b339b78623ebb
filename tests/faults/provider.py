"""A provider whose every answer is known: so many words, one token each, at such a pace; it remembers what it sent.

The caller names its call in ``x-client-request-id``, which Farebox passes on: by that name an answer is ordered, and it
is counted how often it was asked for.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.fakes.upstream import (
    DONE,
    Chunk,
    Cut,
    Do,
    Received,
    Script,
    ScriptedUpstream,
    Send,
    Sleep,
    Step,
    chat_answer,
    chunk,
    head,
    usage_chunk,
    usage_of,
    whole,
)

__all__ = ["PROMPT_TOKENS", "WORD", "Answer", "Provider", "Served", "running_provider"]

WORD = " word"
"""One token of o200k, wherever it stands among its like."""
PROMPT_TOKENS = 10
"""What ``caller.MESSAGES`` come to, and what is reported."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call is answered. ``pace``: seconds before each word. ``breaks``: the socket is cut after the last word."""

    words: int = 20
    pace: float = 0.02
    reports: bool = True
    breaks: bool = False
    status: int = 200


@dataclass(slots=True)
class Served:
    """What a call was sent."""

    requests: int = 0
    words: int = 0
    finished: bool = False


class Provider:
    """The scripts of a ``ScriptedUpstream``, and its book."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.upstream = upstream
        self.served: dict[str, Served] = {}
        self._answers: dict[str, Answer] = {}
        upstream.choose(self._script)

    def will(self, name: str, answer: Answer) -> None:
        """Answer the call of this name so."""
        self._answers[name] = answer

    def answer(self, name: str) -> Answer:
        return self._answers[name]

    def forget(self) -> None:
        """Everything that was ordered and sent."""
        self.served.clear()
        self._answers.clear()
        self.upstream.requests.clear()

    def of(self, name: str) -> Served:
        """What the call of this name was sent; nothing, perhaps."""
        return self.served.setdefault(name, Served())

    def _script(self, received: Received) -> Script:
        name = received.headers["x-client-request-id"]
        served, answer = self.of(name), self._answers[name]
        served.requests += 1
        if answer.status != 200:
            return whole({"error": {"message": "no", "type": "server_error"}}, answer.status)
        if received.json.get("stream"):
            return _stream(answer, served)
        return _whole(answer, served)


def _stream(answer: Answer, served: Served) -> Script:
    def sent() -> None:
        served.words += 1

    def finished() -> None:
        served.finished = True

    steps: list[Step] = [head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})]
    for _ in range(answer.words):
        # Counted before it is written, since nobody may have been given more than was sent.
        steps += [Sleep(answer.pace), Do(sent), Chunk(chunk(WORD))]
    if answer.breaks:
        return [*steps, Sleep(answer.pace), Cut(reset=True)]
    # In writes of their own: a client that was cut off between them has all the words, and no end.
    steps += [Sleep(answer.pace), Chunk(chunk(finish="stop"))]
    if answer.reports:
        steps += [Chunk(usage_chunk(PROMPT_TOKENS, answer.words))]
    return [*steps, Do(finished), Chunk(DONE), Send(b"0\r\n\r\n")]


def _whole(answer: Answer, served: Served) -> Script:
    def sent() -> None:
        served.words, served.finished = answer.words, True

    body = chat_answer(WORD * answer.words)
    body["usage"] = usage_of(PROMPT_TOKENS, answer.words)
    return [Sleep(answer.pace * answer.words), Do(sent), *whole(body)]


@asynccontextmanager
async def running_provider() -> AsyncIterator[Provider]:
    """A running one."""
    async with ScriptedUpstream() as upstream:
        yield Provider(upstream)
