"""The JSON Schemas that editors use and the parser that Farebox uses judge a file the same.

Documents are made as values, written as YAML and given to both: a full one with every single change that is known to
matter, and hypothesis's own, good ones and ones changed several times over. What a schema can't say is kept out of
them, and stands in ``test_catalog_files.py`` instead:

- how a number is spelt (octal, base 60, underscores, exponents), and how many decimals it has: whole microcredits
- duplicate keys, anchors, aliases, tags, and everything else below the level of values
- how fine a currency's amounts go, and that the least amount isn't above the most
- that an upstream named in pricing.yaml stands in upstreams.yaml
- that an IP address in a base_url is one
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from proxy.core import catalog_files
from proxy.core.catalog_files import load_catalog
from proxy.core.families import FAMILIES
from proxy.core.yaml_reader import ConfigError

CONFIG = Path(__file__).parents[2] / "config"

Document = Any
"""Dicts, lists, texts, booleans, None, and Numbers."""


class Number:
    """A number as its text, which is what the parser reads; a schema gets the value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Number({self.text!r})"


def as_value(document: Document) -> Any:
    if isinstance(document, dict):
        return {key: as_value(value) for key, value in document.items()}
    if isinstance(document, list):
        return [as_value(value) for value in document]
    if isinstance(document, Number):
        return float(document.text) if "." in document.text else int(document.text)
    return document


def as_yaml(document: Document, indent: int = 0) -> str:
    """Block style, as people write it; text is quoted where it isn't a plain word."""
    if isinstance(document, dict) and document:
        lines = (f"{' ' * indent}{scalar(key)}:{nested(value, indent)}" for key, value in document.items())
        return "\n".join(lines) + "\n"
    return f"{' ' * indent}{inline(document)}\n"


def nested(value: Document, indent: int) -> str:
    return "\n" + as_yaml(value, indent + 2).rstrip("\n") if isinstance(value, dict) and value else f" {inline(value)}"


def inline(value: Document) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, Number):
        return value.text
    return scalar(value)


def scalar(value: str | bool | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    word = re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", value) and value.lower() not in ("true", "false", "null")
    return value if word else json.dumps(value, ensure_ascii=False)


def schema_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIG / name).read_text())
    return found


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    strict = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        jsonschema.Draft202012Validator, {"pattern": ecma_pattern}
    )
    found: jsonschema.Draft202012Validator = strict(schema)
    return found


