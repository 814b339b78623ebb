"""The demo upstream: an OpenAI-compatible provider without a model, for `farebox demo` and nothing else.

It answers every request with sentences of its own, chosen by a hash of the request: the same request, the same answer.
Its usage is true: every piece of its text is one token of o200k_base (a test proves it), what it is asked is counted by
the counter it is given, and what it writes as JSON (tool calls, structured answers) likewise.

    POST /v1/chat/completions    streaming or not; n, max_tokens, stream_options, tools, response_format
    GET  /v1/models

What it doesn't know it ignores, as a lenient provider does; nonsense gets a 400 in OpenAI's shape.
"""

import asyncio
import hashlib
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

__all__ = ["Count", "DemoUpstream"]

Count = Callable[[Sequence[str]], Awaitable[int | None]]
"""Counts the tokens of texts, or answers None where it can't."""

PIECE = re.compile(r" ?[A-Za-z]+|[.,]")
SENTENCES = (
    "No model wrote this text, but every token of it is counted and paid for.",
    "Before the request went out, credits for the longest possible answer were set aside.",
    "When the answer ends, the account pays for what was used and gets the rest back.",
    "The same question always gets the same answer, so you can check the bill by hand.",
    "Ask for a short answer with a token limit, and fewer credits are held.",
    "Each request leaves a receipt with the price, the usage and the charge.",
    "An operator sets the price of each model in one small file.",
    "Close the connection early, and only the part that was sent is charged.",
    "If the balance is too low, the request is refused before it costs anything.",
    "Point the same client at a real provider, and nothing else has to change.",
    "Prices are fixed when the request starts, even if the file changes a moment later.",
    "Every movement of credits is a row that is never changed or removed.",
    "The sum of all rows is always the balance, and one command proves it.",
    "Streams arrive one token at a time, just as they do from a real model.",
)
FIRST_SENTENCE = "This answer comes from the demo upstream, which runs beside the proxy and needs no key."
SENTENCES_PER_ANSWER = (3, 6)
CHOICES_MAX = 128
CREATED = 1_767_225_600
"""A fixed moment (2026-01-01), so that equal requests get equal bytes."""
MESSAGE_TOKENS = 3
"""What the roles and separators of one message come to, and again of the answer's beginning."""
JSON_PIECE_CHARS = 8
TEXT_TOKEN_BYTES = 4
"""Where the counter can't count: what a token of English is on average."""


