"""API keys: their format, and the keyed hash under which the ledger stores them.

    fb_<id: 12>_<secret: 43>_<crc: 6>        every part in base62 (0-9 A-Z a-z)

The id is public (it finds the row and is shown in lists), the secret is 256 random bits, and the crc is the CRC-32 of
everything before it, so that a mistyped or cut key is refused without a look-up. What is stored is HMAC-SHA-256 of the
whole key under a *pepper* that is never in the database: someone who reads the table can neither use nor guess a key.
A slow hash would add nothing, since 256 random bits can't be searched, and would cost its time on every request.

Pure: the caller brings the random bytes.
"""

import hmac
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "KEY_CHARS",
    "KEY_RANDOM_BYTES",
    "PEPPER_BYTES_MIN",
    "NewKey",
    "ParsedKey",
    "PepperError",
    "Peppers",
    "hmac_of",
    "new_key",
    "parse_key",
    "without_keys",
]

# 32 bytes for the secret, 16 for the id: reducing 128 bits to 62**12 values leaves a bias far below notice.
KEY_RANDOM_BYTES = 48

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARS = 12
_SECRET_CHARS = 43
_CRC_CHARS = 6
KEY_CHARS = 3 + _ID_CHARS + 1 + _SECRET_CHARS + 1 + _CRC_CHARS

_KEY = re.compile(r"fb_([0-9A-Za-z]{12})_([0-9A-Za-z]{43})_([0-9A-Za-z]{6})\Z", re.ASCII)

PEPPER_BYTES_MIN = 16

# A pepper may hold commas and colons: only a comma that a version follows parts two of them.
# In the wrong place it may be cut or lengthened, too.
_IN_TEXT = re.compile(r"fb_([0-9A-Za-z]{12})_[0-9A-Za-z_]{16,}", re.ASCII)
_VERSIONED = re.compile(r"\s*[0-9]+\s*:", re.ASCII)
_NEXT_VERSION = re.compile(r",(?=\s*[0-9]+\s*:)", re.ASCII)
_PEPPER_VERSION_MAX = 32_767


class NewKey(NamedTuple):
    """A fresh key. ``text`` is shown to its owner once; only ``id`` and the HMAC of ``text`` are kept."""

    id: str
    secret: str
    text: str


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key, not yet known to be anyone's."""

    id: str
    text: str

    def __repr__(self) -> str:
        # A key must not reach a log through a traceback or a debug line.
        return f"ParsedKey(id={self.id!r})"


class PepperError(ValueError):
    """The text of the pepper setting can't be used; the message says what was expected and never repeats the pepper."""


@dataclass(frozen=True, slots=True)
class Peppers:
    """Peppers by version. New keys are hashed under ``current``; a stored key names the version it was hashed under."""

    by_version: Mapping[int, bytes]
    current: int

    def __post_init__(self) -> None:
        if self.current not in self.by_version:
            raise PepperError(f"the current pepper version {self.current} is not among the peppers")

    def __repr__(self) -> str:
        return f"Peppers(versions={sorted(self.by_version)}, current={self.current})"

    @classmethod
    def parse(cls, text: str) -> "Peppers":
        """Peppers from settings text: ``TEXT`` is version 1; of ``1:TEXT,2:TEXT`` the highest version is current.

        Each TEXT is at least ``PEPPER_BYTES_MIN`` bytes. Raises PepperError.
        """
        if not _VERSIONED.match(text):
            return cls(MappingProxyType({1: _pepper(1, text)}), 1)
        by_version: dict[int, bytes] = {}
        for part in _NEXT_VERSION.split(text):
            version_text, _, pepper_text = part.partition(":")
            version = int(version_text[:12])
            if not 1 <= version <= _PEPPER_VERSION_MAX:
                raise PepperError(f"a key pepper's version is from 1 to {_PEPPER_VERSION_MAX}, not {version}")
            if version in by_version:
                raise PepperError(f"the key pepper's version {version} is given twice")
            by_version[version] = _pepper(version, pepper_text)
        return cls(MappingProxyType(by_version), max(by_version))


def new_key(random: bytes) -> NewKey:
    """A key made from ``KEY_RANDOM_BYTES`` bytes of a cryptographic source; equal bytes give the equal key."""
    if len(random) != KEY_RANDOM_BYTES:
        raise ValueError(f"a key is made from {KEY_RANDOM_BYTES} random bytes, not {len(random)}")
    secret = _base62(int.from_bytes(random[:32]), _SECRET_CHARS)
    key_id = _base62(int.from_bytes(random[32:]) % 62**_ID_CHARS, _ID_CHARS)
    checked = f"fb_{key_id}_{secret}"
    return NewKey(key_id, secret, f"{checked}_{_crc(checked)}")


def parse_key(text: str) -> ParsedKey | None:
    """The key in ``text``, or None where it can't be a key of ours: another shape, or a wrong crc."""
    match = _KEY.match(text)
    if match is None:
        return None
    checked, _, crc = text.rpartition("_")
    return ParsedKey(match[1], text) if crc == _crc(checked) else None


def hmac_of(pepper: bytes, key_text: str) -> bytes:
    """The 32 bytes stored for a key. The whole key goes in, so a secret is bound to its id."""
    return hmac.digest(pepper, key_text.encode(), "sha256")


def _crc(checked: str) -> str:
    return _base62(zlib.crc32(checked.encode()), _CRC_CHARS)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    if number:
        raise ValueError(f"the number needs more than {width} base62 digits")
    return "".join(reversed(digits))


def _pepper(version: int, text: str) -> bytes:
    pepper = text.strip().encode()
    if len(pepper) < PEPPER_BYTES_MIN:
        raise PepperError(
            f"the key pepper of version {version} has {len(pepper)} bytes: expected at least {PEPPER_BYTES_MIN} random "
            "ones, such as `openssl rand -hex 32` prints, or several as 1:TEXT,2:TEXT"
        )
    return pepper


def without_keys(text: str) -> str:
    """The text with every key's secret taken out: for errors that repeat what a client put in the wrong place."""
    return _IN_TEXT.sub(r"fb_\1_[redacted]", text)
