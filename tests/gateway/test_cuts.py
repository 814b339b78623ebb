"""Cuts: wherever one is found, in whatever script, the pieces have the tokens of the whole."""

import random
from collections.abc import Iterator

import pytest
import tiktoken

from proxy.gateway.cuts import last_cut
from proxy.gateway.tokens import build_encoding

# Letters, digits, blanks, marks and all that patterns treat apart, to be mixed at random.
ALPHABETS = (
    *("abcXYZ", "0123456789", " ", "\n\r\t ", "'’`\"", "sStTdDmMreREvVlL", "!?.,;:-/\\()[]{}", "_*#@&^%$+=<>|~"),
    *("äöüßéñ", "дежзИЙ", "你好世界的是", "。，！？「」、（）", "ひらがなカタカナー", "한국어", "กขค็่้ั", "हिन्दीि्"),
    *("عربيةًٌ", "עברית", "e\u0301\u0300\u20dd", "🙂👍🏽\u200d❤️", "\u00a0\u2003\u3000\u200b\u2028\u0085\x1c"),
    *("ǅǈʰªº²½Ⅷ٣੩", "\x00\x07", "𝒜𝟙", "\ud800", "«»¡¿·°±"),
)


@pytest.fixture(scope="module", params=["o200k_base", "cl100k_base"])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return build_encoding(request.param)


def cuts(text: str) -> Iterator[int]:
    """Every place that is ever named, from the last on."""
    at = last_cut(text, len(text))
    while at:
        yield at
        at = last_cut(text, at - 1)


@pytest.mark.parametrize("seed", range(8))
def test_the_pieces_have_the_tokens_of_the_whole(encoding: tiktoken.Encoding, seed: int) -> None:
    rng = random.Random(seed)
    found = 0
    for _ in range(400):
        mixed = "".join(rng.sample(ALPHABETS, rng.randint(1, 5)))
        text = "".join(rng.choice(mixed) for _ in range(rng.randint(2, 60)))
        whole = len(encoding.encode_ordinary(text))
        for at in cuts(text):
            pieces = [len(encoding.encode_ordinary(piece)) for piece in (text[:at], text[at:])]
            assert sum(pieces) == whole, f"seed {seed}: {text[:at]!r} | {text[at:]!r}"
            found += 1
    assert found > 400


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("so it goes", 5),
        ("so it goes.", 10),
        ("你好，世界", 2),
        ("area51", 4),
        ("don't", 0),
        ("abc", 0),
        ("123456", 0),
        ("   ", 0),
        ("", 0),
        ("ก็ ดี", 2),
        ("x" * 10_000 + " y", 10_000),
    ],
)
def test_the_last_place(text: str, at: int) -> None:
    assert last_cut(text, len(text)) == at


def test_it_isnt_behind_the_end_that_was_asked_for() -> None:
    assert [last_cut("a b c d", end) for end in range(8)] == [0, 1, 1, 3, 3, 5, 5, 5]
