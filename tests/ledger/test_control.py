"""What an operator does: accounts, keys, grants, reversals; each may be said twice."""

import asyncio
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from proxy.core.money import AMOUNT_MAX
from proxy.ledger.errors import Conflict, InvalidValue, Unknown
from proxy.ledger.records import Account, ApiKey, ExtendOutcome, ReserveOutcome, Transfer
from tests.ledger.bank import Bank

GRANTED = ReserveOutcome.GRANTED


# Accounts


async def test_an_account_is_found_by_id_external_id_and_name(bank: Bank) -> None:
    name, external = f"name {uuid4()}", f"ext {uuid4()}"
    account = await bank.control.create_account(name, external, "a@example.org")
    assert (account.name, account.external_id, account.email) == (name, external, "a@example.org")
    assert (account.balance, account.held, account.debt, account.available) == (0, 0, 0, 0)
    for ref in (account.id, str(account.id), external, name):
        assert await bank.control.find_account(ref) == account
    with pytest.raises(Unknown):
        await bank.control.find_account("nobody")
    with pytest.raises(Unknown):
        await bank.control.find_account(uuid4())


async def test_the_same_external_id_is_the_same_account_or_a_conflict(bank: Bank) -> None:
    external = f"ext {uuid4()}"
    made = await asyncio.gather(*(bank.control.create_account("same", external) for _ in range(5)))
    assert {account.id for account in made} == {made[0].id}
    with pytest.raises(Conflict):
        await bank.control.create_account("another", external)


async def test_a_name_that_several_have_is_no_answer(bank: Bank) -> None:
    name = f"twins {uuid4()}"
    one = await bank.control.create_account(name)
    two = await bank.control.create_account(name)
    assert one.id != two.id
    with pytest.raises(Conflict, match="several"):
        await bank.control.find_account(name)


async def test_an_external_id_comes_before_a_name(bank: Bank) -> None:
    word = f"word {uuid4()}"
    await bank.control.create_account(word)
    external = await bank.control.create_account("x", word)
    assert (await bank.control.find_account(word)).id == external.id


async def test_accounts_are_listed_page_by_page_in_the_order_of_their_making(bank: Bank) -> None:
    made = [(await bank.control.create_account(f"page {n}")).id for n in range(5)]
    listed: list[Account] = []
    after = None
    while page := await bank.control.list_accounts(after=after, limit=2):
        assert len(page) <= 2
        listed += page
        after = page[-1].id
    assert [account.id for account in listed if account.id in made] == made
    assert len({account.id for account in listed}) == len(listed)


# Grants


async def test_a_grant_is_credited_once_for_its_reference(bank: Bank) -> None:
    account, _ = await bank.open_account()
    ref = uuid4().hex
    given: dict[str, Any] = {"reference": ref, "actor": "ann", "reason": "hello"}
    transfers = await asyncio.gather(*(bank.control.grant(account.id, 500, **given) for _ in range(8)))
    assert transfers == [transfers[0]] * 8
    assert transfers[0] == Transfer(
        account_id=account.id,
        version=1,
        kind="grant",
        debit="grants",
        credit=str(account.id),
        amount=500,
        balance_after=500,
        debt_after=0,
        hold_id=None,
        reference=ref,
        actor="ann",
        reason="hello",
        created_at=transfers[0].created_at,
    )
    other, _ = await bank.open_account()
    for account_id, amount in ((account.id, 501), (other.id, 500)):
        with pytest.raises(Conflict):
            await bank.control.grant(account_id, amount, **given)
    assert (await bank.money(account.id))[0] == 500
    assert (await bank.money(other.id))[0] == 0


