"""From the JSON of a filter to a `Condition`: the references it reads and one closure that decides."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from rules.exceptions import InvalidChain, Problem

__all__ = ["Condition", "Lookup", "Problem", "Reference", "Sample", "Value", "compile_condition"]

Value = float | int | str | bool | None

MAX_DEPTH = 20
"""Groups that may stand inside one another, so that neither compiling nor evaluating can exhaust the stack."""

MAX_LEAVES = 1_000
"""Comparisons in one filter."""

LARGEST = sys.float_info.max
"""The largest double, about 1.8e308; integers go on beyond it, and other JSON readers take those for infinity."""

SOURCE_TYPES = ("sensor", "device")
LEAF_KEYS = ("sourceType", "UUID", "key", "operator", "value")
GROUP_KEYS = ("type", "expressions")

_UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Reference(NamedTuple):
    """One variable of one source; `source_type` is sensor or device, `uuid` a lower-case version 4 UUID."""

    source_type: str
    uuid: str
    key: str


class Sample(NamedTuple):
    """A value and when it was taken, in microseconds since 1970 (UTC)."""

    value: Value
    timestamp_us: int


Lookup = Callable[[Reference], Sample | None]
Evaluate = Callable[[Lookup, list[Reference]], bool]
Check = Callable[[object], str | None]
"""Says what is wrong with a configured value, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A compiled filter.

    `evaluate(lookup, missing)` asks `lookup` for one reference at a time, left to right, only as far as AND and OR
    need it, and appends to `missing` every reference that has no value. It raises nothing of its own.
    """

    references: frozenset[Reference]
    evaluate: Evaluate


def compile_condition(config: object, *, path: str) -> Condition:
    """Compile a leaf or a group of leaves and groups; `path` is where `config` stands in the chain.

    Raises InvalidChain with every problem of the tree.
    """
    tree = _Tree()
    evaluate = tree.expression(config, path=path, depth=0)
    if tree.problems:
        raise InvalidChain(tree.problems)
    return Condition(references=frozenset(tree.references), evaluate=evaluate)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or a float; True and False are not numbers, nor is the text "6.5"."""
    return type(value) is int or type(value) is float


def not_a_number(value: object) -> str | None:
    """Refuse what is not a number that a double can hold: NaN, the infinities and integers beyond 1.8e308 too."""
    if not is_number(value):
        return "must be a number"
    return None if -LARGEST <= value <= LARGEST else "must be a finite number"


def not_a_scalar(value: object) -> str | None:
    """Refuse what is neither text nor a bool nor a finite number."""
    if isinstance(value, str | bool):
        return None
    return None if not_a_number(value) is None else "must be a finite number, text, true or false"


def not_a_range(value: object) -> str | None:
    """Refuse what is not `[low, high]`, two finite numbers in ascending order."""
    if not isinstance(value, list) or len(value) != 2 or any(not_a_number(end) for end in value):
        return "must be [low, high], two finite numbers"
    return None if value[0] <= value[1] else "must be [low, high] with low not above high"


def not_a_name(value: object) -> str | None:
    """Refuse text that nobody can see is wrong: empty, with blanks around it, with characters that do not print."""
    if not isinstance(value, str) or not value:
        return "must be non-empty text"
    return None if value == value.strip() and value.isprintable() else "must be printable text without blanks around it"


def not_a_uuid(value: object) -> str | None:
    """Refuse what is not a version 4 UUID in its hyphenated form; upper case passes."""
    return None if isinstance(value, str) and _UUID4.fullmatch(value.lower()) else "must be a version 4 UUID"


def one_of(allowed: Iterable[str]) -> Check:
    """Make a check that accepts exactly the texts in `allowed`."""
    choices = tuple(allowed)
    complaint = f"must be one of {', '.join(choices)}"
    return lambda value: None if isinstance(value, str) and value in choices else complaint


