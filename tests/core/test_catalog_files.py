"""pricing.yaml and config/upstreams.yaml become a Catalog, or every problem is named where it stands."""

import json
import re
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.catalog import Catalog, Quirks, Route
from proxy.core.catalog_files import load_catalog
from proxy.core.pricing import Price
from proxy.core.usage import TOKEN_CLASSES
from proxy.core.yaml_reader import PROBLEMS_MAX, ConfigError

ROOT = Path(__file__).parents[2]

UPSTREAMS = """\
upstreams:
  openai:
    dialect: openai
    base_url: https://api.openai.com/v1
    api_key_env: OPENAI_API_KEY
"""

# What a model needs; tests put more lines behind it.
MODEL = """\
models:
  gpt-4o:
    upstream: openai
    input: 1
    output: 3
    max_output_tokens: 16384
"""


def catalog_of(pricing: str, upstreams: str = UPSTREAMS) -> Catalog:
    return load_catalog(pricing, upstreams, ("pricing.yaml", "upstreams.yaml"))


def route_of(*lines: str, top: str = "") -> Route:
    return catalog_of(top + MODEL + "".join(f"    {line}\n" for line in lines)).routes["gpt-4o"]


def problems_of(pricing: str | bytes, upstreams: str | bytes = UPSTREAMS) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_catalog(pricing, upstreams, ("pricing.yaml", "upstreams.yaml"))
    assert str(error.value).splitlines()[: len(error.value.problems)] == list(map(str, error.value.problems))
    return [str(problem) for problem in error.value.problems]


def model_problem(line: str, top: str = "") -> str:
    """The one problem of a model with one more line (line 7 where there is no ``top``)."""
    problems = problems_of(f"{top}{MODEL}    {line}\n")
    assert len(problems) == 1, problems
    return problems[0]


# What is for sale


