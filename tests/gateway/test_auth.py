"""gateway/auth.py: who gets in, what the others are told, and what the cache may and may not remember."""

import asyncio
import hmac
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from proxy.core.errors import Forbidden, Refusal, Unauthenticated, Unavailable
from proxy.core.keys import KEY_RANDOM_BYTES, NewKey, Peppers, hmac_of, new_key
from proxy.gateway.auth import Authenticator, CacheLimits, presented_key, require_model, require_scope
from proxy.ledger.records import ApiKey

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PEPPERS = Peppers.parse("1:an old pepper of old,2:a pepper for new keys")
ACCOUNT = UUID(int=7)


def key_number(number: int) -> NewKey:
    return new_key(number.to_bytes(KEY_RANDOM_BYTES))


def row_of(key: NewKey, **changes: Any) -> ApiKey:
    pepper_version = changes.setdefault("pepper_version", PEPPERS.current)
    row = ApiKey(
        id=key.id,
        account_id=ACCOUNT,
        name="test",
        secret_hmac=hmac_of(PEPPERS.by_version.get(pepper_version, b"another pepper"), key.text),
        pepper_version=pepper_version,
        scopes=frozenset({"inference", "read"}),
        models=None,
        profile=None,
        affordable_cap=True,
        spend_limit=None,
        spent=0,
        version=1,
        created_at=NOW - timedelta(days=1),
        expires_at=None,
        revoked_at=None,
        rotated_from=None,
    )
    return replace(row, **changes)


def bearer(text: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + text.encode())]


@dataclass
class Ledger:
    """Rows by id; counts look-ups, and can be held up or broken."""

    rows: dict[str, ApiKey] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None
    error: BaseException | None = None

    async def find_key(self, key_id: str) -> ApiKey | None:
        self.asked.append(key_id)
        row = self.rows.get(key_id)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return row


@dataclass
class Clock:
    seconds: float = 1000.0

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds - 1000.0)

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class House:
    """An authenticator with all its fakes."""

    ledger: Ledger = field(default_factory=Ledger)
    clock: Clock = field(default_factory=Clock)
    limits: CacheLimits = field(default_factory=CacheLimits)

    def __post_init__(self) -> None:
        self.authenticator = Authenticator(
            self.ledger.find_key, PEPPERS, limits=self.limits, now=self.clock.now, monotonic=self.clock.monotonic
        )

    def add(self, number: int, **changes: Any) -> NewKey:
        key = key_number(number)
        self.ledger.rows[key.id] = row_of(key, **changes)
        return key

    async def enter(self, text: str, **options: Any) -> ApiKey:
        return await self.authenticator.authenticate(bearer(text), **options)


async def refusal_of(call: Awaitable[object]) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await call
    return refused.value


