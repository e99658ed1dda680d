"""What comparisons make of a value: a reference and an operand in, one closure out that compares what a run reads.

A source without a value (never seen, or null) leaves a comparison false, whatever it asks for, != included, and is noted as
missing. The exceptions, which ask for the absence itself, are `absent` and `empty`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rules.engine.context import Scope
from rules.engine.fields import is_number
from rules.engine.patterns import searching
from rules.engine.values import Reference, Value

Evaluate = Callable[[Scope], bool]
Make = Callable[[Reference, Any, int], Evaluate]
"""Makes the closure of a leaf from its reference, its value and its duration in microseconds."""

Judge = Callable[[Any], Callable[[Any], bool]]
"""From an operand to a test of values that are present."""

# ordering, equality and between make the whole closure themselves, without the shared wrapper around a smaller test that the
# other comparisons have, because that second call is a fifth of the cost of the comparisons that nearly every rule is made of.


def ordering(compare: Callable[[Any, Any], bool]) -> Make:
    def make(reference: Reference, operand: float, _duration_us: int) -> Evaluate:
        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (value := sample.value) is None:
                scope.missing.append(reference)
                return False
            return (type(value) is float or type(value) is int) and compare(value, operand)

        return evaluate

    return make


def equality(wanted: bool) -> Make:
    def make(reference: Reference, operand: float | str | bool, _duration_us: int) -> Evaluate:
        kinds = kinds_like(operand)

        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (value := sample.value) is None:
                scope.missing.append(reference)
                return False
            return (type(value) in kinds and value == operand) is wanted

        return evaluate

    return make


def between(reference: Reference, operand: list[float], _duration_us: int) -> Evaluate:
    low, high = operand

    def evaluate(scope: Scope) -> bool:
        sample = scope.read(reference)
        if sample is None or (value := sample.value) is None:
            scope.missing.append(reference)
            return False
        return (type(value) is float or type(value) is int) and low <= value <= high

    return evaluate


def judging(judge: Judge, *, wanted: bool = True) -> Make:
    """Make leaves of a test; where false is wanted, of its opposite, so that of the two one is true for every value."""

    def make(reference: Reference, operand: Any, _duration_us: int) -> Evaluate:
        holds = judge(operand)

        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (value := sample.value) is None:
                scope.missing.append(reference)
                return False
            return holds(value) is wanted

        return evaluate

    return make


def suspicious(*, wanted: bool) -> Make:
    """Make leaves that ask whether the newest value is believed, whatever it is."""

    def make(reference: Reference, _operand: None, _duration_us: int) -> Evaluate:
        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (sample.value is None and not sample.suspicion):
                scope.missing.append(reference)
                return False
            return bool(sample.suspicion) is wanted

        return evaluate

    return make


def absent(reference: Reference, _operand: None, _duration_us: int) -> Evaluate:
    def evaluate(scope: Scope) -> bool:
        sample = scope.read(reference)
        return sample is None or sample.value is None

    return evaluate


def empty(reference: Reference, _operand: None, _duration_us: int) -> Evaluate:
    def evaluate(scope: Scope) -> bool:
        sample = scope.read(reference)
        return sample is None or sample.value is None or sample.value == ""

    return evaluate


def present(_operand: None) -> Callable[[Value], bool]:
    return lambda _value: True


def not_empty(_operand: None) -> Callable[[Value], bool]:
    return lambda value: value != ""


def kind(*kinds: type) -> Judge:
    """Of these types exactly (a bool is no int); what equals nothing, not even itself, is NaN and no number."""
    return lambda _operand: lambda value: type(value) in kinds and value == value  # noqa: PLR0124


def kinds_like(operand: float | str | bool) -> tuple[type, ...]:
    """The types of values that can equal an operand: numbers equal numbers, text text, and bools bools."""
    return (int, float) if is_number(operand) else (type(operand),)


def one_of_them(operand: list[float | str | bool]) -> Callable[[Value], bool]:
    entries = {(type(entry) is bool, entry) for entry in operand}
    return lambda value: (type(value) is bool, value) in entries


def contains(operand: str) -> Callable[[Value], bool]:
    return lambda value: isinstance(value, str) and operand in value


def starts_with(operand: str) -> Callable[[Value], bool]:
    return lambda value: isinstance(value, str) and value.startswith(operand)


def ends_with(operand: str) -> Callable[[Value], bool]:
    return lambda value: isinstance(value, str) and value.endswith(operand)


def matches(operand: str) -> Callable[[Value], bool]:
    holds = searching(operand)
    return lambda value: isinstance(value, str) and holds(value)


def has_all(operand: list[str]) -> Callable[[Value], bool]:
    wanted = frozenset(operand)
    return lambda value: wanted <= items(value)


def has_any(operand: list[str]) -> Callable[[Value], bool]:
    wanted = frozenset(operand)
    return lambda value: not wanted.isdisjoint(items(value))


def items(value: Value) -> frozenset[str]:
    """The items of a text that lists them with commas between; anything else has none."""
    return frozenset(item.strip() for item in value.split(",")) if isinstance(value, str) else frozenset()
