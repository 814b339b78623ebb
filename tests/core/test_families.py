"""A model's name tells its family; where it doesn't, the loosest one is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import bounds
from proxy.core.families import FAMILIES, UNKNOWN, counts_exactly, family_of


@pytest.mark.parametrize(
    ("family", "models"),
    [
        ("gpt-4", "gpt-4o gpt-4.1-mini gpt-4-turbo gpt-3.5-turbo gpt-35-turbo chatgpt-4o-latest openai/gpt-4o GPT-4o"),
        ("gpt-5", "gpt-5 gpt-5-nano gpt-5.5 gpt-6.1-sol gpt-10 o1 o1-mini o3 openai/o4-mini azure.o3-pro"),
        ("claude-4", "claude-3-5-sonnet-20241022 claude-3-haiku-20240307 claude-2.1 claude-instant-v1"),
        ("claude-4", "claude-sonnet-4-20250514 claude-opus-4-1-20250805 claude-opus-4-6 anthropic/claude-haiku-4.5"),
        ("claude-4", "us.anthropic.claude-sonnet-4-20250514-v1:0 claude-4-5-haiku claude-sonnet-4-5@20250929"),
        (
            "claude-5",
            "claude-opus-4-7 claude-4.7-opus claude-sonnet-5 claude-sonnet-5-5 claude-haiku-5-5 claude-fable-5",
        ),
        ("claude-5", "claude-sonnet-latest claude-mythos-5-1 anthropic/claude-opus-5.5 claude-opus-10"),
        ("gemini", "gemini-2.5-flash google/gemini-3-pro"),
        (
            "mistral",
            "mistral-large-latest open-mixtral-8x7b ministral-8b magistral-medium codestral-2508 devstral pixtral-12b",
        ),
        ("deepseek", "deepseek-chat deepseek-r1 deepseek/deepseek-v3.2"),
        ("llama", "meta-llama/Llama-3.3-70B-Instruct llama3.2 deepseek-r1-distill-llama-70b"),
        ("qwen", "qwen3-32b qwq-32b Qwen/Qwen2.5-72B deepseek-r1-distill-qwen-32b"),
        ("grok", "grok-4 x-ai/grok-3-mini"),
        ("glm", "glm-4.6 zai/glm-5"),
        ("kimi", "kimi-k2 moonshot-v1-128k"),
        (UNKNOWN, "groq/compound gpt-oss-120b openai/gpt-oss-20b gemma-3 command-r phi-4 foo1 solo3 my-model nova-pro"),
    ],
)
def test_names_tell_families(family: str, models: str) -> None:
    assert {model: family_of(model) for model in models.split()} == dict.fromkeys(models.split(), family)


@given(st.text(max_size=60))
def test_every_name_has_a_family(name: str) -> None:
    assert family_of(name) in FAMILIES


@pytest.mark.parametrize(
    ("exactly", "models"),
    [
        (True, "gpt-4o gpt-4o-2024-11-20 gpt-4o-mini gpt-4.1 gpt-4.1-nano gpt-4.5-preview openai/gpt-4o my-model"),
        (False, "gpt-4 gpt-4-turbo gpt-4-0613 gpt-3.5-turbo gpt-35-turbo azure/gpt-35 gpt-4o-search-preview"),
    ],
)
def test_only_the_vocabulary_that_is_counted_with_counts_exactly(exactly: bool, models: str) -> None:
    """``my-model`` is one of which an operator has said that it is of the family."""
    assert {model: counts_exactly("gpt-4", model) for model in models.split()} == dict.fromkeys(models.split(), exactly)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_no_other_family_is_counted_exactly(family: str) -> None:
    assert not counts_exactly(family, "gpt-4o")


def test_every_family_has_a_row_of_bounds() -> None:
    assert set(bounds.FAMILIES) == set(FAMILIES)
