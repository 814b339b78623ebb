"""POST /v1/chat/completions: from a bearer key to an exchange that will be settled.

    authenticate -> admit -> parse -> route -> bound the tokens -> quote -> reserve -> open -> encode -> relay

Each step takes what the last gave, and every refusal is one raised error. Up to ``reserve`` nothing has been promised;
from ``Settler.open`` on the exchange has an owner that outlives this handler, which then only writes to its client.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import structlog

from proxy.core.bounds import byte_bound, input_bound, input_estimate, output_bound, output_estimate
from proxy.core.catalog import CatalogHolder
from proxy.core.chat import ChatRequest
from proxy.core.excerpt import Said
from proxy.core.pricing import Bounds
from proxy.dialects.dialect import Dialect
from proxy.gateway.auth import Authenticator, require_model, require_scope, require_unfrozen
from proxy.gateway.channel import Abandoned, BrokenOff
from proxy.gateway.client import Client
from proxy.gateway.departure import policy_of
from proxy.gateway.exchange import Ending, Exchange, Ticket
from proxy.gateway.front import Call, Receive, Scope, Send
from proxy.gateway.headers import Headers, request_headers
from proxy.gateway.idempotency import Idempotency, KeptAnswer, idempotency_word
from proxy.gateway.limits import ClientLeft, Limits, check_headers, read_body
from proxy.gateway.places import Place, Places
from proxy.gateway.plan import Cap, Plan
from proxy.gateway.refusals import NOT_NOW, refusal_for, unavailable
from proxy.gateway.relay import Order, Relay
from proxy.gateway.settle import Settler
from proxy.gateway.steps import Stepper
from proxy.gateway.tokens import TokenCounter
from proxy.gateway.upstream_keys import UpstreamKeys
from proxy.ledger.errors import JournalFull, LedgerError, LedgerUnavailable
from proxy.ledger.idempotency import Claim
from proxy.ledger.records import ApiKey, Reserve, Reserved, ReserveOutcome
from proxy.metrics import Metrics

__all__ = ["Chat", "ChatSettings", "ReservingLedger"]

log = structlog.get_logger("farebox.chat")

# At settlement nobody waits for the count.
SETTLE_COUNT_SECONDS = 10.0
# Where even that doesn't count: what a token comes to, in UTF-8, for text of every language.
BYTES_PER_TOKEN = 3


class ReservingLedger(Protocol):
    """The part of ``BatchedLedger`` that holds credits."""

    async def reserve(self, row: Reserve) -> Reserved:
        """Hold credits; whoever is cancelled or refused here leaves nothing held."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """``cap_tokens_min``: the least output cap that is sent because a balance is short. Seconds are seconds.

    ``key_calls_max``: how many calls of one key may run at once in this process; 0: any number.
    """

    cap_tokens_min: int = 64
    send_seconds: float = 30.0
    key_calls_max: int = 1_000


class Chat:
    """The handler and what it works with."""

    def __init__(
        self,
        *,
        catalog: CatalogHolder,
        authenticator: Authenticator,
        limits: Limits,
        counter: TokenCounter,
        keys: UpstreamKeys,
        ledger: ReservingLedger,
        lease_held: Callable[[], bool],
        worker_id: UUID,
        settler: Settler,
        stepper: Stepper,
        relay: Relay,
        idempotency: Idempotency,
        dialects: Mapping[str, Dialect],
        metrics: Metrics,
        settings: ChatSettings | None = None,
    ) -> None:
        self._catalog = catalog
        self._authenticator = authenticator
        self._limits = limits
        self._counter = counter
        self._keys = keys
        self._ledger = ledger
        self._lease_held = lease_held
        self._worker_id = worker_id
        self._settler = settler
        self._stepper = stepper
        self._relay = relay
        self._idempotency = idempotency
        self._dialects = dialects
        self._metrics = metrics
        self._settings = settings or ChatSettings()
        self._places = Places(self._settings.key_calls_max, settler.open_of)

    async def handle(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        """Serve one request. Raises Refusal before anything of the answer is written, never after."""
        with self._places.place() as place:
            await self._answer(scope, receive, send, call, place)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, call: Call, place: Place) -> None:
        arrived = asyncio.get_running_loop().time()
        try:
            key, request = await self._admit(scope, receive, call, place)
        except ClientLeft:
            return
        word = idempotency_word(scope["headers"])
        plan = await self._plan(key, request)
        secret = self._keys.key(plan.route.upstream)
        async with Client(scope, receive, send, send_seconds=self._settings.send_seconds) as client:
            claim = None
            if word is not None:
                claim = await self._idempotency.claim(word, scope["path"], request.body, key.account_id, call.id)
            if isinstance(claim, KeptAnswer):
                await _replay(client, claim, call)
                return
            key, reserved = await self._reserve_claimed(claim, key, plan, call)
            cap = plan.cap(key, reserved)
            exchange = self._settler.open(self._ticket(key, plan, cap, reserved, call))
            place.pass_on()
            try:
                order = self._order(scope, key, plan, cap, secret)
            except BaseException:
                exchange.close(Ending.FAILED)
                raise
            if client.left:
                exchange.close(Ending.CLIENT_LEFT_UNSENT)
            else:
                await self._serve(client, exchange, order, claim, call)
                self._tell(arrived, exchange, client)

    async def _admit(self, scope: Scope, receive: Receive, call: Call, place: Place) -> tuple[ApiKey, ChatRequest]:
        """Who asks, and what, within the limits."""
        if self._settler.stopping:
            raise unavailable("shutting_down", "Farebox is shutting down; please retry.")
        if not self._lease_held():
            raise unavailable("ledger_unavailable", "Farebox has lost its ledger for the moment; please retry.")
        headers = scope["headers"]
        key = await self._authenticator.authenticate(headers)
        call.facts.update(key_id=key.id, account_id=str(key.account_id))
        require_scope(key, "inference")
        require_unfrozen(key)
        place.take(key.id)
        limits = self._limits.named(key.profile)
        check_headers(headers, limits)
        request = ChatRequest.parse(await read_body(receive, headers, limits), limits)
        require_model(key, request.model)
        call.facts.update(stream=request.stream)
        return key, request

    async def _plan(self, key: ApiKey, request: ChatRequest) -> Plan:
        """The route, its price, and the most that the call can cost."""
        catalog = self._catalog.current
        route = catalog.route(request.model)
        variant = route.variant_for(request.priced_options)
        counted = await self._counter.count(request.texts)
        if counted is None:
            most_in = byte_bound(route.family, request, route.upstream_model)
        else:
            most_in = input_bound(route.family, counted, request, route.upstream_model)
        cap = request.output_cap or route.output_tokens_max
        bounds = Bounds(
            input=most_in + variant.extra_input_tokens,
            output=output_bound(cap, request.choices, request.options.prediction_bytes),
            audio_in=request.audio_in,
            audio_out=request.audio_out,
        )
        return Plan(
            request=request,
            route=route,
            variant=variant,
            price_version=catalog.version,
            counted=counted,
            bounds=bounds,
            first_tokens=(
                self._stepper.first_tokens(key.account_id, variant.price, bounds, route) if request.stream else None
            ),
            least_tokens=min(self._settings.cap_tokens_min, cap),
        )

    async def _reserve_claimed(
        self, claim: Claim | None, key: ApiKey, plan: Plan, call: Call
    ) -> tuple[ApiKey, Reserved]:
        """Hold the credits. Where that is refused, the word that was claimed for it is free again."""
        try:
            return await self._reserve(key, plan, call)
        except BaseException:
            if claim is not None:
                self._idempotency.free(claim)
            raise

    async def _reserve(self, key: ApiKey, plan: Plan, call: Call) -> tuple[ApiKey, Reserved]:
        """Hold the credits. Where the key has changed since it was loaded, load it once more and ask again."""
        call.facts.update(model=plan.route.model)
        reserved = await self._try_reserve(key, plan, call.id)
        if reserved.outcome in (ReserveOutcome.KEY_CHANGED, ReserveOutcome.UNKNOWN):
            key = await self._authenticator.reload(key)
            require_scope(key, "inference")
            require_unfrozen(key)
            require_model(key, plan.request.model)
            reserved = await self._try_reserve(key, plan, call.id)
        if reserved.outcome is not ReserveOutcome.GRANTED:
            raise refusal_for(reserved, plan.at_least(key))
        self._stepper.saw(key.account_id, reserved.balance - reserved.held)
        return key, reserved

    async def _try_reserve(self, key: ApiKey, plan: Plan, hold_id: UUID) -> Reserved:
        want, at_least = plan.want(key), plan.at_least(key)
        facts = (hold_id, key.id, key.version, want, at_least, plan.price_version, plan.route.model, plan.variant.name)
        row = Reserve(
            hold_id=hold_id,
            account_id=key.account_id,
            key_id=key.id,
            key_version=key.version,
            worker_id=self._worker_id,
            want=want,
            at_least=at_least,
            price_version=plan.price_version,
            model=plan.route.model,
            variant=plan.variant.name,
            quote=json.dumps(plan.note(key)),
            fingerprint=hashlib.sha256(repr(facts).encode()).digest(),
        )
        try:
            return await self._ledger.reserve(row)
        except JournalFull as error:
            raise unavailable("journal_full", NOT_NOW) from error
        except LedgerUnavailable as error:
            raise unavailable("ledger_unavailable", NOT_NOW) from error
        except LedgerError as error:
            log.error("a reserve was rejected", request_id=str(hold_id), exc_info=error)
            raise unavailable("ledger_unavailable", NOT_NOW) from error

    def _ticket(self, key: ApiKey, plan: Plan, cap: Cap, reserved: Reserved, call: Call) -> Ticket:
        async def count(said: Said | None) -> tuple[int, int]:
            return await self._count(plan, said)

        return Ticket(
            hold_id=call.id,
            account_id=key.account_id,
            key_id=key.id,
            worker_id=self._worker_id,
            route=plan.route,
            variant=plan.variant,
            price_version=plan.price_version,
            bounds=cap.bounds,
            output_possible=plan.output_possible,
            output_beside=plan.output_beside,
            granted=reserved.granted,
            stream=plan.request.stream,
            cap_sent=cap.tokens,
            count=count,
            on_disconnect=policy_of(plan.route, plan.request),
        )

    async def _count(self, plan: Plan, said: Said | None) -> tuple[int, int]:
        """Tokens of the prompt and of what was said, about as the provider would have reported them."""
        family, model = plan.route.family, plan.route.upstream_model
        counted = plan.counted
        if counted is None:
            counted = await self._count_patiently(plan.request.texts)
        prompt = min(input_estimate(family, counted, plan.request, model), plan.bounds.input)
        if said is None:
            return prompt, 0
        tokens = said.scaled(await self._count_patiently(said.texts()))
        return prompt, output_estimate(family, tokens, choices=said.choices, calls=said.calls)

    async def _count_patiently(self, texts: "tuple[str, ...] | list[str]") -> int:
        counted = await self._counter.count(texts, budget_seconds=SETTLE_COUNT_SECONDS)
        if counted is not None:
            return counted
        return sum(len(text.encode(errors="replace")) for text in texts) // BYTES_PER_TOKEN

    def _order(self, scope: Scope, key: ApiKey, plan: Plan, cap: Cap, secret: str | None) -> Order:
        request, upstream = plan.request, plan.route.upstream
        dialect = self._dialects[upstream.dialect]
        encoded = dialect.encode(request, plan.route, cap.tokens)
        headers = dict(request_headers(scope["headers"], key.account_id, encoded.body))
        headers.setdefault(b"user-agent", b"farebox")
        # In this order: what the dialect needs stands above the client's, what the operator says above both.
        for names in (encoded.headers, upstream.headers):
            headers.update((name.lower().encode(), value.encode()) for name, value in names.items())
        if secret is not None:
            headers[b"authorization"] = b"Bearer " + secret.encode()
        return Order(
            upstream=upstream,
            dialect=dialect,
            path=encoded.path,
            headers=list(headers.items()),
            body=encoded.body,
            stream=request.stream,
            choices=request.choices,
            usage_asked=request.usage_asked,
            usage_forced=encoded.usage_forced,
            secret=secret,
        )

    async def _serve(self, client: Client, exchange: Exchange, order: Order, claim: Claim | None, call: Call) -> None:
        ours: Headers = []
        if exchange.ticket.cap_sent is not None:
            ours.append((b"x-farebox-output-cap", str(exchange.ticket.cap_sent).encode()))
        pump = self._relay.start(exchange, order, self._idempotency.channel(claim, exchange, ours))
        client.when_left(pump.client_left)
        try:
            await client.answer(pump.channel, [*call.headers, *ours])
        except (Abandoned, BrokenOff):
            # Returning without an end is what makes the server break the socket.
            return
        finally:
            # However this ended: from here on nobody reads. After a whole answer it changes nothing.
            pump.client_left()

    def _tell(self, arrived: float, exchange: Exchange, client: Client) -> None:
        """The time that Farebox added: before the request went out, and between the upstream's first byte and ours."""
        if exchange.sent_at is not None and exchange.first_byte_at is not None and client.first_sent_at is not None:
            added = exchange.sent_at - arrived + client.first_sent_at - exchange.first_byte_at
            self._metrics.first_byte_added(added)


async def _replay(client: Client, kept: KeptAnswer, call: Call) -> None:
    """The answer that an earlier call under the same word got: nothing is held, sent or charged."""
    channel = kept.channel()
    client.when_left(channel.abandon)
    try:
        await client.answer(channel, [*call.headers, *kept.headers])
    except Abandoned:
        return
