"""Recorded exchanges with real providers, where the folder that holds them exists, and what a client should see of one.

The folder is no part of this repository: FAREBOX_RECORDINGS names it, else ``../shared/recordings`` beside the clone is
looked for. Tests that need it skip with the reason; the fixtures of our own (``tests/answers.py``) prove the same.
"""

import gzip
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Recording", "chat_recordings", "cuts_of", "needs_recordings", "seen_by_who_did_not_ask"]

FOLDER = Path(os.environ.get("FAREBOX_RECORDINGS") or Path(__file__).parents[2] / "shared" / "recordings")
FILES = ("exchanges.jsonl.gz", "stated_costs.jsonl.gz")

needs_recordings = pytest.mark.skipif(
    not all((FOLDER / name).is_file() for name in FILES),
    reason=f"no recorded exchanges in {FOLDER} (set FAREBOX_RECORDINGS to the folder that holds {FILES[0]})",
)


@dataclass(frozen=True)
class Recording:
    """One exchange. ``usage``: the last report, as the provider sent it. ``kind``: json, sse or other."""

    id: str
    provider: str
    model: str | None
    request: bytes
    status: int
    body: bytes
    kind: str
    usage: dict[str, Any] | None
    tags: frozenset[str]
    stated_cost: bool

    @property
    def elided(self) -> bool:
        """Whether the recorder cut media out of the request, so that its size is not what was sent."""
        return b"ELIDED+" in self.request


@lru_cache(maxsize=1)
def chat_recordings() -> tuple[Recording, ...]:
    """Every recorded chat completion; nothing where the folder is missing."""
    return tuple(_read()) if all((FOLDER / name).is_file() for name in FILES) else ()


def _read() -> Iterable[Recording]:
    for name in FILES:
        with gzip.open(FOLDER / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["endpoint"] == "chat_completions" and row["response"]["body"] is not None:
                    yield Recording(
                        id=row["id"],
                        provider=row["provider"],
                        model=row["model"],
                        request=(row["request"]["body"] or "").encode(),
                        status=row["response"]["status"],
                        body=row["response"]["body"].encode(),
                        kind=row["body_kind"],
                        usage=row["usage_raw"],
                        tags=frozenset(row["tags"]),
                        stated_cost=name == FILES[1],
                    )


def cuts_of(body: bytes, rng: Any, *, bytewise_max: int = 40_000) -> Iterable[tuple[str, list[bytes]]]:
    """The same bytes in several cuts: whole, per event, at random places and, where it isn't too long, per byte."""
    yield "whole", [body]
    yield "per event", _event_blocks(body)
    for i in range(2):
        places = sorted(rng.randrange(len(body) + 1) for _ in range(rng.randrange(1, 40)))
        yield f"random {i}", [body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)]
    if len(body) <= bytewise_max:
        yield "per byte", [body[i : i + 1] for i in range(len(body))]


def seen_by_who_did_not_ask(body: bytes) -> bytes:
    """What a client that hadn't asked for usage gets of an event stream, found the slow way.

    Each event is parsed whole; one that is usage and nothing else goes, and a null usage is cut where the rest of the
    event then still says the same.
    """
    return b"".join(_block_without_usage(block) for block in _event_blocks(body))


_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
_NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null|"usage"\s*:\s*null\s*,')
_CONTENT_WITHOUT_CHOICES = ("prompt_filter_results", "moderation", "error")


def _event_blocks(body: bytes) -> list[bytes]:
    """Lines up to and with each blank line; comments outside of an event for themselves."""
    blocks: list[bytes] = []
    block = b""
    for line in _LINE.findall(body):
        block += line
        if not line.strip(b"\r\n") or (block == line and line.startswith(b":")):
            blocks.append(block)
            block = b""
    return [*blocks, block] if block else blocks


def _block_without_usage(block: bytes) -> bytes:
    chunk = _chunk_of(block)
    if not isinstance(chunk, dict) or "usage" not in chunk:
        return block
    if chunk["usage"] is None:
        wanted = [(key, value) for key, value in chunk.items() if key != "usage"]
        for match in _NULL_USAGE.finditer(block):
            cut = block[: match.start()] + block[match.end() :]
            left = _chunk_of(cut)
            if isinstance(left, dict) and list(left.items()) == wanted:
                return cut
        raise AssertionError("a null usage that can't be cut")
    alone = chunk.get("choices") == [] and isinstance(chunk["usage"], dict)
    return b"" if alone and not any(chunk.get(name) for name in _CONTENT_WITHOUT_CHOICES) else block


def _chunk_of(block: bytes) -> Any:
    values = [
        line.rstrip(b"\r\n")[5:].removeprefix(b" ")
        for line in _LINE.findall(block.removeprefix(b"\xef\xbb\xbf"))
        if line.startswith(b"data:")
    ]
    try:
        return json.loads(b"\n".join(values))
    except ValueError:
        return None
