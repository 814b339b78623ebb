"""Who is asking: from a request's headers to the ApiKey whose secret they carry.

Rules it keeps:

- The secret's HMAC is compared in constant time on *every* request, on a cached row too. The cache holds rows by the
  key's public id, so what it saves is the look-up, never the check, and no part of a secret is ever a cache key.
- An unknown id costs the same HMAC and comparison, and gets the same answer, as a wrong secret: whoever lacks the
  secret learns nothing. Only its holder is told that the key expired or was revoked.
- A cached row may be some seconds old, and that never lets a revoked key spend: ``reserve`` checks the row's version
  under the account's lock and answers ``key_changed``, upon which the caller takes ``reload(key)``, once.
- Where the ledger can't be asked, the answer is 503: an unverified key is neither good nor bad.
"""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import structlog

from proxy.core.errors import Forbidden, Unauthenticated, Unavailable
from proxy.core.keys import ParsedKey, Peppers, hmac_of, parse_key
from proxy.ledger.records import ApiKey

__all__ = [
    "Authenticator",
    "CacheLimits",
    "FindKey",
    "Scope",
    "presented_key",
    "require_model",
    "require_scope",
    "require_unfrozen",
]

FindKey = Callable[[str], Awaitable[ApiKey | None]]
RawHeaders = Iterable[tuple[bytes, bytes]]
Scope = Literal["inference", "read", "billing"]

log = structlog.get_logger("farebox.auth")

_CHALLENGE = {"www-authenticate": "Bearer"}
_RETRY_AFTER = {"retry-after": "1"}


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds of a worker's key cache. Rows are counts, times are seconds."""

    rows_max: int = 20_000
    seconds: float = 5.0
    unknown_rows_max: int = 10_000
    """Ids that no key has are kept apart, so that guesses can't push real rows out."""
    unknown_seconds: float = 2.0
    load_seconds_max: float = 5.0
    """How long one look-up may take before the answer is 503."""


@dataclass(frozen=True, slots=True)
class _Row:
    key: ApiKey | None
    loaded_at: float


@dataclass(frozen=True, slots=True)
class _Load:
    """A look-up in flight. ``newer_than``: the version that was found stale before it began."""

    task: "asyncio.Task[ApiKey | None]"
    newer_than: int | None
    started_at: float


class _LookUpFailed(Exception):
    """The ledger could not be asked."""