class Fields:
    """One JSON object of a configuration, read field by field; what is wrong with it is added to `problems`."""

    def __init__(self, config: object, *, path: str, problems: list[Problem]) -> None:
        self._config: Mapping[str, object] | None = config if isinstance(config, Mapping) else None
        self._path = path
        self._problems = problems
        if self._config is None:
            problems.append(Problem(path, config, "must be an object"))

    def __contains__(self, key: str) -> bool:
        return self._config is not None and key in self._config

    def only(self, keys: tuple[str, ...]) -> None:
        """Refuse every other key: a misspelt one that is passed over is a rule that silently does not do its work."""
        for key in self._config or ():
            if key not in keys:
                self.refuse(key, f"unknown key; known here: {', '.join(keys)}")

    def get(self, key: str, check: Check) -> Any:
        """Return the value of a required key, or None with a problem noted if it is absent or `check` refuses it."""
        if self._config is None:
            return None
        if key not in self._config:
            return self.refuse(key, "is required")
        if (complaint := check(self._config[key])) is not None:
            return self.refuse(key, complaint)
        return self._config[key]

    def refuse(self, key: str, message: str) -> None:
        """Note a problem with one key."""
        found = None if self._config is None else self._config.get(key)
        self._problems.append(Problem(f"{self._path}.{key}", found, message))


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
        def evaluate(lookup: Lookup, missing: list[Reference]) -> bool:
            sample = lookup(reference)
            if sample is None or (value := sample.value) is None:
                missing.append(reference)
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

        def evaluate(lookup: Lookup, missing: list[Reference]) -> bool:
            sample = lookup(reference)
            if sample is None or (value := sample.value) is None:
                missing.append(reference)
                return False
            return (type(value) in kinds and value == operand) is wanted

        return evaluate

    return Operator(not_a_scalar, make)


def _between() -> Operator:
    """Between [low, high]: numbers only, both ends included; text, bools and NaN are in no range."""

    def make(reference: Reference, operand: list[float]) -> Evaluate:
        low, high = operand

        def evaluate(lookup: Lookup, missing: list[Reference]) -> bool:
            sample = lookup(reference)
            if sample is None or (value := sample.value) is None:
                missing.append(reference)
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


def _all(parts: tuple[Evaluate, ...]) -> Evaluate:
    def evaluate(lookup: Lookup, missing: list[Reference]) -> bool:
        for part in parts:  # noqa: SIM110 - all() over a generator takes twice as long
            if not part(lookup, missing):
                return False
        return True

    return evaluate


def _any(parts: tuple[Evaluate, ...]) -> Evaluate:
    def evaluate(lookup: Lookup, missing: list[Reference]) -> bool:
        for part in parts:  # noqa: SIM110 - any() over a generator takes twice as long
            if part(lookup, missing):
                return True
        return False

    return evaluate


GROUPS: dict[str, Callable[[tuple[Evaluate, ...]], Evaluate]] = {"AND": _all, "OR": _any}


def _is_group(config: object) -> bool:
    """Whether a person meant a group; a leaf with a stray `type` is a leaf, a group that misses a key is a group."""
    if not isinstance(config, Mapping):
        return False
    return "expressions" in config or ("type" in config and not any(key in config for key in LEAF_KEYS))


class _Tree:
    """One filter while it is compiled: what it reads, how many leaves it has, what is wrong with it."""

    def __init__(self) -> None:
        self.references: set[Reference] = set()
        self.problems: list[Problem] = []
        self._leaves = 0

    def expression(self, config: object, *, path: str, depth: int) -> Evaluate:
        """Compile one leaf or group that has `depth` groups around it; a broken one becomes a closure nobody calls."""
        if _is_group(config):
            if depth < MAX_DEPTH:
                return self._group(config, path=path, depth=depth + 1)
            self.problems.append(Problem(path, config, f"is nested deeper than {MAX_DEPTH} groups"))
            return _never
        self._leaves += 1
        if self._leaves <= MAX_LEAVES:
            return self._leaf(config, path=path)
        if self._leaves == MAX_LEAVES + 1:
            self.problems.append(Problem(path, config, f"is one more than the {MAX_LEAVES} leaves a filter may have"))
        return _never

    def _group(self, config: object, *, path: str, depth: int) -> Evaluate:
        fields = Fields(config, path=path, problems=self.problems)
        fields.only(GROUP_KEYS)
        kind = fields.get("type", one_of(GROUPS))
        expressions = fields.get("expressions", _not_expressions) or []
        parts = tuple(
            self.expression(part, path=f"{path}.expressions[{position}]", depth=depth)
            for position, part in enumerate(expressions)
        )
        if len(parts) == 1:
            return parts[0]
        return GROUPS[kind](parts) if kind else _never

    def _leaf(self, config: object, *, path: str) -> Evaluate:
        before = len(self.problems)
        fields = Fields(config, path=path, problems=self.problems)
        fields.only(LEAF_KEYS)
        source_type = fields.get("sourceType", one_of(SOURCE_TYPES))
        uuid = fields.get("UUID", not_a_uuid)
        key = fields.get("key", not_a_name)
        symbol = fields.get("operator", one_of(OPERATORS))
        operand = fields.get("value", OPERATORS[symbol].check) if symbol else None
        if len(self.problems) > before:
            return _never
        reference = Reference(source_type, uuid.lower(), key)
        self.references.add(reference)
        return OPERATORS[symbol].make(reference, operand)


def _not_expressions(value: object) -> str | None:
    return None if isinstance(value, list) and value else "must be a non-empty list"


def _never(_lookup: Lookup, _missing: list[Reference]) -> bool:
    return False