def ecma_pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    """As the standard says and editors do; Python's own ``$`` would let a newline at the end through."""
    if isinstance(instance, str) and not re.search(pattern.removesuffix("$") + r"\Z", instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


PRICING = validator("pricing.schema.json")
UPSTREAMS = validator("upstreams.schema.json")


def parser_takes_pricing(document: Document) -> tuple[bool, str]:
    # Upstreams that can't be read leave the one question open that no schema answers: whether the named one exists.
    return _taken(lambda: load_catalog(as_yaml(document), "", ("pricing", "upstreams")), "pricing")


def parser_takes_upstreams(document: Document) -> tuple[bool, str]:
    return _taken(lambda: load_catalog("", as_yaml(document), ("pricing", "upstreams")), "upstreams")


def _taken(load: Callable[[], object], file: str) -> tuple[bool, str]:
    with pytest.raises(ConfigError) as error:
        load()
    found = [str(problem) for problem in error.value.problems if problem.file == file]
    return not found, "\n".join(found)


# Valid documents

numbers = st.builds(
    lambda whole, fraction: Number(f"{whole}.{fraction}" if fraction else str(whole)),
    st.integers(0, 999_999),
    st.one_of(st.just(""), st.from_regex(r"[0-9]{1,6}", fullmatch=True)),
)
tokens = st.integers(1, 10_000_000).map(lambda value: Number(str(value)))
CLASSES = ("cached_input", "cache_write", "audio_input", "reasoning", "audio_output", "per_request")
prices = st.fixed_dictionaries({"input": numbers, "output": numbers}, optional=dict.fromkeys(CLASSES, numbers))
tools = st.fixed_dictionaries({"per_request": numbers}, optional={"input_tokens": tokens})
LEAVING: dict[str, st.SearchStrategy[Document]] = {
    "on_disconnect": st.sampled_from(["cancel", "drain"]),
    "drain_seconds": st.integers(0, 3_600_000).map(lambda n: Number(f"{n // 1000}.{n % 1000:03d}")),
    "drain_tokens": st.integers(0, 10_000_000).map(lambda n: Number(str(n))),
}
models = st.builds(
    lambda required, priced, rest: {**required, **priced, **rest},
    st.fixed_dictionaries(
        {"upstream": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True), "max_output_tokens": tokens}
    ),
    prices,
    st.fixed_dictionaries(
        {},
        optional={
            "upstream_model": st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20),
            "family": st.sampled_from(FAMILIES),
            "service_tiers": st.dictionaries(st.sampled_from(["flex", "priority", "scale"]), prices, min_size=1),
            "web_search": tools,
            "hosted_tools": tools,
            "allow_store": st.booleans(),
            "cost": prices,
            **LEAVING,
            "hidden_reasoning": st.booleans(),
            "reasoning_tokens_per_second": st.integers(0, 1000).map(lambda n: Number(str(n))),
            "read_seconds": st.integers(1, 3_600_000).map(lambda n: Number(f"{n // 1000}.{n % 1000:03d}")),
            "max_seconds": st.integers(1, 86_400_000).map(lambda n: Number(f"{n // 1000}.{n % 1000:03d}")),
        },
    ),
)
whole_money = st.integers(1, 1_000_000).map(lambda n: Number(str(n)))
bought = st.integers(1, 10**12).map(lambda n: Number(f"{n // 10**6}.{n % 10**6:06d}"))
days = st.integers(1, 3_650).map(lambda n: Number(str(n)))
labels = st.from_regex(r"[A-Za-z][A-Za-z ,.]{0,20}", fullmatch=True)
currencies = st.sampled_from(["USD", "EUR", "JPY", "KWD", "ISK"])
sold = {"credits": bought, "price": whole_money, "currency": currencies}
packs = st.fixed_dictionaries(
    sold | {"bonus": bought}, optional={"name": labels, "expires_days": days, "bonus_expires_days": days}
)
custom_amounts = st.fixed_dictionaries(
    {"least": st.just(Number("1")), "most": whole_money, "credits_per_unit": whole_money},
    optional={"expires_days": days},
)
plans = st.fixed_dictionaries(
    sold,
    optional={
        "name": labels,
        "grace_days": st.integers(0, 90).map(lambda n: Number(str(n))),
        "rollover": st.booleans(),
    },
)
offers: dict[str, st.SearchStrategy[Document]] = {
    "packs": st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True), packs, min_size=1),
    "custom_amounts": st.dictionaries(st.sampled_from(["USD", "JPY", "KWD"]), custom_amounts, min_size=1),
    "plans": st.dictionaries(st.from_regex(r"price_[A-Za-z0-9]{1,9}", fullmatch=True), plans, min_size=1),
}
model_names = st.from_regex(r"[A-Za-z0-9@][A-Za-z0-9._:/@+-]{0,12}", fullmatch=True)
pricing_documents = st.fixed_dictionaries(
    {"models": st.dictionaries(model_names, models, min_size=1, max_size=2)},
    optional={
        "per": st.sampled_from([Number("1000"), Number("1000000"), Number("1000.0")]),
        "credit_value": st.fixed_dictionaries(
            {
                "amount": st.integers(1, 1_000_000).map(lambda n: Number(str(n))),
                "currency": st.sampled_from(["USD", "EUR"]),
            }
        ),
        **offers,
    },
)

seconds = st.integers(1, 3_600_000).map(lambda n: Number(f"{n // 1000}.{n % 1000:03d}"))
key_sources = st.sampled_from(
    [{"api_key_env": "OPENAI_API_KEY"}, {"api_key_file": "/run/secrets/key"}, {"api_key": "none"}]
)
urls = st.sampled_from(
    [
        "https://api.openai.com/v1",
        "http://127.0.0.1:8000/v1/",
        "http://[::1]:65535/v1",
        "http://postgres_1/a.b/c",
        "https://h",
    ]
)
upstream_documents = st.fixed_dictionaries(
    {
        "upstreams": st.dictionaries(
            st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True),
            st.builds(
                lambda rest, keys: {**rest, **keys},
                st.fixed_dictionaries(
                    {"dialect": st.just("openai"), "base_url": urls},
                    optional={
                        "connect_seconds": seconds,
                        "read_seconds": seconds,
                        **LEAVING,
                        "headers": st.dictionaries(
                            st.from_regex(r"x-[a-z0-9_-]{0,8}", fullmatch=True),
                            st.from_regex(r"[!-~]{1,3}( [!-~]{1,3})?", fullmatch=True),
                            min_size=1,
                            max_size=3,
                        ),
                        "quirks": st.fixed_dictionaries(
                            {},
                            optional=dict.fromkeys(
                                ("include_usage", "reasoning_outside", "cached_outside"), st.booleans()
                            ),
                        ),
                    },
                ),
                key_sources,
            ),
            min_size=1,
            max_size=2,
        )
    }
)

