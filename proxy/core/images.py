"""What a picture costs in tokens: at most, where its size is unknown; by the family's rule, where it is known."""

import re
from collections.abc import Callable

from proxy.core.media import Image

__all__ = ["ImageRule", "image_rule"]

ImageRule = Callable[[Image], int]


def image_rule(family: str, model: str) -> ImageRule:
    """The rule for a model: by its name where its family has several, else its family's, else the loosest."""
    name = model.lower()
    return next((rule for pattern, rule in _BY_NAME if pattern.search(name)), None) or _BY_FAMILY.get(family, _UNKNOWN)


def _tiles(base: int, per_tile: int) -> ImageRule:
    """OpenAI's tiles: fit into 2,048, then the short side to 768, then 512-pixel tiles; at most eight."""

    def tokens(image: Image) -> int:
        if image.detail == "low":
            return base
        if image.width is None or image.height is None:
            return base + 8 * per_tile
        width, height = _fit(image.width, image.height, longest=2_048)
        scale = min(1.0, 768 / min(width, height))
        return base + per_tile * min(8, _ceil(width * scale, 512) * _ceil(height * scale, 512))

    return tokens


def _patches(factor: float) -> ImageRule:
    """OpenAI's patches: 32-pixel squares, at most 1,536 of them, times a factor of the model."""

    def tokens(image: Image) -> int:
        patches = 1_536
        if image.width is not None and image.height is not None:
            patches = min(patches, _ceil(image.width, 32) * _ceil(image.height, 32))
        return int(patches * factor) + 1

    return tokens


def _area(pixels_per_token: int, longest: int, most: int, least: int = 16) -> ImageRule:
    """By area, after fitting into a square: ``least`` and a token for so many pixels."""

    def tokens(image: Image) -> int:
        if image.width is None or image.height is None:
            return most
        width, height = _fit(image.width, image.height, longest=longest)
        return min(most, int(width * height / pixels_per_token) + least)

    return tokens


def _at_most(most: int) -> ImageRule:
    def tokens(_image: Image) -> int:
        return most

    return tokens


def _fit(width: int, height: int, *, longest: int) -> tuple[float, float]:
    scale = min(1.0, longest / max(width, height))
    return max(1.0, width * scale), max(1.0, height * scale)


def _ceil(pixels: float, square: int) -> int:
    # A thousandth of slack: a side of exactly one tile must not become two by a rounding error.
    return max(1, int(-(-(pixels - 0.001) // square)))


_TILES = _tiles(85, 170)
_MINI_TILES = _tiles(2_833, 5_667)
_UNKNOWN = _at_most(5_000)

_BY_NAME: tuple[tuple[re.Pattern[str], ImageRule], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"gpt-?4o-mini", _MINI_TILES),
        (r"gpt-?4\.1-mini", _patches(1.62)),
        (r"gpt-?4\.1-nano", _patches(2.46)),
        (r"o4-mini", _patches(1.72)),
        (r"gpt-?5(\.\d)?-nano", _patches(1.5)),
        (r"gpt-?5(\.\d)?-mini|gpt-?5\.[4-9]", _patches(1.2)),
        (r"gpt-?4|chatgpt-4o", _TILES),
        (r"gpt-?5", _tiles(70, 140)),
        (r"(^|[/_.-])o[1-9](?![a-z0-9])", _tiles(75, 150)),
    )
)

_BY_FAMILY: dict[str, ImageRule] = {
    "gpt-4": _MINI_TILES,  # a name that tells nothing: the dearest of the family
    "gpt-5": _patches(2.46),
    "claude-4": _area(750, 1_568, 1_600),
    "claude-5": _area(750, 2_576, 4_800),
    "gemini": _at_most(1_120),
    "mistral": _area(196, 1_540, 4_400, least=100),
    "llama": _at_most(4_096),
    "grok": _at_most(1_792),
    "qwen": _area(600, 4_096, 16_384, least=300),
}
