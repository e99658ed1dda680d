"""Admission: how urgent an event is and whose in, whether it may join the queue and why not out; one truth for all processes.

Each process decides from a snapshot at most a quarter of a second old, so that admission costs no round trip per event. The
circuit's state is a row that processes change by compare-and-set. What is not known is refused, never taken for empty.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from django.conf import settings
from django.db import Error as DatabaseError
from gevent.event import AsyncResult, Event
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from aemos.lib import redis
from aemos.lib.per_process import per_process
from aemos.lib.rate_limited_log import RateLimitedLog
from devices.exceptions import OverLimit, Overloaded
from rules.admission import circuit, circuit_store, rates, shared_rates
from rules.admission.circuit import Reason, Samples, Thresholds, Verdict
from rules.admission.circuit_store import Hold, Stored
from rules.admission.rates import Rate
from rules.admission.shared_rates import Measured
from rules.events import Lane, lane_of
from rules.journal import ledger
from rules.journal.ledger import Counts
from rules.journal.tickets import BUDGET_SECONDS

log = logging.getLogger(__name__)
SNAPSHOT_SECONDS = 0.25
# While one request renews the snapshot the others use the old one, up to this age; then they wait for the new one.
TRUST_SECONDS = 1.0
WARN_EVERY_SECONDS = 30.0


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """What decisions are made from. Depths and thresholds in events, rates in events/s, delays in seconds.

    Only `depth` changes: it counts what was accepted since.

    `drain_rate` and `delays` are None where they are not known yet; `stale`: the database is away, the state the last known.
    """

    depth: int
    lanes: Mapping[str, int]
    drain_rate: Mapping[str, float | None]
    delays: Mapping[str, float | None]
    arrivals: float
    total_drain_rate: float | None
    thresholds: Thresholds
    configured: Thresholds
    circuit: Stored
    stale: bool
    enabled: bool
    memory_full: bool
    organizations: Mapping[int, int] = field(default_factory=dict)
    hold: Hold | None = None

    @property
    def limited_by_drain_rate(self) -> bool:
        """Whether the thresholds in force are lower than the configured ones, because the workers are slow."""
        return self.thresholds != self.configured


class Admission:
    """Decides from a snapshot of the journal and the circuit. One per process; any greenlet may call it."""

    def __init__(
        self,
        counts: Callable[[], Counts] = ledger.counts,
        clock: Callable[[], float] = time.monotonic,
        recall: Callable[[], Measured | None] = shared_rates.recall,
    ) -> None:
        self._counts = counts
        self._recall = recall
        self._clock = clock
        self._taken_at = float("-inf")
        self._renewed = Event()
        self._renewed.set()
        self._snapshot: Snapshot | None = None
        self._under_way = 0
        self._circuit = Stored()
        self._samples = Samples()
        self._drained = {lane: Rate() for lane in Lane}
        self._arrived = {lane: Rate() for lane in Lane}
        self._drained_total = Rate()
        self._log = RateLimitedLog(log, seconds=WARN_EVERY_SECONDS, clock=self._clock)

    def snapshot(self) -> Snapshot:
        """At most a quarter of a second old. Raises Overloaded when Redis does not answer."""
        if self._age() >= SNAPSHOT_SECONDS and self._renewed.is_set():
            self._renew()
        elif self._age() >= TRUST_SECONDS:
            # Another request is at it; it ends, well or not, when Redis answers or the socket's timeout has passed.
            self._renewed.wait()
        if self._snapshot is None or self._age() >= TRUST_SECONDS:
            raise unavailable(RedisTimeout())
        return self._snapshot

    def _age(self) -> float:
        return self._clock() - self._taken_at

    def verdict(self, priority: int, organization_id: int | None = None) -> Verdict:
        """Raises Overloaded when the depth is not known."""
        now = self.snapshot()
        hard = 0 if now.memory_full else now.configured.hard
        verdict = circuit.decide(
            now.circuit.state,
            priority,
            depth=now.depth,
            thresholds=now.thresholds,
            hard=hard,
            enabled=now.enabled,
            held=now.hold is not None,
        )
        if not verdict.accept or priority <= circuit.URGENT or organization_id is None or not now.organizations:
            return verdict
        held, limit = circuit.share_of(organization_id, now.organizations)
        if held <= limit:
            return verdict
        return replace(verdict, accept=False, reason=Reason.ORGANIZATION, queue_depth=held, threshold=limit)

    def admitted(self, count: int, until: AsyncResult[None] | None = None) -> None:
        """Counts events accepted since the snapshot, so that a burst inside its lifetime cannot pass the limits.

        Those that the journal has only once `until` is set are counted beside what it says, and so by later snapshots, too.
        """
        if self._snapshot is not None:
            self._snapshot.depth += count
        if until is not None:
            self._under_way += count
            until.rawlink(lambda _: self._arrived_in_journal(count))

    def _arrived_in_journal(self, count: int) -> None:
        self._under_way -= count

    def refusal(self, verdict: Verdict, priority: int) -> Overloaded:
        """The refusal as the sender gets it."""
        now = self._snapshot
        wait = rates.retry_after(
            verdict.queue_depth,
            drain_rate=now.total_drain_rate if now else None,
            arrivals=now.arrivals if now else 0.0,
            budget_seconds=BUDGET_SECONDS[lane_of(priority)],
        )
        if now and now.hold and verdict.reason == Reason.HELD:
            wait = _seconds_of(now.hold, at_least=wait)
        kind, text = refusal_text(verdict, now)
        return kind(
            text,
            reason=verdict.reason,
            retry_after=wait,
            queue_depth=verdict.queue_depth,
            threshold=verdict.threshold,
            circuit_state=verdict.circuit_state,
            drain_rate=now.total_drain_rate if now else None,
            threshold_source="drain-rate" if now and now.limited_by_drain_rate else "configured",
        )

    def measured(self) -> Measured:
        """The rates as this process has seen them."""
        return Measured(
            drained={lane: self._drained[lane].value for lane in Lane},
            arrived={lane: self._arrived[lane].value for lane in Lane},
            total=self._drained_total.cautious,
        )

    def _renew(self) -> None:
        self._renewed.clear()
        try:
            counts = self._counts()
            self._taken_at = self._clock()
            self._observe(counts)
            self._snapshot = self._with_circuit(counts)
        except RedisError as error:
            raise unavailable(error) from error
        finally:
            self._renewed.set()
        self._warn(self._snapshot)

    def _observe(self, counts: Counts) -> None:
        now, before = self._taken_at, self._snapshot
        for lane in Lane:
            backlog = counts.depth[lane] > 0 and before is not None and before.lanes[lane] > 0
            self._drained[lane].observe(now, counts.ended[lane], counts=backlog)
            self._arrived[lane].observe(now, counts.accepted[lane])
        backlog = counts.total > 0 and before is not None and sum(before.lanes.values()) > 0
        self._drained_total.observe(now, sum(counts.ended.values()), counts=backlog)

    def _with_circuit(self, counts: Counts) -> Snapshot:
        configured = configured_thresholds()
        measured = self._recall() or self.measured()
        rate = measured.total
        budget = BUDGET_SECONDS[Lane.NORMAL]
        thresholds = configured if rate is None else configured.within(rate * budget)
        depth = counts.total + self._under_way
        stale = not self._step(depth, thresholds)
        return Snapshot(
            depth=depth,
            lanes=counts.depth,
            drain_rate=measured.drained,
            delays=rates.delays(tuple(Lane), depths=counts.depth, drain_rate=rate, arrivals=measured.arrived),
            arrivals=sum(value or 0.0 for value in measured.arrived.values()),
            total_drain_rate=rate,
            thresholds=thresholds,
            configured=configured,
            circuit=self._circuit,
            stale=stale,
            enabled=settings.ENABLE_BACKPRESSURE,
            memory_full=counts.memory_full,
            organizations=counts.organizations if depth >= thresholds.warning else {},
            hold=self._circuit.held(datetime.now(UTC)),
        )

    def _step(self, depth: int, thresholds: Thresholds) -> bool:
        """Takes the circuit one step on if the depth calls for it; False when the database is away and nothing moves."""
        try:
            self._circuit = circuit_store.load()
            if self._circuit.held(datetime.now(UTC)):
                return True
            self._samples = self._samples.seen(depth, thresholds=thresholds, now=self._taken_at)
            to, reason = circuit.next_state(
                self._circuit.state,
                depth,
                thresholds=thresholds,
                samples=self._samples,
                now=self._taken_at,
                since=self._taken_at - _seconds_since(self._circuit.changed_at),
            )
            if to != self._circuit.state:
                if circuit_store.move(self._circuit, to, reason, queue_depth=depth):
                    log.warning("circuit %s -> %s at %d events: %s", self._circuit.state, to, depth, reason)
                self._circuit = circuit_store.load()
        except DatabaseError as error:
            self._log.log(
                "database",
                logging.WARNING,
                "the circuit stays %s, the database is away: %s",
                self._circuit.state,
                error,
            )
            return False
        return True

    def _warn(self, now: Snapshot) -> None:
        if now.depth >= now.thresholds.warning and self._log.is_due("depth"):
            self._log.log(
                "depth",
                logging.WARNING,
                "the queue holds %d events, warning is at %d",
                now.depth,
                now.thresholds.warning,
            )


def advance_circuit() -> None:
    """Lets the circuit move on while nobody sends anything, and tells all processes the rates: called by the scheduler, every
    second. Raises RedisError."""
    try:
        shared().snapshot()
        shared_rates.publish(shared().measured())
    except Overloaded as refusal:
        log.warning("the circuit is not watched: %s", refusal.detail)


def configured_thresholds() -> Thresholds:
    return Thresholds(
        recovery=settings.QUEUE_RECOVERY_THRESHOLD,
        warning=settings.QUEUE_WARNING_THRESHOLD,
        critical=settings.QUEUE_CRITICAL_THRESHOLD,
    )


@per_process
def shared() -> Admission:
    """The admission of this process."""
    return Admission()


def unavailable(error: RedisError) -> Overloaded:
    """Redis is away: refuse, and say so."""
    wait = rates.retry_after(0, drain_rate=None, arrivals=0.0, budget_seconds=0.0)
    return Overloaded(
        f"Events cannot be stored: {redis.explain(error)}.", reason=Reason.ENQUEUE_ERROR, retry_after=wait
    )


def refusal_text(verdict: Verdict, now: Snapshot | None = None) -> tuple[type[Overloaded], str]:
    """One sentence that says why, with the numbers and where the limit comes from."""
    if verdict.reason == Reason.ORGANIZATION:
        text = f"The organization holds {verdict.queue_depth} events of the queue, its share is {verdict.threshold}."
        return OverLimit, text
    if now and now.hold and verdict.reason == Reason.HELD:
        return Overloaded, f"{now.hold}; only urgent events are accepted."
    if now and now.memory_full:
        return Overloaded, "The memory of Redis is nearly full; nothing is accepted until it has room."
    text = f"The queue holds {verdict.queue_depth} events, the limit is {verdict.threshold}"
    if now and now.limited_by_drain_rate and now.total_drain_rate is not None and verdict.reason != Reason.HARD_LIMIT:
        text += (
            f": workers finish {now.total_drain_rate:.3g} events a second, and nothing should wait for more than "
            f"{BUDGET_SECONDS[Lane.NORMAL]:g} s (configured: {now.configured.critical})"
        )
    return Overloaded, f"{text}."


def _seconds_of(hold: Hold, *, at_least: int) -> int:
    longest = rates.RETRY_AFTER_SECONDS[1]
    if hold.until is None:
        return longest
    return max(at_least, min(longest, math.ceil((hold.until - datetime.now(UTC)).total_seconds())))


def _seconds_since(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()
