"""Automatic top-ups against a fake Stripe with real idempotency keys, over a real ledger: never two charges."""

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.control.billing.errors import StripeAway, StripeRefused, StripeUnknown
from proxy.ledger.autotopups import Opened
from proxy.ledger.orders import Order
from tests.control.billing.shop import PACK, Shop, an_offer
from tests.control.billing.till import Desk
from tests.fakes.stripe import Behaviour, ErrorAfter, ErrorBefore, LostReply, LostRequest, RateLimited, Unavailable

CREATE = "POST /v1/payment_intents"


@pytest.fixture
def shop(desk: Desk) -> Shop:
    return Shop(desk)


async def attempt(shop: Shop, account_id: UUID) -> str | None:
    """One attempt: what became of it; None where none was made."""
    applied = await shop.topups.attempt(account_id, PACK)
    return None if applied is None else applied.outcome


async def lost(shop: Shop, account_id: UUID) -> Order:
    """An attempt of which nothing is known."""
    with pytest.raises(StripeAway):
        await attempt(shop, account_id)
    [order] = await shop.attempts(account_id)
    assert order.state == "created"
    return order


async def test_a_balance_below_the_threshold_buys_the_pack(shop: Shop) -> None:
    account = await shop.account(balance=9, threshold=10)
    assert await attempt(shop, account) == "paid"
    [order] = await shop.attempts(account)
    assert (order.state, order.received, order.pack, order.actor) == ("paid", 1_000, PACK, "auto_topup")
    assert await shop.desk.bank.book(account) == [("grant", 9), ("purchase", 1_000), ("promo", 100)]
    assert await shop.charged(account) == [1_000]
    assert await shop.told(account) == [("topped_up", None)]
    state = await shop.state(account)
    assert (state.spent, state.attempt, state.problem, state.failures) == (1_000, None, None, 0)
    assert await attempt(shop, account) is None, "it is above the threshold now"


@pytest.mark.parametrize(("balance", "threshold"), [(10, 10), (11, 10)], ids=["at the threshold", "above it"])
async def test_nothing_is_bought_that_nobody_needs(shop: Shop, balance: int, threshold: int) -> None:
    account = await shop.account(balance=balance, threshold=threshold)
    assert await attempt(shop, account) is None
    assert await shop.attempts(account) == []


async def test_the_balance_decides_not_what_is_available(shop: Shop) -> None:
    account = await shop.account(balance=100, threshold=50)
    key = await shop.desk.bank.open_key(account)
    reserve, _ = await shop.desk.bank.reserve(key, 90)
    assert await attempt(shop, account) is None
    await shop.desk.bank.finalize(reserve, 60)
    assert await attempt(shop, account) == "paid"


async def test_who_has_switched_it_off_has_no_card_or_is_frozen_buys_nothing(shop: Shop) -> None:
    off, cardless, frozen = await shop.account(), await shop.account(None), await shop.account()
    assert await shop.ledger.stop(off, actor="test")
    assert not await shop.ledger.stop(uuid4(), actor="test")
    await shop.desk.bank.owner.execute("UPDATE farebox.accounts SET frozen_at = now() WHERE id = $1", frozen)
    live = await shop.account()
    await shop.want(live, livemode=True)
    for account in (off, cardless, frozen, live):
        assert await attempt(shop, account) is None
        assert await shop.attempts(account) == []


async def test_fifty_at_once_make_one_attempt(shop: Shop) -> None:
    account = await shop.account()
    outcomes = await asyncio.gather(*(attempt(shop, account) for _ in range(50)))
    assert sorted(str(outcome) for outcome in outcomes) == ["None"] * 49 + ["paid"]
    assert await shop.charged(account) == [1_000]
    assert await shop.balance(account) == 1_105


# Answers that are lost


