"""What decides whether an answer is read on, and whose drain gives way to whose."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from proxy.core.catalog import OnDisconnect, Route
from proxy.core.catalog_files import load_catalog
from proxy.core.chat import ChatRequest
from proxy.gateway.departure import Departure, Drains, policy_of
from proxy.gateway.exchange import Ending, Exchange
from proxy.gateway.limits import DEFAULT

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def route_of(said: str = "", model: str = "gpt-4o") -> Route:
    pricing = (
        f"models:\n  {model}: {{upstream: up, input: 1, output: 3, max_output_tokens: 100, audio_input: 1,"
        f" audio_output: 1, web_search: {{per_request: 1}}, hosted_tools: {{per_request: 1}}{said}}}\n"
    )
    upstreams = "upstreams:\n  up: {dialect: openai, base_url: 'https://h/v1', api_key: none}\n"
    return load_catalog(pricing, upstreams).routes[model]


def request_of(*, content: Any = "Hi.", **more: Any) -> ChatRequest:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": content}], "stream": True} | more
    return ChatRequest.parse(json.dumps(body).encode(), DEFAULT)


def part(kind: str, **value: Any) -> dict[str, Any]:
    return {"type": kind, kind: value}


UNCOUNTED: dict[str, dict[str, Any]] = {
    "a search": {"web_search_options": {}},
    "a tool that the provider runs": {"tools": [{"type": "code_interpreter"}]},
    "sound in the answer": {"modalities": ["text", "audio"], "audio": {"voice": "v", "format": "wav"}},
    "a prediction": {"prediction": {"type": "content", "content": "Hello."}},
    "reasoning": {"reasoning_effort": "high"},
    "a picture of unknown size": {"content": [part("image_url", url="https://h/x.png")]},
    "a file": {"content": [part("file", file_id="file-1")]},
    "sound in the prompt": {"content": [part("input_audio", data="AAAA", format="wav")]},
}
COUNTED: dict[str, dict[str, Any]] = {
    "text": {},
    "several choices": {"n": 3},
    "functions": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "a schema": {"response_format": {"type": "json_object"}},
    "a picture of known size": {"content": [part("image_url", url=PIXEL)]},
    "log probabilities": {"logprobs": True},
}


@pytest.mark.parametrize("more", UNCOUNTED.values(), ids=UNCOUNTED)
def test_a_call_that_is_billed_for_what_cannot_be_counted_is_read_on(more: dict[str, Any]) -> None:
    request = request_of(**more)
    assert policy_of(route_of(), request) is OnDisconnect.DRAIN
    # What the operator says stands above that.
    assert policy_of(route_of(", on_disconnect: cancel"), request) is OnDisconnect.CANCEL


@pytest.mark.parametrize("more", COUNTED.values(), ids=COUNTED)
def test_a_call_whose_text_is_all_that_is_billed_is_cancelled(more: dict[str, Any]) -> None:
    request = request_of(**more)
    assert policy_of(route_of(), request) is OnDisconnect.CANCEL
    assert policy_of(route_of(", on_disconnect: drain"), request) is OnDisconnect.DRAIN
    assert policy_of(route_of(model="gpt-5"), request) is OnDisconnect.DRAIN


@pytest.mark.parametrize("said", ["", ", on_disconnect: cancel", ", on_disconnect: drain"])
def test_an_answer_in_one_piece_is_always_read_on(said: str) -> None:
    assert policy_of(route_of(said), request_of(stream=False)) is OnDisconnect.DRAIN


class Leaver:
    """An exchange with an upstream that has been asked and says nothing, whose client leaves."""

    def __init__(self, drains: Drains, account: UUID) -> None:
        ticket = SimpleNamespace(account_id=account, on_disconnect=OnDisconnect.DRAIN, route=route_of())
        self.exchange = cast(
            Exchange,
            SimpleNamespace(
                ticket=ticket, asked_at=0.0, upstream_status=200, meter=None, ending=None, cut_by=None, cut_at=None
            ),
        )
        self.endings: list[Ending] = []
        self.departure = Departure(self.exchange, drains, self.endings.append)
        self.departure.begin()


async def test_one_drain_too_many_takes_the_place_of_its_own_accounts_oldest() -> None:
    drains = Drains(4)
    honest, greedy = uuid4(), uuid4()
    first = Leaver(drains, honest)
    many = [Leaver(drains, greedy) for _ in range(3)]
    assert (len(drains), first.endings, [one.endings for one in many]) == (4, [], [[], [], []])
    second = Leaver(drains, honest)
    assert [one.endings for one in (first, second, *many)] == [[], [], [Ending.CLIENT_LEFT_CUT], [], []]
    assert many[0].exchange.cut_by == "drains_max"
    assert len(drains) == 4


async def test_an_account_that_is_alone_may_have_every_place() -> None:
    drains = Drains(3)
    account = uuid4()
    three = [Leaver(drains, account) for _ in range(3)]
    assert all(not one.endings for one in three)
    fourth = Leaver(drains, account)
    assert [bool(one.endings) for one in (*three, fourth)] == [True, False, False, False]


async def test_no_place_at_all_cuts_each_one_off() -> None:
    drains = Drains(0)
    assert Leaver(drains, uuid4()).endings == [Ending.CLIENT_LEFT_CUT]
    assert len(drains) == 0


async def test_a_drain_that_ends_leaves_its_place_once() -> None:
    drains = Drains(2)
    leaver, other = Leaver(drains, uuid4()), Leaver(drains, uuid4())
    leaver.departure.end()
    leaver.departure.end()
    assert len(drains) == 1
    await asyncio.sleep(0)
    assert other.endings == []
