"""Messages out, to an endpoint on a real socket, read by the library that receivers use."""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from uuid import UUID

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from proxy.control.billing.messages import RETRY_SECONDS, HttpPost, MessageSender
from proxy.core.webhook_signing import signing_key
from proxy.ledger.alerts import Alerts
from proxy.ledger.connect import Role, create_pool
from proxy.ledger.outbox import Message, Outbox
from proxy.metrics import Metrics
from tests.fakes.upstream import Cut, Received, ScriptedUpstream, Sleep, whole
from tests.ledger.bank import Bank, open_bank
from tests.postgres import Database

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"o" * 24).decode()
TAKEN = whole(b"", 204)


@pytest.fixture
async def bank(database: Database) -> AsyncIterator[Bank]:
    """A ledger of the test's own: what is due concerns all accounts."""
    async with open_bank(database, size=2) as found:
        yield found


@pytest.fixture
async def outbox(bank: Bank) -> AsyncIterator[Outbox]:
    pool = await create_pool(bank.database.app, Role.CONTROL, size=8)
    yield Outbox(pool)
    await pool.close()


@pytest.fixture
async def endpoint() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.will(*TAKEN)
        yield upstream


@pytest.fixture
async def post(endpoint: ScriptedUpstream) -> AsyncIterator[HttpPost]:
    made = HttpPost(endpoint.base_url + "/hooks?token=1", post_seconds=5)
    yield made
    await made.close()


def sender(outbox: Outbox, post: HttpPost | None, *secrets: str, metrics: Metrics | None = None) -> MessageSender:
    keys = [signing_key(secret) for secret in secrets or (SECRET,)]
    return MessageSender(outbox, post, keys, observe=metrics or Metrics(), poll_seconds=0.05)


async def tell(bank: Bank, account_id: UUID, count: int = 1) -> None:
    for _ in range(count):
        await bank.owner.execute("SELECT farebox.tell('account.frozen', $1, NULL, $2)", account_id, '{"why": "ä"}')


async def due_now(bank: Bank) -> None:
    """Let the time pass that every message waits for."""
    await bank.owner.execute("UPDATE farebox.outbox SET next_at = clock_timestamp()")


def read(received: Received, *secrets: str) -> dict[str, object]:
    """The body, as a receiver reads it with each of the secrets."""
    [found] = [Webhook(secret).verify(received.body, received.headers) for secret in secrets or (SECRET,)]
    assert isinstance(found, dict)
    return found


async def test_a_message_arrives_signed_as_standard_webhooks_are(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, post: HttpPost
) -> None:
    account, _ = await bank.open_account(5_000_000)
    await tell(bank, account.id)
    assert await sender(outbox, post).round() == 1
    [received] = endpoint.requests
    found = read(received)
    assert (found["type"], received.method, received.path) == ("account.frozen", "POST", "/v1/hooks?token=1")
    assert found["data"] == {
        "account": str(account.id), "name": account.name, "external_id": None, "balance": "5", "debt": "0", "why": "ä"
    }  # fmt: skip
    assert received.headers["content-type"] == "application/json"
    [message] = await outbox.messages()
    assert (message.state, message.webhook_id) == ("delivered", received.headers["webhook-id"])
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(received.body.replace(b"frozen", b"thawed"), received.headers)
    with pytest.raises(WebhookVerificationError):
        read(received, OTHER_SECRET)
    for name in ("webhook-id", "webhook-timestamp"):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(received.body, received.headers | {name: received.headers[name] + "0"})
    assert await sender(outbox, post).round() == 0


async def test_while_secrets_change_either_is_right(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, post: HttpPost
) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id)
    await sender(outbox, post, SECRET, OTHER_SECRET).round()
    assert read(endpoint.requests[0], SECRET) == read(endpoint.requests[0], OTHER_SECRET)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (whole(b"no", 500), "HTTP 500"),
        (whole(b"", 410), "HTTP 410"),
        (whole(b"", 307, {"location": "http://127.0.0.1:9/elsewhere"}), "HTTP 307: redirects are not followed"),
        ([Cut()], "RemoteProtocolError"),
        ([Cut(reset=True)], "R"),  # ReadError, or RemoteProtocolError where the reset comes late
        ([Sleep(30)], "no answer within"),
    ],
    ids=["500", "410", "redirect", "cut", "reset", "silent"],
)
async def test_what_is_not_taken_is_tried_again_under_the_same_id(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, answer: Sequence[object], reason: str
) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id)
    endpoint.will(*answer)  # type: ignore[arg-type]  # steps, as pytest's table has them
    post = HttpPost(endpoint.base_url, post_seconds=0.5 if reason.startswith("no answer") else 20)
    sending = sender(outbox, post)
    assert await sending.round() == 1
    assert await sending.round() == 0, "not at once"
    [message] = await outbox.messages(state="waiting")
    assert message.error is not None
    assert message.error.startswith(reason)
    endpoint.will(*TAKEN)
    await due_now(bank)
    assert await sending.round() == 1
    first, second = endpoint.requests
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])
    assert [message.state for message in await outbox.messages()] == ["delivered"]
    await post.close()