@pytest.mark.parametrize("fault", [LostReply(), LostRequest(), Unavailable(), RateLimited(), ErrorAfter()], ids=repr)
async def test_an_attempt_without_an_answer_is_gone_on_with_and_charged_once(shop: Shop, fault: object) -> None:
    account = await shop.account()
    shop.desk.stripe.faults.on(CREATE, fault)  # type: ignore[arg-type]  # one of them
    order = await lost(shop, account)
    assert (await shop.state(account)).spent == 1_000, "it may have been paid"
    spent = "SELECT farebox.auto_spent($1, 'usd', false)"
    assert await shop.desk.bank.owner.fetchval(spent, account) == 1_000
    assert (await shop.state(account)).attempt == order.id
    assert await attempt(shop, account) is None, "one attempt at a time"
    applied = await asyncio.gather(*(shop.topups.go_on(order) for _ in range(8)), return_exceptions=True)
    outcomes = {one.outcome for one in applied if not isinstance(one, BaseException)}
    assert outcomes <= {"paid", "known"}
    assert (await shop.topups.go_on(order)).outcome == "known"
    assert await shop.charged(account) == [1_000]
    assert await shop.balance(account) == 1_105
    asked = [one for one in shop.desk.stripe.asked if one.name == CREATE and str(order.id) in repr(one)]
    assert {one.key for one in asked} == {str(order.id)}


async def test_a_key_that_stands_for_another_payment_is_neither_replaced_nor_taken_for_a_refusal(shop: Shop) -> None:
    """Whoever used it: nobody knows what it did. The attempt stays open, and counts, until the key's time is over."""
    account = await shop.account()
    shop.desk.stripe.faults.on(CREATE, LostRequest())
    order = await lost(shop, account)
    params: Any = {"amount": 1, "currency": "usd"}
    options: Any = {"idempotency_key": str(order.id)}
    await shop.desk.api.call(lambda client: client.v1.payment_intents.create(params, options))
    before = len(shop.desk.stripe.asked)
    for _ in range(2):
        with pytest.raises(StripeRefused) as refused:
            await shop.topups.go_on(order)
        assert refused.value.code == "idempotency_error"
    assert [one.key for one in shop.desk.stripe.asked[before:] if one.name == CREATE] == [str(order.id)] * 2
    state = await shop.state(account)
    assert (state.attempt, state.spent, state.problem) == (order.id, 1_000, None)
    await age(shop, order, hours=24)
    assert (await shop.topups.go_on(order)).outcome == "failed"
    assert (await shop.state(account)).problem == "no_answer"
    assert await shop.charged(account) == []


async def test_a_key_that_remembers_a_failure_is_never_replaced_by_another(shop: Shop) -> None:
    account = await shop.account()
    shop.desk.stripe.faults.on(CREATE, ErrorBefore())
    order = await lost(shop, account)
    for _ in range(3):
        with pytest.raises(StripeAway):
            await shop.topups.go_on(order)
    await age(shop, order, hours=24)
    assert (await shop.topups.go_on(order)).outcome == "failed"
    assert await shop.charged(account) == []
    assert (await shop.state(account)).problem == "no_answer"
    assert await shop.pauses(account) == 1
    assert await shop.told(account) == [("auto_topup_failed", "no_answer")]
    asked = [one for one in shop.desk.stripe.asked if one.name == CREATE and str(order.id) in repr(one)]
    assert len(asked) == 4


@pytest.mark.parametrize("paid", [True, False])
async def test_after_a_day_an_attempt_is_only_looked_for(shop: Shop, *, paid: bool) -> None:
    """Its key may be forgotten by then: under it the same request would be another payment."""
    account = await shop.account()
    shop.desk.stripe.faults.on(CREATE, LostReply() if paid else LostRequest())
    order = await lost(shop, account)
    shop.desk.stripe.keys.forget()
    await age(shop, order, hours=23.1)
    assert (await shop.topups.go_on(order)).outcome == ("paid" if paid else "failed")
    assert await shop.charged(account) == ([1_000] if paid else [])


async def test_a_payment_that_was_made_is_found_before_it_is_asked_for_again(shop: Shop) -> None:
    account = await shop.account()
    shop.desk.stripe.faults.on(CREATE, LostReply())
    order = await lost(shop, account)
    shop.desk.stripe.keys.forget()
    assert (await shop.topups.go_on(order)).outcome == "paid"
    assert await shop.charged(account) == [1_000]


