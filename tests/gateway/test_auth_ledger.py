"""gateway/auth.py on a real ledger: a revoked key never spends, however fresh the cache believes it to be."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest

from proxy.core.errors import Refusal, Unavailable
from proxy.core.keys import KEY_RANDOM_BYTES, Peppers, hmac_of, new_key
from proxy.gateway.auth import Authenticator, CacheLimits
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.holds import HoldLedger
from proxy.ledger.records import ApiKey, ReserveOutcome
from tests.gateway.test_auth import bearer, refusal_of
from tests.ledger.bank import Bank, open_bank
from tests.postgres import Database

PEPPERS = Peppers.parse("a pepper that is long enough")
HOURS = CacheLimits(seconds=3600.0)


@dataclass(frozen=True)
class Shop:
    """A bank, an account with credits, a key of it, and a worker whose cache keeps rows for an hour."""

    bank: Bank
    stored: ApiKey
    text: str
    authenticator: Authenticator

    async def enter(self, **options: Any) -> ApiKey:
        return await self.authenticator.authenticate(bearer(self.text), **options)

    async def outcome(self, key: ApiKey) -> ReserveOutcome:
        _, reserved = await self.bank.reserve(key, 10)
        return reserved.outcome

    async def held(self) -> int:
        return (await self.bank.money(self.stored.account_id))[1]


@pytest.fixture
async def shop(database: Database) -> AsyncIterator[Shop]:
    async with open_bank(database) as bank:
        account, _ = await bank.open_account(1_000)
        key = new_key(uuid4().bytes * (KEY_RANDOM_BYTES // 16))
        stored = await bank.control.create_key(
            id=key.id,
            account_id=account.id,
            name="key",
            secret_hmac=hmac_of(PEPPERS.by_version[1], key.text),
            pepper_version=1,
            scopes=["inference", "read"],
        )
        yield Shop(bank, stored, key.text, Authenticator(bank.holds.find_key, PEPPERS, limits=HOURS))


async def test_a_key_of_the_ledger_gets_in_and_reserves(shop: Shop) -> None:
    key = await shop.enter()

    assert key == shop.stored
    assert await shop.outcome(key) is ReserveOutcome.GRANTED


async def test_a_revoked_key_is_refused_by_reserve_and_then_by_name(shop: Shop) -> None:
    await shop.enter()
    await shop.bank.control.revoke_key(shop.stored.id)

    cached = await shop.enter()
    assert await shop.outcome(cached) is ReserveOutcome.KEY_CHANGED
    assert (await refusal_of(shop.authenticator.reload(cached))).code == "api_key_revoked"
    assert (await refusal_of(shop.enter())).code == "api_key_revoked"
    assert await shop.held() == 0


async def test_a_read_sees_a_revocation_at_once(shop: Shop) -> None:
    await shop.enter()
    await shop.bank.control.revoke_key(shop.stored.id)

    assert (await refusal_of(shop.enter(age_seconds_max=0))).code == "api_key_revoked"


async def test_an_edited_key_is_reloaded_and_serves(shop: Shop) -> None:
    cached = await shop.enter()
    await shop.bank.control.update_key(replace(shop.stored, models=frozenset({"m"})))

    assert await shop.outcome(cached) is ReserveOutcome.KEY_CHANGED
    reloaded = await shop.authenticator.reload(cached)
    assert reloaded.models == frozenset({"m"})
    assert await shop.outcome(reloaded) is ReserveOutcome.GRANTED


async def test_a_rotated_key_and_its_successor_both_work_in_the_overlap(shop: Shop) -> None:
    cached = await shop.enter()
    successor = new_key(uuid4().bytes * (KEY_RANDOM_BYTES // 16))
    await shop.bank.control.rotate_key(
        shop.stored.id,
        new_id=successor.id,
        secret_hmac=hmac_of(PEPPERS.by_version[1], successor.text),
        pepper_version=1,
        overlap_seconds=3600,
    )

    old = await shop.authenticator.reload(cached)
    new = await shop.authenticator.authenticate(bearer(successor.text))

    assert new.rotated_from == old.id
    assert await shop.outcome(old) is ReserveOutcome.GRANTED
    assert await shop.outcome(new) is ReserveOutcome.GRANTED


async def test_without_postgres_the_answer_is_503(database: Database) -> None:
    pool = await create_pool(database.app, Role.GATEWAY, size=1)
    authenticator = Authenticator(HoldLedger(pool).find_key, PEPPERS)
    pool.terminate()

    refused: Refusal = await refusal_of(authenticator.authenticate(bearer(new_key(bytes(KEY_RANDOM_BYTES)).text)))

    assert isinstance(refused, Unavailable)
    assert refused.code == "ledger_unavailable"
