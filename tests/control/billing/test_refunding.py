"""Refunds that we ask for: credits are held, Stripe is asked, and the credits are taken or free again, whatever goes
wrong in between."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from proxy.control.billing.refunding import Refunder, RefundTerms
from proxy.control.billing.resume_refunds import RefundResumer
from proxy.core.errors import Conflict, InvalidRequest, NotFound, Refusal, Unavailable
from proxy.ledger.orders import Order
from proxy.ledger.refunds import RefundRequest
from tests.control.billing.counter import Counter
from tests.fakes.stripe import ErrorAfter, ErrorBefore, Fault, LostReply, LostRequest, RateLimited
from tests.fakes.stripe import Unavailable as Away

POST = "POST /v1/refunds"
DAY = 24 * 3600


def refunder(counter: Counter, *, livemode: bool = False) -> Refunder:
    return Refunder(counter.desk.orders, counter.ledger, counter.refunds, livemode=livemode)


async def refund(counter: Counter, order: Order, **terms: Any) -> RefundRequest:
    return await refunder(counter).refund(order, RefundTerms(actor="ann", **terms))


async def refused(counter: Counter, order: Order, **terms: Any) -> Refusal:
    with pytest.raises(Refusal) as found:
        await refund(counter, order, **terms)
    return found.value


async def held(counter: Counter, order: Order) -> list[RefundRequest]:
    return [request for request in await counter.ledger.held(limit=1000) if request.order_id == order.id]


async def resumed(counter: Counter, order: Order) -> list[str]:
    """Carries on with the order's requests; what states those have that ended."""
    found = await counter.refunds.carry_on(await held(counter, order))
    return [request.state for request in found.ended]


def refunds_at_stripe(counter: Counter, intent: str) -> list[int]:
    state = counter.desk.stripe.state
    return [one["amount"] for one in state.all("refund") if one["payment_intent"] == intent]


async def test_all_of_a_purchase_that_is_not_spent(counter: Counter) -> None:
    order, _ = await counter.sold(bonus=100, tax=190)
    request = await refund(counter, order, reason="sorry")
    assert (request.state, request.amount, request.credits, request.bonus) == ("done", 1190, 1000, 100)
    assert request.refund is not None
    at_stripe = counter.desk.stripe.object(request.refund)
    assert at_stripe["metadata"] == {
        "farebox_refund": str(request.id),
        "farebox_order": str(order.id),
        "farebox_account": str(order.account_id),
    }
    [asked] = [a for a in counter.desk.stripe.asked if a.name == POST and a.key == str(request.id)]
    assert asked is not None
    assert await counter.money(order) == (0, 0, 0)
    assert await counter.taken(order) == (1000, 100)
    # The webhook says the same again.
    assert await counter.refunds.apply(request.refund) == "known"
    book = await counter.desk.bank.control.transfers(order.account_id)
    assert [(t.kind, t.amount, t.reference) for t in reversed(book)][2:] == [
        ("refund", 1000, request.refund),
        ("refund", 100, f"{request.refund}:bonus"),
    ]
    assert book[1].reason == "sorry"


async def test_of_a_half_spent_purchase_the_other_half(counter: Counter) -> None:
    order, intent = await counter.sold(credits=1000, price=999)
    await counter.spend(order, 501)
    request = await refund(counter, order)
    # 499 of 1,000 credits are 498.501 cents: 498, which are 498.498 credits: 498.
    assert (request.state, request.amount, request.credits) == ("done", 498, 498)
    assert await counter.money(order) == (1, 0, 0)
    assert refunds_at_stripe(counter, intent) == [498]
    assert (await refused(counter, order)).code in ("refund_spent", "refund_refunded")


async def test_credits_of_others_are_no_reason_to_refund_this_purchase(counter: Counter) -> None:
    order, _ = await counter.sold()
    await counter.spend(order, 1000)
    await counter.desk.bank.control.grant(order.account_id, 5000, reference=f"g {order.id}", actor="test")
    error = await refused(counter, order)
    assert (error.code, type(error)) == ("refund_spent", Conflict)
    assert "10.00 USD" in error.message


