"""Webhooks as Stripe writes them, signed by its own library."""

import json
import time
from typing import Any

import stripe

SECRET = "whsec_9f3cTheEndpointsOwn"
OLD_SECRET = "whsec_0a1bTheOneBeforeIt"


def an_event(event_id: str, event_type: str, about: str, object_id: str, **more: Any) -> dict[str, Any]:
    """A snapshot event about the object of this kind and id; ``more``: its other members, or these ones changed."""
    event = {
        "id": event_id,
        "object": "event",
        "api_version": "2026-10-28.endive",
        "created": 1_790_000_000,
        "data": {"object": {"id": object_id, "object": about}},
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": event_type,
    }
    return event | more


def a_session_event(number: str, **more: Any) -> dict[str, Any]:
    """A checkout is completed."""
    return an_event(f"evt_{number}", "checkout.session.completed", "checkout.session", f"cs_test_{number}", **more)


def body_of(event: dict[str, Any]) -> bytes:
    """As Stripe sends it: indented, in UTF-8."""
    return json.dumps(event, indent=2, ensure_ascii=False).encode()


def signature(body: bytes, *, secret: str = SECRET, at: float | None = None) -> str:
    """The header's value, by stripe's own helper."""
    timestamp = int(time.time() if at is None else at)
    header: str = stripe.WebhookSignature.generate_signature_header(body.decode(), secret, timestamp)
    return header
