"""From the JSON of a transform to a `Transform`, which changes one value of a run's own copy of the event."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from rules.configuration import LARGEST, Check, Fields, not_a_name, not_a_number, one_of
from rules.exceptions import ChainFailed, InvalidChain, Problem
from rules.scope import Value

KEYS = ("operation", "key", "value", "target")


class Transform(NamedTuple):
    """A compiled transform: `apply(values)` sets `target` to what it computes from `key`, or raises ChainFailed."""

    apply: Callable[[dict[str, Value]], None]
    key: str
    target: str


class Operation(NamedTuple):
    """What an operation accepts as `value`, and the arithmetic on (event's value, configured value)."""

    check: Check
    compute: Callable[[Any, Any], Any]


def _not_a_divisor(value: object) -> str | None:
    return not_a_number(value) or (None if value else "must not be zero")


OPERATIONS: dict[str, Operation] = {
    "add": Operation(not_a_number, operator.add),
    "subtract": Operation(not_a_number, operator.sub),
    "multiply": Operation(not_a_number, operator.mul),
    "divide": Operation(_not_a_divisor, operator.truediv),
}


def compile_transform(config: object, *, chain_uuid: str, node: str, path: str) -> Transform:
    """Compile `{"operation", "key", "value", "target"?}`; without a target the key itself is overwritten.

    Integers stay exact under add, subtract and multiply; divide always gives a float.
    Raises InvalidChain with every problem of the object.
    """
    problems: list[Problem] = []
    fields = Fields(config, path=path, problems=problems)
    fields.only(KEYS)
    name = fields.get("operation", one_of(OPERATIONS))
    key = fields.get("key", not_a_name)
    operand = fields.get("value", OPERATIONS[name].check if name else not_a_number)
    target = fields.get("target", not_a_name) if "target" in fields else key
    if problems:
        raise InvalidChain(problems)

    compute = OPERATIONS[name].compute

    def apply(values: dict[str, Value]) -> None:
        value = values.get(key)
        # The range is checked first, so that no integer is too large to become a float in the arithmetic.
        if not ((type(value) is float or type(value) is int) and -LARGEST <= value <= LARGEST):
            raise ChainFailed(chain_uuid, node, _unusable(key, value))
        result = compute(value, operand)
        if not -LARGEST <= result <= LARGEST:
            raise ChainFailed(chain_uuid, node, f"{name} on {key!r} gives a result too large for a number")
        values[target] = result

    return Transform(apply, key, target)


def _unusable(key: str, value: Value) -> str:
    """Say why the event's value cannot be computed with."""
    if value is None:
        return f"the event has no value for {key!r}"
    if isinstance(value, str | bool):
        return f"the value of {key!r} is not a number"
    return f"the value of {key!r} is not a finite number"