async def test_an_amount_takes_other_credits_where_the_purchase_is_spent(counter: Counter) -> None:
    order, intent = await counter.sold()
    await counter.desk.bank.control.grant(order.account_id, 300, reference=f"g {order.id}", actor="test")
    await counter.spend(order, 1200)
    request = await refund(counter, order, amount=100)
    assert (request.state, request.credits) == ("done", 100)
    assert await counter.money(order) == (0, 0, 0)
    error = await refused(counter, order, amount=100)
    assert (error.code, "0.00 USD" in error.message) == ("refund_insufficient", True)
    assert refunds_at_stripe(counter, intent) == [100]


async def test_all_left_is_refunded_and_what_is_spent_is_owed(counter: Counter) -> None:
    order, intent = await counter.sold()
    await counter.spend(order, 700)
    request = await refund(counter, order, all_left=True)
    assert (request.state, request.amount, request.credits) == ("done", 1000, 300)
    assert await counter.money(order) == (0, 0, 700)
    assert (await refused(counter, order, all_left=True)).code == "refund_refunded"
    assert refunds_at_stripe(counter, intent) == [1000]


async def test_what_is_held_for_it_can_t_be_spent_meanwhile(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100)
    counter.desk.stripe.faults.on(POST, LostRequest())
    assert (await refused(counter, order, amount=600)).code == "refund_unresolved"
    assert await counter.money(order) == (1100, 660, 0)
    assert await counter.lots(order) == [("paid", 1000, 600, 0), ("promo", 100, 60, 0)]
    key = await counter.desk.bank.open_key(order.account_id)
    assert (await counter.desk.bank.reserve(key, 441))[1].outcome == "credits_held"
    await counter.spend(order, 440)
    assert await resumed(counter, order) == ["done"]
    assert await counter.money(order) == (0, 0, 0)
    assert await counter.taken(order) == (600, 60)
    assert refunds_at_stripe(counter, intent) == [600]


@pytest.mark.parametrize(
    "fault", [LostRequest(), LostReply(), Away(), RateLimited(), ErrorAfter(), ErrorBefore()], ids=str
)
async def test_whatever_becomes_of_the_call_there_is_one_refund(counter: Counter, fault: Fault) -> None:
    order, intent = await counter.sold()
    counter.desk.stripe.faults.on(POST, fault)
    error = await refused(counter, order)
    assert (error.code, type(error)) == ("refund_unresolved", Unavailable)
    assert (await counter.money(order))[1] == 1000
    states = await resumed(counter, order)
    if isinstance(fault, ErrorBefore):
        # The key remembers it for a day: until then nobody asks under another.
        assert states == []
        counter.desk.stripe.clock.advance(DAY + 1)
        states = await resumed(counter, order)
    assert states == ["done"]
    assert refunds_at_stripe(counter, intent) == [1000]
    assert await counter.money(order) == (0, 0, 0)
    # Under one key, which is the request's id: that of the refund's own metadata.
    [made] = [one for one in counter.desk.stripe.state.all("refund") if one["payment_intent"] == intent]
    asked = [
        one for one in counter.desk.stripe.asked if one.name == POST and made["metadata"]["farebox_order"] in repr(one)
    ]
    assert {one.key for one in asked} == {made["metadata"]["farebox_refund"]}


async def test_a_key_that_stands_for_another_refund_is_neither_replaced_nor_taken_for_a_refusal(
    counter: Counter,
) -> None:
    """Whoever used it: nobody knows what it did. The credits stay held until Stripe has forgotten the key."""
    order, intent = await counter.sold()
    _, other = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostRequest())
    await refused(counter, order)
    [request] = await held(counter, order)
    params: Any = {"payment_intent": other, "amount": 1}
    options: Any = {"idempotency_key": str(request.id)}
    await counter.desk.api.call(lambda client: client.v1.refunds.create(params, options))
    before = len(counter.desk.stripe.asked)
    resumed_now = await counter.refunds.carry_on([request])
    [(waiting, why)] = resumed_now.waiting
    assert (waiting.id, resumed_now.ended) == (request.id, [])
    assert str(request.id) in why
    assert [one.key for one in counter.desk.stripe.asked[before:] if one.name == POST] == [str(request.id)]
    assert [one.state for one in await held(counter, order)] == ["held"]
    assert await counter.money(order) == (1000, 1000, 0)
    counter.desk.stripe.clock.advance(DAY + 1)
    assert await resumed(counter, order) == ["done"]
    assert refunds_at_stripe(counter, intent) == [1000]