async def test_an_endpoint_that_is_not_there_is_asked_for_three_days(bank: Bank, outbox: Outbox) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id)
    metrics, post = Metrics(), HttpPost("http://127.0.0.1:1/hooks")
    sending = sender(outbox, post, metrics=metrics)
    waits = []
    while await sending.round():
        [message] = await outbox.messages()
        waits.append(await seconds_to_wait(bank, message))
        await due_now(bank)
    assert message.state == "given_up"
    assert len(waits) == len(RETRY_SECONDS) + 1
    for waited, planned in zip(waits, RETRY_SECONDS, strict=False):
        assert planned * 0.99 - 1 <= waited <= planned * 1.1 + 1
    assert 72 <= sum(RETRY_SECONDS) / 3600 <= 84
    counted = {
        outcome: metrics.registry.get_sample_value("farebox_messages_total", {"outcome": outcome})
        for outcome in ("delivered", "failed", "given_up")
    }
    assert counted == {"delivered": 0, "failed": 9, "given_up": 1}
    assert metrics.registry.get_sample_value("farebox_messages_given_up") == 1
    await post.close()


async def test_what_nobody_has_thought_of_is_a_failed_attempt_too_and_keeps_no_other_message_waiting(
    bank: Bank, outbox: Outbox, post: HttpPost
) -> None:
    account, other = (await bank.open_account())[0], (await bank.open_account())[0]
    await tell(bank, account.id)
    await tell(bank, other.id)
    metrics, attempts = Metrics(), 0

    async def broken(body: bytes, headers: Sequence[tuple[str, str]]) -> None:
        nonlocal attempts
        if str(other.id) in body.decode():
            await post(body, headers)
            return
        attempts += 1
        # Text that Postgres does not take as it is.
        raise RuntimeError("a \0")

    sending = MessageSender(outbox, broken, [signing_key(SECRET)], observe=metrics)
    assert await sending.round() == 2
    [waiting] = await outbox.messages(state="waiting")
    assert (waiting.account_id, waiting.attempts, waiting.error) == (account.id, 1, "RuntimeError: a ?")
    assert await seconds_to_wait(bank, waiting) <= RETRY_SECONDS[0] * 1.1 + 1
    await due_now(bank)
    while await sending.round():
        await due_now(bank)
    assert attempts == len(RETRY_SECONDS) + 1
    assert sorted(message.state for message in await outbox.messages()) == ["delivered", "given_up"]
    assert metrics.registry.get_sample_value("farebox_messages_given_up") == 1


async def eventually(look: Callable[[], Awaitable[object]]) -> None:
    """Until there is something to see."""
    for _ in range(1_000):
        if await look():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


async def seconds_to_wait(bank: Bank, message: Message) -> float:
    waited: float = await bank.owner.fetchval("SELECT extract(epoch FROM $1 - clock_timestamp())", message.next_at)
    return float(waited)


async def test_many_processes_send_each_message_once(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, post: HttpPost
) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id, 60)
    assert sum(await asyncio.gather(*(sender(outbox, post).round() for _ in range(6)))) == 60
    ids = [received.headers["webhook-id"] for received in endpoint.requests]
    assert len(ids) == len(set(ids)) == 60


async def test_without_an_endpoint_nothing_is_sent_and_old_news_is_not_kept_for_later(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, post: HttpPost
) -> None:
    account, _ = await bank.open_account()
    await tell(bank, account.id)
    await bank.owner.execute("UPDATE farebox.outbox SET next_at = next_at - interval '5 days'")
    await tell(bank, account.id)
    assert await sender(outbox, None).round() == 0
    assert sorted(message.state for message in await outbox.messages()) == ["given_up", "waiting"]
    assert await sender(outbox, post).round() == 1


async def test_neither_proxies_nor_cookies_of_others_come_into_it(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    endpoint.will(*whole(b"", 200, {"set-cookie": "a=b"}))
    account, _ = await bank.open_account()
    await tell(bank, account.id, 2)
    post = HttpPost(endpoint.base_url)
    assert await sender(outbox, post).round() == 2
    await tell(bank, account.id)
    assert await sender(outbox, post).round() == 1
    assert [received.headers.get("cookie") for received in endpoint.requests] == [None] * 3
    await post.close()


async def test_the_loops_tell_by_themselves(
    bank: Bank, outbox: Outbox, endpoint: ScriptedUpstream, post: HttpPost
) -> None:
    account, _ = await bank.open_account(1)
    alerts = Alerts(bank.database.app, low_balance=2, look_seconds=0.05)
    sending = sender(outbox, post)
    alerts.start()
    sending.start()
    await eventually(lambda: outbox.messages(state="delivered"))
    await sending.stop()
    await alerts.stop()
    [received] = endpoint.requests
    assert json.loads(received.body)["data"] == {
        "account": str(account.id), "name": account.name, "external_id": None, "balance": "0.000001", "debt": "0",
        "low_balance": "0.000002",
    }  # fmt: skip


@pytest.mark.parametrize(
    "secret",
    [
        "", "whsec_", "whsec_AAAA", "k" * 40, "whsec_" + "!" * 40, "whsec_" + base64.b64encode(b"k" * 65).decode(),
        "whsek_" + base64.b64encode(b"k" * 32).decode(),
    ],
)  # fmt: skip
def test_a_secret_that_can_t_sign_is_refused_without_being_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match=r"secret|base64") as refused:
        signing_key(secret)
    assert len(secret) < 20 or secret[8:] not in str(refused.value)


def test_any_secret_of_the_standard_is_taken() -> None:
    for size in (24, 32, 64):
        key = os.urandom(size)
        assert signing_key("whsec_" + base64.b64encode(key).decode()) == key
