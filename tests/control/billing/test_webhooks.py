"""The endpoint: what it believes, what it answers, and what it leaves to the next attempt. Over a real ledger."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import asyncpg
import httpx2
import pytest

from proxy.control.billing import webhooks
from proxy.control.billing.event_types import EVENT_TYPES, Subject
from proxy.control.billing.events import Appliers, EventDesk
from proxy.control.billing.resume import EventResumer, resume_events
from proxy.control.billing.webhooks import BODY_BYTES_MAX, PATH, WebhookEndpoint, webhook_routes
from proxy.core.errors import InvalidRequest
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.stripe_events import EventLedger, EventState, Unprocessed
from proxy.metrics import Metrics
from tests.control.billing.signing import OLD_SECRET, SECRET, a_session_event, an_event, body_of, signature
from tests.control.conftest import client_of
from tests.postgres import Database

NUMBERS = count(1)


def fresh() -> str:
    return f"w{next(NUMBERS)}"


@dataclass
class Shop:
    """The endpoint over HTTP, and what it has applied."""

    http: httpx2.AsyncClient
    endpoint: WebhookEndpoint
    ledger: EventLedger
    desk: EventDesk
    metrics: Metrics
    applied: list[tuple[Subject, str]] = field(default_factory=list)
    troubles: list[Exception] = field(default_factory=list)
    """What the next applications raise, one each."""
    gate: asyncio.Event | None = None
    """Applications wait for it."""

    async def send(self, event: dict[str, Any], **changes: Any) -> httpx2.Response:
        return await self.send_raw(body_of(event), **changes)

    async def send_raw(self, body: bytes, *, headers: dict[str, str] | None = None, **how: Any) -> httpx2.Response:
        given = {"stripe-signature": signature(body, **how), "content-type": "application/json; charset=utf-8"}
        return await self.http.post(PATH, content=body, headers=given | (headers or {}))

    async def apply(self, subject: Subject, object_id: str) -> str:
        if self.gate is not None:
            await self.gate.wait()
        if self.troubles:
            raise self.troubles.pop(0)
        self.applied.append((subject, object_id))
        return "paid"

    async def state(self, event_id: str) -> EventState | None:
        return next((state for state in await self.ledger.newest(limit=1000) if state.event.id == event_id), None)

    def counted(self, outcome: str) -> float | None:
        return self.metrics.registry.get_sample_value("farebox_stripe_events_total", {"outcome": outcome})


@pytest.fixture
async def open_shop(module_database: Database) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def open_one(*, livemode: bool = False, seconds: float = 20, dsn: str | None = None) -> Shop:
            pool = await create_pool(dsn or module_database.app, Role.CONTROL, size=10)
            stack.push_async_callback(pool.close)
            ledger, metrics = EventLedger(pool), Metrics()

            async def apply(subject: Subject, object_id: str) -> str:
                return await opened.apply(subject, object_id)

            appliers: Appliers = {s: partial(apply, s) for s in Subject if s != Subject.INVOICE}
            desk = EventDesk(ledger, appliers, metrics=metrics, seconds=seconds)
            endpoint = WebhookEndpoint(
                ledger, desk, secrets=[OLD_SECRET, SECRET], livemode=livemode, metrics=metrics, clock=time.time
            )
            http = await stack.enter_async_context(client_of(webhook_routes(endpoint)))
            opened = Shop(http, endpoint, ledger, desk, metrics)
            return opened

        yield open_one


@pytest.fixture
async def shop(open_shop: Callable[..., Any]) -> Shop:
    found: Shop = await open_shop()
    return found


def refused(answer: httpx2.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    return str(answer.json()["error"]["code"])


# What is believed


async def test_an_event_is_committed_applied_and_then_answered(shop: Shop) -> None:
    number = fresh()
    answer = await shop.send(a_session_event(number))
    assert answer.status_code == 200
    assert answer.json() == {"received": True, "event": f"evt_{number}", "outcome": "paid"}
    assert shop.applied == [(Subject.SESSION, f"cs_test_{number}")]
    state = await shop.state(f"evt_{number}")
    assert state is not None
    assert (state.outcome, state.attempts, state.event.created.timestamp()) == ("paid", 1, 1_790_000_000)


@pytest.mark.parametrize("event_type", [t for t, subject in EVENT_TYPES.items() if subject != Subject.INVOICE])
async def test_each_type_fetches_what_it_is_about(shop: Shop, event_type: str) -> None:
    subject, number = EVENT_TYPES[event_type], fresh()
    assert (await shop.send(an_event(f"evt_{number}", event_type, subject, f"x_{number}"))).status_code == 200
    assert shop.applied == [(subject, f"x_{number}")]


async def test_both_secrets_are_taken_while_they_rotate(shop: Shop) -> None:
    for secret in (SECRET, OLD_SECRET):
        assert (await shop.send(a_session_event(fresh()), secret=secret)).status_code == 200


async def test_a_second_delivery_does_nothing_more(shop: Shop) -> None:
    event = a_session_event(fresh())
    await shop.send(event)
    assert (await shop.send(event)).json()["outcome"] == "known"
    assert len(shop.applied) == 1
    assert (shop.counted("applied"), shop.counted("known")) == (1, 1)


async def test_eight_at_once_are_all_answered(shop: Shop) -> None:
    event = a_session_event(fresh())
    answers = await asyncio.gather(*(shop.send(event) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(shop.applied) >= 1


@pytest.mark.parametrize("event_type", ["charge.refunded", "customer.created", "a.type.that.comes.in.2031"])
async def test_a_type_that_means_nothing_here_is_kept_and_ignored(shop: Shop, event_type: str) -> None:
    number = fresh()
    event = an_event(f"evt_{number}", event_type, "charge", "ch_1")
    for _ in range(2):
        answer = await shop.send(event)
        assert (answer.status_code, answer.json()["outcome"]) == (200, "ignored")
    state = await shop.state(f"evt_{number}")
    assert state is not None
    assert (state.outcome, shop.applied) == ("ignored", [])


async def test_what_has_no_id_can_be_ignored_too(shop: Shop) -> None:
    event = an_event(f"evt_{fresh()}", "balance.available", "balance", "")
    del event["data"]["object"]["id"]
    assert (await shop.send(event)).json()["outcome"] == "ignored"


async def test_a_subject_that_nobody_applies_is_ignored(shop: Shop) -> None:
    event = an_event(f"evt_{fresh()}", "invoice.paid", "invoice", "in_1")
    assert (await shop.send(event)).json()["outcome"] == "ignored"


async def test_a_connected_account_s_event_is_not_ours(shop: Shop) -> None:
    answer = await shop.send(a_session_event(fresh(), account="acct_another"))
    assert (answer.status_code, answer.json()["outcome"], shop.applied) == (200, "not_ours", [])


# What is refused


async def test_what_stripe_didnt_sign_is_refused_and_not_kept(shop: Shop) -> None:
    number = fresh()
    body = body_of(a_session_event(number))
    forged = [
        (await shop.http.post(PATH, content=body), "signature_missing"),
        (await shop.send_raw(body, secret="whsec_guessed"), "signature_invalid"),
        (await shop.send_raw(body, headers={"stripe-signature": signature(body + b" ")}), "signature_invalid"),
        (await shop.send_raw(body, at=time.time() - 320), "signature_expired"),
        (await shop.send_raw(body, at=time.time() + 320), "signature_in_future"),
    ]
    assert [(refused(answer), code) for answer, code in forged] == [(code, code) for _, code in forged]
    assert (await shop.state(f"evt_{number}"), shop.applied) == (None, [])
    assert shop.counted("refused") == len(forged)


@pytest.mark.parametrize("livemode", [False, True])
async def test_the_other_mode_s_event_is_refused(open_shop: Callable[..., Any], livemode: bool) -> None:
    shop: Shop = await open_shop(livemode=livemode)
    assert refused(await shop.send(a_session_event(fresh(), livemode=not livemode))) == "livemode_mismatch"
    assert (await shop.send(a_session_event(fresh(), livemode=livemode))).status_code == 200


async def test_a_thin_event_is_refused_with_what_to_do(shop: Shop) -> None:
    thin = {
        "id": "evt_thin",
        "object": "v2.core.event",
        "type": "v1.billing.meter.error_report_triggered",
        "livemode": False,
        "created": "2026-11-22T00:00:00.000Z",
        "related_object": {"id": "cs_1", "type": "checkout.session", "url": "/v1/checkout/sessions/cs_1"},
    }
    answer = await shop.send(thin)
    assert refused(answer) == "thin_event"
    assert "farebox stripe setup" in answer.json()["error"]["message"]


MALFORMED: list[dict[str, Any]] = [
    {"object": "charge"},
    {"object": None},
    {"id": None},
    {"id": 5},
    {"id": "evt_/../x"},
    {"id": "evt_" + "x" * 300},
    {"type": "Robert'); DROP TABLE"},
    {"type": None},
    {"livemode": None},
    {"livemode": 1},
    {"livemode": "false"},
    {"created": None},
    {"created": True},
    {"created": -1},
    {"created": 10**18},
    {"created": "now"},
    {"account": 5},
    {"data": None},
    {"data": []},
    {"data": {"object": None}},
    {"data": {"object": {"id": "cs_1", "object": "payment_intent"}}},
    {"data": {"object": {"object": "checkout.session"}}},
    {"data": {"object": {"id": "../payment_intents/pi_1", "object": "checkout.session"}}},
    {"data": {"object": {"id": "", "object": "checkout.session"}}},
]


@pytest.mark.parametrize("changes", MALFORMED, ids=range(len(MALFORMED)))
async def test_what_is_signed_and_still_no_event_is_refused(shop: Shop, changes: dict[str, Any]) -> None:
    assert refused(await shop.send(a_session_event(fresh()) | changes)) == "event_malformed"
    assert shop.applied == []


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b"NaN"])
async def test_what_is_no_object_is_refused(shop: Shop, body: bytes) -> None:
    header = {"stripe-signature": signature(b"")}
    if body.isascii():
        header = {"stripe-signature": signature(body)}
        assert refused(await shop.http.post(PATH, content=body, headers=header)) == "event_malformed"
    else:
        assert refused(await shop.http.post(PATH, content=body, headers=header)) == "signature_invalid"


async def test_a_large_body_is_refused_before_it_is_read(shop: Shop) -> None:
    whole = body_of(a_session_event(fresh(), padding="x" * BODY_BYTES_MAX))
    assert refused(await shop.send_raw(whole), 413) == "body_too_large"

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), 65_536):
            yield whole[start : start + 65_536]

    answer = await shop.http.post(PATH, content=chunks(), headers={"stripe-signature": signature(whole)})
    assert refused(answer, 413) == "body_too_large"
    fits = body_of(a_session_event(fresh()))
    fits += b" " * (BODY_BYTES_MAX - len(fits))
    assert (await shop.send_raw(fits)).status_code == 200


async def test_an_encoded_body_is_refused(shop: Shop) -> None:
    body = body_of(a_session_event(fresh()))
    assert refused(await shop.send_raw(body, headers={"content-encoding": "gzip"})) == "content_encoding_unsupported"


async def test_a_body_that_doesnt_arrive_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RECEIVE_SECONDS_MAX", 0.05)
    body = body_of(a_session_event(fresh()))

    async def chunks() -> AsyncIterator[bytes]:
        yield body[:10]
        await asyncio.sleep(30)

    answer = await shop.http.post(PATH, content=chunks(), headers={"stripe-signature": signature(body)})
    assert refused(answer) == "request_timeout"
    assert shop.applied == []


async def test_a_body_that_is_cut_off_is_refused(shop: Shop) -> None:
    body, sent = body_of(a_session_event(fresh())), []
    messages = [{"type": "http.request", "body": body[:10], "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"stripe-signature", signature(body).encode()), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers, "query_string": b""}
    [route] = webhook_routes(shop.endpoint)
    with pytest.raises(InvalidRequest) as refusal:
        await route.handle(scope, receive, send)
    assert (refusal.value.code, sent, shop.applied) == ("request_cut_off", [], [])


async def test_only_post_is_served(shop: Shop) -> None:
    assert (await shop.http.get(PATH)).status_code == 405


async def test_another_event_under_the_same_id_is_refused(shop: Shop) -> None:
    number = fresh()
    await shop.send(an_event(f"evt_{number}", "customer.created", "customer", "cus_1"))
    assert refused(await shop.send(a_session_event(number)), 409) == "event_conflict"
    assert shop.applied == []


# What is left to the next attempt


async def test_what_fails_is_answered_5xx_and_done_at_the_next_delivery(shop: Shop) -> None:
    event = a_session_event(fresh())
    shop.troubles = [RuntimeError("fb_abcdefghijkl_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG was no key")]
    answer = await shop.send(event)
    assert refused(answer, 503) == "event_unprocessed"
    assert "RuntimeError" not in answer.text
    state = await shop.state(event["id"])
    assert state is not None
    assert (state.outcome, state.processed_at) == (None, None)
    assert state.error is not None
    assert state.error.startswith("RuntimeError: fb_abcdefghijkl_")
    assert (await shop.send(event)).json()["outcome"] == "paid"
    state = await shop.state(event["id"])
    assert state is not None
    assert (state.attempts, state.outcome, state.error) == (2, "paid", None)


async def test_what_takes_too_long_is_left_to_the_next_attempt(open_shop: Callable[..., Any]) -> None:
    shop: Shop = await open_shop(seconds=0.2)
    shop.gate = asyncio.Event()
    event = a_session_event(fresh())
    assert refused(await shop.send(event), 503) == "event_unprocessed"
    shop.gate.set()
    assert (await shop.send(event)).json()["outcome"] == "paid"


async def test_without_postgres_nothing_is_answered_2xx(
    open_shop: Callable[..., Any], module_database: Database
) -> None:
    away: Shop = await open_shop(dsn="postgresql://nobody@127.0.0.1:1/nowhere")
    event = a_session_event(fresh())
    answer = await away.send(event)
    assert refused(answer, 503) == "ledger_unavailable"
    assert away.applied == []
    back: Shop = await open_shop()
    assert (await back.send(event)).json()["outcome"] == "paid"


async def test_the_loop_comes_back_for_what_was_left(shop: Shop, module_database: Database) -> None:
    event, hopeless = a_session_event(fresh()), a_session_event(fresh())
    shop.troubles = [RuntimeError("later"), RuntimeError("never")]
    for one in (event, hopeless):
        assert (await shop.send(one)).status_code == 503
    connection = await asyncpg.connect(module_database.superuser)
    past = "UPDATE farebox.stripe_events SET tried_at = tried_at - interval '31 seconds' WHERE processed_at IS NULL"
    await connection.execute(past)
    await connection.close()
    shop.troubles = [RuntimeError("again")]
    seen: asyncio.Queue[Unprocessed] = asyncio.Queue()
    loop = EventResumer(shop.ledger, shop.desk, livemode=False, observe=seen.put_nowait, seconds=0.02)
    loop.start()
    async with asyncio.timeout(20):
        left = await seen.get()
    await loop.stop()
    states = [await shop.state(one["id"]) for one in (event, hopeless)]
    assert sorted(str(state.outcome) for state in states if state is not None) == ["None", "paid"]
    assert left.count >= 1
    assert await resume_events(shop.ledger, shop.desk, livemode=False, pause_seconds=0) == (left.count, 0)
    assert (await shop.ledger.unprocessed(livemode=False)).count == 0
