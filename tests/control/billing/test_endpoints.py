"""The webhook endpoint at Stripe: made once, brought up to date, replaced for a new secret; by the real client."""

from collections.abc import Iterator

import pytest
import stripe

from proxy.control.billing.checks import Finding, check_stripe
from proxy.control.billing.endpoints import API_VERSION, endpoint_url, endpoints_at, set_up
from proxy.control.billing.errors import StripeRefused
from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.stripe_api import StripeApi
from proxy.core.errors import InvalidRequest
from tests.fakes.stripe import FakeStripe

URL = "https://farebox.example.com/webhooks/stripe"


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as opened:
        yield opened


@pytest.fixture
def api(fake: FakeStripe) -> Iterator[StripeApi]:
    opened = StripeApi(fake.key, url=fake.url)
    yield opened
    opened.close()


def client_of(fake: FakeStripe) -> stripe.StripeClient:
    return stripe.StripeClient(fake.key, base_addresses={"api": fake.url})


async def test_it_is_made_with_exactly_the_events_that_are_acted_on(fake: FakeStripe, api: StripeApi) -> None:
    made = await set_up(api, URL)
    assert (made.done, made.retired) == ("made", ())
    assert made.secret is not None
    assert made.secret.startswith("whsec_")
    assert fake.webhooks.secrets[made.endpoint.id] == made.secret
    [there] = client_of(fake).v1.webhook_endpoints.list().data
    assert (there.url, there.status, there.api_version) == (URL, "enabled", API_VERSION)
    assert set(there.enabled_events) == set(EVENT_TYPES)


async def test_again_it_is_the_same_one_and_its_secret_is_not_shown(fake: FakeStripe, api: StripeApi) -> None:
    made = await set_up(api, URL)
    again = await set_up(api, URL)
    assert (again.done, again.secret, again.endpoint) == ("unchanged", None, made.endpoint)
    assert len(await endpoints_at(api, URL)) == 1


async def test_events_and_a_disabled_state_are_brought_up_to_date(fake: FakeStripe, api: StripeApi) -> None:
    old = client_of(fake).v1.webhook_endpoints.create(
        {"url": URL, "enabled_events": ["charge.refunded", "refund.created"]}
    )
    client_of(fake).v1.webhook_endpoints.update(old.id, {"disabled": True})
    found = await set_up(api, URL)
    assert (found.done, found.endpoint.id, found.secret) == ("updated", old.id, None)
    assert (found.endpoint.enabled, found.endpoint.missing, found.endpoint.superfluous) == (True, [], [])


async def test_a_new_secret_is_a_new_endpoint_and_the_old_one_is_retired_later(
    fake: FakeStripe, api: StripeApi
) -> None:
    first = await set_up(api, URL)
    other = await set_up(api, "https://other.example.com/webhooks/stripe")
    fake.clock.advance(60)
    second = await set_up(api, URL, anew=True)
    assert second.secret not in (None, first.secret)
    assert [one.id for one in await endpoints_at(api, URL)] == [second.endpoint.id, first.endpoint.id]
    retired = await set_up(api, URL, retire_others=True)
    assert (retired.done, retired.endpoint.id, retired.retired) == (
        "unchanged",
        second.endpoint.id,
        (first.endpoint.id,),
    )
    assert {one.id for one in await endpoints_at(api, None)} == {second.endpoint.id, other.endpoint.id}


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("https://farebox.example.com", URL),
        ("https://farebox.example.com/", URL),
        (URL, URL),
        (URL + "/", URL),
        ("https://example.com:8443/billing/hook", "https://example.com:8443/billing/hook"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/webhooks/stripe"),
        ("http://[::1]:8080", "http://[::1]:8080/webhooks/stripe"),
    ],
)
def test_a_host_is_enough_of_an_address(typed: str, url: str) -> None:
    assert endpoint_url(typed, livemode=False) == url


@pytest.mark.parametrize(
    ("typed", "livemode"),
    [
        ("farebox.example.com", False),
        ("https://", False),
        ("ftp://farebox.example.com", False),
        ("http://farebox.example.com", False),
        ("http://127.0.0.1:8080", True),
        ("https://user:secret@farebox.example.com", False),
        ("https://farebox.example.com/?a=b", False),
        ("https://[farebox", False),
        ("https://farebox.example.com:port", False),
    ],
)
def test_what_stripe_could_not_deliver_to_is_refused(typed: str, livemode: bool) -> None:
    with pytest.raises(InvalidRequest) as refused:
        endpoint_url(typed, livemode=livemode)
    assert "secret" not in refused.value.message


def wrong(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.ok is False]


async def test_check_finds_nothing_wrong_after_setup(api: StripeApi) -> None:
    await set_up(api, URL)
    findings = await check_stripe(api, url=None, secrets=["whsec_x"])
    assert wrong(findings) == []
    assert findings[0].found == "it is a key of test mode"


async def test_check_says_what_is_missing(fake: FakeStripe, api: StripeApi) -> None:
    findings = await check_stripe(api, url=URL, secrets=[])
    assert wrong(findings) == ["secrets", "endpoint"]
    old = client_of(fake).v1.webhook_endpoints.create(
        {"url": URL, "enabled_events": ["refund.created", "charge.failed"]}
    )
    client_of(fake).v1.webhook_endpoints.update(old.id, {"disabled": True})
    findings = [one for one in await check_stripe(api, url=URL, secrets=["whsec_x"]) if one.name.startswith("endpoint")]
    assert [finding.ok for finding in findings] == [False, False, None, None]
    assert "checkout.session.completed" in findings[1].found
    assert "charge.failed" in findings[2].found


async def test_check_of_another_key_fails_and_repeats_nothing_of_it(fake: FakeStripe) -> None:
    stranger = StripeApi("key_of_somebody_else", url=fake.url, retries=0)
    findings = await check_stripe(stranger, url=URL, secrets=["whsec_x"])
    assert len(wrong(findings)) == 8
    assert not any("of_somebody_else" in finding.found for finding in findings)
    with pytest.raises(StripeRefused):
        await set_up(stranger, URL)
    stranger.close()