async def test_a_lost_answer_is_found_when_the_key_is_long_forgotten(counter: Counter) -> None:
    order, intent = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostReply())
    await refused(counter, order, amount=300)
    counter.desk.stripe.clock.advance(3 * DAY)
    assert await resumed(counter, order) == ["done"]
    assert refunds_at_stripe(counter, intent) == [300]
    assert await counter.money(order) == (700, 0, 0)


async def test_the_webhook_may_be_first(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=50)
    counter.desk.stripe.faults.on(POST, LostReply())
    await refused(counter, order)
    [refund_id] = [one["id"] for one in counter.desk.stripe.state.all("refund") if one["payment_intent"] == intent]
    assert await counter.refunds.apply(refund_id) == "taken"
    assert await held(counter, order) == []
    assert await counter.money(order) == (0, 0, 0)
    assert await counter.lots(order) == [("paid", 0, 0, 0), ("promo", 0, 0, 0)]


async def test_what_stripe_refuses_is_free_again(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100)
    dispute = counter.desk.stripe.disputes.open(intent, withdraw=False)
    request = await refund(counter, order)
    assert (request.state, request.refund) == ("released", None)
    assert request.problem is not None
    assert "charged back" in request.problem
    assert await counter.money(order) == (1100, 0, 0)
    assert await counter.lots(order) == [("paid", 1000, 0, 0), ("promo", 100, 0, 0)]
    counter.desk.stripe.disputes.move(dispute, "won")


async def test_one_that_fails_at_the_bank_is_put_back(counter: Counter) -> None:
    order, _ = await counter.sold(bonus=100)
    counter.desk.stripe.refunds.beginning = "pending"
    try:
        request = await refund(counter, order)
    finally:
        counter.desk.stripe.refunds.beginning = "succeeded"
    assert (request.state, await counter.money(order)) == ("done", (0, 0, 0))
    assert request.refund is not None
    counter.desk.stripe.refunds.settle(request.refund, "failed")
    assert await counter.refunds.apply(request.refund) == "returned"
    assert await counter.money(order) == (1100, 0, 0)
    assert (await refund(counter, order)).state == "done"


async def test_one_that_has_failed_before_its_answer_was_heard_frees_the_hold(counter: Counter) -> None:
    order, intent = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostReply())
    await refused(counter, order)
    [refund_id] = [one["id"] for one in counter.desk.stripe.state.all("refund") if one["payment_intent"] == intent]
    counter.desk.stripe.refunds.settle(refund_id, "failed")
    assert await resumed(counter, order) == ["released"]
    assert await counter.money(order) == (1000, 0, 0)


async def test_eight_commands_at_once_refund_once(counter: Counter) -> None:
    order, intent = await counter.sold()

    async def one() -> str:
        try:
            return (await refund(counter, order)).state
        except Refusal as error:
            return error.code

    outcomes = await asyncio.gather(*(one() for _ in range(8)))
    assert outcomes.count("done") == 1
    assert set(outcomes) <= {"done", "refund_under_way", "refund_refunded"}
    assert refunds_at_stripe(counter, intent) == [1000]
    assert await counter.money(order) == (0, 0, 0)


async def test_the_same_reference_is_the_same_refund(counter: Counter) -> None:
    order, intent = await counter.sold()
    first = await refund(counter, order, amount=100, reference="ticket 7")
    assert await refund(counter, order, amount=100, reference="ticket 7") == first
    assert await refund(counter, order, reference="ticket 7") == first
    assert (await refused(counter, order, amount=200, reference="ticket 7")).code == "conflict"
    assert (await refund(counter, order, amount=200, reference="ticket 8")).state == "done"
    assert sorted(refunds_at_stripe(counter, intent)) == [100, 200]


