"""Where a text can be cut so that the tokens of its pieces are those of the whole.

A tokenizer first splits text by a pattern, then merges bytes within each piece of that split. So a cut changes nothing
where the split has a boundary whatever follows. Both vocabularies' patterns always have one

- before a blank that follows anything but white space: no alternative goes on from there to a blank;
- between a letter or digit and punctuation or a line break behind it, but for the apostrophe (``don't`` may be one
  piece) and for marks that belong to a letter;
- between a letter and a digit.

None of them looks back, so the split of what follows a boundary doesn't depend on what stood before it.
"""

import re

__all__ = ["last_cut"]

# Of what isn't ASCII, only what is surely punctuation in every version of Unicode.
_PUNCTUATION = (
    r"!-&(-/:-@\[-`{-~\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf"
    r"\u2010-\u2018\u201a-\u2027\u3001-\u3003\u3008-\u3011\uff01-\uff06\uff08-\uff0f\uff1a-\uff20"
)
_CUT = re.compile(rf"(?<=\S) |(?<=[^\W_])[\r\n{_PUNCTUATION}]|(?<=[a-zA-Z])[0-9]|(?<=[0-9])[a-zA-Z]")
# A cut is mostly a word away.
_WINDOW_CHARS = 64


def last_cut(text: str, end: int) -> int:
    """The last such place at or before ``end``, and before the text's end; 0 where there is none."""
    window = _WINDOW_CHARS
    while True:
        start = max(end - window, 0)
        last = 0
        for match in _CUT.finditer(text, start, min(end + 1, len(text))):
            last = match.start()
        if last or not start:
            return last
        window *= 8
