"""A chat completion request: read once, judged, and rewritten only where it must be.

Every byte that isn't touched stays as the client sent it: number text, unknown fields, key order, blanks, escapes. What
parsers may read in two ways (duplicate keys, ``"Model"``, NaN, ``"n": "3"``) is refused, since the reading that we
price and the one that the provider serves could differ.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from proxy.core.catalog import PricedOptions
from proxy.core.chat_fields import (
    CAP_KEYS,
    OTHER_CAPS,
    Options,
    check_types,
    read_options,
    refuse_lookalikes,
    refuse_unpriceable,
)
from proxy.core.errors import InvalidRequest, TooLarge
from proxy.core.media import Attachment, Image
from proxy.core.prompt import Prompt, read_prompt
from proxy.core.spans import Edit, Member, TooManyMembers, apply_edits, read_object, skip_blanks, too_much

__all__ = ["BodyLimits", "ChatRequest"]

# Top-level members that never become part of the prompt, or that are counted by their own rule. Any other text is
# counted as if it were prompt.
_NO_PROMPT = frozenset(
    {
        "audio", "frequency_penalty", "function_call", "include_reasoning", "logit_bias", "logprobs",
        "max_completion_tokens", "max_tokens", "messages", "metadata", "modalities", "model", "n",
        "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_retention",
        "provider", "reasoning", "reasoning_effort", "safety_identifier", "seed", "service_tier", "stop", "store",
        "stream", "stream_options", "temperature", "thinking", "tool_choice", "top_k", "top_logprobs", "top_p",
        "usage", "user", "verbosity",
    }
)  # fmt: skip

# The members of the body itself are walked in Python, some microseconds each; the API names about forty.
_MEMBERS_MAX = 1_000

_TOUCHED = ("model", "stream_options", *CAP_KEYS)


class BodyLimits(Protocol):
    """How much one request may ask; ``setting(limit)`` says where a limit is set, as a refusal names it."""

    @property
    def body_bytes_max(self) -> int: ...
    @property
    def messages_max(self) -> int: ...
    @property
    def json_depth_max(self) -> int: ...
    @property
    def json_values_max(self) -> int: ...
    @property
    def choices_max(self) -> int: ...
    def setting(self, limit: str) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a request asks for, and its body.

    ``choices``: n. ``output_cap``: the larger of the client's caps, per choice, or None. ``texts``: everything to count
    for the input bound. ``text_bytes``: the body's size without the media in it. ``options``: what may need a price.
    """

    body: bytes
    model: str
    stream: bool
    choices: int
    output_cap: int | None
    cap_keys: tuple[str, ...]
    usage_asked: bool
    messages_count: int
    calls_count: int
    tools: bool
    response_format: str | None
    texts: tuple[str, ...]
    text_bytes: int
    images: tuple[Image, ...]
    attachments: tuple[Attachment, ...]
    cache_control: bool
    encrypted_reasoning: bool
    options: Options
    _spans: Mapping[str, tuple[int, int]]
    _insert_at: int
    _caps: Mapping[str, int]

    @classmethod
    def parse(cls, body: bytes, limits: BodyLimits) -> "ChatRequest":
        """Read and judge a body. Raises InvalidRequest or TooLarge, and nothing else."""
        text = _decode(body, limits)
        members, twice = _read(text)
        fields = {member.key: member.value for member in members}
        _refuse_duplicates(member.key for member in members)
        refuse_lookalikes(fields)
        check_types(fields, choices_max=limits.choices_max, setting=limits.setting("choices_max"))
        _check_messages(fields["messages"], limits)
        _check_stream_options(text, members)
        if twice is not None:
            raise _given_twice(twice)
        refuse_unpriceable(fields)
        return _request(body, text, members, fields, read_prompt(fields["messages"]))

    @property
    def audio_in(self) -> bool:
        """Whether the prompt may hold audio tokens."""
        return any(attachment.kind != "file" for attachment in self.attachments)

    @property
    def audio_out(self) -> bool:
        """Whether the answer may hold audio tokens."""
        return self.options.audio_out

    @property
    def priced_options(self) -> PricedOptions:
        """What may need a price of its own, for ``Route.variant_for``."""
        return PricedOptions(
            service_tier=self.options.service_tier,
            web_search=self.options.web_search is not None,
            hosted_tools=bool(self.options.hosted_tools),
            audio=self.audio_in or self.audio_out,
            store=self.options.store,
        )

    def rewritten(
        self,
        model: str | None = None,
        include_usage: bool = False,
        output_cap: int | None = None,
        *,
        cap_key: str = "max_completion_tokens",
    ) -> bytes:
        """The body with the model replaced, ``stream_options.include_usage`` forced (streams only) and the cap put in.

        A cap replaces those of the client's caps that are above it, and is inserted as ``cap_key`` where the client
        gave none. Everything else keeps its bytes; where nothing changes, this is the very body that came.
        """
        edits: list[Edit] = []
        inserts: list[str] = []
        if model is not None and model != self.model:
            edits.append(Edit(*self._spans["model"], json.dumps(model).encode()))
        if include_usage and self.stream:
            self._force_usage(edits, inserts)
        if output_cap is not None:
            self._cap(output_cap, cap_key, edits, inserts)
        if inserts:
            text = "".join(f",{member}" for member in inserts)
            edits.append(Edit(self._insert_at, self._insert_at, text.encode()))
        return apply_edits(self.body, edits)

    def _force_usage(self, edits: list[Edit], inserts: list[str]) -> None:
        span = self._spans.get("stream_options")
        if span is None:
            inserts.append('"stream_options":{"include_usage":true}')
            return
        value = self.body[span[0] : span[1]]
        merged = _with_usage(value.decode())
        if merged.encode() != value:
            edits.append(Edit(*span, merged.encode()))

    def _cap(self, cap: int, cap_key: str, edits: list[Edit], inserts: list[str]) -> None:
        number = str(cap)
        if not self.cap_keys:
            if cap_key in self._spans:  # it is there, as null
                edits.append(Edit(*self._spans[cap_key], number.encode()))
            else:
                inserts.append(f"{json.dumps(cap_key)}:{number}")
            return
        edits.extend(Edit(*self._spans[key], number.encode()) for key, value in self._caps.items() if value > cap)