# Credentials.


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer KEY")],
        [(b"authorization", b"bearer KEY")],
        [(b"Authorization", b"BEARER   KEY  ")],
        [(b"x-api-key", b"KEY")],
        [(b"X-Api-Key", b" KEY ")],
        [(b"api-key", b"KEY")],
        [(b"authorization", b"Bearer KEY"), (b"x-api-key", b"KEY"), (b"api-key", b"KEY")],
        [(b"authorization", b"Basic dXNlcjpwYXNz"), (b"api-key", b"KEY")],
        [(b"authorization", b"Bearer "), (b"api-key", b"KEY")],
    ],
)
def test_a_key_is_found_where_clients_put_it(headers: list[tuple[bytes, bytes]]) -> None:
    key = key_number(1)
    filled = [(name, value.replace(b"KEY", key.text.encode())) for name, value in headers]

    assert presented_key(filled).id == key.id


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "api_key_missing"),
        ([(b"authorization", b"")], "api_key_missing"),
        ([(b"authorization", b"Bearer")], "api_key_missing"),
        ([(b"authorization", b"Basic dXNlcjpwYXNz")], "api_key_missing"),
        ([(b"cookie", key_number(1).text.encode())], "api_key_missing"),
        ([(b"authorization", key_number(1).text.encode())], "api_key_missing"),
        ([(b"x-api-key", b"a"), (b"api-key", b"b")], "api_key_ambiguous"),
        ([(b"api-key", key_number(1).text.encode()), (b"api-key", key_number(2).text.encode())], "api_key_ambiguous"),
        ([(b"api-key", key_number(1).text.encode()), (b"authorization", b"Bearer sk-else")], "api_key_ambiguous"),
        ([(b"api-key", b"sk-proj-1234")], "invalid_api_key"),
        ([(b"api-key", key_number(1).text.encode()[:-1])], "invalid_api_key"),
        ([(b"api-key", b"\xff\x00\xfe")], "invalid_api_key"),
        ([(b"api-key", b"fb_" + b"a" * 100_000)], "invalid_api_key"),
    ],
)
def test_other_headers_are_401_with_a_challenge(headers: list[tuple[bytes, bytes]], code: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        presented_key(headers)

    assert refused.value.code == code
    assert refused.value.headers["www-authenticate"] == "Bearer"


async def test_a_mistyped_key_costs_no_look_up() -> None:
    house = House()
    key = house.add(1)

    refused = await refusal_of(house.enter(key.text[:20] + ("x" if key.text[20] != "x" else "y") + key.text[21:]))

    assert refused.code == "invalid_api_key"
    assert house.ledger.asked == []


# Verification.


@pytest.mark.parametrize("pepper_version", [1, 2])
async def test_the_right_secret_gets_in(pepper_version: int) -> None:
    house = House()
    key = house.add(1, pepper_version=pepper_version)

    assert await house.enter(key.text) == house.ledger.rows[key.id]


async def test_a_wrong_secret_and_an_unknown_id_are_answered_alike() -> None:
    house = House()
    known = house.add(1, revoked_at=NOW)
    same_id = new_key(b"\xff" * 32 + (1).to_bytes(16))
    assert same_id.id == known.id

    wrong = await refusal_of(house.enter(same_id.text))
    unknown = await refusal_of(house.enter(key_number(2).text))

    assert (wrong.status, wrong.body(), wrong.headers) == (unknown.status, unknown.body(), unknown.headers)
    assert wrong.code == "invalid_api_key"


async def test_an_unknown_id_costs_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare_digest = hmac.compare_digest

    def noting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare_digest(a, b)

    monkeypatch.setattr("proxy.gateway.auth.hmac.compare_digest", noting)
    house = House()
    key = house.add(1)

    await house.enter(key.text)
    await refusal_of(house.enter(key_number(2).text))

    assert compared == [(32, 32), (32, 32)]


async def test_a_cached_row_still_asks_for_the_secret() -> None:
    house = House()
    key = house.add(1)
    await house.enter(key.text)

    refused = await refusal_of(house.enter(new_key(b"\xff" * 32 + (1).to_bytes(16)).text))

    assert refused.code == "invalid_api_key"
    assert len(house.ledger.asked) == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"revoked_at": NOW - timedelta(days=1)}, "api_key_revoked"),
        ({"expires_at": NOW}, "api_key_expired"),
        ({"expires_at": NOW - timedelta(days=1)}, "api_key_expired"),
        ({"expires_at": NOW - timedelta(days=2), "revoked_at": NOW - timedelta(days=1)}, "api_key_revoked"),
    ],
)
async def test_the_holder_of_the_secret_is_told_what_became_of_the_key(changes: dict[str, Any], code: str) -> None:
    house = House()
    key = house.add(1, **changes)

    refused = await refusal_of(house.enter(key.text))

    assert (refused.status, refused.code) == (401, code)


async def test_a_cached_key_expires_on_time() -> None:
    house = House()
    key = house.add(1, expires_at=NOW + timedelta(seconds=2))
    await house.enter(key.text)

    house.clock.seconds += 2

    assert (await refusal_of(house.enter(key.text))).code == "api_key_expired"


async def test_a_pepper_that_is_not_configured_is_our_fault() -> None:
    house = House()
    key = house.add(1, pepper_version=3)

    refused = await refusal_of(house.enter(key.text))

    assert (refused.status, refused.code) == (503, "key_pepper_missing")


async def test_no_refusal_repeats_the_secret() -> None:
    house = House()
    for key in (house.add(1, revoked_at=NOW), house.add(2, expires_at=NOW), house.add(3, pepper_version=9)):
        refused = await refusal_of(house.enter(key.text))
        assert key.secret not in f"{refused.body()} {refused.headers} {refused!r}"


# Scopes and models.


def test_one_of_the_scopes_is_enough_and_none_is_403() -> None:
    key = row_of(key_number(1), scopes=frozenset({"read"}))

    require_scope(key, "read")
    require_scope(key, "inference", "read")
    with pytest.raises(Forbidden, match="'inference'") as refused:
        require_scope(key, "inference")
    assert refused.value.code == "insufficient_scope"


