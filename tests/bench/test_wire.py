"""What metering costs in Python, in microseconds per event and per request: printed, not judged."""

import json
import time
from collections.abc import Callable

import pytest

from proxy.core.chat import ChatRequest
from proxy.dialects.openai import AnswerDecoder
from tests.core.limits import Limits

pytestmark = pytest.mark.bench

HEAD = (
    b'data: {"id":"chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz012","object":"chat.completion.chunk","created":1752737269,'
    b'"model":"gpt-4o-mini-2024-07-18","service_tier":"default","system_fingerprint":"fp_560af6e559",'
    b'"choices":[{"index":0,"delta":{"content":" hello"},"logprobs":null,"finish_reason":null}]'
)
EVENTS = {"plain": HEAD + b"}\n\n", "null usage": HEAD + b',"usage":null,"obfuscation":"x8Gd71sd"}\n\n'}
COUNT = 10_000


def best_of(rounds: int, work: Callable[[], None]) -> float:
    """The shortest time of some rounds, in microseconds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best * 1e6


@pytest.mark.parametrize("kind", sorted(EVENTS))
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
@pytest.mark.parametrize("events_a_read", [1, 20])
def test_one_event(kind: str, asked: bool, events_a_read: int) -> None:
    chunk = EVENTS[kind] * events_a_read

    def answer() -> None:
        decoder = AnswerDecoder(usage_asked=asked)
        for _ in range(COUNT // events_a_read):
            decoder.feed(chunk)

    way = f"{kind}, usage {'asked' if asked else 'not asked'}, {events_a_read} a read"
    print(f"\n{way}: {best_of(3, answer) / COUNT:.2f} us")


@pytest.mark.parametrize("messages", [1, 100])
def test_one_request(messages: int) -> None:
    body = json.dumps(
        {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "Hello there! " * 20}] * messages}
    ).encode()
    limits = Limits()

    def requests() -> None:
        for _ in range(200):
            ChatRequest.parse(body, limits).rewritten("other", True, 100)

    print(f"\n{messages} messages, {len(body)} bytes: {best_of(3, requests) / 200:.0f} us to parse and rewrite")
