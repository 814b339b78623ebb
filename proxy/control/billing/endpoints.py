"""Farebox's webhook endpoint at Stripe: made, brought up to date, looked at, replaced.

An endpoint is ours if its address is the one that was named. It is subscribed to exactly the events that are acted on,
in the library's own version of the API, and Stripe shows its secret once, when it is made. So a new secret is a new
endpoint beside the old one: both deliver, which harms nothing, until the old one is retired.
"""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

import stripe
from stripe.params import WebhookEndpointCreateParams, WebhookEndpointUpdateParams

from proxy.control.billing.event_types import EVENT_TYPES
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import Members, members
from proxy.control.billing.webhooks import PATH
from proxy.core.errors import InvalidRequest

__all__ = ["API_VERSION", "Endpoint", "SetUp", "endpoint_url", "endpoints_at", "set_up"]

API_VERSION = stripe.api_version
"""What stripe-python speaks, and so what an endpoint should be told in."""
DESCRIPTION = "Farebox"
PAGE = 100


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A webhook endpoint as Stripe has it. ``api_version`` None: the Stripe account's own default."""

    id: str
    url: str
    enabled: bool
    events: frozenset[str]
    api_version: str | None
    created: int

    @property
    def missing(self) -> list[str]:
        """Events that are acted on here and that it isn't subscribed to."""
        return [] if "*" in self.events else sorted(set(EVENT_TYPES) - self.events)

    @property
    def superfluous(self) -> list[str]:
        """Events that it is subscribed to and that mean nothing here."""
        return sorted(self.events - set(EVENT_TYPES))


@dataclass(frozen=True, slots=True)
class SetUp:
    """What was done: ``made``, ``updated`` or nothing (``unchanged``). ``secret``: of one that was made, shown once.

    ``retired``: the ids of the others at this address that were removed.
    """

    endpoint: Endpoint
    done: str
    secret: str | None
    retired: tuple[str, ...]


def endpoint_url(text: str, *, livemode: bool) -> str:
    """The endpoint's address for what an operator typed: ``https://api.example.com`` is enough.

    Raises InvalidRequest for what Stripe couldn't deliver to. Plain http only in test mode, to this very machine.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    problem = None
    if parts.scheme not in {"http", "https"} or not host or port == 0:
        problem = "is not of the form https://HOST"
    elif parts.username is not None or parts.query or parts.fragment:
        problem = "must hold no user, query or fragment"
    elif parts.scheme == "http" and (livemode or not _is_here(host)):
        problem = "must be https://: Stripe delivers to nothing else in live mode, and nobody should read it on its way"
    if problem is not None:
        raise InvalidRequest(f"The endpoint's address {problem}.", code="invalid_value", param="url")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path or PATH, "", ""))


async def endpoints_at(api: StripeApi, url: str | None) -> list[Endpoint]:
    """Stripe's webhook endpoints of this address, the newest first; None: of every address that ends as ours do."""

    def look(client: stripe.StripeClient) -> list[Endpoint]:
        found = client.v1.webhook_endpoints.list({"limit": PAGE})
        return [_endpoint(members(item)) for item in found.auto_paging_iter()]

    found = [
        one
        for one in await api.call(look)
        if (one.url == url if url is not None else one.url.rstrip("/").endswith(PATH))
    ]
    return sorted(found, key=lambda one: (one.created, one.id), reverse=True)


async def set_up(api: StripeApi, url: str, *, anew: bool = False, retire_others: bool = False) -> SetUp:
    """Make the endpoint, or bring the one that is there up to date: its events, and that it is enabled.

    ``anew``: make another one beside it, for a new secret. ``retire_others``: remove all but the newest.
    Raises StripeAway and StripeRefused.
    """
    there = await endpoints_at(api, url)
    secret: str | None = None
    if anew or not there:
        newest, secret = await _make(api, url)
        done = "made"
    else:
        newest, *there = there
        done = "unchanged"
        if newest.missing or newest.superfluous or not newest.enabled:
            newest = await _update(api, newest.id)
            done = "updated"
    retired = tuple(one.id for one in there) if retire_others else ()
    for id in retired:
        await _remove(api, id)
    return SetUp(newest, done, secret, retired)


async def _make(api: StripeApi, url: str) -> tuple[Endpoint, str]:
    params: dict[str, Any] = {
        "url": url,
        "enabled_events": sorted(EVENT_TYPES),
        "api_version": API_VERSION,
        "description": DESCRIPTION,
    }

    def make(client: stripe.StripeClient) -> tuple[Endpoint, str]:
        made = members(client.v1.webhook_endpoints.create(cast(WebhookEndpointCreateParams, params)))
        return _endpoint(made), made.text("secret")

    return await api.call(make)


async def _update(api: StripeApi, id: str) -> Endpoint:
    params: dict[str, Any] = {"enabled_events": sorted(EVENT_TYPES), "disabled": False}

    def update(client: stripe.StripeClient) -> Endpoint:
        return _endpoint(members(client.v1.webhook_endpoints.update(id, cast(WebhookEndpointUpdateParams, params))))

    return await api.call(update)


async def _remove(api: StripeApi, id: str) -> None:
    def remove(client: stripe.StripeClient) -> None:
        client.v1.webhook_endpoints.delete(id)

    await api.call(remove)


def _endpoint(found: Members) -> Endpoint:
    return Endpoint(
        id=found.text("id"),
        url=found.text("url"),
        enabled=found.text("status") == "enabled",
        events=frozenset(found.texts("enabled_events")),
        api_version=found.text_or_none("api_version"),
        created=found.number("created"),
    )


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