async def test_eight_who_resume_at_once_refund_once(counter: Counter) -> None:
    order, intent = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostRequest())
    await refused(counter, order)
    requests = await held(counter, order)
    await asyncio.gather(*(counter.refunds.carry_on(requests) for _ in range(8)))
    await resumed(counter, order)
    assert refunds_at_stripe(counter, intent) == [1000]
    assert await counter.money(order) == (0, 0, 0)


async def test_a_refund_in_the_dashboard_meanwhile_is_no_debt(counter: Counter) -> None:
    order, intent = await counter.sold(bonus=100)
    counter.desk.stripe.faults.on(POST, LostRequest())
    await refused(counter, order)
    await counter.refund(intent)
    assert await counter.money(order) == (0, 0, 0)
    assert await resumed(counter, order) == ["released"]
    assert await counter.money(order) == (0, 0, 0)
    assert await counter.lots(order) == [("paid", 0, 0, 0), ("promo", 0, 0, 0)]
    assert await counter.taken(order) == (1000, 100)


@pytest.mark.parametrize("spent", [0, 50, 100, 400])
@pytest.mark.parametrize(("asked", "disputed"), [(None, None), (300, None), (500, 400), (1000, 1)])
async def test_a_dispute_takes_what_is_held_for_a_refund_that_stripe_then_refuses(
    counter: Counter, asked: int | None, disputed: int | None, spent: int
) -> None:
    """As if the refund had never been asked for: the bonus, too, which would stay with the account otherwise."""
    order, intent = await counter.sold(bonus=100)
    await counter.spend(order, spent) if spent else None
    counter.desk.stripe.faults.on(POST, LostRequest())
    await refused(counter, order, amount=asked) if asked != 1000 else await refused(counter, order, all_left=True)
    dispute = counter.desk.stripe.disputes.open(intent, disputed)
    assert await counter.disputes.apply(dispute) == "taken"
    [request] = await held(counter, order)
    due = disputed or 1000
    bonus_due = due * 100 // 1000
    left = min(bonus_due, 100 - min(spent, 100))
    assert await counter.taken(order) == (due, left)
    balance, on_hold, debt = await counter.money(order)
    assert balance - debt == 1100 - spent - due - left
    # What of the payment is left may still be refunded, and is held as far as it is there.
    assert (
        on_hold
        == request.credits + request.bonus
        == min(balance, min(request.amount, 1000 - due) + min(request.bonus, 100 - left))
    )
    assert await resumed(counter, order) == ["released"]
    assert await counter.money(order) == (balance, 0, debt)
    assert [(reserved, owed) for _, _, reserved, owed in await counter.lots(order)] == [(0, 0)] * 2


@pytest.mark.parametrize("disputed", [100, 250, 400, 700])
async def test_a_dispute_and_a_refund_that_was_under_way_take_both(counter: Counter, disputed: int) -> None:
    order, intent = await counter.sold(bonus=100)
    await counter.spend(order, 300)
    counter.desk.stripe.faults.on(POST, LostReply())
    await refused(counter, order, amount=500)
    await counter.disputes.apply(counter.desk.stripe.disputes.open(intent, disputed))
    assert await resumed(counter, order) == ["done"]
    gone = min(500 + disputed, 1000)
    assert await counter.taken(order) == (gone, 0)
    assert await counter.money(order) == (max(800 - gone, 0), 0, max(gone - 800, 0))


async def test_running_calls_keep_what_they_hold(counter: Counter) -> None:
    order, _ = await counter.sold()
    key = await counter.desk.bank.open_key(order.account_id)
    row, _ = await counter.desk.bank.reserve(key, 400)
    request = await refund(counter, order)
    assert (request.amount, request.credits) == (600, 600)
    await counter.desk.bank.finalize(row, 100)
    assert (await refund(counter, order)).amount == 300
    assert await counter.money(order) == (0, 0, 0)


