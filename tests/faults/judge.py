"""What must be true when the trouble is over, whatever it was. Every wrong is a sentence; an empty list is acquittal.

The judge believes nobody: what was delivered is what callers received, what was asked for is what the provider was
asked, and what was charged is what the ledger's rows say.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from proxy.ledger.audit import audit
from proxy.ledger.lease import MARKS_SECONDS
from tests.faults.caller import Call
from tests.faults.provider import PROMPT_TOKENS
from tests.faults.scene import RENEW_SECONDS, Scene

__all__ = ["PROGRESS_SECONDS", "Verdict", "audited", "counted", "disturbed", "judge", "reported"]

INPUT_RATE, OUTPUT_RATE = 1_000, 3_000
"""Microcredits a token: scene.PRICING sells 1,000 of them for 1 and 3 credits."""
SAID_BESIDE = 1
"""Tokens that an answer of this family costs beside its text, where nothing was reported (core/bounds.py)."""
SETTLING_SECONDS = 2.0
"""A worker that died so soon after the end of a call may not have settled it."""
PROGRESS_SECONDS = RENEW_SECONDS + MARKS_SECONDS + 0.5
"""What a killed worker's call may be charged less for: nothing that was delivered longer before the kill than this.
A renewal's time, what it waits for the marks (which isn't divided), and what a busy machine takes to send it."""
MARK_MARGIN_WORDS = 4
"""A mark leaves out so much of the text's end, whose count may yet change (gateway/progress.py)."""


def counted(words: int) -> int:
    """What so many words cost where no usage was reported."""
    return PROMPT_TOKENS * INPUT_RATE + (words + SAID_BESIDE) * OUTPUT_RATE if words else 0


def reported(words: int) -> int:
    """What they cost where it was."""
    return PROMPT_TOKENS * INPUT_RATE + words * OUTPUT_RATE


@dataclass
class Verdict:
    """What was found: ``wrongs``, and how much was looked at, so that nobody is acquitted for want of evidence."""

    wrongs: list[str] = field(default_factory=list)
    calls: int = 0
    exact: int = 0
    """Calls that nothing disturbed, each charged to the unit."""
    disturbed: int = 0
    """Calls whose worker died on them, with a hold."""
    undercharged: int = 0
    """The most, in microcredits, that such a call was charged below what had been delivered."""
    lag_seconds: float = 0.0
    """How long before the kill the first word was delivered that such a call wasn't charged for."""
    audited: int = 0
    """Rows that the audit looked at."""

    def wrong(self, what: str) -> None:
        self.wrongs.append(what)


async def judge(scene: Scene) -> Verdict:
    """Look at everything since the scene has forgotten. All holds must have ended by now, or that is a wrong."""
    verdict = Verdict()
    known = {customer.id for customer in scene.customers}
    holds = [hold for hold in await scene.holds() if hold["account_id"] in known]
    await _audit(scene, verdict)
    await _totals(scene, verdict)
    by_call: dict[tuple[Any, int | None], list[dict[str, Any]]] = {}
    for hold in holds:
        by_call.setdefault((hold["account_id"], hold["cap"]), []).append(hold)
    for call in scene.calls:
        verdict.calls += 1
        _call(scene, verdict, call, by_call.pop((call.account_id, call.cap), []))
    for (account, cap), strays in by_call.items():
        # A reserve that was given up leaves a tombstone, which nobody's call has to be.
        if cap is not None or any(stray["charge"] or stray["state"] != "released" for stray in strays):
            verdict.wrong(f"account {account}, cap {cap}: no call has made {len(strays)} holds, as {_told(strays[0])}")
    return verdict


async def audited(scene: Scene) -> list[str]:
    """What the audit finds, on a ledger that may be in use; nothing to be looked at is a finding, too."""
    connection = await asyncpg.connect(scene.database.owner)
    try:
        checks = await audit(connection)
    finally:
        await connection.close()
    found = [f"audit: {c.name}: {c.violations} of {c.rows}, as {c.example}" for c in checks if not c.ok]
    return found if sum(check.rows for check in checks) else ["audit: there was nothing to look at"]


async def _audit(scene: Scene, verdict: Verdict) -> None:
    connection = await asyncpg.connect(scene.database.owner)
    try:
        checks = await audit(connection)
    finally:
        await connection.close()
    for check in checks:
        verdict.audited += check.rows
        if not check.ok:
            verdict.wrong(f"audit: {check.name}: {check.violations} of {check.rows}, as {check.example}")
    looked_at = {check.name: check.rows for check in checks}
    ended = await scene.sql.fetchval("SELECT count(*) FROM farebox.holds WHERE state <> 'open'")
    if looked_at["charges_recompute_from_usage_and_price"] != ended:
        verdict.wrong(f"audit looked at other holds than the {ended} that have ended: {looked_at}")


