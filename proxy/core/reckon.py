"""Whose figures are charged: the provider's report, ours, or the provider's for the prompt and ours for the answer.

The order of authority (METERING, section 4): a report that covers the whole answer; a report that covers a part of it
(a running one, before the stream broke), completed by counting; counting alone; nothing, where nothing came.
"""

from dataclasses import dataclass, replace

from proxy.core.catalog import Quirks
from proxy.core.meter import Meter
from proxy.core.pricing import Bounds
from proxy.core.usage import Usage, UsageSource
from proxy.core.usage_report import Reported

__all__ = ["Reckoning", "completed", "needs_count", "reckon"]

COUNTED_ABOVE_BOUND = "counted_above_bound"


@dataclass(frozen=True, slots=True)
class Reckoning:
    """The usage to charge, who said so, and what was odd about the report."""

    usage: Usage
    source: UsageSource
    flags: tuple[str, ...] = ()


def needs_count(meter: Meter, quirks: Quirks) -> bool:
    """Whether ``reckon`` will use the counted figures, so that they are worth counting."""
    return meter.usage(quirks) is None and (meter.delivered or meter.reported(quirks) is not None)


def reckon(meter: Meter, quirks: Quirks, *, counted_input: int, counted_output: int, bounds: Bounds) -> Reckoning:
    """What an answer used. The counted figures are tokens (``core/bounds.py``'s estimates), unused where a report does.

    What is counted stays within ``bounds``, so that a counted charge never exceeds its quote; the flag
    ``counted_above_bound`` says where it was cut. Where neither a report nor any text came, usage is zero and its
    source ``none``.
    """
    above = counted_input > bounds.input or counted_output > bounds.output
    cut = (COUNTED_ABOVE_BOUND,) if above else ()
    counted_input = min(counted_input, bounds.input)
    counted_output = min(counted_output, bounds.output)
    reported = meter.reported(quirks)
    whole = meter.usage(quirks)
    if reported is not None and whole is not None:
        return Reckoning(whole, "reported", reported.flags)
    if reported is not None:
        usage = completed(reported, counted_input, counted_output)
        return Reckoning(usage, "partly_counted", (*reported.flags, *cut))
    if meter.delivered:
        return Reckoning(Usage(input=counted_input, output=counted_output), "counted", cut)
    return Reckoning(Usage(), "none")


def completed(reported: Reported, counted_input: int, counted_output: int) -> Usage:
    """A report that doesn't cover the whole answer, with what was counted in the place of what it lacks."""
    usage = reported.usage
    if not reported.prompt_known:
        usage = replace(usage, input=counted_input)
    # A running report covers less than what has come since; the count covers no hidden reasoning. The larger is nearer.
    said = usage.output + usage.reasoning + usage.audio_output
    return replace(usage, output=usage.output + max(0, counted_output - said))
