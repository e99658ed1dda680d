"""What conditions over time remember: readings one by one in, small JSON out, from which they decide.

Each kind is a function that observes and one that decides. To observe a reading a second time changes nothing, and a reading
that comes late can make a condition true later, never sooner. Times are microseconds since 1970; 0 stands for never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


GROWTH_STEPS = 100
"""Into so many parts the time of an increase is divided at most: what is remembered is small, whatever comes in."""


def observing_growth(within_us: int) -> Observe:
    """Remember how a counter grew: `[newest number, [[time, grown since the first], ...]]`, a restart being no fall.

    Late readings and what is no number are passed over.
    """
    shortest_us = within_us // GROWTH_STEPS

    def observe(remembered: Any, sample: Sample) -> list[Any]:
        value, at = sample.value, sample.timestamp_us
        newest, points = remembered or [None, []]
        if not _usable(value) or (points and at <= points[-1][0]):
            return [newest, points]
        if not points:
            return [value, [[at, 0.0]]]
        grown = points[-1][1] + (value - newest if value >= newest else max(value, 0))
        points = [*points, [at, min(grown, LARGEST)]]
        if len(points) > 2 and at - points[-3][0] < shortest_us:
            del points[-2]
        # One is kept from before that time: from it on the growth is counted.
        while len(points) > 1 and points[1][0] <= at - within_us:
            del points[0]
        return [value, points]

    return observe


def growing(on: Test, within_us: int) -> Decide:
    """True when the growth in that time, up to the newest reading or, if that is later, the run, passes the test."""

    def decide(remembered: Any, now_us: int) -> bool:
        points: list[list[Any]] = remembered[1]
        if not points:
            return False
        begins = max(points[-1][0], now_us) - within_us
        return on(Sample(points[-1][1] - _grown_until(begins, points), points[-1][0]))

    return decide


def _grown_until(at_us: int, points: Sequence[Sequence[Any]]) -> float:
    """Between two readings a counter is taken to have grown evenly."""
    after = next((place for place, (at, _) in enumerate(points) if at > at_us), len(points))
    if after in (0, len(points)):
        return float(points[0 if after == 0 else -1][1])
    (earlier, before), (later, grown) = points[after - 1], points[after]
    return float(before + (grown - before) * (at_us - earlier) / (later - earlier))


def observing_newest(count: int) -> Observe:
    """Remember the newest numbers: `[[time, number], ...]`. Late readings and what is no number are passed over."""

    def observe(remembered: Any, sample: Sample) -> list[list[Any]]:
        newest: list[list[Any]] = remembered or []
        if not _usable(sample.value) or (newest and sample.timestamp_us <= newest[-1][0]):
            return newest
        return [*newest, [sample.timestamp_us, sample.value]][-count:]

    return observe


def in_the_middle(on: Test, count: int) -> Decide:
    """True when the one in the middle of so many passes the test."""

    def decide(remembered: Any, _now_us: int) -> bool:
        if len(remembered) < count:
            return False
        return on(Sample(sorted(number for _, number in remembered)[count // 2], remembered[-1][0]))

    return decide


def _usable(value: Value) -> TypeGuard[float]:
    return is_number(value) and -LARGEST <= value <= LARGEST
