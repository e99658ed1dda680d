"""From the JSON of a filter to a `Condition`: the references it reads and one closure that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rules.configuration import Fields, not_a_name, not_a_uuid, one_of
from rules.exceptions import InvalidChain, Problem
from rules.operators import OPERATORS, Evaluate
from rules.scope import Reference, Scope, Timer, Watch

MAX_DEPTH = 20
"""Groups that may stand inside one another, so that neither compiling nor evaluating can exhaust the stack."""

MAX_LEAVES = 1_000
"""Comparisons in one filter."""

SOURCE_TYPES = ("sensor", "device")
LEAF_KEYS = ("sourceType", "UUID", "key", "operator", "value")
GROUP_KEYS = ("type", "expressions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A compiled filter; `watches` are what its conditions over time remember, `timers` those that time alone can change.

    `evaluate(scope)` reads one reference at a time, left to right, only as far as AND and OR need it, and notes as
    missing every reference that has no value. It raises nothing of its own.
    """

    references: frozenset[Reference]
    evaluate: Evaluate
    watches: tuple[Watch, ...] = ()
    timers: tuple[Timer, ...] = ()


def compile_condition(config: object, *, path: str) -> Condition:
    """Compile a leaf or a group of leaves and groups; `path` is where `config` stands in the chain.

    Raises InvalidChain with every problem of the tree.
    """
    tree = _Tree()
    evaluate = tree.expression(config, path=path, depth=0)
    if tree.problems:
        raise InvalidChain(tree.problems)
    return Condition(references=frozenset(tree.references), evaluate=evaluate)


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


def _never(_scope: Scope) -> bool:
    return False