@pytest.mark.parametrize("paid", [True, False])
@pytest.mark.parametrize("hours", [1, 24])
async def test_an_attempt_whose_customer_was_deleted_meanwhile_comes_to_its_end(
    shop: Shop, *, paid: bool, hours: float
) -> None:
    """Stripe lists nothing of a customer that is there no more. What was paid is credited, whoever finds it."""
    account = await shop.account()
    customer = await shop.customer(account)
    shop.desk.stripe.faults.on(CREATE, LostReply() if paid else LostRequest())
    order = await lost(shop, account)
    await shop.desk.api.call(lambda client: client.v1.customers.delete(customer))
    await age(shop, order, hours=hours)
    outcome = (await shop.topups.go_on(order)).outcome
    asked = [one for one in shop.desk.stripe.asked if one.name == CREATE and str(order.id) in repr(one)]
    assert len(asked) == paid + (hours < 23), "and the request that was lost"
    assert outcome == ("paid" if paid and hours < 23 else "failed")
    if outcome == "failed":
        problem = "payment_method_gone" if hours < 23 else "no_answer"
        assert (await shop.state(account)).problem == problem
    assert (await shop.state(account)).attempt is None
    for charge in shop.desk.stripe.payments.charges(customer):
        await shop.desk.till.apply_payment(payment_intent=charge["payment_intent"])
    assert await shop.charged(account) == ([1_000] if paid else [])
    assert await shop.balance(account) == (1_105 if paid else 5)


@pytest.mark.parametrize("days", [20, 31])
async def test_a_payment_on_its_way_that_stripe_no_longer_knows_is_waited_for_a_month(shop: Shop, days: int) -> None:
    """The key is of another Stripe account now, maybe by mistake. No second attempt while the first may still come."""
    account = await shop.account("processing")
    assert await attempt(shop, account) == "pending"
    [order] = await shop.attempts(account)
    assert order.payment_intent is not None
    shop.desk.stripe.state.remove(order.payment_intent)
    await age(shop, order, hours=days * 24)
    if days < 30:
        with pytest.raises(StripeUnknown):
            await shop.topups.go_on(order)
        assert (await shop.state(account)).attempt == order.id
    else:
        assert (await shop.topups.go_on(order)).outcome == "failed"
        assert (await shop.state(account)).problem == "no_answer"


async def age(shop: Shop, order: Order, *, hours: float) -> None:
    """Let the order be so old. Stripe's payment was made then, too, within what is looked through."""
    await shop.desk.bank.owner.execute(
        "UPDATE farebox.orders SET created_at = created_at - make_interval(secs => $2::float8) WHERE id = $1",
        *(order.id, hours * 3600),
    )


# Refusals


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("decline", "generic_decline"), ("insufficient_funds", "insufficient_funds")]
)
async def test_a_declined_card_waits_longer_each_time_and_its_owner_is_told(
    shop: Shop, behaviour: Behaviour, reason: str
) -> None:
    account = await shop.account(behaviour)
    for number, hours in enumerate((1, 6, 24, 72, None), start=1):
        assert await attempt(shop, account) == "failed"
        assert await attempt(shop, account) is None
        state = await shop.state(account)
        assert (state.problem, state.failures, state.blocked_for_good) == (reason, number, hours is None)
        assert await shop.pauses(account) == hours
        assert await shop.told(account) == [("auto_topup_failed", reason)] * number
        assert state.spent == 0
        await shop.later(account)
    intents = shop.desk.stripe.state.all("payment_intent")
    mine = [one for one in intents if one["customer"] == await shop.customer(account)]
    assert [one["status"] for one in mine] == ["canceled"] * 5


