"""The top-level fields of a chat request that decide its price: their types, their bounds, what they ask for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.core.errors import InvalidRequest

__all__ = [
    "CAP_KEYS",
    "OTHER_CAPS",
    "OUTPUT_CAP_MAX",
    "Options",
    "check_types",
    "read_options",
    "refuse_lookalikes",
    "refuse_unpriceable",
]

CAP_KEYS = ("max_tokens", "max_completion_tokens")
# Names that other servers know the same cap by. They can only raise the bound, never lower it.
OTHER_CAPS = ("max_new_tokens", "max_output_tokens", "n_predict", "num_predict", "max_length")
OUTPUT_CAP_MAX = 2**31
MODEL_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for beside plain text, each of which a provider may charge for in its own way.

    ``web_search``: the field that asks for it, or None. ``hosted_tools``: the types of the tools that run at the
    provider. ``prediction_bytes``: the size of a predicted output, whose rejected tokens are billed as output.
    """

    service_tier: str | None = None
    web_search: str | None = None
    hosted_tools: tuple[str, ...] = ()
    audio_out: bool = False
    store: bool = False
    reasoning_effort: str | None = None
    prediction_bytes: int = 0


def check_types(fields: Mapping[str, Any], *, choices_max: int, setting: str) -> None:
    """Refuse wrong types and values out of bounds; null is as good as absent. Raises InvalidRequest."""
    for name in ("model", "messages"):
        if fields.get(name) is None:
            raise InvalidRequest(f"{name!r} is required.", code="missing_required_parameter", param=name)
    for name, value in fields.items():
        rule = _TYPES.get(name)
        if rule is not None and value is not None and not rule[1](value):
            raise InvalidRequest(f"{name!r} must be {rule[0]}.", code="invalid_type", param=name)
    _check_model(fields["model"])
    _check_range("n", fields.get("n"), choices_max, f" ({setting})")
    for name in CAP_KEYS:
        _check_range(name, fields.get(name), OUTPUT_CAP_MAX, "")


def refuse_lookalikes(fields: Mapping[str, Any]) -> None:
    """Refuse a key that some servers take for one that is judged here, and Python doesn't. Raises InvalidRequest.

    Go's and .NET's parsers ignore case, and protobuf's knows ``maxTokens`` for ``max_tokens``: a ``"Model"`` beside
    ``"model"`` would be served by the one and charged by the other.
    """
    _refuse_lookalikes(fields, _JUDGED)
    options, tools = fields.get("stream_options"), fields.get("tools")
    if isinstance(options, dict):
        _refuse_lookalikes(options, _JUDGED_OPTIONS, "stream_options.")
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict):
            _refuse_lookalikes(tool, _JUDGED_TOOL, "tools[].")


def refuse_unpriceable(fields: Mapping[str, Any]) -> None:
    """Refuse what multiplies the work, or switches the model, behind the price's back. Raises InvalidRequest."""
    for name in _UNPRICEABLE.keys() & fields.keys():
        if not _UNPRICEABLE[name](fields[name]):
            raise InvalidRequest(
                f"{name!r} can raise what the provider charges in a way that no price here covers: leave it out.",
                code="unpriced_option",
                param=name,
            )


def read_options(fields: Mapping[str, Any]) -> Options:
    """What the request asks for beside text. The types have been checked."""
    if _OPTION_FIELDS.isdisjoint(fields):
        return _NO_OPTIONS
    modalities = fields.get("modalities") or []
    return Options(
        service_tier=fields.get("service_tier"),
        web_search=next((name for name, asks in _WEB_SEARCH.items() if asks(fields.get(name))), None),
        hosted_tools=(*_hosted(fields.get("tools") or []), *(name for name in _HOSTED_FIELDS if fields.get(name))),
        audio_out="audio" in modalities or fields.get("audio") is not None,
        store=fields.get("store") is True,
        reasoning_effort=fields.get("reasoning_effort"),
        prediction_bytes=_text_bytes(fields.get("prediction")),
    )


def _refuse_lookalikes(keys: Iterable[str], judged: Mapping[str, str], inside: str = "") -> None:
    for key in keys:
        meant = judged.get(_folded(key))
        if meant is not None and meant != key:
            raise InvalidRequest(
                f"{key[:64]!a} is not {meant!r}, though some servers take it for that: write {meant!r}.",
                code="ambiguous_key",
                param=f"{inside}{meant}",
            )


def _folded(key: str) -> str:
    return key.casefold().replace("_", "").replace("-", "")


