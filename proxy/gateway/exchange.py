"""An exchange: one request in flight, from the grant of its hold to its ending."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from proxy.core.catalog import OnDisconnect, Route, Variant
from proxy.core.excerpt import Excerpt, Said
from proxy.core.meter import Meter
from proxy.core.pricing import Bounds
from proxy.gateway.progress import CountEach, Progress

__all__ = ["Count", "Ending", "Exchange", "Ticket"]


class Ending(StrEnum):
    """How an answer ended; it stands in the receipt."""

    COMPLETE = "complete"
    CLIENT_LEFT = "client_left"
    """The client left; the upstream was read on to its end."""
    CLIENT_LEFT_CUT = "client_left_cut"
    """The client left, and the upstream was cut off before it was done: by policy, or at a limit of the drain."""
    CLIENT_LEFT_UNSENT = "client_left_unsent"
    """The client left before anything went to the upstream."""
    UPSTREAM_REFUSED = "upstream_refused"
    """An error status, or an answer that can't be relayed."""
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_ERROR = "upstream_error"
    """An error in an answer that had begun with 200."""
    UPSTREAM_INCOMPLETE = "upstream_incomplete"
    """It broke, or ended without saying that it was done."""
    UPSTREAM_STALLED = "upstream_stalled"
    SHUTDOWN = "shutdown"
    LEASE_LAPSED = "lease_lapsed"
    TOO_LONG = "too_long"
    """It ran longer than any answer may."""
    OUT_OF_CREDITS = "out_of_credits"
    """The account couldn't carry more of it."""
    SPEND_LIMIT = "spend_limit"
    """The key's own spend limit didn't."""
    LEDGER_LOST = "ledger_lost"
    """Whether the account could carry more of it was not to be known in time."""
    FAILED = "failed"
    """A mistake of ours."""


Count = Callable[[Said | None], Awaitable[tuple[int, int]]]
"""Counts what the upstream didn't report: the tokens of the prompt, and those of what was said (0 for None)."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an exchange is opened with: all that its charge will need. Amounts are microcredits."""

    hold_id: UUID
    account_id: UUID
    key_id: str
    worker_id: UUID
    route: Route
    variant: Variant
    price_version: str
    bounds: Bounds
    output_possible: int
    """The most output tokens, over all choices, were the client's own cap ignored."""
    granted: int
    """What the reserve granted; ``Exchange.granted`` is what the hold has grown to."""
    stream: bool
    cap_sent: int | None
    """The output cap that was sent because of the balance, for each choice; None where none was."""
    count: Count
    on_disconnect: OnDisconnect = OnDisconnect.DRAIN
    """What becomes of the answer if its client leaves."""
    output_beside: int = 0
    """Output tokens, over all choices, that may be billed beside what is said."""


class Exchange:
    """One request in flight: open until ``close``. What the pump learns on the way stands here, for the receipt."""

    def __init__(
        self, ticket: Ticket, closed: "Callable[[Exchange], None]", *, count_each: CountEach, clock: Callable[[], float]
    ) -> None:
        self.ticket = ticket
        self.progress = Progress(
            route=ticket.route,
            bounds=ticket.bounds,
            count_answer=ticket.count,
            count_each=count_each,
            clock=clock,
        )
        """How far the answer has come, in tokens."""
        self.granted = ticket.granted
        """Microcredits that the hold holds now."""
        self.hold_in_doubt = False
        """It may hold more: something that was asked for it got no answer, or may yet be carried out late."""
        self.extensions = 0
        """How often the hold has grown."""
        self.delivered: Excerpt | None = None
        """What was said up to where the answer was ended; None: all that the meter has seen."""
        self.opened_at = clock()
        """The loop's time, as every time here."""
        self.ending: Ending | None = None
        self.asked_at: float | None = None
        """When the last byte of the request had gone out. Before that the upstream has nothing to answer."""
        self.left_at: float | None = None
        """When the client left before the answer's end."""
        self.cut_by: str | None = None
        """What cut the answer off after its client had left, and when."""
        self.cut_at: float | None = None
        self.first_byte_at: float | None = None
        self.upstream_status: int | None = None
        self.upstream_request_id: str | None = None
        self.cut: Callable[[Ending], None] = self.close
        """Stops the work on the answer, whatever it is at, and closes with that ending. The pump puts its own here."""
        self._closed = closed

    @property
    def meter(self) -> Meter | None:
        return self.progress.meter

    @meter.setter
    def meter(self, meter: Meter | None) -> None:
        self.progress.meter = meter

    @property
    def sent_at(self) -> float | None:
        return self.progress.sent_at

    @sent_at.setter
    def sent_at(self, at: float | None) -> None:
        self.progress.sent_at = at

    @property
    def first_said_at(self) -> float | None:
        """When the first text, tool call or visible reasoning came."""
        return self.progress.first_said_at

    @first_said_at.setter
    def first_said_at(self, at: float | None) -> None:
        self.progress.first_said_at = at

    def close(self, ending: Ending) -> None:
        """The answer has ended so. Never waits, never raises; only the first call counts."""
        if self.ending is None:
            self.ending = ending
            self._closed(self)
