"""What an operator can do, once: the admin API and the command call the same functions.

Everything here may be repeated safely, save the making of a key: its secret is shown but once, so a key whose making
was never answered is found in the list by its name and revoked. Raises refusals (``core/errors.py``).
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from proxy.control.fields import check_plain, parse_uuid
from proxy.control.refusals import ledger_refusals
from proxy.core.errors import Conflict, InvalidRequest, NotFound
from proxy.core.keys import KEY_RANDOM_BYTES, NewKey, Peppers, hmac_of, new_key
from proxy.ledger.control import ControlLedger, GrantKind
from proxy.ledger.records import Account, ApiKey, Ended, Freeze, Lot, Transfer

__all__ = [
    "OVERLAP_SECONDS_MAX",
    "PROFILES",
    "SCOPES",
    "SCOPES_DEFAULT",
    "KeyTerms",
    "Operations",
    "no_receipt",
    "transaction_version",
]

SCOPES = frozenset({"inference", "read", "billing"})
SCOPES_DEFAULT = frozenset({"inference", "read"})
PROFILES = frozenset({"default", "chat"})
OVERLAP_SECONDS_MAX = 90 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTerms:
    """What a key may do. ``models`` None: all; ``spend_limit`` None: unlimited, else microcredits over its life."""

    name: str
    scopes: frozenset[str] = SCOPES_DEFAULT
    models: frozenset[str] | None = None
    profile: str | None = None
    affordable_cap: bool = True
    spend_limit: int | None = None
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        check_plain("name", self.name)
        for model in self.models or ():
            check_plain("models", model)
        if not self.scopes or not self.scopes <= SCOPES:
            raise InvalidRequest(
                f"scopes must be some of {', '.join(sorted(SCOPES))}.", code="invalid_value", param="scopes"
            )
        if self.profile is not None and self.profile not in PROFILES:
            raise InvalidRequest(
                f"profile must be one of {', '.join(sorted(PROFILES))}.", code="invalid_value", param="profile"
            )


class Operations:
    """The operator's functions over one ledger. ``peppers`` None: none is set, and no key can be made.

    ``random_bytes`` is a cryptographic source; tests give their own.
    """

    def __init__(
        self,
        ledger: ControlLedger,
        peppers: Peppers | None,
        *,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._ledger = ledger
        self._peppers = peppers
        self._random_bytes = random_bytes

    # Accounts

    async def create_account(self, name: str, *, external_id: str | None = None, email: str | None = None) -> Account:
        """A new account; or the one that has the external id. Raises Conflict where that has another name or email."""
        check_plain("name", name)
        check_plain("external_id", external_id)
        check_plain("email", email)
        with ledger_refusals():
            return await self._ledger.create_account(name, external_id, email)

    async def account(self, ref: str, *, by_name: bool = True) -> Account:
        """The account by its id, its external id, or (``by_name``) its name where only one has it. Raises NotFound."""
        try:
            with ledger_refusals():
                found = await self._ledger.find_account(ref)
        except Conflict:
            if by_name:
                raise
            raise _no_account() from None
        if not by_name and ref not in (str(found.id), found.external_id):
            raise _no_account()
        return found

    async def accounts(self, *, after: str | None = None, limit: int) -> list[Account]:
        """At most ``limit`` accounts in the order of their making, those behind the id ``after``."""
        with ledger_refusals():
            return await self._ledger.list_accounts(after=_after_account(after), limit=limit)

    async def accounts_of(self, external_id: str) -> list[Account]:
        """The account of an external id, if there is one: unlike in ``account``, nothing else can be meant."""
        try:
            with ledger_refusals():
                found = await self._ledger.find_account(external_id)
        except (NotFound, Conflict):
            return []
        return [found] if found.external_id == external_id else []

    async def freeze(self, account_id: UUID, *, reason: str, actor: str, reference: str | None = None) -> Account:
        """Nothing is reserved for the account from now on; what runs goes on to its end, and is charged.

        ``reference`` None: a new one. Raises Conflict where the freeze of that reference has been lifted.
        """
        check_plain("reference", reference)
        check_plain("reason", reason, chars_max=1_000)
        with ledger_refusals():
            await self._ledger.freeze(
                account_id, reference=reference or f"operator:{uuid4()}", reason=reason, actor=actor
            )
        return await self.account(str(account_id))

    async def unfreeze(self, account_id: UUID, *, actor: str, reference: str | None = None) -> Account:
        """Lift the freeze of that reference; None: all that stand. Raises NotFound where there never was such a one."""
        check_plain("reference", reference)
        with ledger_refusals():
            await self._ledger.unfreeze(account_id, reference=reference, actor=actor)
        return await self.account(str(account_id))

    async def freezes(self, account_id: UUID) -> list[Freeze]:
        """Why the account is frozen, and was: those that stand first."""
        with ledger_refusals():
            return await self._ledger.freezes(account_id)

    # Keys

    async def create_key(self, account_id: UUID, terms: KeyTerms) -> tuple[ApiKey, str]:
        """A key, and its text, which is kept nowhere."""
        new, stored = self._new_key()
        with ledger_refusals():
            key = await self._ledger.create_key(
                id=new.id,
                account_id=account_id,
                secret_hmac=stored,
                pepper_version=self._pepper_version(),
                **_members(terms),
            )
        return key, new.text

    async def key(self, key_id: str) -> ApiKey:
        """The key. Raises NotFound."""
        with ledger_refusals():
            return await self._ledger.find_key(key_id)

    async def keys(self, account_id: UUID) -> list[ApiKey]:
        """The account's keys in the order of their making, ended ones too."""
        with ledger_refusals():
            return await self._ledger.list_keys(account_id)

    async def update_key(self, key_id: str, changes: Mapping[str, Any]) -> ApiKey:
        """Replace the members of KeyTerms that ``changes`` names. Raises Conflict where the key has been revoked."""
        key = await self.key(key_id)
        before = KeyTerms(**{field.name: getattr(key, field.name) for field in fields(KeyTerms)})
        terms = replace(before, **changes)
        with ledger_refusals():
            return await self._ledger.update_key(replace(key, **_members(terms)))

    async def revoke_key(self, key_id: str) -> ApiKey:
        """From now on the key is admitted for nothing. Answers under way are finished and charged."""
        with ledger_refusals():
            return await self._ledger.revoke_key(key_id)

    async def rotate_key(self, key_id: str, *, overlap_seconds: int) -> tuple[ApiKey, str]:
        """A key of the same rights, and its text; the old one ends after the overlap."""
        if not 0 <= overlap_seconds <= OVERLAP_SECONDS_MAX:
            raise InvalidRequest(
                f"The overlap is from 0 to {OVERLAP_SECONDS_MAX} seconds.",
                code="invalid_value",
                param="overlap_seconds",
            )
        new, stored = self._new_key()
        with ledger_refusals():
            key = await self._ledger.rotate_key(
                key_id,
                new_id=new.id,
                secret_hmac=stored,
                pepper_version=self._pepper_version(),
                overlap_seconds=overlap_seconds,
            )
        return key, new.text

    # Credits

    async def grant(
        self,
        account_id: UUID,
        amount: int,
        *,
        reference: str,
        actor: str,
        reason: str | None = None,
        kind: GrantKind = "grant",
        expires_at: datetime | None = None,
        priority: int | None = None,
    ) -> Transfer:
        """Credit ``amount`` microcredits, once for each kind and reference. ``priority``: lower is drawn first; None:
        the kind's own. Raises Conflict if the reference stands for another grant, or if it would have expired."""
        check_plain("reference", reference)
        check_plain("reason", reason, chars_max=1_000)
        with ledger_refusals():
            return await self._ledger.grant(
                account_id,
                amount,
                kind=kind,
                reference=reference,
                actor=actor,
                reason=reason,
                expires_at=expires_at,
                priority=priority,
            )

    async def lots(self, account_id: UUID, *, used_up: bool = False, limit: int = 100) -> list[Lot]:
        """What each of the account's grants and purchases has left, in the order in which they are drawn."""
        with ledger_refusals():
            return await self._ledger.lots(account_id, used_up=used_up, limit=limit)

    async def reverse(
        self, request_id: str, amount: int | None, *, reference: str | None, actor: str, reason: str
    ) -> Transfer:
        """Give back ``amount`` microcredits of a request's charge; None: all that is left. Once for each reference.

        Without a reference the request and the amount are one: the same again gives back nothing more.
        """
        hold_id = _request_uuid(request_id)
        check_plain("reference", reference)
        check_plain("reason", reason, chars_max=1_000)
        if reference is None:
            reference = f"{hold_id}:{'all' if amount is None else amount}"
        with ledger_refusals():
            return await self._ledger.reverse(hold_id, amount, reference=reference, actor=actor, reason=reason)

    # The book

    async def transactions(self, account_id: UUID, *, after: str | None = None, limit: int) -> list[Transfer]:
        """At most ``limit`` transfers of the account, newest first; ``after``: those older than the one of that id."""
        before = None if after is None else transaction_version(account_id, after)
        with ledger_refusals():
            return await self._ledger.transfers(account_id, before=before, limit=limit)

    async def receipt(self, request_id: str) -> Ended:
        """The request as it was quoted, held and settled. Raises NotFound."""
        with ledger_refusals():
            found = await self._ledger.ended(_request_uuid(request_id))
        if found is None:
            raise no_receipt()
        return found

    def _new_key(self) -> tuple[NewKey, bytes]:
        if self._peppers is None:
            raise InvalidRequest(
                "FAREBOX_KEY_PEPPER is not set. It is required with a database of your own: give every process of this "
                "installation the same, as `openssl rand -hex 32` prints it.",
                code="settings",
            )
        new = new_key(self._random_bytes(KEY_RANDOM_BYTES))
        return new, hmac_of(self._peppers.by_version[self._peppers.current], new.text)

    def _pepper_version(self) -> int:
        assert self._peppers is not None, "_new_key comes first"
        return self._peppers.current