async def test_a_payment_by_hand_shows_that_the_next_may_succeed(shop: Shop) -> None:
    account = await shop.account("decline")
    assert await attempt(shop, account) == "failed"
    order = await shop.desk.order(account, save_payment_method=True, customer=await shop.customer(account))
    session = await shop.desk.session(
        order, customer=order.customer, payment_intent_data=_saving(order, setup_future_usage="off_session")
    )
    shop.desk.stripe.checkout.pay(session)
    assert (await shop.desk.till.apply_payment(session_id=session)).outcome == "paid"
    assert (await shop.state(account)).blocked_until is None
    await shop.spend(account, 1_000)
    assert await attempt(shop, account) == "paid", "with the card that was saved"
    assert sorted(await shop.charged(account)) == [1_000, 1_000]


def _saving(order: Order, **changes: str) -> dict[str, object]:
    return {"metadata": {"farebox_order": str(order.id), "farebox_account": str(order.account_id)}, **changes}


async def test_settings_that_are_made_anew_are_tried_at_once(shop: Shop) -> None:
    account = await shop.account("decline")
    assert await attempt(shop, account) == "failed"
    await shop.save(account, shop.desk.stripe.customers.save(await shop.customer(account)))
    await shop.want(account)
    assert await attempt(shop, account) == "paid"


async def test_a_card_that_is_gone_is_not_tried_again(shop: Shop) -> None:
    account = await shop.account()
    await shop.save(account, "pm_gone")
    assert (await attempt(shop, account)) == "failed"
    state = await shop.state(account)
    assert (state.problem, state.blocked_for_good) == ("payment_method_gone", True)


async def test_where_the_bank_wants_its_customer_they_get_a_link_in_place_of_the_payment(shop: Shop) -> None:
    account = await shop.account("authentication_required")
    assert await attempt(shop, account) == "failed"
    [failed] = await shop.attempts(account)
    assert failed.payment_intent is not None
    assert await shop.told(account) == [], "the message comes with the link"
    await asyncio.gather(*(shop.topups.send_link(failed) for _ in range(4)))
    assert shop.desk.stripe.object(failed.payment_intent)["status"] == "canceled"
    state = await shop.state(account)
    assert (state.problem, state.blocked_for_good) == ("authentication_required", True)
    assert state.checkout_url is not None
    rows = await shop.desk.bank.owner.fetch("SELECT payload FROM farebox.outbox WHERE account_id = $1", account)
    [data] = [json.loads(row["payload"])["data"] for row in rows]
    assert (data["reason"], data["checkout_url"]) == ("authentication_required", state.checkout_url)
    assert await attempt(shop, account) is None
    [link] = [one for one in await shop.desk.orders.list_orders(account) if one.kind == "checkout"]
    assert (link.credits, link.bonus, link.price, link.save_payment_method) == (1_000, 100, 1_000, True)
    assert link.session_id is not None
    shop.desk.stripe.checkout.pay(link.session_id)
    assert (await shop.desk.till.apply_payment(link.id)).outcome == "paid"
    state = await shop.state(account)
    assert (state.problem, state.blocked_until, state.checkout_url) == (None, None, None)
    assert await shop.charged(account) == [1_000]
    assert await shop.balance(account) == 1_105


async def test_no_link_where_the_payment_came_after_all(shop: Shop) -> None:
    account = await shop.account("authentication_required")
    assert await attempt(shop, account) == "failed"
    [failed] = await shop.attempts(account)
    assert failed.payment_intent is not None
    with shop.desk.stripe.state.lock:
        shop.desk.stripe.payments.succeed(shop.desk.stripe.state.find(failed.payment_intent))
    await shop.topups.send_link(failed)
    assert await shop.balance(account) == 1_105
    assert [one.kind for one in await shop.desk.orders.list_orders(account)] == ["auto"]
    assert (await shop.state(account)).blocked_until is None


