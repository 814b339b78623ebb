"""pricing.yaml and config/upstreams.yaml become a Catalog, or every problem is named."""

from pathlib import Path

from proxy.core.catalog_files import load_catalog

ROOT = Path(__file__).parents[2]


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