def no_receipt() -> NotFound:
    """One answer for a request that nobody made, that another account made, or whose id is no id."""
    return NotFound("There is no receipt for a request of this id.", code="receipt_not_found")


def transaction_version(account_id: UUID, text: str) -> int:
    """The version in a transaction's id (``views.transaction_id``). Raises InvalidRequest if it isn't the account's."""
    match = _TRANSACTION.match(text)
    if match is None or parse_uuid(match[1]) != account_id:
        raise InvalidRequest(
            "after is not the id of a transaction of this account.", code="invalid_value", param="after"
        )
    return int(match[2])


# 18 digits: less than a signed 64-bit column holds.
_TRANSACTION = re.compile(r"(.{36})-([0-9]{1,18})\Z", re.ASCII)


def _members(terms: KeyTerms) -> dict[str, Any]:
    return {field.name: getattr(terms, field.name) for field in fields(terms)}


def _after_account(text: str | None) -> UUID | None:
    found = parse_uuid(text)
    if text is not None and found is None:
        raise InvalidRequest("after is not the id of an account.", code="invalid_value", param="after")
    return found


def _request_uuid(text: str) -> UUID:
    found = parse_uuid(text)
    if found is None:
        raise no_receipt()
    return found


def _no_account() -> NotFound:
    return NotFound("There is no account of this id or external id.", code="not_found")
