"""How the ledger's rows look outside: the JSON of the self-service and admin APIs and of the command's ``--json``.

One shape for one thing, wherever it is shown. Amounts are decimal strings in credits, exact; times are UTC in RFC 3339;
lists are OpenAI's (``object: list``, ``data``, ``has_more``).
"""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from typing import Any

from proxy.core.money import format_credits
from proxy.core.pricing import TOKENS_PER_RATE
from proxy.core.usage import TOKEN_CLASSES, Usage
from proxy.ledger.outbox import Message
from proxy.ledger.reader import DayUsage
from proxy.ledger.records import Account, ApiKey, Ended, Freeze, Lot, Transfer
from proxy.ledger.stripe_events import EventState

__all__ = [
    "View",
    "account_view",
    "credits_view",
    "exact_credits",
    "freeze_view",
    "key_view",
    "list_view",
    "lot_view",
    "message_view",
    "page",
    "receipt_view",
    "stripe_event_view",
    "time_text",
    "tokens_view",
    "transaction_id",
    "transfer_view",
    "usage_view",
]

View = dict[str, Any]


def account_view(account: Account) -> View:
    """An account as its operator sees it."""
    return {
        "object": "account",
        "id": str(account.id),
        "name": account.name,
        "external_id": account.external_id,
        "email": account.email,
        **_money(account),
        "frozen_at": time_text(account.frozen_at),
        "created_at": time_text(account.created_at),
    }


def credits_view(account: Account, expiring: Sequence[Lot]) -> View:
    """What an account has, as its own key sees it; ``expiring``: soon. ``frozen_at`` null: calls are admitted."""
    return {
        "object": "credits",
        "account": str(account.id),
        **_money(account),
        "expiring": [{"amount": format_credits(lot.free), "expires_at": time_text(lot.expires_at)} for lot in expiring],
        "frozen_at": time_text(account.frozen_at),
    }


def lot_view(lot: Lot, *, internal: bool) -> View:
    """What a grant or a purchase has left. ``id`` is that of the transaction that brought it. ``internal`` adds what
    only the operator sees: its place in the order, and what of it is spoken for."""
    view: View = {
        "object": "lot",
        "id": f"{lot.account_id}-{lot.version}",
        "kind": lot.kind,
        "amount": format_credits(lot.amount),
        "remaining": format_credits(lot.remaining),
        "expires_at": time_text(lot.expires_at),
        "order": None if lot.order_id is None else str(lot.order_id),
        "created_at": time_text(lot.created_at),
    }
    if internal:
        view |= {
            "priority": lot.priority,
            "reserved": format_credits(lot.reserved),
            "owed": format_credits(lot.owed),
        }
    return view


def freeze_view(freeze: Freeze) -> View:
    """Why an account is frozen, or was."""
    return {
        "object": "freeze",
        "reference": freeze.reference,
        "reason": freeze.reason,
        "actor": freeze.actor,
        "created_at": time_text(freeze.created_at),
        "lifted_at": time_text(freeze.lifted_at),
        "lifted_by": freeze.lifted_by,
    }


def key_view(key: ApiKey) -> View:
    """A key without its secret. ``models`` null: all of them; ``spend_limit`` null: none."""
    return {
        "object": "api_key",
        "id": key.id,
        "account": str(key.account_id),
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "profile": key.profile,
        "affordable_cap": key.affordable_cap,
        "spend_limit": None if key.spend_limit is None else format_credits(key.spend_limit),
        "spent": None if key.spend_limit is None else format_credits(key.spent),
        "created_at": time_text(key.created_at),
        "expires_at": time_text(key.expires_at),
        "revoked_at": time_text(key.revoked_at),
        "rotated_from": key.rotated_from,
    }


def transfer_view(transfer: Transfer, *, internal: bool) -> View:
    """A transfer as a line of an account's statement: ``amount`` is negative where credits left the account.

    ``internal`` adds what only the operator sees: the other side, who did it and why.
    """
    account = str(transfer.account_id)
    other = transfer.credit if transfer.debit == account else transfer.debit
    view: View = {
        "object": "transaction",
        "id": transaction_id(transfer),
        "kind": transfer.kind,
        "amount": format_credits(-transfer.amount if transfer.debit == account else transfer.amount),
        "balance_after": format_credits(transfer.balance_after),
        "debt_after": format_credits(transfer.debt_after),
        "request_id": None if transfer.hold_id is None else str(transfer.hold_id),
        "reference": transfer.reference,
        "created_at": time_text(transfer.created_at),
    }
    if internal:
        view |= {"account": account, "other_side": other, "actor": transfer.actor, "reason": transfer.reason}
    return view


def transaction_id(transfer: Transfer) -> str:
    """``ACCOUNT-VERSION``: unique over all accounts, and in an account's order."""
    return f"{transfer.account_id}-{transfer.version}"


