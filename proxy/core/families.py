"""Families of models that share a tokenizer and hidden prompts: the rows of METERING's table (``core/bounds.py``).

The family decides how loosely a prompt is bounded before the call, so a name that no rule knows is ``unknown``, the
loosest row. pricing.yaml may state ``family`` where the rules guess wrong.
"""

import re

__all__ = ["FAMILIES", "UNKNOWN", "counts_exactly", "family_of"]

UNKNOWN = "unknown"

FAMILIES: tuple[str, ...] = (
    "gpt-4",  # gpt-3.5, 4, 4o, 4.1
    "gpt-5",  # gpt-5 and later, the o-series
    "claude-4",  # up to 4.6
    "claude-5",  # the newer tokenizer: opus 4.7, sonnet 5, fable and all that came later
    "gemini",
    "mistral",
    "deepseek",
    "llama",
    "grok",
    "qwen",
    "glm",
    "kimi",
    UNKNOWN,
)

# The first rule that matches wins. A distillation ("deepseek-r1-distill-llama") has the tokenizer of what it was made
# of, so llama and qwen stand before deepseek. gpt-oss carries a long hidden prompt: it stays with the unknown.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"gpt-oss", UNKNOWN),
        (r"gpt-?(3\.5|35|4)", "gpt-4"),
        (r"gpt-?([5-9]|[1-9][0-9])(?![0-9])", "gpt-5"),
        (r"(^|[/_.-])o[1-9](?![a-z0-9])", "gpt-5"),
        (r"gemini", "gemini"),
        (r"qwen|qwq|qvq", "qwen"),
        (r"llama", "llama"),
        (r"mistral|mixtral|ministral|magistral|codestral|devstral|pixtral|voxtral", "mistral"),
        (r"deepseek", "deepseek"),
        (r"grok", "grok"),
        (r"glm", "glm"),
        (r"kimi|moonshot", "kimi"),
    )
)

_CLAUDE_VERSION = re.compile(r"(?<![0-9])([0-9]{1,2})(?:[.-]([0-9]{1,2}))?(?![0-9])")
_CLAUDE_OLD_TOKENIZER_LAST = (4, 6)

# Of the one family whose vocabulary is counted with: those that have an older one, and those that search by themselves.
_COUNTED_NEARLY = re.compile(r"gpt-?(3|4(?![o.]))|search")


def counts_exactly(family: str, model: str) -> bool:
    """Whether the tokens of an answer's text, as counted here, are those that the provider bills.

    Only then is a cut answer's charge as good without the provider's report as with it.
    """
    return family == "gpt-4" and not _COUNTED_NEARLY.search(model.lower())


def family_of(model: str) -> str:
    """The family that the name tells of; ``unknown`` where none does."""
    name = model.lower()
    _, claude, rest = name.partition("claude")
    if claude:
        return _claude(rest)
    return next((family for rule, family in _RULES if rule.search(name)), UNKNOWN)


def _claude(rest: str) -> str:
    # A name without a version ("claude-sonnet-latest") is the newest one, whose bound is the looser of the two.
    version = _CLAUDE_VERSION.search(rest)
    if version and (int(version[1]), int(version[2] or 0)) <= _CLAUDE_OLD_TOKENIZER_LAST:
        return "claude-4"
    return "claude-5"
