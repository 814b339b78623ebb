"""How a place in a configuration file is written: ``models."gpt-4.1".input``, the same in every message."""

import re

__all__ = ["key_path", "shorten"]

_SIMPLE = re.compile(r"[A-Za-z0-9_-]{1,60}\Z")


def key_path(*keys: str) -> str:
    """The keys from the top of the file down, joined by dots; a key that itself holds a dot (or worse) is quoted."""
    return ".".join(key if _SIMPLE.match(key) else f'"{shorten(key)}"' for key in keys)


def shorten(text: str, length: int = 60) -> str:
    """The text on one line, unprintable characters escaped, cut to about ``length`` characters."""
    shown = text[: length + 1]
    if not shown.isprintable():
        shown = shown.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= length else shown[:length] + "..."
