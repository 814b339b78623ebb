"""Every recorded chat completion through the decoder: the client's bytes and the usage found, however it was cut."""

import random

import pytest

from proxy.core.catalog import Quirks
from proxy.core.meter import Ending
from proxy.core.usage_report import is_absent
from proxy.dialects.openai import AnswerDecoder
from tests.recordings import Recording, chat_recordings, cuts_of, needs_recordings, seen_by_who_did_not_ask

pytestmark = needs_recordings

STREAMS = [r for r in chat_recordings() if r.kind == "sse"]
BODIES = [r for r in chat_recordings() if r.kind != "sse"]


def name_of(recording: Recording) -> str:
    return recording.id


def replay(pieces: list[bytes], *, asked: bool) -> tuple[bytes, AnswerDecoder]:
    decoder = AnswerDecoder(usage_asked=asked)
    return b"".join([*(decoder.feed(piece) for piece in pieces), decoder.finish()]), decoder


def check(recording: Recording, wanted: bytes, *, asked: bool) -> None:
    usage = None if is_absent(recording.usage) else recording.usage
    for cut, pieces in cuts_of(recording.body, random.Random(recording.id)):
        client, decoder = replay(pieces, asked=asked)
        assert client == wanted, cut
        assert decoder.meter.usage_raw == usage, cut
        assert (decoder.meter.usage(Quirks()) is None) == (usage is None), cut


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_a_stream_whose_client_asked_for_usage(recording: Recording) -> None:
    check(recording, recording.body, asked=True)


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_a_stream_whose_client_did_not_ask(recording: Recording) -> None:
    check(recording, seen_by_who_did_not_ask(recording.body), asked=False)


@pytest.mark.parametrize("recording", BODIES, ids=name_of)
def test_a_json_body(recording: Recording) -> None:
    for asked in (True, False):
        check(recording, recording.body, asked=asked)


def test_there_are_recordings() -> None:
    assert len(STREAMS) > 100
    assert len(BODIES) > 100


@pytest.mark.parametrize("recording", STREAMS, ids=name_of)
def test_a_recorded_stream_is_complete_and_cut_short_it_is_not(recording: Recording) -> None:
    _, whole = replay([recording.body], asked=True)
    assert whole.meter.ending is Ending.COMPLETE
    half = recording.body[: recording.body.find(b'"finish_reason"') if len(recording.body) < 400 else 300]
    if b"[DONE]" not in half and b"finish_reason" not in half:
        _, cut = replay([half], asked=True)
        assert cut.meter.ending is not Ending.COMPLETE


@pytest.mark.parametrize("recording", BODIES, ids=name_of)
def test_a_recorded_error_is_no_answer(recording: Recording) -> None:
    _, decoder = replay([recording.body], asked=True)
    answered = decoder.meter.ending is Ending.COMPLETE
    assert answered == (recording.status < 400 and b'"choices"' in recording.body)
