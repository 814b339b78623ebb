"""Logs: one JSON object a line, and never a prompt, a completion or a credential in it.

Two guards. Members that could carry content are dropped by their name, and every text is searched for credentials on
its last step out, tracebacks included. A process calls ``configure`` once, before anything is logged; until then
nothing guards the loggers that modules get from structlog.
"""

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from proxy.core.money import format_credits

__all__ = ["REDACTED", "Redactor", "RequestLine", "capture_stdlib", "configure", "log_request", "make_logger"]

REDACTED = "[redacted]"

# Ordered: what a rule leaves behind must not feed a later one.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"://[^/\s@\"']*@"), f"://{REDACTED}@"),
    (re.compile(r"\b(bearer|basic)\s+[^\s\"',;]+", re.I), rf"\1 {REDACTED}"),
    (re.compile(r"\b(sk|pk|rk|whsec)([-_])[A-Za-z0-9_-]{6,}"), rf"\1\2{REDACTED}"),
    # The id part stays: it tells which key it was and opens nothing.
    (re.compile(r"\bfb_([0-9A-Za-z]{1,16})_[0-9A-Za-z_-]+"), rf"fb_\1_{REDACTED}"),
    (re.compile(r"\bfb_[0-9A-Za-z_-]{17,}"), f"fb_{REDACTED}"),
    (
        re.compile(r"\b(password|passwd|secret|pepper|token|api[_-]?key)([\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+", re.I),
        rf"\1\2{REDACTED}",
    ),
)

_CREDENTIAL_MEMBERS = frozenset(
    {
        "authorization",
        "x-api-key",
        "api-key",
        "api_key",
        "cookie",
        "set-cookie",
        "password",
        "secret",
        "pepper",
        "token",
    }
)
_CONTENT_MEMBERS = frozenset(
    {"prompt", "messages", "content", "completion", "body", "text", "chunk", "delta", "arguments", "tools"}
)
_DEPTH_MAX = 8
_TEXT_MAX = 8_192


class Redactor:
    """A structlog processor. ``secrets`` are exact values (admin token, pepper...) that no pattern would know."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: set[str] = set()
        for secret in secrets:
            self.learn(secret)

    def learn(self, secret: str) -> None:
        """Redact this exact value from now on. Shorter than 6 characters is ignored: it would garble the log."""
        if len(secret) >= 6:
            self._secrets.add(secret)

    def text(self, text: str) -> str:
        """The text without credentials, cut at 8,192 characters."""
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        # Cut before the patterns run, so that no text can make them slow.
        if len(text) > _TEXT_MAX:
            text = f"{text[:_TEXT_MAX]}[cut]"
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    def value(self, value: object, depth: int = 0) -> object:
        """The value with every text in it redacted; content members are dropped, unknown objects become their text."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self.text(value)
        if depth >= _DEPTH_MAX:
            return "[deep]"
        if isinstance(value, Mapping):
            return {self.text(str(name)): self._member(str(name), item, depth + 1) for name, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, bytes | bytearray | memoryview):
            return f"[{len(value)} bytes]"
        return self.text(str(value))

    def _member(self, name: str, value: object, depth: int) -> object:
        if name.lower() in _CREDENTIAL_MEMBERS:
            return REDACTED
        if name.lower() in _CONTENT_MEMBERS:
            return "[content]"
        return self.value(value, depth)

    def __call__(self, _logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
        return {name: self._member(name, value, 0) for name, value in event_dict.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """What is logged of one request. ``charge`` is microcredits; times are seconds; None is left out."""

    request_id: str
    route: str
    status: int
    seconds: float
    key_id: str | None = None
    account_id: str | None = None
    model: str | None = None
    stream: bool | None = None
    charge: int | None = None
    usage_source: str | None = None
    ending: str | None = None
    code: str | None = None
    """The error's code, where the answer is a refusal."""
    first_byte_seconds: float | None = None
    upstream_seconds: float | None = None
    """From the request's going upstream to the upstream's first byte."""


_MEMBERS = tuple(field.name for field in fields(RequestLine))


def log_request(log: FilteringBoundLogger, line: RequestLine) -> None:
    """Write the one line that each request gets when it is over."""
    # Not asdict, which copies every value, for a line that each request gets.
    members: dict[str, Any] = {name: value for name in _MEMBERS if (value := getattr(line, name)) is not None}
    if line.charge is not None:
        members["charge"] = format_credits(line.charge)
    for name in ("seconds", "first_byte_seconds", "upstream_seconds"):
        if name in members:
            members[name] = round(members[name], 6)
    log.info("request", **members)


def make_logger(
    redactor: Redactor,
    *,
    stream: TextIO | None = None,
    level: int = logging.INFO,
    plain: bool = False,
    tags: Mapping[str, object] | None = None,
) -> FilteringBoundLogger:
    """A logger that writes to ``stream`` (standard error by default). ``plain`` writes aligned text for a person.

    ``tags`` stand in every line: which of several processes it is from.
    """
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream or sys.stderr),
        processors=[*_steps(redactor, tags), _renderer(plain=plain)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger


def configure(
    redactor: Redactor,
    *,
    stream: TextIO | None = None,
    level: int = logging.INFO,
    plain: bool = False,
    tags: Mapping[str, object] | None = None,
) -> FilteringBoundLogger:
    """Make every logger of this process, structlog's and the standard library's, write as ``make_logger``'s does."""
    structlog.configure(
        processors=[*_steps(redactor, tags), _renderer(plain=plain)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=structlog.WriteLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    log = make_logger(redactor, stream=stream, level=level, plain=plain, tags=tags)
    capture_stdlib(log, level=level)
    return log


def capture_stdlib(log: FilteringBoundLogger, *, names: Iterable[str] = ("",), level: int = logging.INFO) -> None:
    """Send the standard library's loggers (uvicorn's, asyncpg's...) through ``log``, in place of their own handlers."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers = [_Forward(log)]
        logger.setLevel(level)
        logger.propagate = False


# How uvicorn calls it when the relay breaks an answer off on purpose; the relay has logged why.
_MEANT = frozenset({"ASGI callable returned without completing response."})


class _Forward(logging.Handler):
    """A standard library handler that hands records on."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg in _MEANT:
            return
        try:
            self._log.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:  # noqa: BLE001 - as every logging.Handler does: a log line must not end a request
            self.handleError(record)


def _renderer(*, plain: bool) -> Any:
    return structlog.dev.ConsoleRenderer(colors=False) if plain else structlog.processors.JSONRenderer()


def _steps(redactor: Redactor, tags: Mapping[str, object] | None = None) -> list[Any]:
    def tag(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
        return {**event_dict, **(tags or {})}

    return [
        *([tag] if tags else []),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        # A plain traceback: a rendering with local variables would show prompts and keys.
        structlog.processors.format_exc_info,
        redactor,
    ]