async def test_a_request_is_given_to_one_and_to_nobody_for_a_while(counter: Counter) -> None:
    order, _ = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostRequest())
    await refused(counter, order)

    async def claim(age: float = 0.0) -> list[UUID]:
        found = await counter.ledger.claim(age_seconds=age, pause_seconds=3600, limit=100)
        return [request.id for request in found if request.order_id == order.id]

    assert await claim(60) == []
    await counter.desk.bank.owner.execute(
        "UPDATE farebox.refund_requests SET created_at = created_at - interval '1 hour', "
        "changed_at = changed_at - interval '16 minutes' WHERE order_id = $1",
        order.id,
    )
    count, oldest = await counter.ledger.waiting()
    assert count >= 1
    assert oldest is not None
    claimed = await asyncio.gather(*(claim(60) for _ in range(8)))
    assert sorted(map(len, claimed)) == [0] * 7 + [1]
    assert await claim(60) == []
    assert await resumed(counter, order) == ["done"]


async def test_what_can_t_be_refunded(counter: Counter) -> None:
    unpaid = await counter.desk.order()
    assert (await refused(counter, unpaid)).code == "refund_no_payment"
    order, _ = await counter.sold()
    assert (await refused(counter, order, amount=1001)).code == "refund_above_payment"
    assert isinstance(await refused(counter, order, amount=0), InvalidRequest)
    assert isinstance(await refused(counter, order, amount=1, all_left=True), InvalidRequest)
    with pytest.raises(Conflict, match="mode"):
        await refunder(counter, livemode=True).refund(order, RefundTerms(actor="ann"))
    nobody = await counter.ledger.open(uuid4(), uuid4(), None, owing=False, step=1, actor="ann", reason=None)
    assert nobody.outcome == "unknown"
    with pytest.raises(NotFound):
        await refunder(counter).refund(_with_id(order, uuid4()), RefundTerms(actor="ann"))
    assert await counter.money(order) == (1000, 0, 0)


async def test_whole_krona_are_refunded(counter: Counter) -> None:
    order, _ = await counter.sold(currency="isk", price=100_000, credits=1000)
    await counter.spend(order, 333)
    request = await refund(counter, order)
    assert (request.amount, request.credits) == (66_700, 667)
    order, _ = await counter.sold(currency="isk", price=100_000, credits=100_000)
    await counter.spend(order, 33_333)
    request = await refund(counter, order)
    assert (request.amount, request.credits) == (66_600, 66_600)
    assert (await refused(counter, order, amount=50)).code == "invalid_value"


def _with_id(order: Order, id: UUID) -> Order:
    return Order(**{name: getattr(order, name) for name in Order.__dataclass_fields__} | {"id": id})


async def test_the_loop_carries_on_by_itself(counter: Counter) -> None:
    order, _ = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostReply())
    await refused(counter, order)
    seen: asyncio.Queue[int] = asyncio.Queue()
    loop = RefundResumer(
        counter.ledger,
        counter.refunds,
        observe=lambda count, oldest: seen.put_nowait(count),
        seconds=0.02,
        age_seconds=0.0,
    )
    loop.start()
    async with asyncio.timeout(20):
        while await seen.get():
            pass
    await loop.stop()
    assert await held(counter, order) == []
    assert await counter.money(order) == (0, 0, 0)


async def test_a_hold_that_somebody_else_has_ended_stops_no_refund(counter: Counter) -> None:
    """No code does, but a gateway's role could."""
    order, _ = await counter.sold()
    counter.desk.stripe.faults.on(POST, LostRequest())
    await refused(counter, order, amount=400)
    [request] = await held(counter, order)
    await counter.desk.bank.holds.release(request.id, order.account_id, counter.desk.bank.worker_id)
    assert await resumed(counter, order) == ["done"]
    assert await counter.money(order) == (600, 0, 0)
    assert await counter.lots(order) == [("paid", 600, 0, 0)]
