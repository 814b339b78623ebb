"""Webhook endpoints and events, as the API shows them. Events are listed for 30 days."""

import secrets
from collections.abc import Sequence

import stripe
from stripe.params import (
    AccountRetrieveCurrentParams,
    BalanceRetrieveParams,
    EventListParams,
    EventRetrieveParams,
    WebhookEndpointCreateParams,
    WebhookEndpointDeleteParams,
    WebhookEndpointListParams,
    WebhookEndpointRetrieveParams,
    WebhookEndpointUpdateParams,
)

from tests.fakes.stripe.api import Call, Endpoint, listed, merged
from tests.fakes.stripe.errors import invalid
from tests.fakes.stripe.shapes import Object
from tests.fakes.stripe.state import State

__all__ = ["Webhooks"]

LISTED_SECONDS = 30 * 24 * 3600
ENDPOINTS_MAX = 16


class Webhooks:
    """``secrets`` of endpoints are shown when they are made, and never again."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.secrets: dict[str, str] = {}
        self.delivered: dict[str, set[str]] = {}
        """By event: the endpoints that took it."""

    def endpoints(self) -> Sequence[Endpoint]:
        return (
            Endpoint("POST", "/v1/webhook_endpoints", WebhookEndpointCreateParams, self._create),
            Endpoint("GET", "/v1/webhook_endpoints", WebhookEndpointListParams, self._list),
            Endpoint("GET", "/v1/webhook_endpoints/{id}", WebhookEndpointRetrieveParams, self._retrieve),
            Endpoint("POST", "/v1/webhook_endpoints/{id}", WebhookEndpointUpdateParams, self._update),
            Endpoint("DELETE", "/v1/webhook_endpoints/{id}", WebhookEndpointDeleteParams, self._delete),
            Endpoint("GET", "/v1/events", EventListParams, self._list_events),
            Endpoint("GET", "/v1/events/{id}", EventRetrieveParams, self._retrieve_event),
            Endpoint("GET", "/v1/account", AccountRetrieveCurrentParams, self._account),
            Endpoint("GET", "/v1/balance", BalanceRetrieveParams, self._balance),
        )

    def subscribed(self, event: Object) -> list[Object]:
        """The endpoints that an event is for."""
        return [
            one
            for one in self._state.all("webhook_endpoint", event["livemode"])
            if one["status"] == "enabled" and {"*", event["type"]} & set(one["enabled_events"])
        ]

    def add(self, live: bool, url: str, events: Sequence[str], *, secret: str | None = None) -> Object:
        """A new one, with a secret of its own or that one."""
        endpoint = self._state.add(
            stripe.WebhookEndpoint,
            "we",
            live,
            url=url,
            enabled_events=list(events),
            status="enabled",
            metadata={},
        )
        self.secrets[endpoint["id"]] = secret or "whsec_" + secrets.token_hex(16)
        return endpoint

    def _create(self, call: Call) -> Object:
        params = call.params
        if not params["url"].startswith(("http://", "https://") if not call.live else "https://"):
            raise invalid("Invalid URL: An explicit scheme (such as https) must be provided.", param="url")
        if sum(1 for _ in self._state.all("webhook_endpoint", call.live)) >= ENDPOINTS_MAX:
            raise invalid(f"You have reached the maximum of {ENDPOINTS_MAX} webhook endpoints.")
        endpoint = self.add(call.live, params["url"], params["enabled_events"])
        endpoint |= {
            "api_version": params.get("api_version"),
            "description": params.get("description"),
            "metadata": merged({}, params.get("metadata")),
        }
        return endpoint | {"secret": self.secrets[endpoint["id"]]}

    def _update(self, call: Call) -> Object:
        endpoint = self._state.get("webhook_endpoint", call.id, call.live)
        for name in ("url", "enabled_events", "description"):
            if name in call.params:
                endpoint[name] = call.params[name]
        if "disabled" in call.params:
            endpoint["status"] = "disabled" if call.params["disabled"] else "enabled"
        endpoint["metadata"] = merged(endpoint["metadata"], call.params.get("metadata"))
        return endpoint

    def _retrieve(self, call: Call) -> Object:
        return self._state.get("webhook_endpoint", call.id, call.live)

    def _delete(self, call: Call) -> Object:
        endpoint = self._state.get("webhook_endpoint", call.id, call.live)
        self._state.remove(endpoint["id"])
        return {"id": endpoint["id"], "object": "webhook_endpoint", "deleted": True}

    def _list(self, call: Call) -> Object:
        return listed(self._state.all("webhook_endpoint", call.live), call, "/v1/webhook_endpoints")

    def _list_events(self, call: Call) -> Object:
        since = self._state.clock.now() - LISTED_SECONDS
        kinds = call.params.get("types", [])
        wanted = call.params.get("delivery_success")
        events = (
            one
            for one in self._state.all("event", call.live)
            if one["created"] > since
            and (not kinds or one["type"] in kinds)
            and wanted in (None, not self.pending(one))
        )
        return listed(events, call, "/v1/events", filters=("type",))

    def pending(self, event: Object) -> int:
        """How many endpoints haven't taken it yet."""
        taken = self.delivered.get(event["id"], set())
        return sum(1 for one in self.subscribed(event) if one["id"] not in taken)

    def _retrieve_event(self, call: Call) -> Object:
        event = self._state.get("event", call.id, call.live)
        return event | {"pending_webhooks": self.pending(event)}

    def _account(self, call: Call) -> Object:
        return {
            "id": "acct_1FareboxFake0000",
            "object": "account",
            "business_profile": {"name": "Fake"},
            "charges_enabled": True,
            "country": "US",
            "default_currency": "usd",
            "details_submitted": True,
            "email": None,
            "payouts_enabled": True,
            "type": "standard",
        }

    def _balance(self, call: Call) -> Object:
        return {"object": "balance", "available": [], "pending": [], "livemode": call.live}
