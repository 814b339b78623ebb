"""Payments without their customer: the calls to Stripe for a PaymentIntent that is confirmed where it is made.

What is sent follows from the order's row alone, and the idempotency key is the order's id: asked again, by whomever and
for as long as Stripe keeps the key (a day: https://docs.stripe.com/api/idempotent_requests), it is the same payment.
There is never a second key for an order. After that day one looks for what was made, and makes nothing.
"""

from datetime import timedelta
from itertools import islice
from typing import Any

import stripe

from proxy.control.billing.errors import StripeRefused
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.billing.stripe_objects import PaymentIntent, members, payment_intent
from proxy.control.billing.till import ACCOUNT_KEY, ORDER_KEY
from proxy.ledger.orders import Order

__all__ = ["cancel_payment", "find_payment", "request_payment"]

CLOCK_ERROR = timedelta(days=1)
"""By which the ledger's clock and Stripe's may differ: what isn't looked at counts as never made."""
WITHIN = timedelta(days=2)
"""After an order's making: nothing is made for it a day later."""
LISTED_MAX = 1_000


async def request_payment(api: StripeApi, order: Order) -> PaymentIntent:
    """Charge the order's payment method for it, or learn what came of that. Raises StripeRefused where it is declined:
    with the PaymentIntent that this has left behind; and StripeAway, after which it may be asked again."""
    params: Any = {
        "amount": order.price,
        "currency": order.currency,
        "customer": order.customer,
        "payment_method": order.payment_method,
        "off_session": True,
        "confirm": True,
        # A payment that would lead its customer elsewhere can't be made without them.
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "metadata": {ORDER_KEY: str(order.id), ACCOUNT_KEY: str(order.account_id)},
    }
    options: Any = {"idempotency_key": str(order.id)}
    return await api.call(lambda client: payment_intent(members(client.v1.payment_intents.create(params, options))))


async def find_payment(api: StripeApi, order: Order) -> PaymentIntent | None:
    """The PaymentIntent that was made for the order; None where there is none.

    Among the customer's own, by the metadata that it was made with: the list shows what was just made, which Stripe's
    search doesn't for a minute.
    """
    since, until = order.created_at - CLOCK_ERROR, order.created_at + WITHIN
    created: Any = {"gte": int(since.timestamp()), "lte": int(until.timestamp())}
    params: Any = {"customer": order.customer, "created": created, "limit": 100}

    def look(client: stripe.StripeClient) -> PaymentIntent | None:
        for item in islice(client.v1.payment_intents.list(params).auto_paging_iter(), LISTED_MAX):
            found = payment_intent(members(item))
            if found.metadata.get(ORDER_KEY) == str(order.id):
                return found
        return None

    return await api.call(look)


async def cancel_payment(api: StripeApi, id: str) -> PaymentIntent:
    """As it is after trying to cancel it: canceled, unless money has come or is on its way."""
    try:
        return await api.call(lambda client: payment_intent(members(client.v1.payment_intents.cancel(id))))
    except StripeRefused as refused:
        if refused.code != "payment_intent_unexpected_state":
            raise
        return await api.payment_intent(id)
