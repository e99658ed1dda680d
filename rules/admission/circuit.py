"""The circuit breaker of the queue: which priorities it admits, and when its state changes. Pure.

CLOSED accepts; OPEN accepts urgent events only; HALF_OPEN is the way back. Urgent events (priority 1 and 2) are accepted in
every state up to a hard cap. The thresholds are the predecessor's, in events over all lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

URGENT = 2  # priorities 1 and 2
NORMAL = 5  # priorities 3 to 5; what is above is low
# ConcurrencyLimit of a threshold.
SHED_SHARE = 0.8  # of critical: low priority is shed before anything else
CLOSE_SHARE = 0.6  # of recovery: then a HALF_OPEN circuit closes
HARD_SHARE = 1.2  # of critical: the cap that holds for urgent events, too
FLOOR_SHARE = 0.1  # of critical: thresholds shrink no further, however slow the workers are
# While the queue is above warning, no organization may hold more of it; with fewer than four, an equal share.
ORGANIZATION_SHARE = 0.25
# One sample above critical may be a burst that is already being processed; the second is a queue.
SAMPLES_TO_OPEN = 2
# Counted from the last sample at critical, so that a circuit that swings does so at most every few seconds.
OPEN_SECONDS = 5.0


class State(StrEnum):
    CLOSED = "CLOSED"
    HALF_OPEN = "HALF_OPEN"
    OPEN = "OPEN"


class Reason(StrEnum):
    """Why an event is accepted or not, and why the state changed."""

    ACCEPTED = "accepted"
    OVERRIDE = "high-priority-override"
    SHED = "low-priority-shed"
    CRITICAL = "queue-critical"
    OPEN = "circuit-open"
    HELD = "circuit-held-open"  # by a person
    REOPENED = "circuit-reopened"
    HARD_LIMIT = "hard-limit"
    ENQUEUE_ERROR = "enqueue-error"
    ORGANIZATION = "organization-limit"
    RECOVERING = "queue-recovering"
    RECOVERED = "queue-recovered"
    MANUAL = "manual"
    RESET = "manual-reset"
    DISABLED = "backpressure-disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """In events: recovery < warning < critical."""

    recovery: int
    warning: int
    critical: int

    @property
    def hard(self) -> int:
        return int(self.critical * HARD_SHARE)

    @property
    def shed(self) -> int:
        return int(self.critical * SHED_SHARE)

    def within(self, limit: float) -> Thresholds:
        """Shrunk so that a queue of `limit` events, as many as the workers manage within their budget, is critical.

        Not below a tenth: workers that restart drain nothing for some seconds, which is no reason to refuse everything.
        """
        critical = max(min(self.critical, int(limit)), int(self.critical * FLOOR_SHARE), 1)
        return Thresholds(
            critical=critical, warning=min(self.warning, critical // 2), recovery=min(self.recovery, critical // 4)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision about one priority, in the names that every protocol answers with."""

    accept: bool
    reason: str
    queue_depth: int
    threshold: int
    circuit_state: str


def decide(
    state: State,
    priority: int,
    *,
    depth: int,
    thresholds: Thresholds,
    hard: int,
    enabled: bool = True,
    held: bool = False,
) -> Verdict:
    """Whether an event may join `depth` others. `hard` is the cap from the configured, not the shrunken, threshold; `held`:
    a person keeps the circuit open."""
    reason, threshold = _judged(state, priority, depth, thresholds, hard) if enabled else _capped(depth, hard)
    if held and reason == Reason.OPEN:
        reason = Reason.HELD
    accept = reason in (Reason.ACCEPTED, Reason.OVERRIDE, Reason.DISABLED)
    return Verdict(accept=accept, reason=reason, queue_depth=depth, threshold=threshold, circuit_state=state)


def _capped(depth: int, hard: int) -> tuple[Reason, int]:
    return (Reason.HARD_LIMIT if depth >= hard else Reason.DISABLED), hard


def _judged(state: State, priority: int, depth: int, thresholds: Thresholds, hard: int) -> tuple[Reason, int]:
    """The first rule that applies, from the strictest on, and the threshold it goes by."""
    urgent, low = priority <= URGENT, priority > NORMAL
    is_open, half_open = state == State.OPEN, state == State.HALF_OPEN
    rules = (
        (depth >= hard, Reason.HARD_LIMIT, hard),
        (urgent and (is_open or depth >= thresholds.critical), Reason.OVERRIDE, hard),
        (urgent, Reason.ACCEPTED, hard),
        (is_open, Reason.OPEN, thresholds.recovery),
        (half_open and depth >= thresholds.warning, Reason.REOPENED, thresholds.warning),
        (depth >= thresholds.critical, Reason.CRITICAL, thresholds.critical),
        (low and (half_open or depth >= thresholds.shed), Reason.SHED, thresholds.shed),
    )
    return next(
        ((reason, limit) for applies, reason, limit in rules if applies), (Reason.ACCEPTED, thresholds.critical)
    )


def share_of(organization_id: int, organizations: Mapping[int, int]) -> tuple[int, int]:
    """Events that the organization holds of the queue, and how many it may hold; `organizations` are all that hold some."""
    active = sum(1 for depth in organizations.values() if depth > 0)
    total = sum(organizations.values())
    return organizations.get(organization_id, 0), int(total * max(ORGANIZATION_SHARE, 1 / max(active, 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What the circuit remembers of the depths it saw: how many in a row were critical, and when the last one was (s)."""

    critical_in_a_row: int = 0
    last_critical_at: float = float("-inf")

    def seen(self, depth: int, *, thresholds: Thresholds, now: float) -> Samples:
        if depth < thresholds.critical:
            return Samples(last_critical_at=self.last_critical_at)
        return Samples(critical_in_a_row=self.critical_in_a_row + 1, last_critical_at=now)


def next_state(
    state: State, depth: int, *, thresholds: Thresholds, samples: Samples, now: float, since: float
) -> tuple[State, Reason]:
    """The state after this sample of the depth, at most one step on, and why; `samples` include it.

    `now` and `since`, when the state was entered, are seconds of one clock.
    """
    if state == State.OPEN:
        calm = now - max(samples.last_critical_at, since) >= OPEN_SECONDS
        return (State.HALF_OPEN if depth <= thresholds.recovery and calm else State.OPEN), Reason.RECOVERING
    if state == State.HALF_OPEN:
        if depth >= thresholds.warning:
            return State.OPEN, Reason.REOPENED
        recovered = depth <= thresholds.recovery * CLOSE_SHARE
        return (State.CLOSED if recovered else State.HALF_OPEN), Reason.RECOVERED
    at_once = depth >= thresholds.critical * HARD_SHARE
    opens = at_once or (depth >= thresholds.critical and samples.critical_in_a_row >= SAMPLES_TO_OPEN)
    return (State.OPEN if opens else State.CLOSED), Reason.CRITICAL
