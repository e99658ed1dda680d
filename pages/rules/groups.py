"""Conditions in groups in groups, as a tree of forms: from what a page sends, and to the configuration of a filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.utils.translation import gettext_lazy as lazy

from pages.rules.rows import ConditionForm
from rules.engine.conditions import MAX_DEPTH

GROUPS = (("AND", lazy("all of these")), ("OR", lazy("any of these")))
MAXIMUM_PARTS = 100


class Unreadable(ValueError):
    """The structure of conditions that the page sent is none."""


@dataclass(slots=True)
class Group:
    """Conditions of which all, or any, must be true; parts are conditions and groups."""

    kind: str = "AND"
    parts: list[Group | ConditionForm] = field(default_factory=list)
    is_group = True  # for the template

    @property
    def config(self) -> dict[str, Any]:
        """Of a group of one, that one; only of valid forms."""
        if len(self.parts) == 1:
            return self.parts[0].config
        return {"type": self.kind, "expressions": [part.config for part in self.parts]}

    @property
    def rows(self) -> Iterator[ConditionForm]:
        for part in self.parts:
            if isinstance(part, Group):
                yield from part.rows
            else:
                yield part

    def at(self, indexes: Sequence[int]) -> Group | ConditionForm | None:
        """The part at this place of the configuration, in which a group of one has no level of its own."""
        here: Group | ConditionForm = self
        for index in [*indexes, None]:
            while isinstance(here, Group) and len(here.parts) == 1:
                here = here.parts[0]
            if index is None:
                return here
            if not isinstance(here, Group) or index >= len(here.parts):
                return None
            here = here.parts[index]
        return here

    @property
    def structure(self) -> dict[str, Any]:
        """What the page sends: the tree, with the number of each row."""
        parts = [part.structure if isinstance(part, Group) else {"row": _number(part)} for part in self.parts]
        return {"type": self.kind, "expressions": parts}


def _number(row: ConditionForm) -> int:
    return int(str(row.prefix).rsplit("-", 1)[1])


def tree_of(structure: object, row: Callable[[int], ConditionForm], depth: int = 0) -> Group:
    """Raises Unreadable."""
    if not isinstance(structure, dict) or depth > MAX_DEPTH or structure.get("type") not in dict(GROUPS):
        raise Unreadable
    parts = structure.get("expressions")
    if not isinstance(parts, list) or len(parts) > MAXIMUM_PARTS:
        raise Unreadable
    found = Group(structure["type"])
    for part in parts:
        number = part.get("row") if isinstance(part, dict) else None
        if number is None:
            found.parts.append(tree_of(part, row, depth + 1))
        elif type(number) is int and 0 <= number < 10_000:
            found.parts.append(row(number))
        else:
            raise Unreadable
    # A group that was emptied asks nothing.
    found.parts = [part for part in found.parts if not isinstance(part, Group) or part.parts]
    return found