class _Nonsense(Exception):
    """A request that no provider would serve; ``param`` is the member at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class _Choice:
    """One answer: its pieces in order (text, or the arguments of ``tool``), what they count, and why it ended."""

    pieces: tuple[str, ...]
    tokens: int
    finish_reason: str
    tool: str | None = None
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class _Answer:
    id: str
    model: str
    choices: tuple[_Choice, ...]
    usage: dict[str, Any]


class DemoUpstream:
    """The ASGI app. ``token_seconds`` is the time between two tokens of a choice."""

    def __init__(self, count: Count, *, token_seconds: float = 0.02, models: Sequence[str] = ()) -> None:
        self._count = count
        self._token_seconds = token_seconds
        self._models = tuple(models)
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._list, methods=["GET"]),
            ]
        )

    async def _list(self, _request: Request) -> Response:
        data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "demo"} for name in self._models]
        return JSONResponse({"object": "list", "data": data})

    async def _chat(self, request: Request) -> Response:
        raw = await request.body()
        try:
            body = _parse(raw)
            answer = await self._answer(body, _seed(body))
        except _Nonsense as error:
            detail = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": None}
            return JSONResponse({"error": detail}, status_code=400)
        headers = {"x-request-id": answer.id.replace("chatcmpl", "req")}
        if not body.get("stream"):
            await asyncio.sleep(self._token_seconds * max(choice.tokens for choice in answer.choices))
            return JSONResponse(_whole(answer), headers=headers)
        asked = bool((body.get("stream_options") or {}).get("include_usage"))
        return StreamingResponse(self._stream(answer, asked), media_type="text/event-stream", headers=headers)

    async def _answer(self, body: Mapping[str, Any], digest: bytes) -> _Answer:
        cap = _cap(body)
        prompt = MESSAGE_TOKENS * (len(body["messages"]) + 1) + await self._tokens(_texts(body))
        choices = [await self._choice(body, digest, index, cap) for index in range(_choices(body))]
        written = sum(choice.tokens for choice in choices)
        return _Answer(
            id=f"chatcmpl-demo{digest.hex()[:20]}",
            model=body["model"],
            choices=tuple(choices),
            usage={
                "prompt_tokens": prompt,
                "completion_tokens": written,
                "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        )

    async def _choice(self, body: Mapping[str, Any], digest: bytes, index: int, cap: int | None) -> _Choice:
        tool = _called_tool(body)
        schema = _answer_schema(body) if tool is None else tool.get("parameters") or {}
        if schema is None:
            return _text_choice(digest, index, cap)
        text = json.dumps(_example(schema), separators=(",", ":"))
        pieces = tuple(text[start : start + JSON_PIECE_CHARS] for start in range(0, len(text), JSON_PIECE_CHARS))
        tokens = await self._tokens([text])
        finish_reason = "stop" if tool is None else "tool_calls"
        if cap is not None and tokens > cap:
            # Cut where the share of the text is the share of the tokens: half a JSON, as a real model would leave.
            pieces, tokens, finish_reason = pieces[: len(pieces) * cap // tokens], cap, "length"
        if tool is None:
            return _Choice(pieces, tokens, finish_reason)
        return _Choice(pieces, tokens, finish_reason, tool["name"], f"call_demo{digest.hex()[:16]}{index}")

    async def _stream(self, answer: _Answer, usage_asked: bool) -> AsyncIterator[bytes]:
        """Every choice's first chunk, then their pieces in turn, then their ends; as OpenAI sends them."""
        rest = {"usage": None} if usage_asked else {}
        for index, choice in enumerate(answer.choices):
            yield _event(answer, [_delta(index, _opening(choice))], rest)
        for step in range(max(len(choice.pieces) for choice in answer.choices)):
            await asyncio.sleep(self._token_seconds)
            for index, choice in enumerate(answer.choices):
                if step < len(choice.pieces):
                    yield _event(answer, [_delta(index, _piece(choice, step))], rest)
        for index, choice in enumerate(answer.choices):
            yield _event(answer, [_delta(index, {}, choice.finish_reason)], rest)
        if usage_asked:
            yield _event(answer, [], {"usage": answer.usage})
        yield b"data: [DONE]\n\n"

    async def _tokens(self, texts: Sequence[str]) -> int:
        counted = await self._count(texts)
        if counted is None:
            return sum(len(text.encode(errors="replace")) for text in texts) // TEXT_TOKEN_BYTES
        return counted


# Reading the request


def _seed(body: Mapping[str, Any]) -> bytes:
    """What the answer depends on: not on how it is delivered, so that a stream says what a whole answer says."""
    asked = [body.get(name) for name in ("model", "messages", "tools", "seed")]
    return hashlib.sha256(json.dumps(asked).encode()).digest()