class Authenticator:
    """Turns headers into a verified ApiKey, over a bounded cache of rows that is this worker's own.

    ``find_key`` looks a key up by its id in the ledger. ``now`` (wall clock, aware) and ``monotonic`` (seconds) are for
    tests.
    """

    def __init__(
        self,
        find_key: FindKey,
        peppers: Peppers,
        *,
        limits: CacheLimits | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find_key = find_key
        self._peppers = peppers
        self._limits = limits or CacheLimits()
        self._now = now
        self._monotonic = monotonic
        self._rows: OrderedDict[str, _Row] = OrderedDict()
        self._unknown: OrderedDict[str, _Row] = OrderedDict()
        self._loads: dict[str, _Load] = {}

    async def authenticate(self, headers: RawHeaders, *, age_seconds_max: float | None = None) -> ApiKey:
        """The key that the headers carry, verified, neither expired nor revoked.

        ``age_seconds_max`` bounds the age of what is known of the key (0 asks the ledger each time: for reads, which no
        ``reserve`` re-checks); None takes the cache's own bound. Raises Unauthenticated or Unavailable.
        """
        parsed = presented_key(headers)
        row = await self._row(parsed.id, age_seconds_max)
        return self._verified(parsed, row)

    async def reload(self, stale: ApiKey) -> ApiKey:
        """The key as the ledger has it now, for a caller whose copy ``reserve`` refused as ``key_changed``.

        The secret was verified when ``stale`` was; the new row must still have the same. Raises Unauthenticated where
        the key is revoked, expired or gone, or Unavailable.
        """
        self.forget(stale)
        current = await self._row(stale.id, None, newer_than=stale.version)
        same = current is not None and hmac.compare_digest(current.secret_hmac, stale.secret_hmac)
        if current is None or not same or current.account_id != stale.account_id:
            raise _incorrect()
        return self._usable(current)

    def forget(self, stale: ApiKey) -> None:
        """Drop what is cached of the key, unless newer than ``stale``, and any look-up that may still answer so."""
        row = self._rows.get(stale.id)
        if row is not None and row.key is not None and row.key.version <= stale.version:
            del self._rows[stale.id]
        load = self._loads.get(stale.id)
        if load is not None and (load.newer_than is None or load.newer_than < stale.version):
            del self._loads[stale.id]

    def _verified(self, parsed: ParsedKey, row: ApiKey | None) -> ApiKey:
        version = self._peppers.current if row is None else row.pepper_version
        pepper = self._peppers.by_version.get(version)
        if pepper is None:
            log.error(
                "a key's pepper version is not among FAREBOX_KEY_PEPPER", key_id=parsed.id, pepper_version=version
            )
            raise Unavailable("This API key can't be verified at the moment.", code="key_pepper_missing")
        presented = hmac_of(pepper, parsed.text)
        stored = presented[::-1] if row is None else row.secret_hmac
        matches = hmac.compare_digest(presented, stored)
        if row is None or not matches:
            raise _incorrect()
        return self._usable(row)

    def _usable(self, key: ApiKey) -> ApiKey:
        if key.revoked_at is not None:
            raise _unauthenticated("This API key has been revoked.", "api_key_revoked")
        if key.expires_at is not None and key.expires_at <= self._now():
            raise _unauthenticated("This API key has expired.", "api_key_expired")
        return key

    async def _row(self, key_id: str, age_seconds_max: float | None, newer_than: int | None = None) -> ApiKey | None:
        row = self._cached(key_id, age_seconds_max)
        if row is not None:
            return row.key
        load = self._loads.get(key_id) or self._start_load(key_id, newer_than)
        try:
            # Shielded: a client that leaves must not take the look-up away from the others who wait for it.
            return await asyncio.shield(load.task)
        except _LookUpFailed:
            # Each waiter gets an exception of its own, since handlers add to what they catch.
            raise Unavailable(
                "The ledger can't be reached to verify the API key; please retry.",
                code="ledger_unavailable",
                headers=_RETRY_AFTER,
            ) from None

    def _cached(self, key_id: str, age_seconds_max: float | None) -> _Row | None:
        for rows, seconds in ((self._rows, self._limits.seconds), (self._unknown, self._limits.unknown_seconds)):
            row = rows.get(key_id)
            if row is None:
                continue
            age_max = seconds if age_seconds_max is None else min(seconds, age_seconds_max)
            if self._monotonic() - row.loaded_at < age_max:
                rows.move_to_end(key_id)
                return row
        return None

    def _start_load(self, key_id: str, newer_than: int | None) -> _Load:
        # The row is as old as the question: a change made while the ledger answers may not be in it.
        load = _Load(asyncio.create_task(self._look_up(key_id)), newer_than, self._monotonic())
        self._loads[key_id] = load
        load.task.add_done_callback(lambda _task: self._loaded(key_id, load))
        return load

    async def _look_up(self, key_id: str) -> ApiKey | None:
        try:
            async with asyncio.timeout(self._limits.load_seconds_max):
                return await self._find_key(key_id)
        except Exception as error:
            # Whatever went wrong, the key is unverified. Only the kind is logged: the text may quote a connection.
            log.warning("the ledger can't be asked for a key", error=type(error).__name__)
            raise _LookUpFailed from error

    def _loaded(self, key_id: str, load: _Load) -> None:
        current = self._loads.get(key_id) is load
        if current:
            del self._loads[key_id]
        # Asking for the exception marks it as seen, for a look-up whose every waiter has left.
        if load.task.cancelled() or load.task.exception() is not None or not current:
            return
        self._keep(key_id, _Row(load.task.result(), load.started_at))

    def _keep(self, key_id: str, row: _Row) -> None:
        self._rows.pop(key_id, None)
        self._unknown.pop(key_id, None)
        rows, rows_max = (
            (self._unknown, self._limits.unknown_rows_max) if row.key is None else (self._rows, self._limits.rows_max)
        )
        rows[key_id] = row
        while len(rows) > rows_max:
            rows.popitem(last=False)


def presented_key(headers: RawHeaders) -> ParsedKey:
    """The one key that the headers carry, in ``Authorization: Bearer``, ``x-api-key`` or ``api-key``.

    The same key in several headers is one key. Raises Unauthenticated: none, several different ones, or not a key of
    ours.
    """
    found = {text for text in (_credential(name.lower(), value) for name, value in headers) if text}
    if not found:
        raise _unauthenticated(
            "No API key was sent: put it in the header `Authorization: Bearer fb_...`, `x-api-key` or `api-key`.",
            "api_key_missing",
        )
    if len(found) > 1:
        raise _unauthenticated("The request carries several different API keys: send one.", "api_key_ambiguous")
    parsed = parse_key(found.pop())
    if parsed is None:
        raise _incorrect()
    return parsed


def require_scope(key: ApiKey, *any_of: Scope) -> None:
    """Raises Forbidden unless the key has one of the scopes."""
    if key.scopes.isdisjoint(any_of):
        needed = " or ".join(f"'{scope}'" for scope in any_of)
        raise Forbidden(f"This API key doesn't have the scope {needed}.", code="insufficient_scope")


def require_unfrozen(key: ApiKey) -> None:
    """Raises Forbidden where the key's account is frozen."""
    if key.account_frozen:
        raise Forbidden(
            "This account is frozen: nothing is admitted until its operator lifts that. "
            "Calls that were running go on to their end.",
            code="account_frozen",
            headers={"x-should-retry": "false"},
        )


def require_model(key: ApiKey, model: str) -> None:
    """Raises Forbidden where the key has a list of models and this one isn't on it.

    Ask before the catalog is asked, so that the answer doesn't tell which other models exist.
    """
    if key.models is not None and model not in key.models:
        raise Forbidden(
            "This API key is not allowed to use the requested model.", code="model_forbidden", param="model"
        )


def _credential(name: bytes, value: bytes) -> str | None:
    text = value.decode("latin-1").strip()
    if name in (b"x-api-key", b"api-key"):
        return text
    if name == b"authorization":
        scheme, _, token = text.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None
    return None


def _incorrect() -> Unauthenticated:
    return _unauthenticated("The API key is not correct.", "invalid_api_key")


def _unauthenticated(message: str, code: str) -> Unauthenticated:
    return Unauthenticated(message, code=code, headers=_CHALLENGE)
