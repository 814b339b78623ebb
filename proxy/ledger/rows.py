"""From database rows to records: each takes a row that has the record's columns."""

import asyncpg

from proxy.core.usage import Usage
from proxy.ledger.records import Account, ApiKey, Ended, Freeze, Lot, Transfer

__all__ = ["account", "api_key", "ended", "freeze", "lot", "transfer"]


def account(row: asyncpg.Record) -> Account:
    """An Account."""
    return Account(
        id=row["id"],
        name=row["name"],
        external_id=row["external_id"],
        email=row["email"],
        balance=row["balance"],
        held=row["held"],
        debt=row["debt"],
        version=row["version"],
        created_at=row["created_at"],
        frozen_at=row["frozen_at"],
    )


def freeze(row: asyncpg.Record) -> Freeze:
    """A Freeze."""
    return Freeze(
        reference=row["reference"],
        reason=row["reason"],
        actor=row["actor"],
        created_at=row["created_at"],
        lifted_at=row["lifted_at"],
        lifted_by=row["lifted_by"],
    )


def lot(row: asyncpg.Record) -> Lot:
    """A Lot."""
    return Lot(
        account_id=row["account_id"],
        version=row["version"],
        kind=row["kind"],
        amount=row["amount"],
        remaining=row["remaining"],
        reserved=row["reserved"],
        owed=row["owed"],
        priority=row["priority"],
        expires_at=row["expires_at"],
        order_id=row["order_id"],
        created_at=row["created_at"],
    )


def api_key(row: asyncpg.Record, *, account_frozen: bool = False) -> ApiKey:
    """An ApiKey."""
    models = row["models"]
    return ApiKey(
        id=row["id"],
        account_id=row["account_id"],
        name=row["name"],
        secret_hmac=row["secret_hmac"],
        pepper_version=row["pepper_version"],
        scopes=frozenset(row["scopes"]),
        models=None if models is None else frozenset(models),
        profile=row["profile"],
        affordable_cap=row["affordable_cap"],
        spend_limit=row["spend_limit"],
        spent=row["spent"],
        version=row["version"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        rotated_from=row["rotated_from"],
        account_frozen=account_frozen,
    )


def transfer(row: asyncpg.Record) -> Transfer:
    """A Transfer; the side that the row calls the account's gets the account's id."""
    customer = str(row["account_id"])
    debit, credit = customer, row["system_account"]
    if row["account_side"] == "credit":
        debit, credit = credit, debit
    return Transfer(
        account_id=row["account_id"],
        version=row["version"],
        kind=row["kind"],
        debit=debit,
        credit=credit,
        amount=row["amount"],
        balance_after=row["balance_after"],
        debt_after=row["debt_after"],
        hold_id=row["hold_id"],
        reference=row["reference"],
        actor=row["actor"],
        reason=row["reason"],
        created_at=row["created_at"],
    )


def ended(row: asyncpg.Record) -> Ended:
    """A hold, with the price rows of what it was charged at."""
    return Ended(
        hold_id=row["id"],
        account_id=row["account_id"],
        key_id=row["key_id"],
        state=row["state"],
        model=row["model"],
        variant=row["variant"],
        price_version=row["price_version"],
        amount=row["amount"],
        charge=row["charge"],
        overrun=row["overrun"],
        reversed=row["reversed"],
        usage=None if row["usage"] is None else Usage(*row["usage"]),
        usage_source=row["usage_source"],
        capped=row["capped"],
        ending=row["ending"],
        quote=row["quote"],
        receipt=row["receipt"],
        opened_at=row["opened_at"],
        ended_at=row["ended_at"],
        rates=None if row["rates"] is None else tuple(row["rates"]),
        per_request=row["per_request"] or 0,
    )
