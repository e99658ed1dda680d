"""Operators on age: a reference, a value and a duration in, one closure out that looks at when a sample was taken.

The age of a sample is the time since it was taken, as the run's `clock_us` says. Whether a source is silent is asked of when
it was heard: a clock that is slow makes no living sensor silent.
"""

from __future__ import annotations

from typing import Any

from rules.engine.comparisons import Evaluate, Make, equality
from rules.engine.context import Scope
from rules.engine.values import Reference


def reached(scope: Scope, reference: Reference, at_us: int, *, now_us: int) -> bool:
    """Whether it is this time, or after it; if not, the chain is to run again then, event or none."""
    if now_us >= at_us:
        return True
    scope.wake(reference, at_us)
    return False


def older(reference: Reference, _operand: None, duration_us: int) -> Evaluate:
    def evaluate(scope: Scope) -> bool:
        sample = scope.read(reference)
        return sample is None or reached(scope, reference, sample.heard_us + duration_us, now_us=scope.clock_us)

    return evaluate


def newer(reference: Reference, _operand: None, duration_us: int) -> Evaluate:
    def evaluate(scope: Scope) -> bool:
        sample = scope.read(reference)
        if sample is None:
            scope.missing.append(reference)
            return False
        return scope.clock_us < sample.timestamp_us + duration_us

    return evaluate


def in_last(reference: Reference, _operand: None, duration_us: int) -> Evaluate:
    return newer(reference, None, duration_us + 1)


def with_value(age: Make) -> Make:
    """Make leaves that ask for the age only of the value that is looked for."""

    def make(reference: Reference, operand: Any, duration_us: int) -> Evaluate:
        equal, of_age = equality(wanted=True)(reference, operand, 0), age(reference, None, duration_us)
        return lambda scope: equal(scope) and of_age(scope)

    return make


value_older, value_newer, value_in_last = with_value(older), with_value(newer), with_value(in_last)
