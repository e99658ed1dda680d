"""From the JSON of a transform to a `Transform`, which changes one value of a run's own copy of the event.

{"operation": "add", "key": "ph", "value": 0.2}                     also subtract, multiply, divide
{"operation": "scale", "key": "raw", "factor": 0.1, "offset": -5}   raw * factor + offset
{"operation": "rename", "key": "t", "target": "temperature"}
{"operation": "set", "target": "limit", "value": 6.5}
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

from rules.engine.exceptions import ChainFailed, InvalidChain, Problem
from rules.engine.fields import LARGEST, Check, Fields, check_name, check_number, check_scalar, is_number, one_of
from rules.engine.values import Value

Number = float | int
Compute = Callable[[Number], Number]


class Transform(NamedTuple):
    """A compiled transform: `apply(values)` sets `target` to what it makes of `key`, or raises ChainFailed.

    `key` is None where the result does not depend on the event.
    """

    apply: Callable[[dict[str, Value]], None]
    key: str | None
    target: str


class Failing(NamedTuple):
    """Where a transform stands, for the errors that it raises."""

    chain_uuid: str
    node: str

    def __call__(self, cause: str) -> ChainFailed:
        return ChainFailed(self.chain_uuid, self.node, cause)


def compile_transform(config: object, *, chain_uuid: str, node: str, path: str) -> Transform:
    """Compile the transform that `config["operation"]` names; raises InvalidChain with every problem of the object."""
    problems: list[Problem] = []
    fields = Fields(config, path=path, problems=problems)
    # The rest is judged all the same, as an arithmetic: whoever misspelt the operation hears of everything at once.
    name = fields.get("operation", one_of(OPERATIONS)) or "add"
    transform = OPERATIONS[name](fields, name, Failing(chain_uuid, node))
    if problems:
        raise InvalidChain(problems)
    return transform


def _not_a_divisor(value: object) -> str | None:
    return check_number(value) or (None if value else "must not be zero")


_ARITHMETIC: dict[str, Callable[[Number, Number], Number]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
}


def _arithmetic(fields: Fields, name: str, failing: Failing) -> Transform:
    """`{"operation", "key", "value", "target"?}`. Integers stay exact, except that divide always gives a float."""
    fields.only(("operation", "key", "value", "target"))
    key = fields.get("key", check_name)
    check: Check = _not_a_divisor if name == "divide" else check_number
    operand = fields.get("value", check)
    compute = _ARITHMETIC[name]
    return _computing(lambda value: compute(value, operand), key, _target(fields, key), name, failing)


def _scale(fields: Fields, name: str, failing: Failing) -> Transform:
    """`{"operation", "key", "factor", "offset"?, "target"?}`: key * factor + offset."""
    fields.only(("operation", "key", "factor", "offset", "target"))
    key = fields.get("key", check_name)
    factor = fields.get("factor", check_number)
    offset = fields.get("offset", check_number) if "offset" in fields else 0
    return _computing(lambda value: value * factor + offset, key, _target(fields, key), name, failing)


def _rename(fields: Fields, name: str, failing: Failing) -> Transform:
    """`{"operation", "key", "target"}`: the value of key, of any kind, is called target from there on."""
    fields.only(("operation", "key", "target"))
    key, target = fields.get("key", check_name), fields.get("target", check_name)
    if key is not None and key == target:
        fields.refuse("target", "is the name that it has already")

    def apply(values: dict[str, Value]) -> None:
        if values.get(key) is None:
            raise failing(_unusable(key, None))
        values[target] = values.pop(key)

    return Transform(apply, key, target)


def _set(fields: Fields, name: str, failing: Failing) -> Transform:
    """`{"operation", "target", "value"}`: target has this value from there on, whatever the event says."""
    fields.only(("operation", "target", "value"))
    target, value = fields.get("target", check_name), fields.get("value", check_scalar)

    def apply(values: dict[str, Value]) -> None:
        values[target] = value

    return Transform(apply, None, target)


def _target(fields: Fields, key: str) -> str:
    """Without a target the key itself is overwritten."""
    target: str = fields.get("target", check_name) if "target" in fields else key
    return target


def _computing(compute: Compute, key: str, target: str, name: str, failing: Failing) -> Transform:
    def apply(values: dict[str, Value]) -> None:
        value = values.get(key)
        # The range is checked first, so that no integer is too large to become a float in the arithmetic.
        if not (is_number(value) and -LARGEST <= value <= LARGEST):
            raise failing(_unusable(key, value))
        try:
            result = compute(value)
        except OverflowError:  # a product of integers beyond the range of floats meets a float
            result = LARGEST * 2
        if not -LARGEST <= result <= LARGEST:
            raise failing(f"{name} on {key!r} gives a result too large for a number")
        values[target] = result

    return Transform(apply, key, target)


def _unusable(key: str, value: Value) -> str:
    """Say why the event's value cannot be computed with."""
    if value is None:
        return f"the event has no value for {key!r}"
    if isinstance(value, str | bool):
        return f"the value of {key!r} is not a number"
    return f"the value of {key!r} is not a finite number"


OPERATIONS: dict[str, Callable[[Fields, str, Failing], Transform]] = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    "scale": _scale,
    "rename": _rename,
    "set": _set,
}
