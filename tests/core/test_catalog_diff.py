"""The diff shows what an edit would change, and points at what looks like a slip or a loss."""

import pytest

from proxy.core.catalog import Catalog
from proxy.core.catalog_diff import CatalogDiff, compare
from proxy.core.catalog_files import load_catalog

UPSTREAMS = "upstreams:\n  openai: {dialect: openai, base_url: 'https://h/v1', api_key: none}\n"
MODEL = "  gpt-4o: {upstream: openai, input: 1, output: 3, max_output_tokens: 100}\n"


def catalog_of(*models: str, top: str = "", upstreams: str = UPSTREAMS) -> Catalog:
    return load_catalog(f"{top}models:\n{''.join(models)}", upstreams)


def edited(before: str, after: str) -> CatalogDiff:
    """The diff of one model whose text was edited."""
    return compare(catalog_of(MODEL), catalog_of(MODEL.replace(before, after)))


def test_the_same_catalog_changes_nothing() -> None:
    diff = compare(catalog_of(MODEL), catalog_of(MODEL.replace("input: 1", "input: 1.0")))
    assert not diff.changes_anything
    assert diff.render() == "Nothing would change."
    assert diff.version_before == diff.version_after


def test_a_price_is_shown_before_and_after() -> None:
    diff = edited("input: 1", "input: 1.5")
    assert diff.render() == "~ gpt-4o\n    input: 1 -> 1.5 credits per 1,000 tokens"
    assert diff.warnings == ()
    assert diff.changes_anything


@pytest.mark.parametrize(
    ("after", "warning"),
    [
        ("2", None),
        ("2.000001", "more than doubles"),
        ("0.5", None),
        ("0.499999", "falls below half"),
        ("0", "is free of charge afterwards"),
    ],
)
def test_a_price_that_jumps_is_pointed_at(after: str, warning: str | None) -> None:
    (entry,) = edited("input: 1", f"input: {after}").entries
    assert [change.warning for change in entry.changes] == [warning]


def test_a_price_that_was_free_is_pointed_at() -> None:
    diff = compare(catalog_of(MODEL.replace("output: 3", "output: 0")), catalog_of(MODEL))
    assert diff.warnings == ("gpt-4o: output: 0 -> 3 credits per 1,000 tokens  ! was free of charge",)


def test_models_come_and_go() -> None:
    other = MODEL.replace("gpt-4o", "other")
    diff = compare(catalog_of(MODEL), catalog_of(other))
    assert [(entry.sign, entry.name) for entry in diff.entries] == [("-", "gpt-4o"), ("+", "other")]
    lines = diff.render().splitlines()
    assert lines[0] == "- gpt-4o"
    assert "    input: 1 credits per 1,000 tokens" in lines


def test_without_a_catalog_to_compare_with_everything_is_new() -> None:
    diff = compare(None, catalog_of(MODEL))
    assert diff.version_before is None
    assert {(entry.kind, entry.name, entry.sign) for entry in diff.entries} == {
        ("model", "gpt-4o", "+"),
        ("upstream", "openai", "+"),
    }


def test_a_class_that_takes_over_its_sides_price_is_shown_with_what_it_costs_then() -> None:
    """Dropping cached_input isn't dropping a price: it is input's from then on."""
    cached = MODEL.replace("output: 3", "output: 3, cached_input: 0.25")
    diff = compare(catalog_of(cached), catalog_of(MODEL))
    assert diff.warnings == ("gpt-4o: cached_input: 0.25 -> 1 credits per 1,000 tokens  ! more than doubles",)


def test_classes_that_follow_their_side_are_not_repeated() -> None:
    (entry,) = edited("output: 3", "output: 4").entries
    assert [change.key for change in entry.changes] == ["output"]