def _decode(body: bytes, limits: BodyLimits) -> str:
    if len(body) > limits.body_bytes_max:
        raise TooLarge(
            f"The request body is larger than {limits.body_bytes_max} bytes ({limits.setting('body_bytes_max')}).",
            code="request_too_large",
        )
    # UTF-16 and UTF-32 put a NUL beside the ASCII byte that any JSON begins with; all three have byte order marks.
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) or b"\x00" in body[:4]:
        raise _malformed("it must be UTF-8 without a byte order mark")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from None
    excess = too_much(body, depth_max=limits.json_depth_max, values_max=limits.json_values_max)
    if excess == "values":
        raise InvalidRequest(
            f"The request body holds more than {limits.json_values_max} values ({limits.setting('json_values_max')}).",
            code="json_too_many_values",
        )
    if excess == "depth":
        raise InvalidRequest(
            f"The request body nests deeper than {limits.json_depth_max} levels ({limits.setting('json_depth_max')}).",
            code="json_too_deep",
        )
    return text


class _Reader:
    """Decodes the JSON of one request, and remembers a key that an object in it names twice."""

    def __init__(self) -> None:
        self.twice: str | None = None
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=_refuse_constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            self.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return value


class _ConstantError(ValueError):
    """NaN, Infinity or -Infinity stands where JSON has no such thing."""


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(f"{name} is not a JSON number")


