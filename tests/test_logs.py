"""The logs: canaries that look like credentials or content never come out, whatever way they went in."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from proxy.logs import REDACTED, Redactor, RequestLine, capture_stdlib, configure, log_request, make_logger

ADMIN_TOKEN = "canary-admin-token-0123456789abcdef"
CANARIES = (
    "sk-proj-Canary0123456789abcdefCanary",
    "sk_live_Canary0123456789",
    "whsec_Canary0123456789",
    "fb_A1b2C3d4E5f6_Canary0123456789abcdefghijkl_x9y8z7",
    "Bearer CanaryToken.with-dots_0123456789",
    "bearer\tCanaryToken",
    "https://user:CanaryPassword@example.org/v1",
    "postgresql://farebox:CanaryPass%40word@db:5432/farebox",
    "password=CanaryPassword",
    "{'api_key': 'CanaryPassword'}",
    f"the token {ADMIN_TOKEN} was wrong",
)


class Sink(io.StringIO):
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def sink() -> Sink:
    return Sink()


def clean(text: str) -> bool:
    return "canary" not in text.lower()


@pytest.mark.parametrize("secret", CANARIES)
@pytest.mark.parametrize("plain", [False, True])
def test_a_credential_never_comes_out(sink: Sink, secret: str, plain: bool) -> None:
    log = make_logger(Redactor([ADMIN_TOKEN]), stream=sink, plain=plain)
    log.info(secret)
    log.warning("nested", deep={"list": [{"x": secret}], secret: 1}, raw=secret.encode(), error=ValueError(secret))
    log.bind(bound=secret).error("bound")
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        log.exception("raised")
    assert sink.getvalue()
    assert clean(sink.getvalue())


@pytest.mark.parametrize("name", ["prompt", "messages", "content", "Authorization", "x-api-key", "cookie"])
def test_a_member_that_carries_content_or_a_credential_is_dropped_by_name(sink: Sink, name: str) -> None:
    log = make_logger(Redactor(), stream=sink)
    log.info("named", **{name: "canary"})
    log.info("nested", headers={name: ["canary"]})
    assert clean(sink.getvalue())


def test_a_traceback_shows_no_local_variables(sink: Sink) -> None:
    log = make_logger(Redactor(), stream=sink)

    def fails(prompt: str) -> None:
        raise ValueError(len(prompt))

    try:
        fails("".join(["can", "ary in a local variable"]))
    except ValueError:
        log.exception("failed")
    (event,) = sink.events()
    assert "ValueError: 26" in event["exception"]
    assert clean(event["exception"])


def test_what_is_no_secret_stays(sink: Sink) -> None:
    text = "GET https://example.org/v1/models?x=1 for fb_A1b2C3d4E5f6 and risk-free ask-me: 12 tokens"
    make_logger(Redactor(), stream=sink).info(text, url="http://127.0.0.1:8080", tokens=12, ok=True, none=None)
    (event,) = sink.events()
    assert event["event"] == text
    assert (event["url"], event["tokens"], event["ok"], event["none"]) == ("http://127.0.0.1:8080", 12, True, None)
    assert event["level"] == "info"
    assert event["timestamp"].endswith("Z")


def test_the_id_part_of_a_key_stays() -> None:
    assert Redactor().text("fb_A1b2C3d4E5f6_secretsecret_crc") == f"fb_A1b2C3d4E5f6_{REDACTED}"


def test_long_text_is_cut(sink: Sink) -> None:
    make_logger(Redactor(), stream=sink).info("x" * 100_000)
    assert len(sink.getvalue()) < 10_000


def test_the_request_line(sink: Sink) -> None:
    line = RequestLine(
        request_id="0198",
        route="chat",
        status=200,
        seconds=1.23456789,
        key_id="A1b2",
        account_id="acc",
        model="gpt-4o",
        charge=1_500,
        ending="complete",
    )
    log_request(make_logger(Redactor(), stream=sink), line)
    (event,) = sink.events()
    assert event["event"] == "request"
    assert (event["charge"], event["seconds"], event["ending"]) == ("0.0015", 1.234568, "complete")
    assert "first_byte_seconds" not in event


@pytest.fixture
def stdlib_name() -> Iterator[str]:
    name = "tests.captured"
    yield name
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [], True


def test_the_standard_library_s_loggers_are_redacted_too(sink: Sink, stdlib_name: str) -> None:
    capture_stdlib(make_logger(Redactor(), stream=sink), names=[stdlib_name])
    logger = logging.getLogger(stdlib_name)
    logger.debug("too quiet")
    logger.error("connecting to %s", "postgres://u:CanaryPass@h/db")
    (event,) = sink.events()
    assert event["logger"] == stdlib_name
    assert event["level"] == "error"
    assert clean(sink.getvalue())


@pytest.fixture
def clean_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, propagate = root.handlers, root.level, root.propagate
    yield
    structlog.reset_defaults()
    root.handlers, root.propagate = handlers, propagate
    root.setLevel(level)


@pytest.mark.usefixtures("clean_logging")
def test_once_configured_every_module_s_logger_is_guarded(sink: Sink) -> None:
    early = structlog.get_logger("farebox.some.module")
    configure(Redactor([ADMIN_TOKEN]), stream=sink, level=logging.WARNING)
    early.info("too quiet")
    early.warning(ADMIN_TOKEN, messages=["canary"])
    structlog.get_logger().error("postgres://u:CanaryPass@h/db")
    logging.getLogger("uvicorn.error").error("Bearer CanaryToken")
    assert len(sink.events()) == 3
    assert clean(sink.getvalue())


def test_an_answer_that_was_broken_off_on_purpose_is_no_second_error(sink: Sink, stdlib_name: str) -> None:
    capture_stdlib(make_logger(Redactor(), stream=sink), names=[stdlib_name])
    uvicorn = logging.getLogger(stdlib_name)
    uvicorn.error("ASGI callable returned without completing response.")
    uvicorn.error("ASGI callable returned without starting response.")
    assert [event["event"] for event in sink.events()] == ["ASGI callable returned without starting response."]