def test_a_list_of_models_binds_and_none_does_not() -> None:
    listed = row_of(key_number(1), models=frozenset({"gpt-4o"}))

    require_model(row_of(key_number(1)), "anything")
    require_model(listed, "gpt-4o")
    with pytest.raises(Forbidden) as refused:
        require_model(listed, "gpt-4o-mini")
    assert refused.value.code == "model_forbidden"
    with pytest.raises(Forbidden):
        require_model(row_of(key_number(1), models=frozenset()), "gpt-4o")


# The cache.


async def test_a_row_is_asked_for_once_in_its_seconds() -> None:
    house = House()
    key = house.add(1)

    for _ in range(5):
        await house.enter(key.text)
        house.clock.seconds += 1.0
    assert len(house.ledger.asked) == 1

    await house.enter(key.text)
    assert len(house.ledger.asked) == 2


async def test_a_caller_can_ask_for_fresher_rows() -> None:
    house = House()
    key = house.add(1)
    await house.enter(key.text)
    house.clock.seconds += 1.0

    await house.enter(key.text, age_seconds_max=2.0)
    assert len(house.ledger.asked) == 1
    await house.enter(key.text, age_seconds_max=1.0)
    assert len(house.ledger.asked) == 2
    house.ledger.rows[key.id] = row_of(key, revoked_at=NOW)
    assert (await refusal_of(house.enter(key.text, age_seconds_max=0))).code == "api_key_revoked"


async def test_a_row_is_as_old_as_its_question() -> None:
    house = House()
    key = house.add(1)
    house.ledger.gate = asyncio.Event()
    entering = asyncio.create_task(house.enter(key.text))
    await asyncio.sleep(0)
    house.clock.seconds += 4.0
    house.ledger.gate.set()
    await entering

    house.clock.seconds += 1.0
    await house.enter(key.text)

    assert len(house.ledger.asked) == 2


async def test_unknown_ids_are_remembered_for_a_shorter_time() -> None:
    house = House()
    key = key_number(1)
    await refusal_of(house.enter(key.text))
    await refusal_of(house.enter(key.text))
    assert len(house.ledger.asked) == 1

    house.add(1)
    house.clock.seconds += 2.0

    assert (await house.enter(key.text)).id == key.id


async def test_a_thousand_requests_at_once_are_one_look_up() -> None:
    house = House()
    key = house.add(1)
    house.ledger.gate = asyncio.Event()
    entering = [asyncio.create_task(house.enter(key.text)) for _ in range(1000)]
    await asyncio.sleep(0)
    house.ledger.gate.set()

    assert {row.id for row in await asyncio.gather(*entering)} == {key.id}
    assert len(house.ledger.asked) == 1


async def test_a_client_that_leaves_takes_nobody_with_it() -> None:
    house = House()
    key = house.add(1)
    house.ledger.gate = asyncio.Event()
    leaving = asyncio.create_task(house.enter(key.text))
    await asyncio.sleep(0)
    staying = asyncio.create_task(house.enter(key.text))
    await asyncio.sleep(0)

    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    house.ledger.gate.set()

    assert (await staying).id == key.id
    assert len(house.ledger.asked) == 1


async def test_both_caches_are_bounded_and_guesses_push_no_real_row_out() -> None:
    house = House(limits=CacheLimits(rows_max=3, unknown_rows_max=2))
    real = [house.add(n) for n in range(1, 5)]
    for key in real:
        await house.enter(key.text)
    for number in range(100, 150):
        await refusal_of(house.enter(key_number(number).text))

    assert len(house.authenticator._rows) == 3
    assert len(house.authenticator._unknown) == 2
    asked = len(house.ledger.asked)
    for key in real[1:]:
        await house.enter(key.text)
    assert len(house.ledger.asked) == asked
    await house.enter(real[0].text)
    assert len(house.ledger.asked) == asked + 1


# A key that changed.


async def test_a_revoked_key_is_known_after_one_reload() -> None:
    house = House()
    key = house.add(1)
    stale = await house.enter(key.text)
    house.ledger.rows[key.id] = row_of(key, version=2, revoked_at=NOW)

    refused = await refusal_of(house.authenticator.reload(stale))

    assert refused.code == "api_key_revoked"
    assert (await refusal_of(house.enter(key.text))).code == "api_key_revoked"
    assert len(house.ledger.asked) == 2