async def test_one_reference_on_two_accounts_at_once_credits_one(bank: Bank) -> None:
    accounts = [(await bank.open_account())[0] for _ in range(4)]
    ref = uuid4().hex
    async with bank.owner.transaction():
        # Whoever doesn't wait for the reference waits here, and all of them look for it at once afterwards.
        await bank.owner.execute("SELECT FROM farebox.accounts ORDER BY id FOR UPDATE")
        grants = [
            asyncio.create_task(bank.control.grant(account.id, 500, reference=ref, actor="test"))
            for account in accounts
        ]
        await asyncio.sleep(0.3)
    results = await asyncio.gather(*grants, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 3 + ["Transfer"]
    assert sum([(await bank.money(account.id))[0] for account in accounts]) == 500


async def test_without_a_reference_each_grant_is_its_own(bank: Bank) -> None:
    account, _ = await bank.open_account()
    for _ in range(2):
        await bank.control.grant(account.id, 500, reference=None, actor="test")
    assert (await bank.money(account.id))[0] == 1000


async def test_a_grant_to_nobody_of_nothing_or_above_all_bounds_is_refused(bank: Bank) -> None:
    account, _ = await bank.open_account()
    with pytest.raises(Unknown):
        await bank.control.grant(uuid4(), 5, reference=None, actor="test")
    for amount in (0, -1, AMOUNT_MAX + 1):
        with pytest.raises(InvalidValue):
            await bank.control.grant(account.id, amount, reference=None, actor="test")
    for text in ("\0", "\ud800"):
        with pytest.raises(InvalidValue):
            await bank.control.grant(account.id, 1, reference=text, actor="test")
    for _ in range(10):
        await bank.control.grant(account.id, AMOUNT_MAX, reference=None, actor="test")
    with pytest.raises(Conflict, match="above what one account can have"):
        await bank.control.grant(account.id, AMOUNT_MAX, reference=None, actor="test")


# Reversals


async def test_a_charge_is_reversed_in_parts_and_never_more_than_once(bank: Bank) -> None:
    account, key = await bank.open_account(1000)
    reserve, _ = await bank.reserve(key, 400)
    with pytest.raises(Conflict, match="no final charge"):
        await bank.control.reverse(reserve.hold_id, None, reference=None, actor="ann", reason="why")
    await bank.finalize(reserve, 300)
    first = await bank.control.reverse(reserve.hold_id, 100, reference="a" + key.id, actor="ann", reason="why")
    assert (first.kind, first.debit, first.credit, first.amount) == ("reversal", "revenue", str(account.id), 100)
    assert (first.hold_id, first.actor, first.reason) == (reserve.hold_id, "ann", "why")
    again = await bank.control.reverse(reserve.hold_id, 100, reference="a" + key.id, actor="ann", reason="why")
    assert again == first
    with pytest.raises(Conflict, match="another reversal"):
        await bank.control.reverse(reserve.hold_id, 50, reference="a" + key.id, actor="ann", reason="why")
    with pytest.raises(Conflict, match="more than what is left"):
        await bank.control.reverse(reserve.hold_id, 201, reference=None, actor="ann", reason="why")
    rest = await bank.control.reverse(reserve.hold_id, None, reference=None, actor="ann", reason="why")
    assert rest.amount == 200
    with pytest.raises(Conflict, match="more than what is left"):
        await bank.control.reverse(reserve.hold_id, None, reference=None, actor="ann", reason="why")
    ended = await bank.control.ended(reserve.hold_id)
    assert ended is not None
    assert (ended.charge, ended.reversed) == (300, 300)
    assert await bank.money(account.id) == (1000, 0, 0)
    with pytest.raises(Unknown):
        await bank.control.reverse(uuid4(), None, reference=None, actor="ann", reason="why")


async def test_transfers_are_listed_newest_first_and_page_by_page(bank: Bank) -> None:
    account, _ = await bank.open_account()
    for amount in (1, 2, 3, 4, 5):
        await bank.control.grant(account.id, amount, reference=None, actor="test")
    first = await bank.control.transfers(account.id, limit=2)
    second = await bank.control.transfers(account.id, before=first[-1].version, limit=10)
    assert [t.amount for t in first + second] == [5, 4, 3, 2, 1]


# Keys


async def test_a_key_is_found_as_it_was_made(bank: Bank) -> None:
    expires = datetime.now(UTC) + timedelta(days=1)
    terms: dict[str, Any] = {
        "scopes": ["read", "inference"],
        "models": ["m"],
        "profile": "chat",
        "affordable_cap": False,
    }
    account, key = await bank.open_account(0, spend_limit=500, expires_at=expires, **terms)
    found = await bank.holds.find_key(key.id)
    assert found == key == await bank.control.find_key(key.id)
    assert found == ApiKey(
        id=key.id,
        account_id=account.id,
        name="key",
        secret_hmac=key.secret_hmac,
        pepper_version=1,
        scopes=frozenset({"read", "inference"}),
        models=frozenset({"m"}),
        profile="chat",
        affordable_cap=False,
        spend_limit=500,
        spent=0,
        version=1,
        created_at=key.created_at,
        expires_at=expires,
        revoked_at=None,
        rotated_from=None,
    )
    assert await bank.holds.find_key("nobody") is None
    assert [k.id for k in await bank.control.list_keys(account.id)] == [key.id]


async def test_making_a_key_again_is_the_same_key_or_a_conflict(bank: Bank) -> None:
    account, key = await bank.open_account()
    given: dict[str, Any] = {"account_id": account.id, "name": "key", "scopes": ["inference"], "pepper_version": 1}
    same = await bank.control.create_key(id=key.id, secret_hmac=key.secret_hmac, **given)
    assert same == key
    with pytest.raises(Conflict):
        await bank.control.create_key(id=key.id, secret_hmac=os.urandom(32), **given)
    with pytest.raises(Unknown):
        await bank.open_key(uuid4())


async def test_a_changed_key_must_be_reloaded_once(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    edited = await bank.control.update_key(replace(key, name="new", models=frozenset({"m"}), spend_limit=100))
    assert (edited.version, edited.name, edited.models, edited.spend_limit) == (2, "new", frozenset({"m"}), 100)
    assert (await bank.reserve(key, 1))[1].outcome is ReserveOutcome.KEY_CHANGED
    assert (await bank.reserve(edited, 1))[1].outcome is GRANTED
    with pytest.raises(Conflict):
        await bank.control.update_key(replace(key, name="from the old copy"))
    assert (await bank.control.find_key(key.id)).name == "new"


async def test_a_revoked_key_reserves_nothing_whatever_version_is_said(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    revoked = await bank.control.revoke_key(key.id)
    assert revoked.revoked_at is not None
    assert await bank.control.revoke_key(key.id) == revoked
    for copy in (key, revoked):
        assert (await bank.reserve(copy, 1))[1].outcome is ReserveOutcome.KEY_CHANGED
    with pytest.raises(Conflict):
        await bank.control.update_key(replace(revoked, name="back"))
    with pytest.raises(Unknown):
        await bank.control.revoke_key("nobody")


async def test_a_rotated_key_works_for_the_overlap_beside_the_new_one(bank: Bank) -> None:
    account, key = await bank.open_account(1000, models=["m"], profile="chat")
    hmac = os.urandom(32)
    given: dict[str, Any] = {"new_id": uuid4().hex[:12], "secret_hmac": hmac, "pepper_version": 2}
    new = await bank.control.rotate_key(key.id, overlap_seconds=600, **given)
    assert (new.account_id, new.rotated_from, new.models, new.profile) == (account.id, key.id, frozenset({"m"}), "chat")
    assert (new.secret_hmac, new.pepper_version, new.expires_at) == (hmac, 2, None)
    assert await bank.control.rotate_key(key.id, overlap_seconds=600, **given) == new
    old = await bank.control.find_key(key.id)
    assert old.expires_at is not None
    assert timedelta(seconds=590) < old.expires_at - datetime.now(UTC) <= timedelta(seconds=600)
    assert (await bank.reserve(old, 1))[1].outcome is GRANTED
    assert (await bank.reserve(new, 1))[1].outcome is GRANTED


async def test_without_overlap_the_old_key_ends_at_once(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    await bank.control.rotate_key(key.id, new_id=uuid4().hex[:12], secret_hmac=b"x", pepper_version=1)
    old = await bank.control.find_key(key.id)
    assert (await bank.reserve(old, 1))[1].outcome is ReserveOutcome.KEY_EXPIRED
    with pytest.raises(Conflict):
        await bank.control.rotate_key(key.id, new_id=uuid4().hex[:12], secret_hmac=b"x", pepper_version=1)


async def test_a_rotation_without_overlap_may_be_said_again(bank: Bank) -> None:
    _, key = await bank.open_account(1000)
    given: dict[str, Any] = {"new_id": uuid4().hex[:12], "secret_hmac": os.urandom(32), "pepper_version": 1}
    new = await bank.control.rotate_key(key.id, **given)
    assert await bank.control.rotate_key(key.id, **given) == new
    with pytest.raises(Conflict):
        await bank.control.rotate_key(key.id, **(given | {"secret_hmac": os.urandom(32)}))


# Spend limits


async def test_a_spend_limit_counts_what_is_held_and_what_was_charged(bank: Bank) -> None:
    _, key = await bank.open_account(10_000, spend_limit=500)
    first, one = await bank.reserve(key, 300)
    second, two = await bank.reserve(key, 300, at_least=100)
    _, three = await bank.reserve(key, 1)
    assert [(r.outcome, r.granted, r.spend_limit_left) for r in (one, two, three)] == [
        (GRANTED, 300, 200),
        (GRANTED, 200, 0),
        (ReserveOutcome.SPEND_LIMIT, 0, 0),
    ]
    await bank.finalize(first, 250)
    await bank.release(second)
    assert (await bank.control.find_key(key.id)).spent == 250
    assert (await bank.reserve(key, 251))[1].outcome is ReserveOutcome.SPEND_LIMIT
    fourth, _ = await bank.reserve(key, 250)
    extended = await bank.extend(fourth, 260)
    assert (extended.outcome, extended.total, extended.spend_limit_left) == (ExtendOutcome.SPEND_LIMIT, 250, 0)
    await bank.finalize(fourth, 300)
    assert (await bank.reserve(key, 1))[1].outcome is ReserveOutcome.SPEND_LIMIT
    await bank.control.reverse(first.hold_id, 150, reference=None, actor="test", reason=None)
    assert (await bank.control.find_key(key.id)).spent == 400
    assert (await bank.reserve(key, 101))[1].outcome is ReserveOutcome.SPEND_LIMIT
    assert (await bank.reserve(key, 100))[1].outcome is GRANTED


async def test_a_limit_set_later_counts_what_was_before_it(bank: Bank) -> None:
    _, key = await bank.open_account(10_000)
    first, _ = await bank.reserve(key, 300)
    await bank.finalize(first, 250)
    await bank.reserve(key, 200)
    limited = await bank.control.update_key(replace(key, spend_limit=500))
    assert limited.spent == 250
    _, reserved = await bank.reserve(limited, 100, at_least=0)
    assert (reserved.granted, reserved.spend_limit_left) == (50, 0)
    lifted = await bank.control.update_key(replace(limited, spend_limit=None))
    assert (await bank.reserve(lifted, 1000))[1].outcome is GRANTED


async def test_a_limit_lasts_over_rotations(bank: Bank) -> None:
    _, key = await bank.open_account(10_000, spend_limit=500)
    first, _ = await bank.reserve(key, 300)
    new = await bank.control.rotate_key(
        key.id, new_id=uuid4().hex[:12], secret_hmac=b"x", pepper_version=1, overlap_seconds=600
    )
    assert new.spend_limit == 500
    assert (await bank.reserve(new, 201))[1].outcome is ReserveOutcome.SPEND_LIMIT
    second, _ = await bank.reserve(new, 200)
    await bank.finalize(first, 300)
    await bank.finalize(second, 200)
    assert (await bank.control.find_key(new.id)).spent == 500
    old = await bank.control.find_key(key.id)
    assert (await bank.reserve(old, 1))[1].outcome is ReserveOutcome.SPEND_LIMIT


async def test_a_limit_binds_its_own_key_alone(bank: Bank) -> None:
    account, key = await bank.open_account(10_000, spend_limit=10)
    other = await bank.open_key(account.id)
    _, reserved = await bank.reserve(other, 5_000)
    assert (reserved.outcome, reserved.spend_limit_left) == (GRANTED, None)
    assert (await bank.reserve(key, 11))[1].outcome is ReserveOutcome.SPEND_LIMIT


async def test_many_reserves_of_a_limited_key_in_one_batch_see_each_other(bank: Bank) -> None:
    _, key = await bank.open_account(10_000, spend_limit=1_000)
    _, reserved, _ = await bank.holds.batch([], [bank.a_reserve(key, 300, 50) for _ in range(5)])
    assert [r.granted for r in reserved] == [300, 300, 300, 100, 0]
