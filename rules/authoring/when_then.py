"""Rule chains of the shape that a form can show: when conditions hold, do this; otherwise, do that.

A chain of this shape is one filter, with actions one after the other where it is true and where it is false; or, by schedule,
actions alone. Its conditions stand in groups: of all groups one part is enough (`any_group` false), or of any group all parts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rules.models import RuleNode

Config = Mapping[str, Any]
WHEN, THEN, OTHERWISE = "when", "then", "otherwise"
_PATH = re.compile(r"nodes\[(\d+)\](?:\.config)?((?:\.expressions\[\d+\])*)(?:\.(\w+))?.*")


class Place(NamedTuple):
    """Where a problem is: `part` is when, then or otherwise, `position` counts within it, `key` is of its configuration."""

    part: str
    position: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WhenThen:
    """`groups`: leaves of the filter, each in a group; `then` and `otherwise`: configurations of actions."""

    groups: Sequence[Sequence[Config]]
    then: Sequence[Config]
    otherwise: Sequence[Config] = ()
    any_group: bool = False

    @property
    def condition(self) -> dict[str, Any]:
        """The configuration of the filter."""
        outer, inner = ("OR", "AND") if self.any_group else ("AND", "OR")
        parts = [_group(inner, group) for group in self.groups]
        return dict(parts[0]) if len(parts) == 1 else {"type": outer, "expressions": parts}

    def nodes(self, before: Sequence[RuleNode] = ()) -> list[RuleNode]:
        """New nodes. Those of the chain as it was lend their names, because cooldowns go by the name of a node."""
        names = _Names(before)
        then = _line(names, THEN, self.then)
        otherwise = _line(names, OTHERWISE, self.otherwise)
        if not self.groups:
            return then
        first = RuleNode(name=names.take(WHEN), type=RuleNode.Type.FILTER, config=self.condition)
        first.next = then[0].name if then else ""
        first.on_false = otherwise[0].name if otherwise else ""
        return [first, *then, *otherwise]

    def place_of(self, path: str) -> Place | None:
        """Where in the form a path of a Problem leads; None to no field of it."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        number, inside, key = int(match[1]), [int(each) for each in re.findall(r"\d+", match[2])], match[3] or ""
        if self.groups and number == 0:
            index = self._flat(inside)
            return None if index is None else Place(WHEN, index, key)
        number -= bool(self.groups)
        if number < len(self.then):
            return Place(THEN, number, key)
        return Place(OTHERWISE, number - len(self.then), key)

    def _flat(self, inside: Sequence[int]) -> int | None:
        """Of a leaf, its number among all leaves, from its place in the tree."""
        group = inside[0] if len(self.groups) > 1 and inside else 0
        within = inside[1:] if len(self.groups) > 1 else inside
        if len(self.groups) > 1 and not inside:
            return None
        return sum(len(each) for each in self.groups[:group]) + (within[0] if within else 0)


def read(nodes: Sequence[RuleNode]) -> WhenThen | None:
    """The chain as a form shows it; None when it is of another shape."""
    by_name = {node.name: node for node in nodes}
    pointed_to = {name for node in nodes for name in (node.next, node.on_false, node.on_failure)}
    start = [node for node in nodes if node.name not in pointed_to]
    if len(start) != 1 or any(node.on_failure for node in nodes):
        return None
    first = start[0]
    if first.type == RuleNode.Type.FILTER:
        condition = _read_condition(first.config)
        lines = [_read_line(first.next, by_name), _read_line(first.on_false, by_name)]
    else:
        condition, lines = ([], False), [_read_line(first.name, by_name), []]
    then, otherwise = lines
    if condition is None or then is None or otherwise is None:
        return None
    if len(then) + len(otherwise) + bool(condition[0]) != len(nodes):
        return None
    groups, any_group = condition
    return WhenThen(groups=groups, any_group=any_group, then=then, otherwise=otherwise)


def _group(kind: str, leaves: Sequence[Config]) -> dict[str, Any]:
    return dict(leaves[0]) if len(leaves) == 1 else {"type": kind, "expressions": [dict(leaf) for leaf in leaves]}


def _line(names: _Names, part: str, actions: Sequence[Config]) -> list[RuleNode]:
    nodes = [RuleNode(name=names.take(part), type=RuleNode.Type.ACTION, config=dict(each)) for each in actions]
    for node, following in itertools.pairwise(nodes):
        node.next = following.name
    return nodes


class _Names:
    """Names for nodes, by part: first those that the chain had there, then new ones."""

    def __init__(self, before: Sequence[RuleNode]) -> None:
        self._had = _names_by_part(before)
        self._taken = {name for names in self._had.values() for name in names}

    def take(self, part: str) -> str:
        had = self._had.get(part)
        if had:
            return had.pop(0)
        number = 1
        while (name := part if number == 1 else f"{part} {number}") in self._taken:
            number += 1
        self._taken.add(name)
        return name


def _names_by_part(nodes: Sequence[RuleNode]) -> dict[str, list[str]]:
    if read(nodes) is None:
        return {}
    by_name = {node.name: node for node in nodes}
    first = nodes[0] if len(nodes) == 1 else _start(nodes)
    if first.type != RuleNode.Type.FILTER:
        return {THEN: list(_follow(first.name, by_name))}
    then, otherwise = (list(_follow(name, by_name)) for name in (first.next, first.on_false))
    return {WHEN: [first.name], THEN: then, OTHERWISE: otherwise}


def _start(nodes: Sequence[RuleNode]) -> RuleNode:
    pointed_to = {name for node in nodes for name in (node.next, node.on_false)}
    return next(node for node in nodes if node.name not in pointed_to)


def _follow(name: str, by_name: Mapping[str, RuleNode]) -> Iterator[str]:
    seen: set[str] = set()
    while name in by_name and name not in seen:
        seen.add(name)
        yield name
        name = by_name[name].next


def _read_line(name: str, by_name: Mapping[str, RuleNode]) -> list[Config] | None:
    found = [by_name[each] for each in _follow(name, by_name)]
    return [node.config for node in found] if all(node.type == RuleNode.Type.ACTION for node in found) else None


def _read_condition(config: Any) -> tuple[list[list[Config]], bool] | None:
    """The groups, and whether any of them is enough."""
    if not isinstance(config, dict):
        return None
    parts = config.get("expressions")
    if not isinstance(parts, list):
        return [[config]], False
    any_group = config.get("type") == "OR"
    inner = "AND" if any_group else "OR"
    groups = [_read_group(part, inner) for part in parts]
    return None if None in groups else ([group for group in groups if group], any_group)


def _read_group(part: Any, kind: str) -> list[Config] | None:
    if not isinstance(part, dict):
        return None
    leaves = part.get("expressions")
    if not isinstance(leaves, list):
        return [part]
    plain = all(isinstance(leaf, dict) and "expressions" not in leaf for leaf in leaves)
    return leaves if part.get("type") == kind and plain else None