def test_options_limits_and_fees_are_compared() -> None:
    options = MODEL.replace(
        "max_output_tokens: 100",
        "max_output_tokens: 200, per_request: 0.5, allow_store: true, family: kimi, upstream_model: x,"
        " service_tiers: {flex: {input: 0.5, output: 1.5}}, web_search: {per_request: 10},"
        " audio_input: 2, audio_output: 3",
    )
    diff = compare(catalog_of(MODEL), catalog_of(options))
    (entry,) = diff.entries
    assert {change.key: (change.before, change.after) for change in entry.changes} == {
        "upstream_model": ("gpt-4o", "x"),
        "audio_input": ("1", "2"),
        "per_request": ("0", "0.5"),
        "max_output_tokens": ("100", "200"),
        "family": ("gpt-4", "kimi"),
        "on_disconnect": ("cancel", "drain"),
        "audio": ("refused", "served"),
        "allow_store": ("false", "true"),
        "service_tiers.flex.input": (None, "0.5"),
        "service_tiers.flex.output": (None, "1.5"),
        "service_tiers.flex.per_request": (None, "0.5"),
        "service_tiers.flex.audio": (None, "refused"),
        "web_search.per_request": (None, "10"),
        "web_search.input_tokens": (None, "20,000"),
    }
    back = compare(catalog_of(options), catalog_of(MODEL)).entries[0]
    assert {(c.key, c.after) for c in back.changes if c.after is None} == {
        *(("service_tiers.flex.input", None), ("service_tiers.flex.output", None)),
        *(("service_tiers.flex.per_request", None), ("service_tiers.flex.audio", None)),
        *(("web_search.per_request", None), ("web_search.input_tokens", None)),
    }


def test_an_upstream_is_compared_without_showing_its_headers_values() -> None:
    one = UPSTREAMS.replace("api_key: none", "api_key: none, headers: {x-a: secret1}")
    two = UPSTREAMS.replace("api_key: none", "api_key_env: KEY, headers: {x-a: secret2}").replace("v1", "v2")
    diff = compare(catalog_of(MODEL, upstreams=one), catalog_of(MODEL, upstreams=two))
    (entry,) = diff.entries
    assert (entry.kind, entry.sign) == ("upstream", "~")
    assert {change.key for change in entry.changes} == {"base_url", "api_key_env", "headers"}
    assert "secret" not in diff.render()


# Margins

CREDIT = "credit_value: {amount: 0.01, currency: USD}\n"


def margins_of(cost: str, top: str = CREDIT) -> list[str]:
    model = MODEL.replace("max_output_tokens: 100", f"max_output_tokens: 100, cost: {{{cost}}}")
    return [str(margin) for entry in compare(None, catalog_of(model, top=top)).entries for margin in entry.margins]


def test_a_cost_shows_what_is_left_of_a_price() -> None:
    assert margins_of("input: 0.0025, output: 0.01") == [
        "input: margin 75 % (sold at 1, costs 0.25 credits per 1,000 tokens)",
        "output: margin 66 % (sold at 3, costs 1 credits per 1,000 tokens)",
    ]


def test_a_sale_below_cost_is_pointed_at() -> None:
    assert margins_of("input: 0.02, output: 0.03") == [
        "input: margin -100 % (sold at 1, costs 2 credits per 1,000 tokens)  ! sold below cost",
        "output: margin 0 % (sold at 3, costs 3 credits per 1,000 tokens)",
    ]


def test_a_class_that_costs_otherwise_has_a_margin_of_its_own() -> None:
    assert "cached_input: margin 87 % (sold at 1, costs 0.125 credits per 1,000 tokens)" in margins_of(
        "input: 0.0025, output: 0.01, cached_input: 0.00125"
    )


def test_a_free_model_that_costs_money_is_pointed_at() -> None:
    free = MODEL.replace("input: 1", "input: 0").replace("}", ", cost: {input: 0.001, output: 0}}")
    diff = compare(None, catalog_of(free, top=CREDIT))
    assert diff.warnings == ("gpt-4o: input: free (sold at 0, costs 0.1 credits per 1,000 tokens)  ! sold below cost",)


def test_a_cost_that_changes_is_shown_in_credits() -> None:
    before = catalog_of(MODEL.replace("}", ", cost: {input: 0.001, output: 0.01}}"), top=CREDIT)
    after = catalog_of(MODEL.replace("}", ", cost: {input: 0.003, output: 0.01}}"), top=CREDIT)
    diff = compare(before, after)
    assert "    cost.input: 0.1 -> 0.3 credits per 1,000 tokens  ! more than doubles" in diff.render().splitlines()
    assert diff.version_before != diff.version_after


def test_margins_are_shown_where_nothing_changes_too() -> None:
    costly = catalog_of(MODEL.replace("}", ", cost: {input: 1, output: 1}}"), top=CREDIT)
    diff = compare(costly, costly)
    assert not diff.changes_anything
    assert diff.render().splitlines()[:2] == ["Nothing would change.", "= gpt-4o"]
    assert len(diff.warnings) == 2
