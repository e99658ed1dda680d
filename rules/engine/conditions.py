"""From the JSON of a filter to a `Condition`: the references it reads and one closure that decides.

A filter is a leaf or a group `{"type": "AND" | "OR", "expressions": [leaf or group, ...]}`. A leaf:

    {"sourceType": "sensor", "UUID": "...", "key": "ph", "operator": ">", "value": 6.5}

    sourceType  "sensor" or "device"
    UUID        of the sensor or device, version 4
    key         a variable of the sensor, a state of the device
    operator    one of rules.engine.operators.OPERATORS
    value       what the operator compares with; not for isNull and its like, nor for olderThan, newerThan and inLast
    duration    10s, 5m, 2h, 1d; for olderThan, newerThan, inLast, valueOlderThan, valueNewerThan and valueInLast

and, where the operator compares values (Operator.compares), keys of conditions over time, see rules.engine.temporal:

    for              a duration: true for that long without interruption
    times, within    a whole number and a duration: true that often within that time; sensors only
    releaseAt        a number, with > >= < <=: a dead band, true until the value is beyond it; sensors only
    per              a duration, with > >= < <= between: compares the change per that time; sensors only

`for` and `releaseAt` go together; the others stand alone. Every other key is refused, and so is a time key on a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rules.engine.comparisons import Evaluate
from rules.engine.context import Scope
from rules.engine.durations import check_duration, microseconds_of
from rules.engine.exceptions import InvalidChain, Problem
from rules.engine.fields import Fields, check_name, check_uuid, one_of
from rules.engine.operators import OPERATORS
from rules.engine.temporal import TIME_KEYS, Leaf, compile_timed, fingerprint, read_timing
from rules.engine.values import Reference, TemporalCondition, Timer

MAX_DEPTH = 20
"""Groups that may stand inside one another, so that neither compiling nor evaluating can exhaust the stack."""

MAX_LEAVES = 1_000
"""Comparisons in one filter."""

SOURCE_TYPES = ("sensor", "device")
COMPARISON_KEYS = ("sourceType", "UUID", "key", "operator", "value")
LEAF_KEYS = (*COMPARISON_KEYS, "duration", *TIME_KEYS)
GROUP_KEYS = ("type", "expressions")
_ON_LEAVES = dict.fromkeys(("duration", *TIME_KEYS), "is not for groups: put it on each leaf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A compiled filter; `watches` are what its conditions over time remember, `timers` those that time alone can change.
    `questioned` are the references of which it asks whether they are believed. `first` is what it reads first, as it is written.

    `evaluate(scope)` reads one reference at a time, left to right, only as far as AND and OR need it, and notes as
    missing every reference that has no value. It raises nothing of its own.
    """

    references: frozenset[Reference]
    evaluate: Evaluate
    watches: tuple[TemporalCondition, ...] = ()
    timers: tuple[Timer, ...] = ()
    questioned: frozenset[Reference] = frozenset()
    first: Reference | None = None


def compile_condition(config: object, *, path: str) -> Condition:
    """Compile a leaf or a group of leaves and groups; `path` is where `config` stands in the chain.

    Raises InvalidChain with every problem of the tree.
    """
    tree = _Tree()
    evaluate = tree.expression(config, path=path, depth=0)
    if tree.problems:
        raise InvalidChain(tree.problems)
    return Condition(
        references=frozenset(tree.references),
        evaluate=evaluate,
        watches=tuple(tree.watches.values()),
        timers=tuple(tree.timers),
        questioned=frozenset(tree.questioned),
        first=next(iter(tree.references), None),
    )


def _all(parts: tuple[Evaluate, ...]) -> Evaluate:
    def evaluate(scope: Scope) -> bool:
        for part in parts:  # noqa: SIM110 - all() over a generator takes twice as long
            if not part(scope):
                return False
        return True

    return evaluate


def _any(parts: tuple[Evaluate, ...]) -> Evaluate:
    def evaluate(scope: Scope) -> bool:
        for part in parts:  # noqa: SIM110 - any() over a generator takes twice as long
            if part(scope):
                return True
        return False

    return evaluate


GROUPS: dict[str, Callable[[tuple[Evaluate, ...]], Evaluate]] = {"AND": _all, "OR": _any}


def _is_group(config: object) -> bool:
    """Whether a person meant a group; a leaf with a stray `type` is a leaf, a group that misses a key is a group."""
    if not isinstance(config, Mapping):
        return False
    return "expressions" in config or ("type" in config and not any(key in config for key in COMPARISON_KEYS))


class _Tree:
    """One filter while it is compiled: what it reads, remembers and waits for, how many leaves it has, what is wrong with it."""

    def __init__(self) -> None:
        self.references: dict[Reference, None] = {}
        self.watches: dict[str, TemporalCondition] = {}
        self.timers: dict[Timer, None] = {}
        self.questioned: set[Reference] = set()
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
        fields.only(GROUP_KEYS, misplaced=_ON_LEAVES)
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
        uuid = fields.get("UUID", check_uuid)
        key = fields.get("key", check_name)
        symbol = fields.get("operator", one_of(OPERATORS))
        if symbol is None:
            return _never
        operand, duration_us = _operand(fields, symbol), _duration_us(fields, symbol)
        timing = read_timing(fields, source_type=source_type, symbol=symbol, operand=operand)
        if len(self.problems) > before:
            return _never
        reference = Reference(source_type, uuid.lower(), key)
        self.references[reference] = None
        if OPERATORS[symbol].asks_quality:
            self.questioned.add(reference)
        evaluate = OPERATORS[symbol].make(reference, operand, duration_us)
        leaf = Leaf(reference, symbol, operand, duration_us, evaluate)
        if timing is None:
            if OPERATORS[symbol].turns_by_itself:
                self.timers[Timer(fingerprint(leaf), reference[:2])] = None
            return evaluate
        evaluate, kept = compile_timed(leaf, timing)
        if isinstance(kept, TemporalCondition):
            self.watches[kept.key] = kept
        else:
            self.timers[kept] = None
        return evaluate


def _operand(fields: Fields, symbol: str) -> Any:
    """Read the value of a leaf, which some operators need and others refuse."""
    operator = OPERATORS[symbol]
    if operator.operand is not None:
        return fields.get("value", operator.operand.check)
    if "value" in fields:
        fields.refuse(
            "value", f"{symbol} takes a duration and no value" if operator.takes_duration else f"{symbol} takes none"
        )
    return None


def _duration_us(fields: Fields, symbol: str) -> int:
    if OPERATORS[symbol].takes_duration:
        text = fields.get("duration", check_duration)
        return microseconds_of(text) if text else 0
    if "duration" in fields:
        fields.refuse("duration", f"{symbol} takes none; for how long it must be true is said with for")
    return 0


def _not_expressions(value: object) -> str | None:
    return None if isinstance(value, list) and value else "must be a non-empty list"


def _never(_scope: Scope) -> bool:
    return False
