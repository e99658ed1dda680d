"""What conditions over time remember: readings one by one in, small JSON out, from which they decide.

Each kind is a function that observes and one that decides. To observe a reading a second time changes nothing, and a reading
that comes late can make a condition true later, never sooner. Times are microseconds since 1970; 0 stands for never.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from rules.engine.comparisons import Evaluate
from rules.engine.context import Scope
from rules.engine.durations import SECOND_US
from rules.engine.fields import LARGEST, is_number
from rules.engine.values import Reference, Sample, Value

Observe = Callable[[Any, Sample], Any]
Test = Callable[[Sample], bool]
Decide = Callable[[Any, int], bool]
"""From what is remembered and the run's time to an answer."""

SHORTEST_STEP_US = SECOND_US
"""Between two readings that give a rate of change: over less, noise looks like a landslide."""


def alone(leaf: Evaluate) -> Test:
    """Make a test of single samples from a leaf, so that a comparison means over time what it means at once."""
    held: list[Sample] = []
    # One for all samples: to make it takes longer than to compare.
    scope = Scope(lambda _reference: held[0], 0)

    def test(sample: Sample) -> bool:
        held[:] = (sample,)
        scope.now_us = sample.timestamp_us
        if scope.missing or scope.wakes:
            scope.missing, scope.wakes = [], {}
        return leaf(scope)

    return test


def deciding(key: str, reference: Reference, decide: Decide) -> Evaluate:
    """Make the closure of a leaf that decides from what is remembered under `key`; a source without a value is missing."""

    def evaluate(scope: Scope) -> bool:
        sample = scope.read(reference)
        if sample is None or sample.value is None:
            scope.missing.append(reference)
            return False
        remembered = scope.memory.get(key)
        return remembered is not None and decide(remembered, scope.now_us)

    return evaluate


def observing_hold(on: Test, off: Test) -> Observe:
    """Remember how long a comparison has held: `[since, newest on, newest off, newest]`, since 0 while it does not.

    A reading that is neither on nor off leaves it as it was. What matters is the order of the readings' own times. A late off
    that falls into the time held so far makes that begin anew at the newest on, because when it began is not known any more.
    """

    def observe(remembered: Any, sample: Sample) -> list[int]:
        since, newest_on, newest_off, newest = remembered or (0, 0, 0, 0)
        at = sample.timestamp_us
        if on(sample):
            newest_on = max(newest_on, at)
            if not since and at > newest_off:
                since = at
        elif at > newest_off and off(sample):
            newest_off = at
            if since <= at:
                since = newest_on if newest_on > at else 0
        return [since, newest_on, newest_off, max(newest, at)]

    return observe


def holding(for_us: int) -> Decide:
    """True when readings from a first to the newest, at least `for_us` later, all said so.

    The run's time does not count: when a sensor falls silent, nothing turns true, and a late reading undoes nothing.
    """

    def decide(remembered: Any, _now_us: int) -> bool:
        since: int = remembered[0]
        newest: int = remembered[3]
        return since > 0 and newest - since >= for_us

    return decide


def observing_hits(on: Test, times: int) -> Observe:
    """Remember when a comparison was true, the newest `times` of them: `[newest reading, [hit, ...]]`, hits ascending."""

    def observe(remembered: Any, sample: Sample) -> list[Any]:
        newest, hits = remembered or (0, [])
        at = sample.timestamp_us
        if on(sample):
            hits = sorted({*hits, at})[-times:]
        return [max(newest, at), hits]

    return observe


def counting(times: int, within_us: int) -> Decide:
    """True when there are `times` hits in the time up to the newest reading or, if that is later, the run."""

    def decide(remembered: Any, now_us: int) -> bool:
        newest: int = remembered[0]
        hits: list[int] = remembered[1]
        return len(hits) >= times and hits[-times] >= max(newest, now_us) - within_us

    return decide


def observe_steps(remembered: Any, sample: Sample) -> list[list[Any]]:
    """Remember the two newest readings that are at least SHORTEST_STEP_US apart: `[[time, number], [time, number]]`.

    Late readings are passed over. After a value that is no number, of which only the time is kept, it begins anew.
    """
    steps: list[list[Any]] = remembered or []
    value, at = sample.value, sample.timestamp_us
    if steps and at <= steps[-1][0]:
        return steps
    if not _usable(value):
        return [[at, None]]
    if not steps or steps[-1][1] is None:
        return [[at, float(value)]]
    return steps if at - steps[-1][0] < SHORTEST_STEP_US else [steps[-1], [at, float(value)]]


def changing(on: Test, per_us: int) -> Decide:
    """True when the change from reading to reading, brought to `per_us`, passes the test."""

    def decide(remembered: Any, _now_us: int) -> bool:
        if len(remembered) < 2:
            return False
        (before_us, before), (after_us, after) = remembered
        return on(Sample((after - before) * per_us / (after_us - before_us), after_us))

    return decide


def _usable(value: Value) -> TypeGuard[float]:
    return is_number(value) and -LARGEST <= value <= LARGEST
