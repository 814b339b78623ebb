"""What a prompt carries beside text: images, files, audio and video, with the sizes that bound their tokens.

A size is read from what the client sent; nothing is fetched and nothing is decoded beyond a picture's header.
"""

import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Attachment", "AttachmentKind", "Image", "attachment_of", "image_of", "media_of_data_url"]

AttachmentKind = Literal["file", "audio", "video"]

_DATA_URL = re.compile(r"data:([a-z]+)/[^,]{0,200},", re.IGNORECASE)

# Base64 characters that are decoded to find a picture's size: its header, or, in a JPEG, what may stand before it
# (a camera's preview picture). Multiples of four.
_HEAD_CHARS = 4_096
_JPEG_HEAD_CHARS = 262_144


@dataclass(frozen=True, slots=True)
class Image:
    """A picture. ``bytes`` None: given by URL, so nothing is known of it. Width and height are None where unread."""

    bytes: int | None
    width: int | None = None
    height: int | None = None
    detail: str = "auto"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file, a sound or a film. ``bytes`` None: given by URL or by id."""

    kind: AttachmentKind
    bytes: int | None


_KINDS: dict[str, AttachmentKind] = {"audio": "audio", "video": "video"}


def media_of_data_url(text: str) -> Image | Attachment | None:
    """The picture or attachment that a data URL holds; None where the text is no data URL, or holds plain text."""
    match = _DATA_URL.match(text)
    if not match or match[1].lower() == "text":
        return None
    return image_of(text, "auto") if match[1].lower() == "image" else attachment_of(text, "file")


def image_of(url: str, detail: str) -> Image:
    """The picture at a URL: measured where it is a data URL, unknown where it is any other."""
    match = _DATA_URL.match(url)
    if not match:
        return Image(None, detail=detail)
    size = _decoded_bytes(url, match.end())
    width, height = _dimensions(url, match.end()) or (None, None)
    return Image(size, width, height, detail)


def attachment_of(data: str | None, kind: AttachmentKind) -> Attachment:
    """A file part's content: a data URL (whose type wins over ``kind``), plain base64, a URL or nothing but an id."""
    if not data or data[:8].lower().startswith(("http:", "https:", "gs:", "s3:", "file:")):
        return Attachment(kind, None)
    match = _DATA_URL.match(data)
    if not match:
        return Attachment(kind, _decoded_bytes(data, 0))
    return Attachment(_KINDS.get(match[1].lower(), kind), _decoded_bytes(data, match.end()))


def _decoded_bytes(text: str, start: int) -> int:
    return (len(text) - start) * 3 // 4


def _dimensions(url: str, start: int) -> tuple[int, int] | None:
    head = _decode(url[start : start + _HEAD_CHARS])
    for magic, read in _READERS:
        if head.startswith(magic):
            if read is _jpeg:
                head = _decode(url[start : start + _JPEG_HEAD_CHARS])
            size = read(head)
            return size if size and size[0] > 0 and size[1] > 0 else None
    return None


def _decode(text: str) -> bytes:
    text = text[: len(text) // 4 * 4]
    try:
        return binascii.a2b_base64(text)
    except ValueError:
        return b""


def _png(head: bytes) -> tuple[int, int] | None:
    if len(head) < 24 or head[12:16] != b"IHDR":
        return None
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _gif(head: bytes) -> tuple[int, int] | None:
    if len(head) < 10:
        return None
    return int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")


def _webp(head: bytes) -> tuple[int, int] | None:
    if len(head) < 30 or head[8:12] != b"WEBP":
        return None
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:
            at += 1
        # The frame headers: C0 to CF without the tables' C4, C8 and CC.
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(head[at + 7 : at + 9], "big"), int.from_bytes(head[at + 5 : at + 7], "big")
        else:
            at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None


_READERS: tuple[tuple[bytes, Callable[[bytes], tuple[int, int] | None]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"GIF8", _gif),
    (b"RIFF", _webp),
    (b"\xff\xd8", _jpeg),
)
