"""The events are Stripe's own, by the names that its library knows, each about the object that its name says."""

import inspect
import re
from pathlib import Path

from stripe.params import _webhook_endpoint_create_params

from proxy.control.billing.event_types import EVENT_TYPES, Subject


def test_stripe_knows_every_event_by_this_name() -> None:
    known = set(re.findall(r'"([a-z_.0-9]+)"', inspect.getsource(_webhook_endpoint_create_params)))
    assert len(known) > 200
    assert set(EVENT_TYPES) <= known


def test_an_event_is_about_the_object_that_its_name_begins_with() -> None:
    for name, subject in EVENT_TYPES.items():
        assert name.removeprefix("charge.").startswith(f"{subject}.")
    assert set(EVENT_TYPES.values()) == set(Subject)


def test_the_page_names_exactly_these() -> None:
    page = (Path(__file__).parents[3] / "docs" / "stripe.md").read_text()
    [table] = re.findall(r"^## The events$(.*?)^## ", page, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `([a-z_.]+)` \|", table, flags=re.MULTILINE) == list(EVENT_TYPES)
