"""Callers who remember what they were given, byte for byte, and when."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

import httpx2

from tests.faults.provider import PROMPT_TOKENS, WORD

__all__ = ["BODY", "Call", "make_call"]

MESSAGES = [{"role": "user", "content": "Say hello."}]
BODY = {"model": "m", "messages": MESSAGES}

Outcome = Literal["running", "whole", "broken", "refused", "unreached", "left"]


@dataclass(slots=True)
class Call:
    """One call as its caller saw it. ``cap`` is its output limit: no other call of the account has the same, so that
    the ledger's hold of it can be told from others even where no answer ever came."""

    name: str
    account_id: UUID
    cap: int
    stream: bool = True
    word: str | None = None
    """Its Idempotency-Key. Said again after a crash, such a call may have a second hold."""
    began: float = 0.0
    outcome: Outcome = "running"
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    words: list[float] = field(default_factory=list)
    """When each word arrived, on the monotonic clock."""
    ended: float = 0.0
    _left: bytes = b""

    def words_by(self, moment: float) -> int:
        """How many words had arrived by then."""
        return sum(1 for arrived in self.words if arrived <= moment)

    def take(self, data: bytes) -> None:
        """Bytes of the answer as they came."""
        *lines, self._left = (self._left + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._take_event(json.loads(line[6:]))
            elif line.startswith(b"data: [DONE]"):
                self.outcome = "whole"

    def _take_event(self, event: dict[str, object]) -> None:
        error = event.get("error")
        if isinstance(error, dict):
            self.code = error.get("code")
            return
        choices = event["choices"]
        assert isinstance(choices, list)
        text = choices[0]["delta"].get("content", "") if choices else ""
        assert text in ("", WORD)
        if text:
            self.words.append(time.monotonic())


async def make_call(
    http: httpx2.AsyncClient, url: str, key: str, call: Call, *, leave_after: int | None = None
) -> Call:
    """Make the call, and read its answer to whatever end it has. ``leave_after``: hang up after so many words."""
    body = BODY | {"max_tokens": call.cap, "stream": call.stream}
    headers = {"authorization": f"Bearer {key}", "x-client-request-id": call.name}
    if call.word is not None:
        headers["idempotency-key"] = call.word
    call.began = time.monotonic()
    try:
        async with http.stream(
            "POST", f"{url}/chat/completions", content=json.dumps(body).encode(), headers=headers
        ) as answer:
            call.status = answer.status_code
            call.request_id = answer.headers.get("x-request-id")
            if answer.status_code != 200:
                call.outcome = "refused"
                call.code = json.loads(await answer.aread())["error"].get("code")
            elif call.stream:
                await _read_stream(answer, call, leave_after)
            else:
                text = json.loads(await answer.aread())["choices"][0]["message"]["content"]
                call.words = [time.monotonic()] * text.count(WORD)
                call.outcome = "whole"
    except httpx2.ConnectError:
        call.outcome = "unreached"
    except (httpx2.TransportError, ValueError):
        # What came before it broke stays counted; [DONE] may have come, and the end of the body not.
        call.outcome = "whole" if call.outcome == "whole" else "broken"
    except asyncio.CancelledError:
        call.outcome = "left"
        raise
    finally:
        call.ended = time.monotonic()
    if call.outcome == "running":
        call.outcome = "broken"
    return call


async def _read_stream(answer: httpx2.Response, call: Call, leave_after: int | None) -> None:
    async for data in answer.aiter_raw():
        call.take(data)
        if leave_after is not None and len(call.words) >= leave_after:
            call.outcome = "left"
            return


assert PROMPT_TOKENS == 10, "what MESSAGES come to"
