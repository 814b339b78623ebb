"""Where a process may die: labelled points, each a function of the real code and a moment of its call.

A *scene* drives a process to its points (``test_failpoints.py``). ``leaves`` says what the ledger has of the call right
after the death, before anybody has tidied up, so that a point which isn't where its label says is found out; ``owes``
says what the call costs when everything has been settled.

A function that has been renamed fails ``test_dying.py``: name its new place here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from proxy.gateway.exchange import Ending
from proxy.ledger.journal_files import OPEN
from proxy.ledger.journal_records import DONE, MAGIC, ROW

__all__ = ["POINTS", "SCENES", "Moment", "Owes", "Point", "Seen"]


class Moment(Enum):
    """When, in the life of the call."""

    BEFORE = "before"
    AFTER = "after"
    UNDER_WAY = "under way"
    """A few turns of the loop after it began."""
    IN_FLIGHT = "in flight"
    """Its statement was sent to PostgreSQL, which carries it out or doesn't."""
    HALF = "half"
    """Half of its bytes were written."""


class Owes(Enum):
    """What the call costs in the end."""

    NOTHING = "nothing"
    MARK = "mark"
    """Something between its last progress mark and what was delivered."""
    ALL = "all"
    """Exactly what an undisturbed call costs."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A call of the point's function; ``result`` once it has returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None


def _always(_: Seen) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Point:
    """One place to die at. ``leaves``: the states a hold may be found in then; None is no hold at all."""

    label: str
    scene: str
    target: str
    moment: Moment
    leaves: frozenset[str | None] = frozenset({None})
    owes: Owes = Owes.NOTHING
    nth: int = 1
    when: Callable[[Seen], bool] = field(default=_always)


def _finalizes(seen: Seen) -> bool:
    return bool(seen.args[1])


def _reserves(seen: Seen) -> bool:
    return bool(seen.args[2])


def _releases(seen: Seen) -> bool:
    return len(seen.args) > 3 and bool(seen.args[3])


def _found_some(seen: Seen) -> bool:
    return bool(seen.result)


def _has_left(seen: Seen) -> bool:
    return seen.args[0]._exchange.left_at is not None


def _has_marks(seen: Seen) -> bool:
    return bool(seen.args[2])


def _holds_row(seen: Seen) -> bool:
    return MAGIC + ROW in bytes(seen.args[1])


def _holds_mark(seen: Seen) -> bool:
    return MAGIC + DONE in bytes(seen.args[1])


def _may_hold_rows(seen: Seen) -> bool:
    """Not the sync of a file that is being made."""
    return bool(seen.args[0].path.suffix == OPEN)


def _has_rows(seen: Seen) -> bool:
    return bool(seen.result.rows)


def _at_the_end(seen: Seen) -> bool:
    return bool(seen.args[1] is Ending.SHUTDOWN)


def _makes_tables(seen: Seen) -> bool:
    return "CREATE TABLE farebox.accounts" in seen.args[1]


def _is_open(seen: Seen) -> bool:
    return seen.args[0]._exchange.ending is None


_BATCH = "proxy.ledger.holds:HoldLedger.batch"
_EXTEND = "proxy.ledger.holds:HoldLedger.extend_batch"
_BEAT = "proxy.ledger.holds:HoldLedger.heartbeat"
_EXPIRE = "proxy.ledger.holds:HoldLedger.expire_holds"
_START = "proxy.ledger.holds:HoldLedger.start_worker"
_STOP = "proxy.ledger.holds:HoldLedger.stop_worker"
_PRICES = "proxy.ledger.holds:HoldLedger.put_price_version"
_GRANT = "proxy.ledger.control:ControlLedger.grant"
_REVERSE = "proxy.ledger.control:ControlLedger.reverse"
_PASS_ON = "proxy.gateway.relay:Pump._pass_on"
_POST = "proxy.gateway.upstream:HttpClient.post"

_OPEN = frozenset({"open"})
_FINAL = frozenset({"final"})
_RELEASED = frozenset({"released"})
_PROVISIONAL = frozenset({"provisional"})
_OPENING = frozenset({None, "open"})
_CLOSING = frozenset({"open", "final"})

_WRITE = "proxy.ledger.journal_files:JournalFile.write_at"
_SYNC = "proxy.ledger.journal_files:JournalFile.sync"
_SEAL = "proxy.ledger.bookkeeper:seal"
_LOOK = "proxy.ledger.bookkeeper:audit_since_last"
_CLAIM = "proxy.ledger.idempotency:IdempotencyLedger.claim"

_B, _A, _U, _F = Moment.BEFORE, Moment.AFTER, Moment.UNDER_WAY, Moment.IN_FLIGHT

_ALL = (
    # A call is let in, and credits are held for it.
    Point("reserve.arrived", "stream", "proxy.gateway.chat:Chat._admit", _B),
    Point("reserve.planned", "stream", "proxy.gateway.chat:Chat._plan", _A),
    Point("reserve.queued", "stream", "proxy.ledger.batch:BatchedLedger.reserve", _U),
    Point("reserve.unsent", "stream", _BATCH, _B, when=_reserves),
    Point("reserve.in_flight", "stream", _BATCH, _F, _OPENING, when=_reserves),
    Point("reserve.committed", "stream", _BATCH, _A, _OPEN, when=_reserves),
    Point("reserve.answered", "stream", "proxy.ledger.batch:BatchedLedger.reserve", _A, _OPEN),
    Point("reserve.opened", "stream", "proxy.gateway.settle:Settler.open", _A, _OPEN),
    Point("reserve.ordered", "stream", "proxy.gateway.chat:Chat._order", _A, _OPEN),
    # The answer is relayed.
    Point("stream.started", "stream", "proxy.gateway.relay:Relay.start", _A, _OPEN),
    Point("stream.unsent", "stream", _POST, _B, _OPEN),
    Point("stream.sent", "stream", _POST, _U, _OPEN, Owes.MARK),
    Point("stream.head", "stream", _POST, _A, _OPEN, Owes.MARK),
    Point("stream.head_passed", "stream", "proxy.gateway.channel:Channel.start", _A, _OPEN, Owes.MARK),
    Point("stream.first_read", "stream", _PASS_ON, _B, _OPEN, Owes.MARK),
    Point("stream.first_metered", "stream", "proxy.gateway.channel:Channel.put", _B, _OPEN, Owes.MARK),
    Point("stream.first_passed", "stream", _PASS_ON, _A, _OPEN, Owes.MARK),
    Point("stream.midway", "stream", _PASS_ON, _A, _OPEN, Owes.MARK, nth=12),
    Point("stream.client_left", "leaver", "proxy.gateway.relay:Pump.client_left", _A, _OPEN, Owes.MARK, when=_is_open),
    Point("stream.draining", "leaver", _PASS_ON, _A, _OPEN, Owes.MARK, nth=3, when=_has_left),
    Point("stream.broke", "broken", "proxy.gateway.relay:Pump._give_up", _A, _OPEN, Owes.MARK),
    Point("whole.read", "whole", "proxy.gateway.relay:Pump._read_all", _A, _OPEN, Owes.MARK),
    Point("whole.passed", "whole", "proxy.gateway.relay:Pump._pass_whole", _A, _OPEN, Owes.MARK),
    # Its hold grows with it.
    Point("extend.unsent", "growing", _EXTEND, _B, _OPEN, Owes.MARK),
    Point("extend.in_flight", "growing", _EXTEND, _F, _OPEN, Owes.MARK),
    Point("extend.committed", "growing", _EXTEND, _A, _OPEN, Owes.MARK),
    Point("extend.again", "growing", _EXTEND, _A, _OPEN, Owes.MARK, nth=2),
    # What it costs is written down.
    Point("finalize.seen", "stream", "proxy.gateway.exchange:Exchange.close", _B, _OPEN, Owes.MARK),
    Point("finalize.closed", "stream", "proxy.gateway.exchange:Exchange.close", _A, _OPEN, Owes.MARK),
    Point("finalize.priced", "stream", "proxy.gateway.settle:find_due", _A, _OPEN, Owes.MARK),
    Point("finalize.counted", "unreported", "proxy.gateway.settle:find_due", _A, _OPEN, Owes.MARK),
    Point("finalize.described", "stream", "proxy.gateway.settle:finalize_row", _A, _OPEN, Owes.MARK),
    Point("finalize.queued", "stream", "proxy.ledger.batch:BatchedLedger.finalize", _A, _OPEN, Owes.ALL),
    Point("finalize.unsent", "stream", _BATCH, _B, _OPEN, Owes.ALL, when=_finalizes),
    Point("finalize.in_flight", "stream", _BATCH, _F, _CLOSING, Owes.ALL, when=_finalizes),
    Point("finalize.committed", "stream", _BATCH, _A, _FINAL, Owes.ALL, when=_finalizes),
    Point("finalize.answered", "stream", "proxy.gateway.settle:Settler._charge", _A, _FINAL, Owes.ALL),
    # It is on this machine's disk before the database hears of it, and what was written outlives its process.
    Point("journal.taken", "stream", "proxy.ledger.journal:Journal.write", _A, _OPEN, Owes.MARK),
    Point("journal.half_written", "stream", _WRITE, Moment.HALF, _OPEN, Owes.MARK, when=_holds_row),
    Point("journal.written", "stream", _WRITE, _A, _OPEN, Owes.ALL, when=_holds_row),
    Point("journal.unsynced", "stream", _SYNC, _B, _OPEN, Owes.ALL, when=_may_hold_rows),
    Point("journal.synced", "stream", _SYNC, _A, _OPEN, Owes.ALL, when=_may_hold_rows),
    Point("journal.durable", "stream", "proxy.ledger.journal:Journal._durable", _B, _OPEN, Owes.ALL),
    Point("journal.done", "stream", "proxy.ledger.journal:Journal.done", _A, _FINAL, Owes.ALL),
    Point("journal.half_marked", "stopped", _WRITE, Moment.HALF, _FINAL, Owes.ALL, when=_holds_mark),
    Point("journal.made", "start", "proxy.ledger.journal_files:JournalFile.rename_to", _B),
    Point("journal.named", "start", "proxy.ledger.journal_files:JournalFile.rename_to", _A),
    # Another process finds what the dead one had written.
    Point("takeover.read", "takeover", "proxy.ledger.takeover:read_journal", _A, _OPEN, Owes.ALL, when=_has_rows),
    Point("takeover.unsent", "takeover", _BATCH, _B, _OPEN, Owes.ALL, when=_finalizes),
    Point("takeover.in_flight", "takeover", _BATCH, _F, _CLOSING, Owes.ALL, when=_finalizes),
    Point("takeover.committed", "takeover", _BATCH, _A, _FINAL, Owes.ALL, when=_finalizes),
    Point("takeover.half_marked", "takeover", _WRITE, Moment.HALF, _FINAL, Owes.ALL, when=_holds_mark),
    Point("takeover.marked", "takeover", "proxy.ledger.journal_files:JournalFile.rename", _B, _FINAL, Owes.ALL),
    Point("takeover.renamed", "takeover", "proxy.ledger.journal_files:JournalFile.rename", _A, _FINAL, Owes.ALL),
    # It finds it after a sweeper has settled the hold at its mark.
    Point("true_up.unsent", "true_up", _BATCH, _B, _PROVISIONAL, Owes.ALL, when=_finalizes),
    Point("true_up.in_flight", "true_up", _BATCH, _F, _PROVISIONAL | _FINAL, Owes.ALL, when=_finalizes),
    Point("true_up.committed", "true_up", _BATCH, _A, _FINAL, Owes.ALL, when=_finalizes),
    # A call under a word of its client's own, which is said again when all is over.
    Point("word.unclaimed", "word", _CLAIM, _B),
    Point("word.in_flight", "word", _CLAIM, _F),
    Point("word.claimed", "word", _CLAIM, _A),
    Point("word.held", "word", _BATCH, _A, _OPEN, when=_reserves),
    Point("word.midway", "word", _PASS_ON, _A, _OPEN, Owes.MARK, nth=8),
    Point("word.charged", "word", _BATCH, _A, _FINAL, Owes.ALL, when=_finalizes),
    # A call that costs nothing is given back.
    Point("release.queued", "refused", "proxy.ledger.batch:BatchedLedger.release", _A, _OPEN),
    Point("release.unsent", "refused", _BATCH, _B, _OPEN, when=_releases),
    Point("release.in_flight", "refused", _BATCH, _F, frozenset({"open", "released"}), when=_releases),
    Point("release.committed", "refused", _BATCH, _A, _RELEASED, when=_releases),
    Point("release.answered", "refused", "proxy.gateway.settle:Settler._release", _A, _RELEASED),
    # The worker's lease, and its progress.
    Point("heartbeat.unsent", "long", _BEAT, _B, _OPEN, Owes.MARK, when=_has_marks),
    Point("heartbeat.in_flight", "long", _BEAT, _F, _OPEN, Owes.MARK, when=_has_marks),
    Point("heartbeat.committed", "long", _BEAT, _A, _OPEN, Owes.MARK, when=_has_marks),
    Point("start.prices_in_flight", "start", _PRICES, _F),
    Point("start.prices_kept", "start", _PRICES, _A),
    Point("start.registering", "start", _START, _F),
    Point("start.registered", "start", _START, _A),
    # It is told to stop with an answer under way.
    Point("stop.refusing", "stop", "proxy.gateway.settle:Settler.stop_admitting", _A, _OPEN, Owes.MARK),
    Point("stop.cut", "stop", "proxy.gateway.settle:Settler.cut_all", _A, _OPEN, Owes.MARK, when=_at_the_end),
    Point("stop.drained", "stop", "proxy.gateway.settle:Settler.drain", _A, _FINAL, Owes.MARK),
    Point("stop.ledger", "stop", "proxy.ledger.batch:BatchedLedger.stop", _A, _FINAL, Owes.MARK),
    Point("stop.lease_in_flight", "stop", _STOP, _F, _FINAL, Owes.MARK),
    Point("stop.lease_ended", "stop", _STOP, _A, _FINAL, Owes.MARK),
    # It settles what another has left behind.
    Point("sweep.unsent", "sweep", _EXPIRE, _B, _OPEN, Owes.MARK),
    Point("sweep.in_flight", "sweep", _EXPIRE, _F, _OPEN | _PROVISIONAL, Owes.MARK),
    Point("sweep.committed", "sweep", _EXPIRE, _A, _PROVISIONAL, Owes.MARK, when=_found_some),
    # It seals the book, and audits what is new.
    Point("seal.unsent", "sealed", _SEAL, _B, _CLOSING, Owes.MARK),
    Point("seal.in_flight", "sealed", _SEAL, _F, _CLOSING, Owes.MARK),
    Point("seal.committed", "sealed", _SEAL, _A, _CLOSING, Owes.MARK, when=_found_some),
    Point("seal.auditing", "sealed", _LOOK, _F, _CLOSING, Owes.MARK),
    Point("seal.audited", "sealed", _LOOK, _A, _CLOSING, Owes.MARK, when=_found_some),
    # The schema is made.
    Point("migrate.roles", "migrate", "proxy.ledger.migrate:_ensure_roles", _A),
    Point("migrate.locked", "migrate", "proxy.ledger.migrate:_ensure_schema", _B),
    Point("migrate.bookkeeping_in_flight", "migrate", "proxy.ledger.migrate:_ensure_schema", _F),
    Point("migrate.bookkeeping", "migrate", "proxy.ledger.migrate:_ensure_schema", _A),
    Point("migrate.in_flight", "migrate", "asyncpg.connection:Connection.execute", _U, when=_makes_tables),
    Point("migrate.uncommitted", "migrate", "asyncpg.transaction:Transaction.__aexit__", _B),
    Point("migrate.committed", "migrate", "asyncpg.transaction:Transaction.__aexit__", _A),
    Point("migrate.granting", "migrate", "proxy.ledger.migrate:_grant_roles", _B),
    Point("migrate.granted", "migrate", "proxy.ledger.migrate:_grant_roles", _A),
    # An operator gives credits, and gives some back.
    Point("grant.unsent", "grant", _GRANT, _B),
    Point("grant.in_flight", "grant", _GRANT, _F),
    Point("grant.committed", "grant", _GRANT, _A),
    Point("reverse.unsent", "reverse", _REVERSE, _B, _FINAL, Owes.ALL),
    Point("reverse.in_flight", "reverse", _REVERSE, _F, _FINAL, Owes.ALL),
    Point("reverse.committed", "reverse", _REVERSE, _A, _FINAL, Owes.ALL),
)

POINTS = {point.label: point for point in _ALL}
SCENES = tuple(dict.fromkeys(point.scene for point in _ALL))