# Documents with something changed

# Without what no file may hold at all: control characters, lone surrogates, the line breaks that editors don't show.
printable = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp", "Co", "Cn"), exclude_characters="\ufeff")
EDGE_TEXTS = (
    *("", "none", "openai", "opnai", "OPENAI_API_KEY", "1KEY", "USD", "usd", "USD\n", "EURO", "a b", " padded "),
    *(
        "x" * 64,
        "x" * 65,
        "x" * 256,
        "x" * 257,
        "-x",
        "@x",
        "1",
        "1.5",
        "true",
        "null",
        "gpt-4",
        "Ünïcode",
        "two\nlines",
    ),
    *(
        "https://h",
        "https://h/",
        "https://h//v1",
        "https://h:80/v1",
        "https://h:0/v1",
        "https://h:65535",
        "https://h:65536",
    ),
    *("https://user:pass@host/v1", "https://h/v1?x=1", "https://h/v1#x", "ftp://h", "https://", "HTTP://h", "//h"),
    *("https://-h", "https://h-", "https://[::1]", "https://[x]", "https://h/" + "a/" * 16, "https://h/" + "a/" * 17),
)
EDGE_NUMBERS = (
    *("-1", "-0.5", "0", "0.5", "1", "1.0", "100", "1000", "1000.0", "1000000", "1000000.5", "1000001"),
    *("3600", "3600.5", "10000000", "10000001", "16384.0", "16384.5"),
)
texts = st.one_of(st.text(printable, max_size=6), st.sampled_from(EDGE_TEXTS))
junk: st.SearchStrategy[Document] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        numbers,
        texts,
        st.sampled_from(["0", "1", "1000", "1000000", "1000001", "1000000.5", "0.5", "16384.0", "10000001"]).map(
            Number
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
NAMES = (
    *("models", "per", "credit_value", "upstreams", "amount", "currency", "input", "output", *CLASSES, "cost"),
    *("upstream", "upstream_model", "family", "max_output_tokens", "service_tiers", "web_search", "hosted_tools"),
    *("input_tokens", "allow_store", "dialect", "base_url", "api_key", "api_key_env", "api_key_file", "headers"),
    *(
        "connect_seconds",
        "read_seconds",
        "max_seconds",
        "drain_seconds",
        "quirks",
        "include_usage",
        "reasoning_outside",
    ),
    *("on_disconnect", "drain_tokens", "hidden_reasoning", "reasoning_tokens_per_second", "cancel", "drain"),
    *("flex", "auto", "default", "standard", "Flex", "1flex", "f" * 32, "f" * 33, "gpt-4.1", "m" * 128, "m" * 129),
    *("authorization", "host", "x-title", "X-Title", "x title", "", "-", "a/b:c@d+e", "ü"),
)
OFFER_NAMES = (
    *("packs", "custom_amounts", "plans", "credits", "price", "bonus", "expires_days", "bonus_expires_days", "name"),
    *("least", "most", "credits_per_unit", "grace_days", "rollover", "price_1Abc", "price_", "USD", "EURO"),
)
MONEY = ("price", "least", "most", "credits_per_unit")
keys = st.one_of(st.sampled_from(NAMES + OFFER_NAMES), texts)


@st.composite
def changed(draw: st.DrawFn, documents: st.SearchStrategy[Document]) -> Document:
    """A document in which a value, a key or a whole branch is another, is gone, or is new; up to three times."""
    document = draw(documents)
    for _ in range(draw(st.integers(0, 3))):
        places = list(tables(document))
        if not places:
            return draw(junk)
        table = draw(st.sampled_from(places))
        key = draw(st.sampled_from(sorted(table))) if table else draw(keys)
        match draw(st.sampled_from(["value", "value", "drop", "add", "rename", "move"])):
            case "value":
                table[key] = draw(junk)
            case "drop":
                table.pop(key, None)
            case "add":
                table[draw(keys)] = draw(junk)
            case "rename":
                table[draw(keys)] = table.pop(key, None)
            case "move":
                draw(st.sampled_from(places))[key] = as_copy(table.get(key))
    return document


def tables(document: Document) -> Iterator[dict[str, Document]]:
    if isinstance(document, dict):
        yield document
        for value in document.values():
            yield from tables(value)


def as_copy(document: Document) -> Document:
    return {key: as_copy(value) for key, value in document.items()} if isinstance(document, dict) else document


FULL_PRICES = {name: Number("0.5") for name in ("input", "output", *CLASSES)}
FULL_TOOL = {"per_request": Number("1"), "input_tokens": Number("5")}
FULL_PRICING = {
    "per": Number("1000"),
    "credit_value": {"amount": Number("0.5"), "currency": "USD"},
    "models": {
        "gpt-4o": {
            "upstream": "openai",
            "upstream_model": "gpt-4o",
            "family": "gpt-4",
            "max_output_tokens": Number("100"),
            **FULL_PRICES,
            "cost": {name: Number("0.5") for name in ("input", "output", "audio_output")},
            "service_tiers": {"flex": {name: Number("0.5") for name in ("input", "output", "per_request")}},
            "web_search": FULL_TOOL,
            "hosted_tools": FULL_TOOL,
            "allow_store": True,
            "on_disconnect": "drain",
            "drain_seconds": Number("1"),
            "drain_tokens": Number("1"),
            "hidden_reasoning": False,
            "reasoning_tokens_per_second": Number("57"),
            "read_seconds": Number("1"),
            "max_seconds": Number("1"),
        }
    },
}
A_MODEL = {"upstream": "openai", "input": Number("1"), "output": Number("1"), "max_output_tokens": Number("1")}
FULL_OFFERS = {
    "models": {"m": A_MODEL},
    "packs": {
        "starter": {
            "name": "Starter",
            "credits": Number("1000"),
            "price": Number("10"),
            "currency": "USD",
            "bonus": Number("0.5"),
            "expires_days": Number("365"),
            "bonus_expires_days": Number("90"),
        }
    },
    "custom_amounts": {
        "EUR": {
            "least": Number("1"),
            "most": Number("1000"),
            "credits_per_unit": Number("100"),
            "expires_days": Number("1"),
        }
    },
    "plans": {
        "price_1": {
            "name": "Pro",
            "credits": Number("1"),
            "price": Number("20"),
            "currency": "USD",
            "grace_days": Number("3"),
            "rollover": True,
        }
    },
}
FULL_UPSTREAMS = {
    "upstreams": {
        "openai": {
            "dialect": "openai",
            "base_url": "https://api.openai.com/v1",
            "api_key_env": "OPENAI_API_KEY",
            "connect_seconds": Number("1"),
            "read_seconds": Number("1"),
            "on_disconnect": "cancel",
            "drain_seconds": Number("1"),
            "drain_tokens": Number("1"),
            "headers": {"x-title": "shop"},
            "quirks": {"include_usage": True, "reasoning_outside": True, "cached_outside": False},
        },
        "deepseek": {"dialect": "openai", "base_url": "https://h", "api_key_file": "key"},
        "ollama": {"dialect": "openai", "base_url": "https://h", "api_key": "none"},
    }
}


def every_change(document: Document) -> Iterator[Document]:
    """The document with one thing another, for every place in it and every edge that is known."""
    values = (*map(Number, EDGE_NUMBERS), *EDGE_TEXTS, None, True, [], ["openai"], {}, {"x": Number("1")}, FULL_PRICES)
    yield from values
    for index, table in enumerate(tables(document)):
        for key in table:
            yield from (_with(document, index, drop=key, add={key: value}) for value in values)
            yield _with(document, index, drop=key, add={})
            yield from (_with(document, index, drop=key, add={name: table[key]}) for name in NAMES + OFFER_NAMES)
        yield from (_with(document, index, drop=None, add={name: Number("1")}) for name in NAMES + OFFER_NAMES)
        yield from (_with(document, index, drop=None, add=_many(table, count)) for count in (7, 8, 31, 32))


def _many(table: dict[str, Document], count: int) -> dict[str, Document]:
    """So many more entries like the one that the table has."""
    return {f"k{number}": next(iter(table.values())) for number in range(count)}


def _with(document: Document, index: int, *, drop: str | None, add: dict[str, Document]) -> Document:
    """A copy in which one table (by its place among the tables) lacks a key and has others."""
    copied = as_copy(document)
    table = list(tables(copied))[index]
    if drop is not None:
        del table[drop]
    table.update(add)
    return copied


unhurried = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@given(pricing_documents)
@unhurried
def test_every_good_pricing_file_is_good_to_both(document: Document) -> None:
    if "credit_value" not in document:
        for model in document["models"].values():
            model.pop("cost", None)
    assert PRICING.is_valid(as_value(document))
    assert parser_takes_pricing(document) == (True, "")


@given(upstream_documents)
@unhurried
def test_every_good_upstreams_file_is_good_to_both(document: Document) -> None:
    assert UPSTREAMS.is_valid(as_value(document))
    assert parser_takes_upstreams(document) == (True, "")


@given(changed(pricing_documents))
@unhurried
def test_pricing_is_judged_the_same(document: Document) -> None:
    assume(money_is_plain(document))
    judge_pricing(document)


@given(changed(upstream_documents))
@unhurried
def test_upstreams_are_judged_the_same(document: Document) -> None:
    judge_upstreams(document)


def test_pricing_is_judged_the_same_after_every_single_change() -> None:
    assert parser_takes_pricing(FULL_PRICING) == (True, "")
    verdicts = Counter(judge_pricing(document) for document in every_change(FULL_PRICING))
    assert verdicts[True] > 100
    assert verdicts[False] > 1_000


def test_what_is_sold_for_money_is_judged_the_same_after_every_single_change() -> None:
    assert parser_takes_pricing(FULL_OFFERS) == (True, "")
    verdicts = Counter(judge_pricing(document) for document in every_change(FULL_OFFERS) if money_is_plain(document))
    assert verdicts[True] > 100
    assert verdicts[False] > 1_000


def money_is_plain(document: Document) -> bool:
    """Whether every amount of money is one that any currency has, and amounts are in their order."""
    for table in tables(document):
        amounts = [value for key, value in table.items() if key in MONEY and isinstance(value, Number)]
        if any("." in amount.text.removesuffix(".0") for amount in amounts):
            return False
        least, most = (table.get(key) for key in ("least", "most"))
        if isinstance(least, Number) and isinstance(most, Number) and float(least.text) > float(most.text):
            return False
    return True


def test_upstreams_are_judged_the_same_after_every_single_change() -> None:
    assert parser_takes_upstreams(FULL_UPSTREAMS) == (True, "")
    verdicts = Counter(judge_upstreams(document) for document in every_change(FULL_UPSTREAMS))
    assert verdicts[True] > 50
    assert verdicts[False] > 500


def judge_pricing(document: Document) -> bool:
    return judge(document, PRICING, *parser_takes_pricing(document))


def judge_upstreams(document: Document) -> bool:
    return judge(document, UPSTREAMS, *parser_takes_upstreams(document))


def judge(document: Document, schema: jsonschema.Draft202012Validator, taken: bool, problems: str) -> bool:
    complaints = [error.message for error in schema.iter_errors(as_value(document))]
    assert taken == (not complaints), f"{as_yaml(document)}\nparser: {problems}\nschema: {complaints}"
    return taken


def test_how_many_entries_a_file_may_have_is_the_same_to_both() -> None:
    upstream = {"dialect": "openai", "base_url": "https://h", "api_key": "none"}
    model = {"upstream": "a", "input": Number("1"), "output": Number("1"), "max_output_tokens": Number("1")}
    for count, good in ((catalog_files.UPSTREAMS_MAX, True), (catalog_files.UPSTREAMS_MAX + 1, False)):
        document = {"upstreams": {f"u{index}": upstream for index in range(count)}}
        assert UPSTREAMS.is_valid(document) == parser_takes_upstreams(document)[0] == good
    for count, good in ((catalog_files.MODELS_MAX, True), (catalog_files.MODELS_MAX + 1, False)):
        priced = {"models": {f"m{index}": model for index in range(count)}}
        assert PRICING.is_valid(as_value(priced)) == parser_takes_pricing(priced)[0] == good


def test_the_schemas_say_the_same_words_as_the_parser() -> None:
    """Lists and patterns that stand twice; the documents above would find a difference, but not name it."""
    pricing = schema_of("pricing.schema.json")["$defs"]
    model = pricing["model"]["properties"]
    upstream = schema_of("upstreams.schema.json")["$defs"]["upstream"]["properties"]
    assert tuple(model["family"]["enum"]) == FAMILIES
    assert tuple(upstream["dialect"]["enum"]) == catalog_files.DIALECTS
    assert set(upstream["headers"]["propertyNames"]["not"]["enum"]) == set(catalog_files._HEADERS_REFUSED)
    assert pricing["credits"]["maximum"] == catalog_files.PRICE_IN_FILE_MAX
    assert model["max_output_tokens"]["maximum"] == catalog_files.OUTPUT_TOKENS_MAX


@pytest.mark.parametrize("name", ["pricing.yaml", "config/upstreams.yaml"])
def test_the_shipped_files_point_editors_at_their_schema(name: str) -> None:
    path = CONFIG.parent / name
    first = path.read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    assert (path.parent / match[1]).is_file()
