"""Operators: a reference and the configured value in, one closure out that compares what a run reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from rules.configuration import Check, is_number, not_a_number, not_a_range, not_a_scalar
from rules.scope import Reference, Scope

Evaluate = Callable[[Scope], bool]

# Each factory below makes the whole closure of a leaf, without a shared wrapper around a smaller test,
# because that second call is a fifth of the cost of a comparison. A source without a value (never seen, or null)
# is missing: the leaf is false whatever the operator says, != included.


class Operator(NamedTuple):
    """What an operator accepts as `value`, and how its leaf is made from a reference and that value."""

    check: Check
    make: Callable[[Reference, Any], Evaluate]


def _ordering(compare: Callable[[Any, Any], bool]) -> Operator:
    """> >= < <=: numbers only, int and float alike and exact at any size.

    Text and bools are neither above nor below a number, so every ordering is false for them (also "7" > 6.5), and
    it is false for NaN.
    """

    def make(reference: Reference, operand: float) -> Evaluate:
        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (value := sample.value) is None:
                scope.missing.append(reference)
                return False
            return (type(value) is float or type(value) is int) and compare(value, operand)

        return evaluate

    return Operator(not_a_number, make)


def _equality(wanted: bool) -> Operator:
    """== (wanted) and != (not wanted): numbers, text (case-sensitive) and bools.

    Values of different kinds are never equal (1 and true, 6.5 and "6.5"), while 6 and 6.0 are; NaN equals nothing.
    For every value that is present, exactly one of == and != is true.
    """

    def make(reference: Reference, operand: float | str | bool) -> Evaluate:
        kinds = (int, float) if is_number(operand) else (type(operand),)

        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (value := sample.value) is None:
                scope.missing.append(reference)
                return False
            return (type(value) in kinds and value == operand) is wanted

        return evaluate

    return Operator(not_a_scalar, make)


def _between() -> Operator:
    """Between [low, high]: numbers only, both ends included; text, bools and NaN are in no range."""

    def make(reference: Reference, operand: list[float]) -> Evaluate:
        low, high = operand

        def evaluate(scope: Scope) -> bool:
            sample = scope.read(reference)
            if sample is None or (value := sample.value) is None:
                scope.missing.append(reference)
                return False
            return (type(value) is float or type(value) is int) and low <= value <= high

        return evaluate

    return Operator(not_a_range, make)


OPERATORS: dict[str, Operator] = {
    ">": _ordering(operator.gt),
    ">=": _ordering(operator.ge),
    "<": _ordering(operator.lt),
    "<=": _ordering(operator.le),
    "==": _equality(wanted=True),
    "!=": _equality(wanted=False),
    "between": _between(),
}