def message_view(message: Message) -> View:
    """A message to the operator's endpoint. ``error``: what the last attempt failed with."""
    return {
        "object": "message",
        "id": message.webhook_id,
        "type": message.type,
        "account": str(message.account_id),
        "state": message.state,
        "attempts": message.attempts,
        "error": message.error,
        "created_at": time_text(message.created_at),
        "next_at": time_text(message.next_at) if message.state == "waiting" else None,
        "delivered_at": time_text(message.delivered_at),
        "given_up_at": time_text(message.given_up_at),
        "payload": _stored(message.payload),
    }


def list_view(data: Sequence[View], *, has_more: bool) -> View:
    """One page of a list. ``last_id`` is what the next page's ``after`` takes."""
    ids = [item.get("id") for item in data]
    return {
        "object": "list",
        "data": list(data),
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }


def receipt_view(ended: Ended) -> View:
    """Why a request cost what it did."""
    charge = ended.charge or 0
    settled = ended.charge is not None
    return {
        "object": "receipt",
        "id": str(ended.hold_id),
        "account": str(ended.account_id),
        "key_id": ended.key_id,
        "state": ended.state,
        "model": ended.model,
        "variant": ended.variant,
        "price_version": ended.price_version,
        "opened_at": time_text(ended.opened_at),
        "ended_at": time_text(ended.ended_at),
        "quote": _stored(ended.quote),
        "held": format_credits(ended.amount),
        "usage": _usage_view(ended),
        "prices": _price_rows(ended),
        "capped": ended.capped,
        "ending": ended.ending,
        "answer": _stored(ended.receipt),
        "charge": format_credits(charge) if settled else None,
        "released": format_credits(max(0, ended.amount - charge)) if settled else None,
        "overrun": format_credits(ended.overrun),
        "reversed": format_credits(ended.reversed),
    }


def usage_view(rows: Sequence[DayUsage], first: date, last: date) -> View:
    """What was used by day and model, the newest day first. ``charged`` is less what was given back since."""
    days = [
        {
            "object": "usage",
            "date": row.day.isoformat(),
            "model": row.model,
            "requests": row.requests,
            "tokens": tokens_view(row.usage),
            "charged": format_credits(row.charge),
        }
        for row in rows
    ]
    return {
        "object": "list",
        "data": days,
        "has_more": False,
        "from": first.isoformat(),
        "to": last.isoformat(),
        "requests": sum(row.requests for row in rows),
        "charged": format_credits(sum(row.charge for row in rows)),
    }


def stripe_event_view(state: EventState) -> View:
    """A webhook and what became of it. ``outcome`` null: it is still to be processed, and ``error`` says what went
    wrong when it was last tried; ``about``: the id of the object that it names."""
    return {
        "object": "stripe_event",
        "id": state.event.id,
        "type": state.event.type,
        "livemode": state.event.livemode,
        "about": state.event.object_id or None,
        "created_at": time_text(state.event.created),
        "received_at": time_text(state.received_at),
        "attempts": state.attempts,
        "tried_at": time_text(state.tried_at),
        "error": state.error,
        "processed_at": time_text(state.processed_at),
        "outcome": state.outcome,
    }


def tokens_view(usage: Usage) -> View:
    """Tokens by class."""
    return dict(zip(TOKEN_CLASSES, usage.as_tuple(), strict=True))


def time_text(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC, to the microsecond."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def exact_credits(numerator: int, places: int) -> str:
    """``numerator / 10**places`` in decimal, exact, without trailing zeros."""
    whole, rest = divmod(numerator, 10**places)
    return f"{whole}.{rest:0{places}d}".rstrip("0") if rest else str(whole)


def _money(account: Account) -> View:
    return {
        "balance": format_credits(account.balance),
        "held": format_credits(account.held),
        "available": format_credits(account.available),
        "debt": format_credits(account.debt),
    }


def _usage_view(ended: Ended) -> View | None:
    if ended.usage is None:
        return None
    return {"source": ended.usage_source, "tokens": tokens_view(ended.usage)}


def _price_rows(ended: Ended) -> list[View]:
    """One row for each class that was used: the amounts add up to the charge, rounded up once, unless it was capped."""
    if ended.usage is None or ended.rates is None:
        return []
    rows = [_row(*row) for row in zip(TOKEN_CLASSES, ended.rates, ended.usage.as_tuple(), strict=True) if row[2]]
    if ended.per_request:
        rows.append({"class": "per_request", "amount": format_credits(ended.per_request)})
    return rows


def _row(name: str, rate: int, tokens: int) -> View:
    # A rate is microcredits per 10**6 tokens: a millionth of a microcredit a token, 10**-12 credits.
    assert TOKENS_PER_RATE == 1_000_000
    return {
        "class": name,
        "credits_per_1k": exact_credits(rate, 9),
        "tokens": tokens,
        "amount": exact_credits(rate * tokens, 12),
    }


def _stored(text: str | None) -> Any:
    """What the gateway stored as JSON text. The ledger never looked into it, so it may be anything."""
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def page(items: Iterable[View], limit: int) -> View:
    """A page of at most ``limit`` out of items of which one more than that was asked for."""
    found = list(items)
    return list_view(found[:limit], has_more=len(found) > limit)

    return {}
