"""The control plane's ledger: what an operator does to accounts, keys and credits. One method for each SQL function.

Reads are plain queries under the control role's SELECT. Every change may be repeated: an external id, a key's id or the
reference of a transfer says that it is the same one.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

import asyncpg

from proxy.ledger.connect import Pool, translated
from proxy.ledger.errors import Conflict, InvalidValue, Unknown
from proxy.ledger.lots import draw_account
from proxy.ledger.records import Account, ApiKey, Ended, Freeze, Lot, Transfer, check_amount, check_text
from proxy.ledger.reports import report
from proxy.ledger.rows import account, api_key, ended, freeze, lot, transfer

__all__ = ["GRANT_KINDS", "PRIORITY_MAX", "ControlLedger", "GrantKind"]

GrantKind = Literal["grant", "promo"]
"""What is given: as good as paid for, or a promotion, whose credits are drawn before all others."""
GRANT_KINDS: tuple[GrantKind, ...] = ("grant", "promo")
PRIORITY_MAX = 1_000

_ACCOUNTS = report("accounts")
_FIND_ACCOUNT = report("find_account")
_FREEZES = report("freezes")
_KEYS = report("keys")
_LOTS = report("lots")
_RECEIPT = report("receipt")
_TRANSFER = report("transfer")
_TRANSFERS = report("transfers")


class ControlLedger:
    """Accounts, keys, grants and reversals. ``pool`` acts as ``Role.CONTROL``.

    Raises Unknown and Conflict as each method says, InvalidValue for what can't be stored, and LedgerUnavailable where
    Postgres can't be asked.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    # Accounts

    async def create_account(self, name: str, external_id: str | None = None, email: str | None = None) -> Account:
        """A new account; or the one that has the external id, if name and email agree, else Conflict."""
        check_text("name", name)
        check_text("external_id", external_id)
        check_text("email", email)
        row = await self._row("SELECT * FROM farebox.create_account($1, $2, $3, $4)", uuid4(), name, external_id, email)
        _require(row["outcome"], conflict=f"external id {external_id!r} belongs to another account")
        return await self.find_account(row["account_id"])

    async def find_account(self, ref: UUID | str) -> Account:
        """By id, external id or name, in this order. Raises Unknown; Conflict where several have that name."""
        check_text("account", str(ref))
        rows = await self._rows(_FIND_ACCOUNT, _uuid_or_none(ref), str(ref))
        best = [row for row in rows if row["rank"] == rows[0]["rank"]]
        if not best:
            raise Unknown(f"no account {str(ref)[:80]!r}")
        if len(best) > 1:
            raise Conflict(f"several accounts have the name {str(ref)[:80]!r}: say which by its id")
        return account(best[0])

    async def list_accounts(self, *, after: UUID | None = None, limit: int = 100) -> list[Account]:
        """At most ``limit`` accounts in the order of their making, those behind ``after``."""
        return [account(row) for row in await self._rows(_ACCOUNTS, after, limit)]

    # Freezes

    async def freeze(self, account_id: UUID, *, reference: str, reason: str, actor: str) -> None:
        """From now on nothing is reserved for the account; what runs goes on to its end. Once for each reference.

        Raises Unknown (account), Conflict (that reference stood before, and has been lifted).
        """
        for field, text in (("reference", reference), ("reason", reason), ("actor", actor)):
            check_text(field, text)
        outcome = await self._value(
            "SELECT farebox.freeze_account($1, $2, $3, $4)", account_id, reference, reason, actor
        )
        conflict = f"freeze {reference!r} has been lifted: freeze the account anew under another reference"
        _require(outcome, unknown=f"no account {account_id}", conflict=conflict)

    async def unfreeze(self, account_id: UUID, *, reference: str | None, actor: str) -> None:
        """Lift the freeze of that reference; None: all that stand. Raises Unknown (account, reference)."""
        check_text("reference", reference)
        check_text("actor", actor)
        outcome = await self._value("SELECT farebox.unfreeze_account($1, $2, $3)", account_id, reference, actor)
        if outcome == "no_freeze":
            raise Unknown(f"account {account_id} was never frozen by {str(reference)[:80]!r}")
        _require(outcome, unknown=f"no account {account_id}")

    async def freezes(self, account_id: UUID) -> list[Freeze]:
        """Why the account is frozen, and was: the newest first, 100 at most."""
        return [freeze(row) for row in await self._rows(_FREEZES, account_id)]

    # Keys

    async def create_key(
        self,
        *,
        id: str,
        account_id: UUID,
        name: str,
        secret_hmac: bytes,
        pepper_version: int,
        scopes: Iterable[str],
        models: Iterable[str] | None = None,
        profile: str | None = None,
        affordable_cap: bool = True,
        spend_limit: int | None = None,
        expires_at: datetime | None = None,
    ) -> ApiKey:
        """A new key; the same id with the same HMAC again is the same key. Raises Unknown (account), Conflict."""
        terms = _terms(name, scopes, models, profile, affordable_cap, spend_limit, expires_at)
        check_text("id", id)
        outcome = await self._value(
            "SELECT farebox.create_key($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            *(id, account_id, terms[0], secret_hmac, pepper_version, *terms[1:]),
        )
        _require(outcome, unknown=f"no account {account_id}", conflict=f"key id {id!r} is taken")
        return await self.find_key(id)

    async def find_key(self, key_id: str) -> ApiKey:
        """By id. Raises Unknown."""
        check_text("key", key_id)
        for row in await self._rows(_KEYS, None, key_id):
            return api_key(row)
        raise Unknown(f"no key {key_id[:80]!r}")

    async def list_keys(self, account_id: UUID) -> list[ApiKey]:
        """The account's keys in the order of their making, revoked ones too."""
        return [api_key(row) for row in await self._rows(_KEYS, account_id, None)]

    async def revoke_key(self, key_id: str) -> ApiKey:
        """After this no reserve is granted to the key. Raises Unknown."""
        check_text("key", key_id)
        outcome = await self._value("SELECT farebox.revoke_key($1)", key_id)
        _require(outcome, unknown=f"no key {key_id[:80]!r}")
        return await self.find_key(key_id)

    async def update_key(self, key: ApiKey) -> ApiKey:
        """Store an edited copy (``dataclasses.replace``): name, scopes, models, profile, cap, limit and expiry.

        Raises Unknown; Conflict where the key was revoked, or changed since the copy was read.
        """
        terms = _terms(
            key.name, key.scopes, key.models, key.profile, key.affordable_cap, key.spend_limit, key.expires_at
        )
        outcome = await self._value(
            "SELECT farebox.update_key($1, $2, $3, $4, $5, $6, $7, $8, $9)", key.id, key.version, *terms
        )
        _require(outcome, unknown=f"no key {key.id!r}", conflict=f"key {key.id!r} was changed or revoked meanwhile")
        return await self.find_key(key.id)

    async def rotate_key(
        self, key_id: str, *, new_id: str, secret_hmac: bytes, pepper_version: int, overlap_seconds: float = 0
    ) -> ApiKey:
        """A new key with the old one's rights and what is left of its limit; the old one expires after the overlap.

        Raises Unknown; Conflict where the old key has ended, or the new id is taken.
        """
        check_text("key", key_id)
        check_text("id", new_id)
        overlap = timedelta(seconds=overlap_seconds)
        outcome = await self._value(
            "SELECT farebox.rotate_key($1, $2, $3, $4, $5)", key_id, new_id, secret_hmac, pepper_version, overlap
        )
        conflict = f"key {key_id[:80]!r} has ended, or key id {new_id!r} is taken"
        _require(outcome, unknown=f"no key {key_id[:80]!r}", conflict=conflict)
        return await self.find_key(new_id)

    # Credits

    async def grant(
        self,
        account_id: UUID,
        amount: int,
        *,
        kind: GrantKind = "grant",
        reference: str | None,
        actor: str,
        reason: str | None = None,
        expires_at: datetime | None = None,
        priority: int | None = None,
    ) -> Transfer:
        """Credit ``amount`` microcredits, once for each (kind, reference); None: once for each call.

        ``priority``: 0 to PRIORITY_MAX, lower is drawn first; None: the kind's own. ``expires_at`` None: never.
        Raises Unknown (account), Conflict (the reference stands for another account or amount; it would have expired).
        """
        _check_transfer(amount, reference, actor, reason)
        if priority is not None and not 0 <= priority <= PRIORITY_MAX:
            raise InvalidValue(f"priority is {priority}; expected 0 to {PRIORITY_MAX}")
        row = await self._row(
            "SELECT * FROM farebox.grant_lot($1, $2, $3, $4, $5, $6, $7, $8)",
            *(account_id, kind, amount, reference, actor, reason, expires_at, priority),
        )
        conflict = {
            "conflict": f"reference {reference!r} stands for another grant",
            "above_limit": "the account's balance would be above what one account can have",
            "expired": "these credits would have expired already",
        }
        _require(row["outcome"], unknown=f"no account {account_id}", **conflict)
        return await self._transfer(row)

    async def lots(self, account_id: UUID, *, used_up: bool = False, limit: int = 100) -> list[Lot]:
        """The account's lots as they are now, in the order in which they are drawn; with ``used_up`` those that have
        nothing left as well, at the end. At most ``limit``."""
        await draw_account(self._pool, account_id)
        return [lot(row) for row in await self._rows(_LOTS, account_id, used_up, limit)]

    async def reverse(
        self,
        hold_id: UUID,
        amount: int | None,
        *,
        reference: str | None,
        actor: str,
        reason: str | None,
    ) -> Transfer:
        """Give back ``amount`` of a final charge (None: all that is left of it), once for each reference.

        Raises Unknown (hold), Conflict (not final yet, more than is left, reference taken).
        """
        _check_transfer(amount, reference, actor, reason)
        row = await self._row(
            "SELECT * FROM farebox.reverse($1, $2, $3, $4, $5)", hold_id, amount, reference, actor, reason
        )
        _require(
            row["outcome"],
            unknown=f"no request {hold_id}",
            conflict=f"reference {reference!r} stands for another reversal",
            not_final=f"request {hold_id} has no final charge to reverse",
            above_charge=f"that is more than what is left of the charge of request {hold_id}",
        )
        return await self._transfer(row)

    async def ended(self, hold_id: UUID) -> Ended | None:
        """The hold, open or ended, whatever its account; None if unknown."""
        for row in await self._rows(_RECEIPT, hold_id):
            return ended(row)
        return None

    async def transfers(self, account_id: UUID, *, before: int | None = None, limit: int = 100) -> list[Transfer]:
        """The account's transfers, newest first: at most ``limit``, of versions below ``before``."""
        return [transfer(row) for row in await self._rows(_TRANSFERS, account_id, before, limit)]

    async def _transfer(self, row: asyncpg.Record) -> Transfer:
        [found] = await self._rows(_TRANSFER, row["transfer_account"], row["transfer_version"])
        return transfer(found)

    async def _rows(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        with translated():
            return await self._pool.fetch(query, *arguments)

    async def _row(self, query: str, *arguments: Any) -> asyncpg.Record:
        [row] = await self._rows(query, *arguments)
        return row

    async def _value(self, query: str, *arguments: Any) -> str:
        value: str = (await self._row(query, *arguments))[0]
        return value


def _require(outcome: str, *, unknown: str = "", **refusals: str) -> None:
    """Raises for every outcome but 'done': Unknown for 'unknown', Conflict for those in ``refusals``."""
    if outcome == "done":
        return
    if outcome == "unknown" and unknown:
        raise Unknown(unknown)
    raise Conflict(refusals[outcome])


def _terms(
    name: str,
    scopes: Iterable[str],
    models: Iterable[str] | None,
    profile: str | None,
    affordable_cap: bool,
    spend_limit: int | None,
    expires_at: datetime | None,
) -> tuple[Any, ...]:
    """A key's editable columns, checked, in the order of the SQL functions."""
    scopes, models = sorted(scopes), None if models is None else sorted(models)
    for text in (name, profile, *scopes, *(models or ())):
        check_text("key", text)
    if spend_limit is not None:
        check_amount("spend_limit", spend_limit)
    return name, scopes, models, profile, affordable_cap, spend_limit, expires_at


def _check_transfer(amount: int | None, reference: str | None, actor: str, reason: str | None) -> None:
    if amount is not None:
        check_amount("amount", amount, least=1)
    check_text("reference", reference)
    check_text("actor", actor)
    check_text("reason", reason)


def _uuid_or_none(ref: UUID | str) -> UUID | None:
    if isinstance(ref, UUID):
        return ref
    try:
        return UUID(ref)
    except ValueError:
        return None
