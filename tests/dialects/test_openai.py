"""OpenAI's dialect on answers of our own: what the client gets and what the meter finds, however the bytes were cut."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.catalog import Quirks, Route, Upstream, Variant
from proxy.core.chat import ChatRequest
from proxy.core.meter import Ending
from proxy.core.pricing import Price
from proxy.core.sse import AnswerTooLarge, EventTooLarge, Splitter
from proxy.dialects.dialect import AnswerError
from proxy.dialects.openai import AnswerDecoder, OpenAI
from proxy.dialects.registry import DIALECTS
from tests.answers import ANSWERS, Answer
from tests.core.limits import Limits
from tests.recordings import cuts_of, seen_by_who_did_not_ask

DIALECT = OpenAI()
STREAMS = [answer for answer in ANSWERS if answer.streamed]


def run(pieces: list[bytes], **options: Any) -> tuple[bytes, AnswerDecoder]:
    decoder = AnswerDecoder(**options)
    client = b"".join([*(decoder.feed(piece) for piece in pieces), decoder.finish()])
    return client, decoder


def found(decoder: AnswerDecoder, answer: Answer) -> tuple[Any, ...]:
    meter = decoder.meter
    return meter.ending, meter.usage(answer.quirks), tuple(meter.texts()), meter.calls


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.name)
def test_a_client_that_asked_gets_the_upstreams_bytes(answer: Answer) -> None:
    for cut, pieces in cuts_of(answer.body, random.Random(answer.name)):
        client, decoder = run(pieces, usage_asked=True, choices=answer.choices)
        assert client == answer.body, cut
        assert found(decoder, answer) == (answer.ending, answer.usage, answer.texts, answer.calls), cut


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.name)
def test_a_client_that_did_not_ask_gets_them_less_the_usage_it_did_not_ask_for(answer: Answer) -> None:
    wanted = seen_by_who_did_not_ask(answer.body) if answer.streamed else answer.body
    for cut, pieces in cuts_of(answer.body, random.Random(answer.name)):
        client, decoder = run(pieces, usage_asked=False, choices=answer.choices)
        assert client == wanted, cut
        assert found(decoder, answer) == (answer.ending, answer.usage, answer.texts, answer.calls), cut


@pytest.mark.parametrize("answer", STREAMS, ids=lambda a: a.name)
def test_what_is_kept_back_is_as_many_events_as_the_table_says(answer: Answer) -> None:
    client, _ = run([answer.body], usage_asked=False, choices=answer.choices)
    before, after = _events(answer.body), _events(client)
    assert len(before) - len(after) == answer.dropped
    nulls = [sum(event.count('"usage":null') for event in events) for events in (before, after)]
    assert nulls[0] - nulls[1] == answer.nulls


def _events(body: bytes) -> list[str]:
    text = body.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return [event for event in text.split("\n\n") if "data:" in event]


@pytest.mark.parametrize("answer", STREAMS, ids=lambda a: a.name)
def test_nulls_that_are_the_upstreams_own_stay(answer: Answer) -> None:
    client, _ = run([answer.body], usage_asked=False, usage_forced=False)
    assert client.count(b'"usage":null') == answer.body.count(b'"usage":null')


@pytest.mark.parametrize("answer", STREAMS, ids=lambda a: a.name)
def test_an_event_leaves_with_its_last_byte_and_comments_at_once(answer: Answer) -> None:
    """Nothing is held beyond the event it belongs to."""
    decoder, upstream = AnswerDecoder(usage_asked=False), Splitter()
    sent = b""
    for i in range(len(answer.body)):
        sent += decoder.feed(answer.body[i : i + 1])
        upstream.feed(answer.body[i : i + 1])
        # What is held back of an event the client hasn't seen, so one of our own may always stand here.
        assert decoder.between_events
        if upstream.between_events:
            assert sent == seen_by_who_did_not_ask(answer.body[: i + 1])


@given(st.data())
def test_cut_anywhere_it_is_the_same_answer(data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from(ANSWERS))
    asked = data.draw(st.booleans())
    places = sorted(data.draw(st.lists(st.integers(0, len(answer.body)), max_size=12)))
    pieces = [answer.body[a:b] for a, b in zip([0, *places], [*places, len(answer.body)], strict=True)]
    whole, first = run([answer.body], usage_asked=asked, choices=answer.choices)
    parts, second = run(pieces, usage_asked=asked, choices=answer.choices)
    assert parts == whole
    assert found(second, answer) == found(first, answer)


@given(st.data())
def test_a_body_broken_off_anywhere_raises_nothing_and_never_looks_complete_too_early(data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from([a for a in STREAMS if a.ending is Ending.COMPLETE]))
    at = data.draw(st.integers(0, len(answer.body) - 1))
    client, decoder = run([answer.body[:at]], usage_asked=True, choices=answer.choices)
    assert client == answer.body[:at]
    marks = (b'"finish_reason":"', b"[DONE]")
    if not any(mark in answer.body[:at] for mark in marks):
        assert decoder.meter.ending in (Ending.TRUNCATED, Ending.EMPTY)
        assert decoder.meter.usage(answer.quirks) is None


@given(st.lists(st.binary(max_size=60), max_size=8), st.booleans())
def test_bytes_that_mean_nothing_pass_through(pieces: list[bytes], asked: bool) -> None:
    client, decoder = run(pieces, usage_asked=asked)
    assert client == b"".join(pieces) or b'"usage"' in b"".join(pieces)
    assert decoder.meter.usage(Quirks()) is None


HEAD = b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]'


@pytest.mark.parametrize(
    ("event", "left"),
    [
        (HEAD + b',"usage":null}\n\n', HEAD + b"}\n\n"),
        (HEAD + b' ,\t"usage" : null , "z":1}\n\n', HEAD + b'  , "z":1}\n\n'),
        (b'data: {"usage":null,"choices":[{"index":0}]}\n\n', b'data: {"choices":[{"index":0}]}\n\n'),
        (b'data: {"id":"a","usage":null,"choices":[{"index":0}]}\n\n', b'data: {"id":"a","choices":[{"index":0}]}\n\n'),
        (b'data: {"usage":null}\n\n', b"data: {}\n\n"),
        # A nested one isn't ours; an escaped key is the same key; a number keeps its text.
        (b'data: {"choices":[{"usage":null}],"n":1.50}\n\n', b'data: {"choices":[{"usage":null}],"n":1.50}\n\n'),
        (b'data: {"x":{"usage":null},"usage":null,"n":1.50}\n\n', b'data: {"x":{"usage":null},"n":1.50}\n\n'),
        (b'data: {"a":{"b":1},"usage":null,"c":{"usage":null}}\n\n', b'data: {"a":{"b":1},"c":{"usage":null}}\n\n'),
        (b'data: {"a":{},"\\u0075sage":null,"c":1e400}\n\n', b'data: {"a":{},"c":1e400}\n\n'),
        (b'data: {"a":{},"usage":null,"usage":null}\r\n\r\n', b'data: {"a":{}}\r\n\r\n'),
        (b'data: {"c":",\\"usage\\":null}","usage":null}\n\n', b'data: {"c":",\\"usage\\":null}"}\n\n'),
    ],
)
def test_a_null_usage_is_cut_and_nothing_else(event: bytes, left: bytes) -> None:
    client, _ = run([event], usage_asked=False)
    assert client == left


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[],"usage":{"prompt_tokens":1},"prompt_filter_results":[{"a":1}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1},"error":{"message":"x"}}\n\n',
        b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":5}\n\n',
        b'data: {"choices":[]}\n\n',
        b'data: {"choices":null,"usage":{}}\n\n',
    ],
)
def test_what_is_more_or_less_than_the_usage_chunk_passes(event: bytes) -> None:
    assert run([event], usage_asked=False)[0] == event


@pytest.mark.parametrize("extra", ["", ',"timings":{"a":1}', ',"cost":{"usd":1}', ',"obfuscation":"x"'])
def test_the_usage_chunk_goes_whatever_else_describes_the_answer(extra: str) -> None:
    event = f'data: {{"choices":[],"usage":{{"prompt_tokens":1}}{extra}}}\r\n\r\n'.encode()
    after = b": keep-alive\r\n\r\n"
    for pieces in ([event + after], [event[:-1], event[-1:], after], [bytes([b]) for b in event + after]):
        client, decoder = run(pieces, usage_asked=False)
        assert client == after
        assert decoder.meter.usage_raw == {"prompt_tokens": 1}


def test_a_usage_chunk_that_ends_without_its_blank_line_is_read_and_dropped() -> None:
    event = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    client, decoder = run([HEAD + b"}\n\n", event], usage_asked=False)
    assert client == HEAD + b"}\n\n"
    assert decoder.meter.usage_raw == {"prompt_tokens": 3, "completion_tokens": 4}


@pytest.mark.parametrize("lead", [b"", b" \r\n\n ", b"\xef\xbb\xbf", b"\n" * 40])
@pytest.mark.parametrize("asked", [True, False])
def test_a_json_answer_to_a_stream_is_read_as_json(lead: bytes, asked: bool) -> None:
    body = lead + b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],"usage":{"prompt_tokens":2,'
    body += b'"completion_tokens":1}}'
    for _, pieces in cuts_of(body, random.Random(1)):
        client, decoder = run(pieces, usage_asked=asked)
        assert client == body
        assert decoder.meter.usage_raw == {"prompt_tokens": 2, "completion_tokens": 1}
        assert decoder.meter.ending is Ending.COMPLETE


def test_a_stream_in_answer_to_a_plain_request_is_read_as_a_stream() -> None:
    answer = next(a for a in STREAMS if a.name == "openai_usage_asked.sse")
    meter = DIALECT.decode_body(answer.body)
    assert (meter.ending, meter.usage(Quirks())) == (answer.ending, answer.usage)


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        (b"", Ending.EMPTY),
        (b"null", Ending.EMPTY),
        (b"<html><body>404</body></html>", Ending.EMPTY),
        (b"upstream connect error", Ending.EMPTY),
        (b'{"choices": [', Ending.EMPTY),
        (b"[1,2]", Ending.EMPTY),
        (b'[{"error":{"code":400,"message":"no","status":"INVALID"}}]', Ending.ERROR),
        (b'{"detail":"Not Found"}', Ending.ERROR),
        (b'{"error":"no"}', Ending.ERROR),
        (b'{"object":"error","message":"no"}', Ending.ERROR),
    ],
)
def test_a_body_that_is_no_answer_is_not_taken_for_one(body: bytes, ending: Ending) -> None:
    meter = DIALECT.decode_body(body)
    assert meter.ending is ending
    assert not meter.delivered


def test_numbers_and_nesting_that_no_decoder_likes_do_no_harm() -> None:
    digits = b"9" * 5000
    hostile = [
        b'data: {"choices":[],"usage":{"prompt_tokens":' + digits + b',"completion_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":1e999}}\n\n',
        b'data: {"x":' + b"[" * 100_000 + b"\n\n",
        b'data: {"choices":[{"index":0,"delta":{"content":"\x01\xff"}}]}\n\n',
        b'data: "text"\n\ndata: 5\n\ndata:\n\ndata: {\n\n',
        b'data: {"choices":{"a":1},"usage":[1],"x_groq":4,"error":null}\n\n',
        b'data: {"choices":[null,5,{"delta":5},{"index":"x","delta":{"tool_calls":[5,{"function":3}],"audio":3}}]}\n\n',
    ]
    client, decoder = run(hostile, usage_asked=True)
    assert client == b"".join(hostile)
    assert decoder.meter.usage(Quirks()) is None
    assert decoder.meter.usage_json() is not None


def test_the_limits_are_named_errors() -> None:
    with pytest.raises(EventTooLarge):
        run([b"data: " + b"x" * 2_000], usage_asked=True, event_bytes_max=1_000)
    with pytest.raises(AnswerTooLarge):
        run([b'{"a":"' + b"x" * 2_000], usage_asked=True, body_bytes_max=1_000)
    line = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"y" * 3_000_000 + b'"}}]}\n\n'
    _, decoder = run([line[i : i + 65_536] for i in range(0, len(line), 65_536)], usage_asked=False)
    assert decoder.meter.text_chars == 3_000_000


PRICE = Price(input=1, cached_input=1, cache_write=1, audio_input=1, output=1, reasoning=1, audio_output=1)


def route(upstream_model: str = "gpt-4o", family: str = "gpt-4", **quirks: bool) -> Route:
    upstream = Upstream(name="u", dialect="openai", base_url="http://127.0.0.1/v1", quirks=Quirks(**quirks))
    return Route(
        model="gpt-4o",
        upstream=upstream,
        upstream_model=upstream_model,
        family=family,
        output_tokens_max=1_000,
        variants={"standard": Variant(name="standard", price=PRICE)},
    )


def ask(**fields: Any) -> ChatRequest:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatRequest.parse(json.dumps(body).encode(), Limits())


class TestEncode:
    def test_a_plain_request_that_needs_nothing_is_sent_as_it_came(self) -> None:
        request = ask()
        sent = DIALECT.encode(request, route())
        assert sent.body is request.body
        assert sent.path == "/chat/completions"
        assert dict(sent.headers) == {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
        }
        assert not sent.usage_forced

    def test_a_stream_is_asked_for_usage(self) -> None:
        sent = DIALECT.encode(ask(stream=True), route())
        assert json.loads(sent.body)["stream_options"] == {"include_usage": True}
        assert sent.headers["accept"] == "text/event-stream"
        assert sent.usage_forced

    def test_a_client_that_asked_itself_changes_nothing(self) -> None:
        request = ask(stream=True, stream_options={"include_usage": True})
        sent = DIALECT.encode(request, route())
        assert sent.body is request.body
        assert not sent.usage_forced

    def test_an_upstream_that_takes_no_stream_options_is_not_sent_any(self) -> None:
        request = ask(stream=True)
        sent = DIALECT.encode(request, route(include_usage=False))
        assert sent.body is request.body
        assert not sent.usage_forced

    @pytest.mark.parametrize(
        ("family", "key"), [("gpt-5", "max_completion_tokens"), ("mistral", "max_tokens"), ("?", "max_tokens")]
    )
    def test_a_cap_goes_by_the_name_that_the_family_knows(self, family: str, key: str) -> None:
        sent = DIALECT.encode(ask(), route("other-name", family), 77)
        assert json.loads(sent.body)[key] == 77
        assert json.loads(sent.body)["model"] == "other-name"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            b'{"error":{"message":"m","type":"t","param":"p","code":"c"}}',
            AnswerError(message="m", type="t", code="c", param="p"),
        ),
        (b'{"error":{"message":"m","type":null,"param":null,"code":429}}', AnswerError("m", "", "429")),
        (b'{"type":"error","error":{"type":"t","message":"m"},"request_id":"r"}', AnswerError("m", "t")),
        (b'{"error":{"code":402,"message":"m","metadata":{}},"user_id":"u"}', AnswerError("m", "", "402")),
        (b'{"error":"text"}', AnswerError("text")),
        (b'{"object":"error","message":"m","type":"t","param":null,"code":"1"}', AnswerError("m", "t", "1")),
        (b'{"detail":"Not Found"}', AnswerError("Not Found")),
        (b'{"detail":[{"loc":["body"]}]}', AnswerError('[{"loc": ["body"]}]')),
        (b'{"id":"x","message":"m"}', AnswerError("m")),
        (b'{"error":{"code":404,"message":"m","status":"NOT_FOUND"}}', AnswerError("m", "NOT_FOUND", "404")),
        (b'[{"error":{"code":400,"message":"m","status":"INVALID"}}]', AnswerError("m", "INVALID", "400")),
        (b"<html>", None),
        (b"", None),
        (b"[]", None),
        (b'{"error":5}', None),
        (b'{"choices":[]}', None),
    ],
)
def test_errors_are_read_in_every_providers_shape(body: bytes, error: AnswerError | None) -> None:
    assert DIALECT.read_error(body) == error


def test_the_dialects_are_found_by_their_configured_name() -> None:
    assert isinstance(DIALECTS["openai"], OpenAI)
