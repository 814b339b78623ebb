"""What `farebox stripe check` looks at: whether the key, its permissions, the endpoint and the secrets fit together.

Everything is only read. Each line says what was found, and of what is wrong what to do about it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import stripe

from proxy.control.billing.endpoints import API_VERSION, Endpoint, endpoints_at
from proxy.control.billing.errors import StripeError
from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.stripe_api import StripeApi

__all__ = ["Finding", "check_stripe"]

# What a restricted key has to be allowed to read; what it must write besides stands in docs/stripe.md.
_READS: dict[str, Callable[[stripe.StripeClient], Any]] = {
    "PaymentIntents": lambda client: client.v1.payment_intents.list({"limit": 1}),
    "Checkout Sessions": lambda client: client.v1.checkout.sessions.list({"limit": 1}),
    "Customers": lambda client: client.v1.customers.list({"limit": 1}),
    "Refunds": lambda client: client.v1.refunds.list({"limit": 1}),
    "Disputes": lambda client: client.v1.disputes.list({"limit": 1}),
    "Invoices": lambda client: client.v1.invoices.list({"limit": 1}),
    "Events": lambda client: client.v1.events.list({"limit": 1}),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what was found. ``ok`` None: worth knowing, and nothing is wrong."""

    name: str
    ok: bool | None
    found: str


async def check_stripe(api: StripeApi, *, url: str | None, secrets: Sequence[str]) -> list[Finding]:
    """Look at everything. ``url``: the endpoint's address; None: any that ends as ours do."""
    mode = "live" if api.livemode else "test"
    findings = [Finding("key", True, f"it is a key of {mode} mode")]
    for what, read in _READS.items():
        findings.append(await _readable(api, what, read))
    findings.append(_secrets(secrets))
    try:
        endpoints = await endpoints_at(api, url)
    except StripeError as error:
        return [*findings, Finding("endpoint", False, str(error))]
    if not endpoints:
        where = url or "an address that ends in /webhooks/stripe"
        return [*findings, Finding("endpoint", False, f"none at {where} in {mode} mode: run `farebox stripe setup`")]
    for endpoint in endpoints:
        findings += _endpoint(endpoint)
    return findings


async def _readable(api: StripeApi, what: str, read: Callable[[stripe.StripeClient], Any]) -> Finding:
    def look(client: stripe.StripeClient) -> None:
        read(client)

    try:
        await api.call(look)
    except StripeError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, "can be read")


def _secrets(secrets: Sequence[str]) -> Finding:
    if not secrets:
        return Finding("secrets", False, "FAREBOX_STRIPE_WEBHOOK_SECRETS is not set: no webhook will be believed")
    count = f"{len(secrets)} webhook secret{'' if len(secrets) == 1 else 's'}"
    return Finding("secrets", True, f"{count} in FAREBOX_STRIPE_WEBHOOK_SECRETS")


def _endpoint(endpoint: Endpoint) -> list[Finding]:
    name = f"endpoint {endpoint.id}"
    state = "enabled" if endpoint.enabled else "disabled: run `farebox stripe setup`"
    findings = [Finding(name, endpoint.enabled, f"{endpoint.url} is {state}")]
    if endpoint.missing:
        findings.append(
            Finding(name, False, f"isn't told of {', '.join(endpoint.missing)}: run `farebox stripe setup`")
        )
    else:
        findings.append(Finding(name, True, f"is told of all {len(EVENT_TYPES)} events that are acted on"))
    if endpoint.superfluous:
        findings.append(Finding(name, None, f"is also told of {', '.join(endpoint.superfluous)}, for nothing"))
    if endpoint.api_version != API_VERSION:
        theirs = endpoint.api_version or "the Stripe account's default version"
        # Of an event nothing is read but what it is about: the object is fetched in our own version.
        findings.append(Finding(name, None, f"is told in {theirs}, not {API_VERSION}: no harm, it isn't read"))
    return findings