def test_the_shipped_files_sell_the_four_models_at_their_prices() -> None:
    catalog = load_catalog((ROOT / "pricing.yaml").read_bytes(), (ROOT / "config/upstreams.yaml").read_bytes())
    prices = {
        model: (route.upstream.name, route.standard.price.input, route.standard.price.output)
        for model, route in catalog.routes.items()
    }
    credit_per_1k = 1_000_000 * 1_000
    assert prices == {
        "gpt-4o": ("openai", credit_per_1k, 3 * credit_per_1k),
        "gpt-4o-mini": ("openai", credit_per_1k // 2, credit_per_1k),
        "claude-sonnet": ("anthropic", credit_per_1k, 3 * credit_per_1k),
        "claude-haiku": ("anthropic", credit_per_1k * 3 // 10, credit_per_1k * 8 // 10),
    }


@pytest.mark.parametrize("name", ["pricing.yaml", "config/upstreams.yaml"])
def test_what_the_shipped_files_show_in_comments_works_when_the_marks_are_taken_away(name: str) -> None:
    text = (ROOT / name).read_text()
    pricing, upstreams = (ROOT / "pricing.yaml").read_text(), (ROOT / "config/upstreams.yaml").read_text()
    if name == "pricing.yaml":
        shown = text[text.index("#   my-model:") : text.index("# cost needs")]
        top = text[text.index("# credit_value:") : text.index("# What customers buy")]
        sold = text[text.index("# packs:") :]
        pricing += "\n" + shown.replace("#   ", "  ", 1).replace("\n#   ", "\n  ").replace("\n#\n", "\n")
        pricing += "\n" + top.replace("# ", "") + re.sub("^# ?", "", sold, flags=re.MULTILINE)
        catalog = catalog_of(pricing, upstreams)
        assert catalog.routes["my-model"].cost is not None
        assert (list(catalog.offers.packs), list(catalog.offers.plans)) == (["starter"], ["price_1AbcDef"])
        assert {"web_search", "flex"} <= {
            part for name in catalog.routes["my-model"].variants for part in name.split("+")
        }
    else:
        shown = text[text.index("#  openrouter:") : text.index("# An upstream can say more")]
        more = text[text.index("#    connect_seconds") :]
        upstreams += shown.replace("\n#  ", "\n  ").replace("#  ", "  ", 1).rstrip("#\n ") + "\n"
        upstreams += more.replace("\n#  ", "\n  ").replace("#  ", "  ", 1)
        assert {"openrouter", "deepseek", "ollama", "vllm"} <= catalog_of(pricing, upstreams).upstreams.keys()


def test_what_is_left_out_falls_back() -> None:
    assert route_of().standard.price == Price(
        input=10**9,
        cached_input=10**9,
        cache_write=10**9,
        audio_input=10**9,
        output=3 * 10**9,
        reasoning=3 * 10**9,
        audio_output=3 * 10**9,
        per_request=0,
    )


def test_what_is_given_holds() -> None:
    price = route_of("cached_input: 0.25", "reasoning: 0", "per_request: 0.000001").standard.price
    assert (price.input, price.cached_input, price.cache_write) == (10**9, 250_000_000, 10**9)
    assert (price.output, price.reasoning, price.audio_output) == (3 * 10**9, 0, 3 * 10**9)
    assert price.per_request == 1


def test_prices_can_be_per_million_tokens() -> None:
    price = route_of("cached_input: 0.000001", top="per: 1000000\n").standard.price
    assert (price.input, price.cached_input) == (10**6, 1)


@given(st.integers(0, 10**15), st.sampled_from([1_000, 1_000_000]))
def test_a_price_is_read_to_the_last_microcredit(rate: int, per: int) -> None:
    decimals = {1_000: 9, 1_000_000: 6}[per]
    rate = min(rate, 10 ** (6 + decimals))
    text = f"{Decimal(rate).scaleb(-decimals):f}"
    assert route_of(f"cached_input: {text}", top=f"per: {per}\n").standard.price.cached_input == rate


def test_free_is_an_explicit_zero() -> None:
    free = MODEL.replace("input: 1", "input: 0").replace("output: 3", "output: 0.0")
    assert not any(catalog_of(free).routes["gpt-4o"].standard.price.rates())


def test_a_model_may_have_another_name_upstream() -> None:
    assert route_of().upstream_model == "gpt-4o"
    assert route_of("upstream_model: gpt-4o-2024-08-06").upstream_model == "gpt-4o-2024-08-06"


@pytest.mark.parametrize(
    ("lines", "family"),
    [
        ([], "gpt-4"),
        (["upstream_model: claude-sonnet-5-5"], "claude-5"),
        (["upstream_model: my-deployment"], "gpt-4"),
        (["family: kimi", "upstream_model: claude-sonnet-5-5"], "kimi"),
    ],
)
def test_the_family_follows_from_the_names_unless_it_is_given(lines: list[str], family: str) -> None:
    assert route_of(*lines).family == family


def test_options_have_prices_of_their_own() -> None:
    route = route_of(
        "per_request: 1",
        "service_tiers:",
        "  flex: {input: 0.5, output: 1.5}",
        "  priority: {input: 2, output: 6, cached_input: 1, per_request: 2}",
        "web_search: {per_request: 10}",
        "hosted_tools: {per_request: 5, input_tokens: 0}",
    )
    assert route.service_tiers == {"flex", "priority"}
    assert set(route.variants) == {
        tier + tools
        for tier in ("standard", "flex", "priority")
        for tools in ("", "+web_search", "+hosted_tools", "+web_search+hosted_tools")
    }
    both = route.variants["priority+web_search+hosted_tools"]
    assert both.price.rates() == (2 * 10**9, 10**9, 2 * 10**9, 2 * 10**9, 6 * 10**9, 6 * 10**9, 6 * 10**9)
    assert both.price.per_request == (2 + 10 + 5) * 10**6
    assert both.extra_input_tokens == 20_000
    assert route.variants["flex"].price.per_request == 10**6, "a tier takes the model's fee where it gives none"


def test_audio_is_sold_where_both_of_its_classes_are_priced() -> None:
    assert not route_of("audio_input: 1").audio
    assert route_of("audio_input: 1", "audio_output: 1").audio
    route = route_of(
        "service_tiers:",
        "  flex: {input: 1, output: 1}",
        "  priority: {input: 1, output: 1, audio_input: 1, audio_output: 1}",
    )
    assert {name: variant.audio for name, variant in route.variants.items()} == {
        "standard": False,
        "flex": False,
        "priority": True,
    }


def test_a_cost_in_money_becomes_credits_by_what_a_credit_is_sold_for() -> None:
    top = "credit_value: {amount: 0.01, currency: USD}\n"
    cost = route_of("cost: {input: 0.0025, output: 0.01, per_request: 0.005}", top=top).cost
    assert cost is not None
    assert (cost.input, cost.output, cost.per_request) == (250_000_000, 10**9, 500_000)
    thirds = route_of("cost: {input: 0.01, output: 0}", top=top.replace("0.01", "0.03")).cost
    assert thirds is not None
    assert thirds.input == 333_333_334, "a cost is rounded up"


def test_an_upstream_is_read_whole() -> None:
    upstream = catalog_of(
        MODEL,
        """\
upstreams:
  openai:
    dialect: openai
    base_url: http://[::1]:8000/v1/
    api_key_file: secrets/key
    connect_seconds: 2.5
    read_seconds: 60
    drain_seconds: 0
    headers: {x-title: "My shop"}
    quirks: {include_usage: false, reasoning_outside: true, cached_outside: True}
  local: {dialect: openai, base_url: "http://127.0.0.1:8000/v1", api_key: none}
""",
    ).upstreams
    assert upstream["openai"].base_url == "http://[::1]:8000/v1", "without the slash at the end"
    assert (upstream["openai"].api_key_env, upstream["openai"].api_key_file) == (None, "secrets/key")
    assert (upstream["openai"].connect_seconds, upstream["openai"].read_seconds) == (2.5, 60)
    assert upstream["openai"].drain_seconds == 0
    assert upstream["openai"].headers == {"x-title": "My shop"}
    assert upstream["openai"].quirks == Quirks(include_usage=False, reasoning_outside=True, cached_outside=True)
    assert (upstream["local"].api_key_env, upstream["local"].api_key_file) == (None, None)


# The price version


def test_the_body_is_canonical_json_and_its_hash_the_version() -> None:
    catalog = catalog_of(MODEL + "    web_search: {per_request: 10}\n")
    assert catalog.version == sha256(catalog.body.encode()).hexdigest()
    rates = [10**9] * 4 + [3 * 10**9] * 3
    assert json.loads(catalog.body) == {
        "classes": list(TOKEN_CLASSES),
        "routes": {
            "gpt-4o": {
                "upstream": "openai",
                "upstream_model": "gpt-4o",
                "output_tokens_max": 16384,
                "variants": {
                    "standard": {"rates": rates, "per_request": 0},
                    "standard+web_search": {"rates": rates, "per_request": 10**7},
                },
            }
        },
    }


def test_the_version_tells_prices_apart_and_nothing_else() -> None:
    version = catalog_of(MODEL).version
    two = MODEL + "  b: {upstream: openai, input: 1, output: 1, max_output_tokens: 1}\n"
    turned = two.splitlines(keepends=True)
    turned = [turned[0], turned[-1], *turned[1:-1]]
    assert catalog_of("# a comment\n" + MODEL.replace("input: 1", "input: 1.000")).version == version
    assert catalog_of(two).version == catalog_of("".join(turned)).version, "the order of models is no matter"
    assert catalog_of(MODEL, UPSTREAMS.replace("api.openai.com", "example.com")).version == version
    assert catalog_of(MODEL.replace("input: 1", "input: 1.000000001")).version != version


# Numbers, as they are spelt


@pytest.mark.parametrize(
    ("spelt", "complaint"),
    [
        ("-1", "negative"),
        ("-0.5", "negative"),
        ("+1", "sign"),
        ("0o7", "octal"),
        ("010", "octal"),
        ("0x1F", "hexadecimal"),
        ("1_000", "underscore"),
        ("1:30", "base 60"),
        ("1e3", "exponent"),
        ("1.5E-3", "exponent"),
        ("1,5", "comma"),
        ("1,000.50", "comma"),
        (".5", "both sides"),
        ("5.", "both sides"),
        (".nan", "found .nan"),
        (".inf", "found .inf"),
        ("-.inf", "found -.inf"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("true", "found true"),
        ("null", "found nothing"),
        ("~", "found nothing"),
        ("", "found nothing"),
        ("'1'", "the number in quotes; write it without"),
        ('"0.5"', "the number in quotes; write it without"),
        ("free", 'found "free"'),
        ("$1", 'found "$1"'),
        ("1 credit", 'found "1 credit"'),
        ("[1]", "found a list"),
        ("{per: 1}", "found a mapping"),
        ("1" * 41, "a number of 41 characters"),
        ("1000000.1", "above the largest value, 1,000,000"),
        ("٣", 'found "٣"'),
    ],
)
def test_a_price_is_a_plain_decimal(spelt: str, complaint: str) -> None:
    problem = model_problem(f"cached_input: {spelt}")
    assert problem.startswith(
        "pricing.yaml:7: models.gpt-4o.cached_input: expected credits per 1,000 tokens, such as 0.5;"
    )
    assert complaint in problem


@pytest.mark.parametrize(
    ("top", "line", "decimals"),
    [
        ("", "cached_input: 0.0000000001", "per: 1000 a price has at most 9 decimals"),
        ("per: 1000000\n", "cached_input: 0.0000001", "per: 1000000 a price has at most 6 decimals"),
        ("", "per_request: 0.0000001", "at most 6 decimals"),
    ],
)
def test_a_price_is_a_whole_number_of_microcredits(top: str, line: str, decimals: str) -> None:
    assert decimals in model_problem(line, top)


def test_zeros_behind_the_decimals_are_no_decimals() -> None:
    assert route_of("cached_input: 0.50000000000000").standard.price.cached_input == 500_000_000


@pytest.mark.parametrize("spelt", ["0", "1.5", "1e4", "10000001", "lots", "-5", "0o20", "'16384'", "true"])
def test_the_output_limit_is_a_whole_number_above_0(spelt: str) -> None:
    pricing = MODEL.replace("max_output_tokens: 16384", f"max_output_tokens: {spelt}")
    assert [problem.split(":")[:3] for problem in problems_of(pricing)] == [
        ["pricing.yaml", "6", " models.gpt-4o.max_output_tokens"]
    ]


@pytest.mark.parametrize("spelt", ["100", "1e3", "'1000'", "1_000", "-1000", "[]", "1000.5"])
def test_per_is_1000_or_1000000(spelt: str) -> None:
    problem = problems_of(f"per: {spelt}\n{MODEL}")[0]
    assert problem.startswith("pricing.yaml:1: per: expected 1000 or 1000000")


@pytest.mark.parametrize("spelt", ["yes", "on", "1", "'true'", "null", "[]"])
def test_a_switch_is_true_or_false(spelt: str) -> None:
    assert "allow_store: expected true or false; found" in model_problem(f"allow_store: {spelt}")


@pytest.mark.parametrize("spelt", ["4", "4.5", "0x4", "true", ".inf", "1e3"])
def test_text_that_looks_like_something_else_wants_quotes(spelt: str) -> None:
    assert "if that is the text, put it in quotes" in model_problem(f"upstream_model: {spelt}")
    assert route_of(f"upstream_model: '{spelt}'").upstream_model == spelt


@pytest.mark.parametrize("spelt", ["no", "on", "1:30", "2024-01-01", "1_000", "gpt-4o"])
def test_text_is_text_where_only_older_readers_see_something_else(spelt: str) -> None:
    assert route_of(f"upstream_model: {spelt}").upstream_model == spelt


# Keys


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("imput", "input"),
        ("Input", "input"),
        ("prompt", "input"),
        ("completion", "output"),
        ("max-output-tokens", "max_output_tokens"),
        ("max_tokens", "max_output_tokens"),
        ("upsteam", "upstream"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(typed: str, meant: str) -> None:
    lines = [line.replace(f"    {meant}:", f"    {typed}:") for line in MODEL.splitlines(keepends=True)]
    (problem,) = problems_of("".join(lines))
    assert problem.endswith(f'models.gpt-4o.{typed}: unknown key; did you mean "{meant}"?')


def test_an_unknown_key_that_resembles_none_is_told_what_there_is() -> None:
    problem = model_problem("colour: blue")
    assert problem.startswith("pricing.yaml:7: models.gpt-4o.colour: unknown key; the keys here are upstream, ")


def test_a_word_for_a_key_that_stands_there_already_is_just_unknown() -> None:
    assert "unknown key; the keys here are" in model_problem("imput: 2")


@pytest.mark.parametrize("key", ["upstream", "input", "output", "max_output_tokens"])
def test_what_a_model_needs_is_missed_by_name(key: str) -> None:
    lines = [line for line in MODEL.splitlines(keepends=True) if not line.startswith(f"    {key}:")]
    assert problems_of("".join(lines)) == [f"pricing.yaml:3: models.gpt-4o.{key}: is missing"]


def test_a_key_that_stands_there_twice_names_both_lines() -> None:
    assert model_problem("input: 2") == (
        "pricing.yaml:7: models.gpt-4o.input: this key stands here twice (first on line 4)"
    )


def test_a_model_that_stands_there_twice() -> None:
    again = MODEL.removeprefix("models:\n").replace("gpt-4o", '"gpt-4o"')
    assert problems_of(MODEL + again) == ["pricing.yaml:7: models.gpt-4o: this key stands here twice (first on line 2)"]


def test_a_name_with_a_dot_is_quoted_in_the_place() -> None:
    assert problems_of(MODEL.replace("gpt-4o", "gpt-4.1").replace("input: 1", "input: x"))[0].startswith(
        'pricing.yaml:4: models."gpt-4.1".input: '
    )


@pytest.mark.parametrize("name", ["a b", '""', "'ü'", "x" * 129, "'a\\b'", "'a,b'", "-a", '"a\\nb"'])
def test_a_models_name_is_a_word(name: str) -> None:
    problems = problems_of(
        MODEL.replace("gpt-4o", name) if len(name) < 100 else MODEL.replace("gpt-4o", f"? {name}\n  ")
    )
    assert "expected a model's name" in problems[0]


def test_a_very_long_key_is_cut_in_the_message() -> None:
    problems = problems_of(MODEL + "    ? " + "k" * 5_000 + "\n    : 1\n")
    assert max(map(len, problems)) < 500


@pytest.mark.parametrize("tier", ["auto", "default", "standard"])
def test_the_standard_tier_is_not_a_tier_of_its_own(tier: str) -> None:
    assert "is the standard price" in model_problem(f"service_tiers: {{{tier}: {{input: 1, output: 1}}}}")


def test_a_cost_without_a_credits_value_compares_nothing() -> None:
    assert "cost: needs credit_value at the top" in model_problem("cost: {input: 1, output: 1}")


# Between the files


def test_an_upstream_that_is_not_there_is_named_with_the_nearest() -> None:
    assert problems_of(MODEL.replace("openai", "opnai")) == [
        'pricing.yaml:3: models.gpt-4o.upstream: upstreams.yaml has no upstream "opnai"; did you mean "openai"?'
    ]
    assert problems_of(MODEL.replace("openai", "zzz"))[0].endswith('has no upstream "zzz"; it has openai')


def test_an_upstream_with_a_problem_of_its_own_is_still_there() -> None:
    problems = problems_of(MODEL, UPSTREAMS.replace("dialect: openai", "dialect: opnai"))
    assert problems == ['upstreams.yaml:3: upstreams.openai.dialect: expected one of openai; found "opnai"']


def test_an_unreadable_upstreams_file_does_not_make_every_model_wrong() -> None:
    problems = problems_of(MODEL, "upstreams: [")
    assert [problem.split(":")[0] for problem in problems] == ["upstreams.yaml"]


def test_every_problem_of_both_files_is_named_in_the_order_of_the_lines() -> None:
    problems = problems_of(
        MODEL.replace("input: 1", "input: -1") + "    colour: blue\n    input: 5\n",
        UPSTREAMS.replace("https", "ftp") + "    quirks: {include_usage: maybe}\n",
    )
    assert [problem.split(": ")[0] for problem in problems] == [
        *("pricing.yaml:4", "pricing.yaml:7", "pricing.yaml:8", "upstreams.yaml:4", "upstreams.yaml:6")
    ]


def test_very_many_problems_are_counted_behind_the_first_twenty() -> None:
    pricing = MODEL + "".join(f"    k{index}: 1\n" for index in range(50))
    with pytest.raises(ConfigError) as error:
        catalog_of(pricing)
    assert (len(error.value.problems), error.value.more) == (PROBLEMS_MAX, 30)
    assert str(error.value).endswith("... and 30 more")


# Upstreams


@pytest.mark.parametrize(
    "url",
    [
        *("api.openai.com/v1", "ftp://api.openai.com", "https://", "https:///v1", "https://user:secret@host/v1"),
        *("https://host/v1?key=secret", "https://host/v1#x", "https://host/a b", "https://host:0/v1", "https://host:x"),
        *("https://host:65536/v1", "https://hö.st/v1", "https://host//v1", "https://ho\\nst/v1"),
        *("https://999.1.1.1/v1", "https://1.2.3/v1", "https://[::::]/v1", "https://[1.2.3.4]/v1"),
    ],
)
def test_a_base_url_is_an_address_with_a_path_and_nothing_else(url: str) -> None:
    (problem,) = problems_of(MODEL, UPSTREAMS.replace("https://api.openai.com/v1", f'"{url}"'))
    assert problem.startswith("upstreams.yaml:4: upstreams.openai.base_url: ")
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "found none of them"),
        (["api_key_env: A", "api_key_file: b"], "found api_key_env and api_key_file"),
        (["api_key_env: A", "api_key: none"], "found api_key_env and api_key"),
        (["api_key: sk-secret-123"], "a key never stands in this file"),
        (["api_key_env: sk-secret-123"], "the name of an environment variable"),
        (["api_key_env: 1234567"], "the name of an environment variable"),
        (["api_key_file: ''"], "the path of a file"),
    ],
)
def test_a_key_comes_from_one_place_and_never_stands_in_the_file(lines: list[str], complaint: str) -> None:
    upstreams = UPSTREAMS.replace("    api_key_env: OPENAI_API_KEY\n", "".join(f"    {line}\n" for line in lines))
    problems = problems_of(MODEL, upstreams)
    assert complaint in problems[0]
    assert "secret" not in "".join(problems)
    assert "1234567" not in "".join(problems)


@pytest.mark.parametrize("header", ["authorization", "host", "content-length", "x-api-key", "X-Title", "x title", '""'])
def test_headers_that_are_not_the_operators_to_set_are_refused(header: str) -> None:
    (problem,) = problems_of(MODEL, UPSTREAMS + f"    headers: {{{header}: secret}}\n")
    assert "upstreams.openai.headers." in problem
    assert "secret" not in problem


@pytest.mark.parametrize("value", ['"a\\r\\nb: c"', '"a\\nb"', '""', '" padded"', "'ü'", "7", "[a]"])
def test_a_headers_value_is_one_line_of_ascii(value: str) -> None:
    (problem,) = problems_of(MODEL, UPSTREAMS + f"    headers: {{x-title: {value}}}\n")
    assert "headers.x-title: expected printable ASCII text on one line" in problem


@pytest.mark.parametrize("key", ["connect_seconds", "read_seconds", "drain_seconds"])
@pytest.mark.parametrize("value", ["-1", "3601", "ten", "1.2345", "1:30", "'10'"])
def test_times_are_seconds_up_to_an_hour(key: str, value: str) -> None:
    (problem,) = problems_of(MODEL, f"{UPSTREAMS}    {key}: {value}\n")
    assert f"upstreams.openai.{key}: expected seconds" in problem


def test_a_read_without_any_patience_is_refused() -> None:
    (problem,) = problems_of(MODEL, f"{UPSTREAMS}    read_seconds: 0\n")
    assert "below the smallest value, 0.001" in problem


def test_a_model_may_be_silent_for_longer_than_its_upstream_and_has_an_end() -> None:
    def route_of(said: str) -> Route:
        pricing = f"models:\n  m: {{upstream: up, input: 1, output: 3, max_output_tokens: 100{said}}}\n"
        upstreams = "upstreams:\n  up: {dialect: openai, base_url: 'https://h/v1', api_key: none, read_seconds: 30}\n"
        return load_catalog(pricing, upstreams).routes["m"]

    default, patient = route_of(""), route_of(", read_seconds: 2400, max_seconds: 10800")
    assert (default.upstream.read_seconds, default.seconds_max) == (30.0, 7200.0)
    assert (patient.upstream.read_seconds, patient.seconds_max) == (2400.0, 10_800.0)
    with pytest.raises(ConfigError, match="max_seconds: expected seconds, at most 86400"):
        route_of(", max_seconds: 86401")