async def _totals(scene: Scene, verdict: Verdict) -> None:
    """Credits are neither made nor lost: what was granted is what is left and what was charged."""
    rows = await scene.sql.fetch(
        "SELECT a.id, a.balance, a.held, a.debt,"
        " (SELECT coalesce(sum(h.charge - h.reversed), 0) FROM farebox.holds h WHERE h.account_id = a.id) AS charged"
        " FROM farebox.accounts a"
    )
    accounts = {row["id"]: row for row in rows}
    for customer in scene.customers:
        row = accounts[customer.id]
        if row["held"] or row["debt"]:
            verdict.wrong(f"account {customer.id} holds {row['held']} and owes {row['debt']} when all is quiet")
        if customer.granted != row["balance"] + row["charged"]:
            verdict.wrong(f"account {customer.id}: {customer.granted} granted, {dict(row)}")


def _call(scene: Scene, verdict: Verdict, call: Call, holds: list[dict[str, Any]]) -> None:
    served = scene.provider.of(call.name)
    charged = [hold for hold in holds if hold["charge"]]
    if len(holds) > 1 and (call.word is None or len(charged) > 1):
        verdict.wrong(f"{call.name} has {len(holds)} holds, {len(charged)} of them charged")
    if served.requests > len(holds):
        verdict.wrong(f"{call.name} went to the upstream {served.requests} times, with {len(holds)} holds")
    if len(call.words) > served.words:
        verdict.wrong(f"{call.name} was given {len(call.words)} words of {served.words}")
    if not holds:
        if call.status == 200:
            verdict.wrong(f"{call.name} was answered and never held")
        return
    if still := [hold for hold in holds if hold["state"] == "open"]:
        verdict.wrong(f"{call.name} is still held: {_told(still[0])}")
        return
    hold = (charged or holds)[0]
    died = scene.deaths.get(scene.served_by[call.name].pid, math.inf)
    if call.began <= died <= call.ended + SETTLING_SECONDS:
        verdict.disturbed += 1
        disturbed(verdict, call, hold, died=died, sent=served.words)
    else:
        _undisturbed(scene, verdict, call, hold)


def disturbed(
    verdict: Verdict,
    call: Call,
    hold: Mapping[str, Any],
    *,
    died: float,
    sent: int = 0,
    period: float = PROGRESS_SECONDS,
) -> None:
    """Its worker died on it: never above what was delivered, and not below what a progress mark could know.

    ``sent``: the words that the upstream has sent, for a caller that left before they came.
    """
    delivered = counted(len(call.words))
    # Who hangs up pays for what the upstream goes on to say, as the route's policy has it; for the prompt at least.
    most = max(counted(sent), PROMPT_TOKENS * INPUT_RATE) if call.outcome == "left" else delivered
    known = counted(max(call.words_by(died - period) - MARK_MARGIN_WORDS, 0))
    if hold["charge"] > most:
        verdict.wrong(f"{call.name} was given {len(call.words)} words, {most}, and charged {_told(hold)}")
    # A report costs a token less than a count.
    if hold["charge"] < known - SAID_BESIDE * OUTPUT_RATE:
        verdict.wrong(f"{call.name} had been given {known}'s worth {period} s before the kill: {_told(hold)}")
    # How much of what was delivered wasn't paid for.
    verdict.undercharged = max(verdict.undercharged, delivered - hold["charge"])
    # The first word that was delivered and not paid for, the margin left aside, is how far the mark lay behind.
    paid = (hold["charge"] - PROMPT_TOKENS * INPUT_RATE) // OUTPUT_RATE + MARK_MARGIN_WORDS if hold["charge"] else 0
    if len(call.words) > max(paid, MARK_MARGIN_WORDS):
        verdict.lag_seconds = max(verdict.lag_seconds, died - call.words[paid])


def _undisturbed(scene: Scene, verdict: Verdict, call: Call, hold: Mapping[str, Any]) -> None:
    """Nothing died: to the unit what the provider said, or what came where it said nothing."""
    answer, served = scene.provider.answer(call.name), scene.provider.of(call.name)
    if answer.status != 200:
        due = {0}
    elif call.outcome == "whole":
        due = {reported(answer.words) if answer.reports or not call.stream else counted(answer.words)}
    elif call.outcome in ("left", "broken"):
        # Cut, by its caller or by a lost lease: as counted, at or above what arrived; or drained to its report.
        due = {counted(words) for words in range(len(call.words), served.words + 1)}
        due |= {reported(answer.words)} if served.finished else set()
    else:
        due = {0}
    verdict.exact += 1
    if hold["charge"] not in due:
        verdict.wrong(f"{call.name}, {call.outcome}, {len(call.words)} words, should cost {due}: {_told(hold)}")


def _told(hold: Mapping[str, Any]) -> str:
    names = ("id", "state", "ending", "charge", "usage", "usage_source", "mark", "capped")
    return ", ".join(f"{name} {hold[name]}" for name in names)