def _check_model(model: str) -> None:
    if not 0 < len(model) <= MODEL_CHARS_MAX or not model.isprintable():
        raise InvalidRequest(
            f"'model' must be a name of 1 to {MODEL_CHARS_MAX} printable characters.",
            code="invalid_value",
            param="model",
        )


def _check_range(name: str, value: int | None, largest: int, setting: str) -> None:
    if value is not None and not 1 <= value <= largest:
        raise InvalidRequest(f"{name!r} must be from 1 to {largest}{setting}.", code="invalid_value", param=name)


def _hosted(tools: list[dict[str, Any]]) -> list[str]:
    kinds = [tool.get("type") or ("function" if "function" in tool else "unknown") for tool in tools]
    beside = [key for tool in tools for key in tool if _folded(key) in _HOSTED_MEMBERS]
    return [*(kind for kind in kinds if kind not in ("function", "custom")), *beside]


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of all strings in a value: more than their tokens, whatever the vocabulary."""
    size, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            size += len(item.encode(errors="surrogatepass"))
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
    return size


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _integer(value: Any) -> bool:
    return type(value) is int


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _array(value: Any) -> bool:
    return isinstance(value, list)


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _tools(value: Any) -> bool:
    return _objects(value) and all(isinstance(tool.get("type", ""), str) for tool in value)


def _stream_options(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("include_usage"), bool | None)


def _format(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str | None)


_TYPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a string", _string),
    "messages": ("an array of objects", _array),
    "stream": ("a boolean", _boolean),
    "stream_options": ("an object whose include_usage is a boolean", _stream_options),
    "n": ("an integer", _integer),
    "max_tokens": ("an integer", _integer),
    "max_completion_tokens": ("an integer", _integer),
    "store": ("a boolean", _boolean),
    "service_tier": ("a string", _string),
    "tools": ("an array of objects whose type is a string", _tools),
    "functions": ("an array of objects", _objects),
    "response_format": ("an object whose type is a string", _format),
    "modalities": ("an array of strings", _strings),
    "audio": ("an object", _object),
    "web_search_options": ("an object", _object),
    "reasoning_effort": ("a string", _string),
    "prediction": ("an object", _object),
}


def _present(value: Any) -> bool:
    return value is not None and value is not False


# Each provider's own way to ask for a search that it charges for.
_WEB_SEARCH: Mapping[str, Callable[[Any], bool]] = {
    "web_search_options": _present,
    "search_parameters": _present,
    "search_context_size": _present,
    "enable_search": _present,
    "web_search": _present,
}


# Fields that put work or text of the provider's own into a call, as its hosted tools do.
_HOSTED_FIELDS = ("plugins", "data_sources", "mcp_servers")


_OPTION_FIELDS = frozenset(
    {"service_tier", "tools", "modalities", "audio", "store", "reasoning_effort", "prediction"}
    | _WEB_SEARCH.keys()
    | set(_HOSTED_FIELDS)
)
_NO_OPTIONS = Options()


def _one(value: Any) -> bool:
    return value is None or (type(value) is int and value == 1)


def _off(value: Any) -> bool:
    return value is None or value is False


def _empty(value: Any) -> bool:
    return value is None or value == []


def _standard(value: Any) -> bool:
    return value in (None, "standard")


def _text_or_audio(value: Any) -> bool:
    return value is None or all(item in ("text", "audio") for item in value)


_UNPRICEABLE: Mapping[str, Callable[[Any], bool]] = {
    "best_of": _one,  # several answers are made, one is returned
    "num_beams": _one,
    "num_return_sequences": _one,
    "use_beam_search": _off,
    "models": _empty,  # a list of other models to fall back to
    "fallbacks": _empty,
    "chat_template": _off,  # a program that writes the prompt
    "preset": _off,  # a stored choice of model and options
    "speed": _standard,  # a dearer lane
    "deferred": _off,  # the answer would be fetched later, past the meter
    "background": _off,
    "modalities": _text_or_audio,  # pictures have their own price
}


def _by_folded(*names: str) -> Mapping[str, str]:
    return {_folded(name): name for name in names}


_JUDGED = _by_folded(*_TYPES, *OTHER_CAPS, *_WEB_SEARCH, *_HOSTED_FIELDS, *_UNPRICEABLE, "usage")
_JUDGED_OPTIONS = _by_folded("include_usage")
_JUDGED_TOOL = _by_folded("type", "function", "custom")
# A hosted tool's own member, which may stand beside a function in one object.
_HOSTED_MEMBERS = _by_folded(
    "google_search", "google_search_retrieval", "url_context", "code_execution", "web_search", "retrieval", "mcp"
)
