"""What an ended answer costs, and the row that says so to the ledger.

- What the upstream reported is charged; what it didn't is counted on the joined text of each choice.
- A report of zeros is believed where nothing was said, and is no report where something was.
- An answer of which nothing came through is free where that isn't the client's doing.
- A model that reasons unseen, cut off since its client left, is charged for the time in which it showed nothing.
- Of an answer that was ended since its hold couldn't grow, what was delivered is charged, and not what was kept back.
- A counted charge never exceeds the hold; a reported one may, but above four times what is possible it isn't believed:
  the hold is charged and the answer is flagged. Possible is what the model can say, not what the client's cap allows:
  some servers know one name of the cap and ignore the other, and a cap of one token would buy a whole answer.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from proxy.core.excerpt import Excerpt
from proxy.core.money import format_credits
from proxy.core.pricing import charge, quote
from proxy.core.reckon import completed, needs_count, reckon
from proxy.core.usage import Usage, UsageSource
from proxy.core.usage_report import normalise
from proxy.gateway.departure import unseen_reasoning
from proxy.gateway.exchange import Ending, Exchange
from proxy.ledger.records import Finalize

__all__ = ["IMPLAUSIBLE", "Due", "finalize_row", "find_due", "uncountable_due"]

# Reported usage above this many times what is possible isn't believed.
BELIEVED_TIMES_POSSIBLE = 4
IMPLAUSIBLE = "implausible_usage"
COUNTED_ABOVE_HOLD = "counted_above_hold"
TIMED_REASONING = "timed_reasoning"
COUNTED_ABOVE_KNOWN_HOLD = "counted_above_known_hold"

# Nothing was asked of the upstream, or it said no: free whatever was seen.
_FREE = frozenset({Ending.CLIENT_LEFT_UNSENT, Ending.UPSTREAM_REFUSED, Ending.UPSTREAM_UNREACHABLE})
# The upstream did its work, or would have but for the client: the prompt is charged even if no text came.
_CHARGED = frozenset(
    {Ending.COMPLETE, Ending.CLIENT_LEFT, Ending.CLIENT_LEFT_CUT, Ending.OUT_OF_CREDITS, Ending.SPEND_LIMIT}
)
# All of it was seen: where it says nothing and is reported as zero tokens, zero it is.
_WHOLE = frozenset({Ending.COMPLETE, Ending.CLIENT_LEFT})


@dataclass(frozen=True, slots=True)
class Due:
    """What an ended answer costs. ``capped`` says why ``charge`` is less than the usage costs, where it is."""

    charge: int
    usage: Usage
    source: UsageSource
    capped: str | None
    flags: tuple[str, ...] = ()
    """What was odd about the report or the count."""


async def find_due(exchange: Exchange) -> Due | None:
    """What the answer costs; None where it is free."""
    ticket, meter, ending = exchange.ticket, exchange.meter, exchange.ending
    if ending in _FREE:
        return None
    quirks = ticket.route.upstream.quirks
    if exchange.delivered is not None:
        return await _delivered(exchange, exchange.delivered)
    if meter is None or not (meter.delivered or meter.reported(quirks)):
        if ending not in _CHARGED or (ending in _WHOLE and meter is not None and meter.zeros_reported):
            return None
        prompt, _ = await ticket.count(None)
        return _timed(exchange, Usage(input=prompt), "counted")
    prompt, said = await ticket.count(meter) if needs_count(meter, quirks) else (0, 0)
    found = reckon(meter, quirks, counted_input=prompt, counted_output=said, bounds=ticket.bounds)
    reported = found.source == "reported"
    due = _reported(exchange, found.usage) if reported else _timed(exchange, found.usage, found.source)
    return replace(due, flags=(*found.flags, *due.flags))


async def _delivered(exchange: Exchange, delivered: Excerpt) -> Due | None:
    """What was delivered of an answer that was ended before all of it was; with what was reported by then."""
    ticket = exchange.ticket
    if not delivered.choices and exchange.ending not in _CHARGED:
        return None
    prompt, said = await ticket.count(delivered)
    prompt, said = min(prompt, ticket.bounds.input), min(said, ticket.bounds.output)
    reported = None if delivered.report is None else normalise(delivered.report, ticket.route.upstream.quirks)
    if reported is None:
        return _timed(exchange, Usage(input=prompt, output=said), "counted")
    return _timed(exchange, completed(reported, prompt, said), "partly_counted")


def uncountable_due(exchange: Exchange) -> Due:
    """What is charged where a mistake of ours keeps the usage from being found: never nothing, never above the hold."""
    bounds = exchange.ticket.bounds
    usage = Usage(input=bounds.input, output=bounds.output)
    cost = charge(exchange.ticket.variant.price, usage)
    return Due(min(exchange.granted, cost), usage, "counted", "uncountable")


def _timed(exchange: Exchange, usage: Usage, source: UsageSource) -> Due:
    """With the reasoning that was taken to have been written unseen, for which there is nothing but the time."""
    room = exchange.ticket.bounds.output - usage.output - usage.reasoning - usage.audio_output
    unseen = min(unseen_reasoning(exchange), max(room, 0))
    if not unseen:
        return _counted(exchange, usage, source)
    due = _counted(exchange, replace(usage, reasoning=usage.reasoning + unseen), source)
    return replace(due, flags=(TIMED_REASONING,))


def _counted(exchange: Exchange, usage: Usage, source: UsageSource) -> Due:
    cost, held = charge(exchange.ticket.variant.price, usage), exchange.granted
    # The ledger's audit takes the first at its word: nothing of the hold may be left.
    above = COUNTED_ABOVE_KNOWN_HOLD if exchange.hold_in_doubt else COUNTED_ABOVE_HOLD
    return Due(min(cost, held), usage, source, above if cost > held else None)


def _reported(exchange: Exchange, usage: Usage) -> Due:
    ticket = exchange.ticket
    cost = charge(ticket.variant.price, usage)
    tokens_in = usage.input + usage.cached_input + usage.cache_write + usage.audio_input
    tokens_out = usage.output + usage.reasoning + usage.audio_output
    times = BELIEVED_TIMES_POSSIBLE
    believed = tokens_in <= times * ticket.bounds.input and tokens_out <= times * ticket.output_possible
    # What was held for it so far may be but a part of what it could cost.
    if believed or cost <= max(exchange.granted, quote(ticket.variant.price, ticket.bounds)):
        return Due(cost, usage, "reported", None)
    return Due(exchange.granted, usage, "reported", IMPLAUSIBLE)


def finalize_row(exchange: Exchange, due: Due) -> Finalize:
    """The settlement of a closed exchange. Its fingerprint covers every fact that the charge follows from."""
    ticket, ending = exchange.ticket, exchange.ending
    assert ending is not None
    facts = json.dumps(
        [str(ticket.hold_id), due.charge, due.usage.as_tuple(), due.source, ticket.price_version, ending]
    )
    return Finalize(
        hold_id=ticket.hold_id,
        account_id=ticket.account_id,
        key_id=ticket.key_id,
        worker_id=ticket.worker_id,
        charge=due.charge,
        usage=due.usage,
        usage_source=due.source,
        price_version=ticket.price_version,
        model=ticket.route.model,
        variant=ticket.variant.name,
        ending=ending,
        receipt=json.dumps(_receipt(exchange, due)),
        fingerprint=hashlib.sha256(facts.encode()).digest(),
        capped=due.capped,
    )


def _receipt(exchange: Exchange, due: Due) -> dict[str, Any]:
    """What a person who asks about the charge needs beside the figures: never a word of the prompt or the answer."""
    ticket, meter = exchange.ticket, exchange.meter
    raw = None if meter is None else meter.usage_json()
    return {
        "stream": ticket.stream,
        "upstream": ticket.route.upstream.name,
        "upstream_model": ticket.route.upstream_model,
        "upstream_status": exchange.upstream_status,
        "upstream_request_id": exchange.upstream_request_id,
        "usage_reported": None if raw is None else json.loads(raw),
        "finish_reasons": [] if meter is None else meter.finish_reasons,
        "cap_sent": ticket.cap_sent,
        "held_at_last": format_credits(exchange.granted),
        "extensions": exchange.extensions,
        "capped": due.capped,
        "usage_flags": due.flags,
        "seconds_to_leaving": _between(exchange.sent_at, exchange.left_at),
        "cut_by": exchange.cut_by,
        "seconds_to_first_byte": _between(exchange.sent_at, exchange.first_byte_at),
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)