def _parse(raw: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise _Nonsense(f"The body isn't JSON: {error}.") from None
    if not isinstance(body, dict):
        raise _Nonsense("The body must be a JSON object.")
    if not isinstance(body.get("model"), str):
        raise _Nonsense("You must provide a model parameter.", "model")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise _Nonsense("'messages' must be a list of at least one message.", "messages")
    for name in ("stream_options", "response_format"):
        if not isinstance(body.get(name), dict | None):
            raise _Nonsense(f"'{name}' must be an object.", name)
    if body.get("stream_options") is not None and not body.get("stream"):
        raise _Nonsense("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    return body


def _choices(body: Mapping[str, Any]) -> int:
    count = body.get("n")
    if count is None:
        return 1
    if type(count) is not int or not 1 <= count <= CHOICES_MAX:
        raise _Nonsense(f"'n' must be between 1 and {CHOICES_MAX}.", "n")
    return count


def _cap(body: Mapping[str, Any]) -> int | None:
    """The most tokens one choice may have; the newer name goes before the older."""
    for name in ("max_completion_tokens", "max_tokens"):
        cap = body.get(name)
        if cap is None:
            continue
        if type(cap) is not int or cap < 1:
            raise _Nonsense(f"'{name}' must be an integer of at least 1.", name)
        return cap
    return None


def _texts(body: Mapping[str, Any]) -> list[str]:
    """Everything that a model would read, each message's parts and the tools."""
    found = []
    for message in body["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        found += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if message.get("tool_calls"):
            found.append(json.dumps(message["tool_calls"]))
    found += [json.dumps(body[name]) for name in ("tools", "response_format") if body.get(name)]
    return found


def _called_tool(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The function to be called: the one that is named, or the first where any is required."""
    choice, tools = body.get("tool_choice"), body.get("tools")
    if choice in (None, "none", "auto"):
        return None
    named = (tool.get("function") for tool in (tools if isinstance(tools, list) else ()) if isinstance(tool, dict))
    functions: list[dict[str, Any]] = [item for item in named if isinstance(item, dict) and item.get("name")]
    if choice != "required":
        wanted = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
        functions = [function for function in functions if function.get("name") == wanted]
    if not functions:
        raise _Nonsense("'tool_choice' asks for a function that 'tools' doesn't have.", "tool_choice")
    return functions[0]


def _answer_schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that the answer's JSON must have; None where text was asked for."""
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return dict((wanted.get("json_schema") or {}).get("schema") or {})
    return {"type": "object", "properties": {"answer": {}}} if wanted.get("type") == "json_object" else None


# Writing the answer


def _text_choice(digest: bytes, index: int, cap: int | None) -> _Choice:
    seeded = random.Random(digest + bytes([index]))  # noqa: S311 (for variety, not for secrets)
    sentences = [FIRST_SENTENCE, *seeded.sample(SENTENCES, seeded.randint(*SENTENCES_PER_ANSWER))]
    pieces = tuple(PIECE.findall(" ".join(sentences)))
    if cap is not None and len(pieces) > cap:
        return _Choice(pieces[:cap], cap, "length")
    return _Choice(pieces, len(pieces), "stop")


def _example(schema: Any, depth: int = 0) -> Any:
    """The simplest value that a JSON Schema of ordinary making accepts."""
    if not isinstance(schema, dict) or depth > 8:
        return "demo"
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for name in ("anyOf", "oneOf"):
        if schema.get(name):
            return _example(schema[name][0], depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or "properties" in schema:
        return {name: _example(part, depth + 1) for name, part in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [_example(schema.get("items"), depth + 1)]
    simple: dict[Any, Any] = {"integer": 1, "number": 1.5, "boolean": True, "null": None}
    return simple.get(kind, "demo")


def _whole(answer: _Answer) -> dict[str, Any]:
    choices = []
    for index, choice in enumerate(answer.choices):
        text = "".join(choice.pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.tool is not None:
            call = {"id": choice.call_id, "type": "function", "function": {"name": choice.tool, "arguments": text}}
            message |= {"content": None, "tool_calls": [call]}
        choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason})
    return _envelope(answer, "chat.completion") | {"choices": choices, "usage": answer.usage}


def _opening(choice: _Choice) -> dict[str, Any]:
    if choice.tool is None:
        return {"role": "assistant", "content": "", "refusal": None}
    call = {"index": 0, "id": choice.call_id, "type": "function", "function": {"name": choice.tool, "arguments": ""}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _piece(choice: _Choice, step: int) -> dict[str, Any]:
    if choice.tool is None:
        return {"content": choice.pieces[step]}
    return {"tool_calls": [{"index": 0, "function": {"arguments": choice.pieces[step]}}]}


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(answer: _Answer, choices: list[dict[str, Any]], rest: Mapping[str, Any]) -> bytes:
    chunk = _envelope(answer, "chat.completion.chunk") | {"choices": choices, **rest}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _envelope(answer: _Answer, kind: str) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": kind,
        "created": CREATED,
        "model": answer.model,
        "system_fingerprint": "fp_farebox_demo",
    }