async def test_an_edited_key_comes_back_edited() -> None:
    house = House()
    key = house.add(1)
    stale = await house.enter(key.text)
    house.ledger.rows[key.id] = row_of(key, version=2, models=frozenset({"gpt-4o"}))

    reloaded = await house.authenticator.reload(stale)

    assert (reloaded.version, reloaded.models) == (2, frozenset({"gpt-4o"}))
    assert await house.enter(key.text) == reloaded


@pytest.mark.parametrize(
    "change", [{"secret_hmac": bytes(32)}, {"account_id": UUID(int=8)}, None], ids=["secret", "account", "gone"]
)
async def test_a_row_that_became_another_is_no_longer_the_callers(change: dict[str, Any] | None) -> None:
    house = House()
    key = house.add(1)
    stale = await house.enter(key.text)
    if change is None:
        del house.ledger.rows[key.id]
    else:
        house.ledger.rows[key.id] = row_of(key, version=2, **change)

    assert (await refusal_of(house.authenticator.reload(stale))).code == "invalid_api_key"


async def test_a_look_up_that_began_before_the_change_is_not_trusted_after_it() -> None:
    house = House()
    key = house.add(1)
    stale = house.ledger.rows[key.id]
    house.ledger.gate = asyncio.Event()
    before = asyncio.create_task(house.enter(key.text))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(house.ledger.asked) == 1
    house.ledger.rows[key.id] = row_of(key, version=2, revoked_at=NOW)

    reloading = asyncio.create_task(house.authenticator.reload(stale))
    await asyncio.sleep(0)
    house.ledger.gate.set()

    assert (await refusal_of(reloading)).code == "api_key_revoked"
    assert (await before).version == 1
    # Nor does the old answer, which came in at the same time, stay behind in the cache.
    assert (await refusal_of(house.enter(key.text))).code == "api_key_revoked"


async def test_a_hundred_stale_copies_are_one_reload() -> None:
    house = House()
    key = house.add(1)
    stale = await house.enter(key.text)
    house.ledger.rows[key.id] = row_of(key, version=2)

    reloaded = await asyncio.gather(*(house.authenticator.reload(stale) for _ in range(100)))

    assert {row.version for row in reloaded} == {2}
    assert len(house.ledger.asked) == 2
    # One that hears of it late finds the newer row, and leaves it.
    assert (await house.authenticator.reload(stale)).version == 2
    assert len(house.ledger.asked) == 2


# The ledger fails.


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("secret-host:5432"),
        TimeoutError(),
        RuntimeError("password=hunter2"),
        Unavailable("x", code="y"),
    ],
)
async def test_without_a_ledger_the_answer_is_503_and_nothing_is_remembered(error: Exception) -> None:
    house = House()
    key = house.add(1)
    house.ledger.error = error

    refused = await refusal_of(house.enter(key.text))

    assert (refused.status, refused.code) == (503, "ledger_unavailable")
    assert refused.headers["retry-after"] == "1"
    assert "hunter2" not in str(refused.body())
    house.ledger.error = None
    assert (await house.enter(key.text)).id == key.id


async def test_waiters_of_one_failed_look_up_get_refusals_of_their_own() -> None:
    house = House()
    key = house.add(1)
    house.ledger.error = OSError()

    refusals = await asyncio.gather(*(house.enter(key.text) for _ in range(3)), return_exceptions=True)

    assert {type(refused) for refused in refusals} == {Unavailable}
    assert len({id(refused) for refused in refusals}) == 3


async def test_a_ledger_that_hangs_is_503_in_bounded_time() -> None:
    house = House(limits=CacheLimits(load_seconds_max=0.01))
    key = house.add(1)
    house.ledger.gate = asyncio.Event()

    assert (await refusal_of(house.enter(key.text))).code == "ledger_unavailable"
    assert house.authenticator._loads == {}


async def test_a_failed_look_up_that_nobody_waits_for_is_quiet() -> None:
    """An exception that is never fetched would be logged by the loop when its task is collected."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    house = House()
    key = house.add(1)
    house.ledger.gate, house.ledger.error = asyncio.Event(), OSError()
    entering = asyncio.create_task(house.enter(key.text))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    entering.cancel()
    house.ledger.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await asyncio.sleep(0.01)

    assert complaints == []
    assert house.authenticator._loads == {}
