"""Idempotency-Key: a client's own word for one call, so that saying it again neither calls nor charges twice.

    no header              nothing here is touched
    first time, or free    the call goes on; a refusal, or an end that costs nothing, frees the word again
    running                409 with Retry-After and x-should-retry: true
    finished               409 with x-should-retry: false and the receipt; or the kept answer, byte for byte
    another body           422

What a word stands for follows from its hold (``ledger/idempotency.py``). A word belongs to an account, and only its
SHA-256 is kept. Answers are kept only where the operator says for how long, and only whole ones.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog

from proxy.core.errors import Conflict, InvalidRequest, Unprocessable
from proxy.gateway.channel import Channel, Head
from proxy.gateway.exchange import Ending, Exchange
from proxy.gateway.headers import Headers
from proxy.gateway.refusals import NOT_NOW, unavailable
from proxy.ledger.idempotency import Claim, Claimed, ClaimOutcome, IdempotencyLedger
from proxy.ledger.rounds import Rounds
from proxy.metrics import Metrics

__all__ = ["Idempotency", "IdempotencySettings", "KeptAnswer", "idempotency_word"]

log = structlog.get_logger("farebox.idempotency")

HEADER = b"idempotency-key"
WORD_BYTES_MAX = 255
_WORD = re.compile(rb"[\x21-\x7e]+(?:[ \t]+[\x21-\x7e]+)*\Z")

# A word that is in use may be free, or used up, in a moment: the retry of a refused call often comes before its hold is
# given back. So the ledger is asked again after these pauses before the client is told to come again.
LOOK_AGAIN_SECONDS = (0.05, 0.15, 0.4)
RETRY_AFTER_SECONDS = 5
FREE_TRIES = 30
FREE_PAUSE_SECONDS = 1.0
FORGET_SECONDS = 60.0
FORGET_ROWS = 1_000
# Answers on their way into the ledger, over all calls; one more is not kept.
RECORDED_BYTES_MAX = 64 * 1024 * 1024


def idempotency_word(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The header's value, None where there is none. Raises InvalidRequest for two, and for one that can't be a word."""
    word: bytes | None = None
    for name, value in headers:
        if name == HEADER:
            if word is not None:
                raise _invalid("was given twice")
            word = value
    if word is not None and not (len(word) <= WORD_BYTES_MAX and _WORD.match(word)):
        raise _invalid(f"has to be 1 to {WORD_BYTES_MAX} printable ASCII characters")
    return word


@dataclass(frozen=True, slots=True)
class IdempotencySettings:
    """``answer_seconds``: how long whole answers are kept for replays, 0: not at all; ``answer_bytes_max``: how large
    one may be. ``key_seconds``: how long a word is remembered. ``claim_seconds``: how long the ledger is waited for."""

    answer_seconds: float = 0.0
    answer_bytes_max: int = 1024 * 1024
    key_seconds: float = 30 * 86_400.0
    claim_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """The answer of an earlier call under the same word. ``receipt``: that call's."""

    head: Head
    body: bytes
    receipt: UUID

    @property
    def headers(self) -> Headers:
        """What tells it from an answer of its own."""
        return [(b"idempotent-replayed", b"true"), (b"x-farebox-receipt", str(self.receipt).encode())]

    def channel(self) -> Channel:
        """The answer, to be written as any other is."""
        channel = Channel()
        channel.start(self.head)
        channel.put_at_once(self.body)
        channel.end()
        return channel


