"""What a prompt is made of: the texts to count, and what costs input tokens beside text.

Every string in the messages is counted, known field or not: what a template puts into the prompt can't be told from
outside, and a string that was left out would be free service.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.core.media import Attachment, AttachmentKind, Image, attachment_of, image_of, media_of_data_url

__all__ = ["Prompt", "read_prompt"]


@dataclass(slots=True)
class Prompt:
    """``calls``: tool calls of earlier turns. ``encrypted``: it carries reasoning that only the provider can read."""

    messages: int = 0
    calls: int = 0
    texts: list[str] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    cache_control: bool = False
    encrypted: bool = False


def read_prompt(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """The prompt that these messages make."""
    prompt = Prompt(messages=len(messages))
    for message in messages:
        for key, value in message.items():
            _reader(_MESSAGE_FIELDS, key)(prompt, value)
            prompt.cache_control |= key == "cache_control"
    return prompt


def _reader(fields: Mapping[str, "_Read"], key: str) -> "_Read":
    # Some servers ignore the case of a key, and an "Image_URL" costs what an "image_url" does.
    return fields.get(key) or fields.get(key.casefold(), _anything)


def _anything(prompt: Prompt, value: Any) -> None:
    """Every string at any depth; keys, too, from the second level on: an unknown object may be printed as it is."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            _text(prompt, item)
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, dict):
            prompt.cache_control |= "cache_control" in item
            prompt.texts.extend(item)
            stack.extend(item.values())


def _text(prompt: Prompt, text: str) -> None:
    media = media_of_data_url(text) if text[:5].lower() == "data:" else None
    if isinstance(media, Image):
        prompt.images.append(media)
    elif media is not None:
        prompt.attachments.append(media)
    elif text:
        prompt.texts.append(text)


def _nothing(prompt: Prompt, value: Any) -> None:
    # A role is part of the four tokens that every message costs, unless it is no role at all.
    if not (isinstance(value, str) and len(value) <= 16):
        _anything(prompt, value)


def _content(prompt: Prompt, value: Any) -> None:
    if isinstance(value, str):
        if value:
            prompt.texts.append(value)
    elif isinstance(value, list):
        for part in value:
            _part(prompt, part)
    else:
        _anything(prompt, value)


def _part(prompt: Prompt, part: Any) -> None:
    if not isinstance(part, dict):
        _anything(prompt, part)
        return
    # The type says what a part is, but some clients leave it out; the member that holds the content tells, too.
    for key, value in part.items():
        if key == "text" and isinstance(value, str):
            prompt.texts.append(value)
        elif key == "cache_control":
            prompt.cache_control = True
        elif key != "type":
            _reader(_PART_FIELDS, key)(prompt, value)


def _image(prompt: Prompt, value: Any) -> None:
    if isinstance(value, str):
        prompt.images.append(image_of(value, "auto"))
    elif isinstance(value, dict) and isinstance(value.get("url"), str):
        detail = value.get("detail")
        prompt.images.append(image_of(value["url"], detail if isinstance(detail, str) else "auto"))
        _anything(prompt, [v for k, v in value.items() if k not in ("url", "detail")])
    else:
        prompt.images.append(Image(None))
        _anything(prompt, value)


def _attachment(kind: AttachmentKind) -> Callable[[Prompt, Any], None]:
    def read(prompt: Prompt, value: Any) -> None:
        content = value
        if isinstance(value, dict):
            content = next((value[k] for k in ("file_data", "data", "url") if isinstance(value.get(k), str)), None)
            _anything(prompt, [v for v in value.values() if v is not content])
        prompt.attachments.append(attachment_of(content if isinstance(content, str) else None, kind))

    return read


def _calls(prompt: Prompt, value: Any) -> None:
    for call in value if isinstance(value, list) else [value]:
        if call is None:
            continue
        prompt.calls += 1
        function = call.get("function", call.get("custom", call)) if isinstance(call, dict) else call
        if isinstance(function, dict):
            # The names of these members are part of the tokens that a call costs; their values are counted.
            for item in function.values():
                _anything(prompt, item)
        else:
            _anything(prompt, function)


def _spoken(prompt: Prompt, value: Any) -> None:
    # An earlier spoken answer, named by its id: the provider puts its sound back into the prompt.
    if value is not None:
        prompt.attachments.append(Attachment("audio", None))


def _images(prompt: Prompt, value: Any) -> None:
    _content(prompt, value)


def _details(prompt: Prompt, value: Any) -> None:
    for detail in value if isinstance(value, list) else [value]:
        if isinstance(detail, dict) and ("data" in detail or "signature" in detail):
            prompt.encrypted = True
    _anything(prompt, value)


_Read = Callable[[Prompt, Any], None]

_MESSAGE_FIELDS: Mapping[str, _Read] = {
    "role": _nothing,
    "content": _content,
    "tool_calls": _calls,
    "function_call": _calls,
    "audio": _spoken,
    "images": _images,
    "reasoning_details": _details,
    "thinking_blocks": _details,
}

_PART_FIELDS: Mapping[str, _Read] = {
    "image_url": _image,
    "input_audio": _attachment("audio"),
    "audio_url": _attachment("audio"),
    "video_url": _attachment("video"),
    "input_video": _attachment("video"),
    "file": _attachment("file"),
    "file_url": _attachment("file"),
    "document_url": _attachment("file"),
}
