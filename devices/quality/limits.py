"""Judge readings by the limits of their variable. What is outside them is suspect: kept and shown, and not believed by rules."""

from __future__ import annotations

from dataclasses import dataclass

from devices.latest import Latest
from devices.quality.reasons import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a variable whose values are numbers; None where nothing is asked. Times are microseconds.

    `step`: by how much it may change within `step_us`. `stuck_after_us`: for how long it may stay the same.
    """

    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    step_us: int = 60_000_000
    stuck_after_us: int | None = None


def judge(limits: Limits, value: float, at_us: int, known: Latest | None) -> str:
    """Why the reading is suspect; empty when it is not. `known`: what was known of the variable before it.

    Of a reading that is older than what is known, only whether it is within the range.
    """
    if limits.minimum is not None and value < limits.minimum:
        return Reason.BELOW_MINIMUM.value
    if limits.maximum is not None and value > limits.maximum:
        return Reason.ABOVE_MAXIMUM.value
    if known is None or known.value is None or at_us < known.timestamp_us:
        return ""
    if limits.step is not None:
        # A change that lasts is believed after a while: the longer ago the last good value, the further it may have moved.
        steps = max(1.0, (at_us - known.timestamp_us) / limits.step_us)
        if abs(value - known.value) > limits.step * steps:
            return Reason.STEP.value
    if limits.stuck_after_us is not None and value == known.value and at_us - _since_us(known) >= limits.stuck_after_us:
        return Reason.STUCK.value
    return ""


def taken_in(reason: str, value: float, at_us: int, received_us: int, known: Latest | None) -> Latest:
    """What is known of the variable after a reading that was judged so: the last good value, and what is suspect after it."""
    if known is None:
        known = Latest(None, 0)
    received_us = max(known.heard_us, received_us)
    if at_us < known.timestamp_us:
        return known._replace(received_us=received_us)
    if reason:
        return known._replace(received_us=received_us, suspect_us=max(known.suspect_us, at_us), reason=reason)
    since_us = _since_us(known) if value == known.value else at_us
    return Latest(value, at_us, received_us, known.suspect_us, known.reason, since_us)


def _since_us(known: Latest) -> int:
    """What was restored, or judged by no limits before, is not known to have been the same for longer."""
    return known.since_us or known.timestamp_us