class Idempotency:
    """Claims, refusals and replays. Use it in one event loop, between ``start`` and ``stop``."""

    def __init__(
        self,
        ledger: IdempotencyLedger,
        *,
        worker_id: UUID,
        metrics: Metrics,
        settings: IdempotencySettings | None = None,
    ) -> None:
        self._ledger = ledger
        self._worker_id = worker_id
        self._metrics = metrics
        self._settings = settings or IdempotencySettings()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._forgetting = Rounds(
            self._forget, seconds=FORGET_SECONDS, complaint="old idempotency keys were not removed"
        )
        self._recorded = _Budget(RECORDED_BYTES_MAX)

    # What a call uses.

    async def claim(self, word: bytes, path: str, body: bytes, account_id: UUID, hold_id: UUID) -> Claim | KeptAnswer:
        """Claim the word for the hold that is about to be reserved, or get the answer that was kept under it.

        Raises Conflict, Unprocessable or Unavailable. Whoever got a Claim and then no hold must ``free`` it.
        """
        claim = Claim(account_id, _hash(word), _hash(path.encode() + b"\0" + body), hold_id, self._worker_id)
        for pause in (*LOOK_AGAIN_SECONDS, None):
            claimed = await self._ask(claim)
            told = self._judged(claimed)
            if pause is None or not told.worth_a_look:
                break
            await asyncio.sleep(pause)
        self._metrics.idempotency(told.outcome)
        if told.refusal is not None:
            raise told.refusal
        return claim if told.kept is None else told.kept

    def free(self, claim: Claim) -> None:
        """The claim's hold was refused. Never waits; said again until the ledger has heard it, within reason."""
        self._own(self._free(claim))

    def channel(self, claim: Claim | None, exchange: Exchange, ours: Headers) -> Channel:
        """The channel for an answer: one that keeps it, where answers are kept. ``ours``: headers that belong to it."""
        if claim is None or not self._settings.answer_seconds:
            return Channel()

        def keep(head: Head, body: bytes) -> bool:
            if exchange.ending not in _WHOLE:
                return False
            self._own(self._keep(claim.hold_id, Head(head.status, [*head.headers, *ours]), body))
            return True

        return _Recording(keep, self._settings.answer_bytes_max, self._recorded)

    # What the app uses.

    def start(self) -> None:
        """Begin to remove what is old."""
        self._forgetting.start()

    async def stop(self, limit_seconds: float = 2.0) -> None:
        """End; what is on its way into the ledger gets that long."""
        await self._forgetting.stop()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=limit_seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Claiming.

    async def _ask(self, claim: Claim) -> Claimed:
        # In a task of our own: a request that is cancelled inside asyncpg would leave the claim in doubt.
        asking = self._own(self._claim_in_time(claim))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(lambda _: self.free(claim))
            raise
        except Exception as error:
            # Whatever went wrong: whether the word was used is unknown, so nothing may be sent.
            reason = f"{type(error).__name__}: {error}"
            log.warning("an idempotency key can't be claimed", request_id=str(claim.hold_id), reason=reason)
            self.free(claim)
            raise unavailable("ledger_unavailable", NOT_NOW) from error

    async def _claim_in_time(self, claim: Claim) -> Claimed:
        async with asyncio.timeout(self._settings.claim_seconds):
            return await self._ledger.claim(claim)

    def _judged(self, claimed: Claimed) -> "_Told":
        if claimed.outcome is ClaimOutcome.CLAIMED:
            return _Told("claimed")
        if claimed.outcome is ClaimOutcome.MISMATCH:
            return _Told("mismatch", _mismatch(), worth_a_look=True)
        if claimed.outcome is ClaimOutcome.RUNNING:
            return _Told("running", _running(claimed.hold_id), worth_a_look=True)
        keeps = self._settings.answer_seconds > 0
        if keeps and claimed.head is not None and claimed.body is not None:
            return _Told("replayed", kept=KeptAnswer(_head(claimed.head), claimed.body, claimed.hold_id))
        # An answer that is to be kept arrives in the ledger about when its charge does.
        return _Told("finished", _finished(claimed.hold_id), worth_a_look=keeps)

    async def _free(self, claim: Claim) -> None:
        for _ in range(FREE_TRIES):
            try:
                await self._ledger.free(claim)
            except Exception:  # noqa: BLE001 - it may go better in a second
                await asyncio.sleep(FREE_PAUSE_SECONDS)
            else:
                return
        log.warning("an idempotency key stays claimed for half a minute", request_id=str(claim.hold_id))

    # Keeping, and forgetting.

    async def _keep(self, hold_id: UUID, head: Head, body: bytes) -> None:
        try:
            await self._ledger.keep_answer(hold_id, _head_text(head), body, seconds=self._settings.answer_seconds)
        except Exception as error:  # noqa: BLE001 - the answer has been given; its retry will get a 409
            log.warning("an answer was not kept", request_id=str(hold_id), reason=str(error))
        finally:
            self._recorded.give_back(len(body))

    async def _forget(self) -> None:
        while await self._ledger.forget(FORGET_ROWS, keep_seconds=self._settings.key_seconds) >= FORGET_ROWS:
            pass

    def _own(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run it in a task that no request's end can take away."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        return task

    def _disown(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        # Asking marks it as seen: what a claim raises is its caller's, who may have gone; the others raise nothing.
        if not task.cancelled():
            task.exception()


@dataclass(frozen=True, slots=True)
class _Told:
    """What a claim comes to: the metrics' word for it, and the refusal or the answer. ``worth_a_look``: may change."""

    outcome: str
    refusal: Exception | None = None
    kept: KeptAnswer | None = None
    worth_a_look: bool = False


class _Budget:
    """Bytes that may be taken in all."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max

    def take(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        self._left += size


class _Recording(Channel):
    """A channel that remembers what went through, for nobody too, and offers it where it came to a whole end.

    ``offer`` says whether it takes it; then it gives its size back to the budget, too.
    """

    def __init__(self, offer: Callable[[Head, bytes], bool], bytes_max: int, budget: _Budget) -> None:
        super().__init__()
        self._offer = offer
        self._bytes_max = bytes_max
        self._budget = budget
        self._start: Head | None = None
        self._parts: list[bytes] | None = []
        self._taken = 0

    @property
    def is_kept(self) -> bool:
        return self._parts is not None

    def start(self, head: Head) -> None:
        self._start = head
        super().start(head)

    def put_at_once(self, data: bytes) -> None:
        if self._parts is not None and data:
            if self._taken + len(data) <= self._bytes_max and self._budget.take(len(data)):
                self._parts.append(data)
                self._taken += len(data)
            else:
                self._drop()
        super().put_at_once(data)

    def end(self) -> None:
        super().end()
        if self._parts is None:
            return
        parts, self._parts = self._parts, None
        head = self._start
        whole = head is not None and head.status == 200 and not self._broken
        if not (head and whole and self._offer(head, b"".join(parts))):
            self._drop()

    def _drop(self) -> None:
        self._parts = None
        self._budget.give_back(self._taken)
        self._taken = 0


# The upstream said all it had to say, whether or not the client was there to read it.
_WHOLE = frozenset({Ending.COMPLETE, Ending.CLIENT_LEFT})


def _hash(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _head_text(head: Head) -> str:
    headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in head.headers]
    return json.dumps({"status": head.status, "headers": headers})


def _head(text: str) -> Head:
    stored = json.loads(text)
    return Head(stored["status"], [(n.encode("latin-1"), v.encode("latin-1")) for n, v in stored["headers"]])


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"The Idempotency-Key {what}.", code="idempotency_key_invalid")


def _mismatch() -> Unprocessable:
    return Unprocessable(
        "This Idempotency-Key belongs to a request with another body. Take a new key for every new request; a constant "
        "among a client's default headers can't work.",
        code="idempotency_key_mismatch",
    )


def _running(hold_id: UUID) -> Conflict:
    return Conflict(
        "A request with this Idempotency-Key is still running. Nothing was sent to the provider again; retry later.",
        code="idempotency_key_in_use",
        headers={"x-should-retry": "true", "retry-after": str(RETRY_AFTER_SECONDS), "x-farebox-receipt": str(hold_id)},
        details={"receipt": str(hold_id)},
    )


def _finished(hold_id: UUID) -> Conflict:
    return Conflict(
        "The request with this Idempotency-Key has been carried out already, and its answer isn't kept: "
        f"GET /v1/receipts/{hold_id} shows how it ended and what it cost. To ask anew, take a new key.",
        code="idempotency_key_used",
        headers={"x-farebox-receipt": str(hold_id)},
        details={"receipt": str(hold_id)},
    )