@pytest.mark.parametrize("succeed", [True, False])
async def test_a_payment_that_takes_days_is_waited_for(shop: Shop, *, succeed: bool) -> None:
    account = await shop.account("processing")
    assert await attempt(shop, account) == "pending"
    assert await attempt(shop, account) is None
    [order] = await shop.attempts(account)
    assert (await shop.topups.go_on(order)).outcome == "pending"
    assert (await shop.state(account)).spent == 1_000
    assert order.payment_intent is not None
    shop.desk.stripe.payments.settle(order.payment_intent, succeed=succeed)
    # By the webhook, in whichever process that comes to.
    applied = await shop.desk.till.apply_payment(payment_intent=order.payment_intent)
    assert applied.outcome == ("paid" if succeed else "failed")
    assert await shop.balance(account) == (1_105 if succeed else 5)
    assert await shop.told(account) == [("topped_up", None) if succeed else ("auto_topup_failed", "generic_decline")]
    assert await shop.pauses(account) == (None if succeed else 1)


# What stands in the way


async def test_a_month_s_maximum_counts_what_is_not_known_to_have_failed(shop: Shop) -> None:
    account = await shop.account(monthly_max=2_500)
    for _ in range(2):
        assert await attempt(shop, account) == "paid"
        await shop.spend(account, 1_100)
    assert await attempt(shop, account) is None
    state = await shop.state(account)
    assert (state.problem, state.spent, state.blocked_for_good) == ("monthly_max", 2_000, False)
    assert state.blocked_until is not None
    assert (state.blocked_until.day, state.blocked_until.hour, state.blocked_until.minute) == (1, 0, 0)
    assert await shop.told(account) == [("topped_up", None)] * 2 + [("auto_topup_failed", "monthly_max")]
    assert await attempt(shop, account) is None
    assert len(await shop.told(account)) == 3, "once"
    await shop.want(account, monthly_max=3_000)
    shop.desk.stripe.faults.on(CREATE, LostRequest())
    with pytest.raises(StripeAway):
        await attempt(shop, account)
    assert (await shop.state(account)).spent == 3_000


async def test_so_many_attempts_a_day_and_no_more(shop: Shop) -> None:
    account = await shop.account()
    for _ in range(10):
        assert await attempt(shop, account) == "paid"
        await shop.spend(account, 1_100)
    assert await attempt(shop, account) is None
    assert (await shop.state(account)).problem == "too_often"
    assert len(await shop.charged(account)) == 10


@pytest.mark.parametrize(
    ("offer", "problem"),
    [
        (None, "pack_gone"),
        (an_offer(price=1_001), "pack_changed"),
        (an_offer(credits=999), "pack_changed"),
        (an_offer(currency="eur"), "pack_changed"),
    ],
    ids=["gone", "dearer", "smaller", "in another currency"],
)
async def test_a_pack_that_its_owner_has_not_agreed_to_is_not_bought(shop: Shop, offer: object, problem: str) -> None:
    account = await shop.account()
    shop.offers = {} if offer is None else {PACK: offer}  # type: ignore[dict-item]  # an offer
    shop.topups = shop.worker(shop.desk.api)
    assert await attempt(shop, account) is None
    state = await shop.state(account)
    assert (state.problem, state.blocked_for_good) == (problem, True)
    assert await shop.told(account) == [("auto_topup_failed", problem)]


async def test_a_pack_that_has_become_better_is_bought_as_it_is(shop: Shop) -> None:
    account = await shop.account()
    shop.offers[PACK] = an_offer(price=900, credits=2_000, bonus=0)
    assert await attempt(shop, account) == "paid"
    assert await shop.charged(account) == [900]
    assert await shop.balance(account) == 2_005


async def test_an_attempt_and_the_end_of_another_do_not_wait_for_each_other(shop: Shop) -> None:
    """Opening one while another comes to its end, in every order: no deadlock, one attempt at a time."""
    account = await shop.account("processing")
    for _ in range(6):
        await attempt(shop, account)
        order = (await shop.attempts(account))[0]
        offers = [shop.ledger.open(uuid4(), account, an_offer(), livemode=False, day_max=100) for _ in range(4)]
        ended = shop.desk.orders.advance(order.id, "failed", problem="generic_decline")
        opened = await asyncio.gather(*offers, ended)
        assert set(opened) <= {Opened.BUSY, Opened.NOT_DUE, "failed"}
        await shop.want(account)
    assert len(await shop.attempts(account)) == 6