def _read(text: str) -> tuple[list[Member], str | None]:
    """The members, and a key that some object inside them names twice."""
    reader = _Reader()
    try:
        members, end = read_object(text, 0, reader.decoder, members_max=_MEMBERS_MAX)
    except json.JSONDecodeError as error:
        if error.msg == "Expecting an object":
            raise _not_an_object(text, error.pos) from None
        raise _malformed(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except _ConstantError as error:
        raise _malformed(str(error)) from None
    except TooManyMembers:
        raise InvalidRequest(
            f"The request body has more than {_MEMBERS_MAX} members at its top level.", code="json_too_many_values"
        ) from None
    except ValueError:
        raise _malformed("a number has too many digits") from None
    except RecursionError:
        raise _malformed("it nests too deep") from None
    rest = skip_blanks(text, end + 1)
    if rest != len(text):
        raise _malformed(f"there is more after the object's end, from character {rest} on")
    return members, reader.twice


def _not_an_object(text: str, at: int) -> InvalidRequest:
    if at == len(text):
        return _malformed("it is empty")
    try:
        json.JSONDecoder(parse_constant=_refuse_constant).decode(text)
    except (ValueError, RecursionError):
        return _malformed(f"Expecting an object at character {at}")
    return InvalidRequest("The request body must be a JSON object.", code="invalid_json")


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The request body is not valid JSON: {why}.", code="invalid_json")


def _refuse_duplicates(keys: Iterable[str], inside: str = "") -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise _given_twice(f"{inside}{key}")
        seen.add(key)


def _given_twice(key: str) -> InvalidRequest:
    name = json.dumps(key)[1:-1][:64]
    return InvalidRequest(
        f"{name!r} is given more than once. Parsers differ on which one counts, so it must be given once.",
        code="duplicate_key",
        param=name,
    )


def _check_messages(messages: Sequence[Any], limits: BodyLimits) -> None:
    if not messages:
        raise InvalidRequest("'messages' must not be empty.", code="invalid_value", param="messages")
    if len(messages) > limits.messages_max:
        raise InvalidRequest(
            f"'messages' holds {len(messages)} messages, above the limit of {limits.messages_max} "
            f"({limits.setting('messages_max')}).",
            code="too_many_messages",
            param="messages",
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"'messages[{i}]' must be an object.", code="invalid_type", param=f"messages[{i}]")


def _check_stream_options(text: str, members: Sequence[Member]) -> None:
    for member in members:
        if member.key == "stream_options" and member.value is not None:
            inner, _ = read_object(text, member.value_start, json.JSONDecoder())
            _refuse_duplicates((m.key for m in inner), "stream_options.")


def _with_usage(options: str) -> str:
    if options == "null":
        return '{"include_usage":true}'
    members, close = read_object(options, 0, json.JSONDecoder())
    for member in members:
        if member.key == "include_usage":
            if member.value is True:
                return options
            return f"{options[: member.value_start]}true{options[member.value_end :]}"
    at = members[-1].value_end if members else close
    comma = "," if members else ""
    return f'{options[:at]}{comma}"include_usage":true{options[at:]}'


def _request(body: bytes, text: str, members: list[Member], fields: Mapping[str, Any], prompt: Prompt) -> ChatRequest:
    caps = {key: fields[key] for key in CAP_KEYS if fields.get(key) is not None}
    others = [fields[key] for key in OTHER_CAPS if fields.get(key) is not None]
    stated = [*caps.values(), *others]
    capped = bool(caps) and all(type(cap) is int and cap > 0 for cap in stated)
    media = sum(i.bytes or 0 for i in prompt.images) + sum(a.bytes or 0 for a in prompt.attachments)
    byte_at = _byte_offsets(text, body)
    return ChatRequest(
        body=body,
        model=fields["model"],
        stream=fields.get("stream") is True,
        choices=fields.get("n") or 1,
        output_cap=max(stated) if capped else None,
        cap_keys=tuple(caps),
        usage_asked=_usage_asked(fields),
        messages_count=prompt.messages,
        calls_count=prompt.calls,
        tools=bool(fields.get("tools") or fields.get("functions")),
        response_format=(fields.get("response_format") or {}).get("type"),
        texts=(*prompt.texts, *_other_texts(text, members)),
        text_bytes=max(0, len(body) - media * 4 // 3),
        images=tuple(prompt.images),
        attachments=tuple(prompt.attachments),
        cache_control=prompt.cache_control,
        encrypted_reasoning=prompt.encrypted,
        options=read_options(fields),
        _spans=MappingProxyType(
            {m.key: (byte_at(m.value_start), byte_at(m.value_end)) for m in members if m.key in _TOUCHED}
        ),
        _insert_at=byte_at(members[-1].value_end),
        _caps=MappingProxyType(caps),
    )


def _usage_asked(fields: Mapping[str, Any]) -> bool:
    # OpenRouter's own way of asking is {"usage": {"include": true}}.
    options, usage = fields.get("stream_options") or {}, fields.get("usage")
    return options.get("include_usage") is True or (isinstance(usage, dict) and usage.get("include") is True)


def _other_texts(text: str, members: Sequence[Member]) -> list[str]:
    """The JSON text of tools, of a schema and of fields that nobody here knows."""
    return [
        text[m.value_start : m.value_end]
        for m in members
        if m.key not in _NO_PROMPT and isinstance(m.value, str | list | dict) and m.value
    ]


def _byte_offsets(text: str, body: bytes) -> Callable[[int], int]:
    if len(text) == len(body):
        return int
    return lambda at: len(text[:at].encode())
