"""Orders, packs and payments in quarantine as JSON: for customers and for operators.

Credits are decimal strings; money is a decimal string with all the decimals of its currency, beside its code.
"""

from typing import Any

from proxy.control.views import View, time_text
from proxy.core.currencies import format_amount
from proxy.core.money import format_credits
from proxy.core.packs import CustomAmounts, Offers, Pack
from proxy.ledger.orders import Order, Quarantined

__all__ = ["offers_view", "order_view", "quarantined_view"]

_UNPAID = frozenset({"created", "open"})


def order_view(order: Order, *, internal: bool = False) -> View:
    """An order. ``url``: where it is paid, while it can be; ``received`` and the rest of it once it is paid.

    ``internal``: with what an operator looks for at Stripe.
    """
    view: dict[str, Any] = {
        "object": "order",
        "id": str(order.id),
        "state": order.state,
        "kind": order.kind,
        "pack": order.pack,
        "credits": format_credits(order.credits),
        "bonus": format_credits(order.bonus),
        "price": format_amount(order.price, order.currency),
        "currency": order.currency.upper(),
        "livemode": order.livemode,
        "url": order.url if order.state in _UNPAID else None,
        "received": _money(order.received, order),
        "discount": _money(order.discount, order),
        "tax": _money(order.tax, order),
        "credits_taken_back": format_credits(order.taken + order.bonus_taken),
        "created_at": time_text(order.created_at),
        "paid_at": time_text(order.paid_at),
    }
    if internal:
        view |= {
            "account": str(order.account_id),
            "session": order.session_id,
            "payment_intent": order.payment_intent,
            "invoice": order.invoice,
            "customer": order.customer,
            "problem": order.problem,
            "actor": order.actor,
            "changed_at": time_text(order.changed_at),
        }
    return view


def offers_view(offers: Offers) -> View:
    """What is sold: packs, and between which limits an amount can be chosen."""
    return {
        "object": "list",
        "data": [_pack(pack) for pack in offers.packs.values()],
        "custom_amounts": [_amounts(amounts) for amounts in offers.custom_amounts.values()],
    }


def quarantined_view(payment: Quarantined) -> View:
    """A payment that doesn't match the order that it names."""
    money = None
    if payment.received is not None and payment.currency is not None:
        money = format_amount(payment.received, payment.currency)
    return {
        "object": "quarantined_payment",
        "id": payment.payment,
        "order": None if payment.order_id is None else str(payment.order_id),
        "account": None if payment.account_id is None else str(payment.account_id),
        "reason": payment.reason,
        "received": money,
        "currency": None if payment.currency is None else payment.currency.upper(),
        "livemode": payment.livemode,
        "session": payment.session_id,
        "seen_at": time_text(payment.seen_at),
        "resolution": payment.resolution,
        "resolved_at": time_text(payment.resolved_at),
        "resolved_by": payment.resolved_by,
    }


def _money(amount: int | None, order: Order) -> str | None:
    return None if amount is None else format_amount(amount, order.currency)


def _pack(pack: Pack) -> View:
    return {
        "object": "pack",
        "id": pack.id,
        "name": pack.name,
        "credits": format_credits(pack.credits),
        "bonus": format_credits(pack.bonus),
        "price": format_amount(pack.price, pack.currency),
        "currency": pack.currency.upper(),
        "expires_days": _days(pack.credits_seconds),
        "bonus_expires_days": _days(pack.bonus_seconds or pack.credits_seconds) if pack.bonus else None,
    }


def _amounts(amounts: CustomAmounts) -> View:
    return {
        "object": "custom_amounts",
        "currency": amounts.currency.upper(),
        "least": format_amount(amounts.least, amounts.currency),
        "most": format_amount(amounts.most, amounts.currency),
        "credits_per_minor_unit": format_credits(amounts.credits_per_minor),
        "expires_days": _days(amounts.credits_seconds),
    }


def _days(seconds: int | None) -> int | None:
    return None if seconds is None else seconds // 86_400
