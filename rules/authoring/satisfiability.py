"""Find for which values the conditions of filters can be true, as regions that can be intersected and found empty. Pure.

A region is a list of alternatives, each a span per reference; an empty list is never true. What cannot be known for sure is
left open, so a region may be too large, never too small: an empty one is certain, an overlap is a "may".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rules.engine.conditions import MAX_DEPTH
from rules.engine.fields import is_number
from rules.engine.temporal import RELEASE_KEYS
from rules.engine.values import Reference

MAXIMUM_ALTERNATIVES = 64
"""Beyond it a region is taken for everything, because alternatives multiply."""

Atom = tuple[str, object]
"""A value with its kind: 1, 1.0 and "1" and true are two numbers that are the same, a text and a bool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The values that one reference may have: within bounds, which only numbers are, or exactly one of `only`."""

    low: float = -math.inf
    low_open: bool = False
    high: float = math.inf
    high_open: bool = False
    only: frozenset[Atom] | None = None
    never: frozenset[Atom] = frozenset()

    @property
    def is_bounded(self) -> bool:
        return self.low > -math.inf or self.high < math.inf

    def meet(self, other: Span) -> Span:
        """Both at once."""
        only = self.only if other.only is None else other.only if self.only is None else self.only & other.only
        low = max((self.low, self.low_open), (other.low, other.low_open))
        high = min((self.high, not self.high_open), (other.high, not other.high_open))
        return Span(
            low=low[0],
            low_open=low[1],
            high=high[0],
            high_open=not high[1],
            only=only,
            never=self.never | other.never,
        )

    @property
    def is_empty(self) -> bool:
        if self.only is not None:
            return not any(self._has(atom) for atom in self.only)
        if self.low == self.high:
            return self.low_open or self.high_open or ("number", self.low) in self.never
        return self.low > self.high

    def _has(self, atom: Atom) -> bool:
        kind, value = atom
        if atom in self.never:
            return False
        if not self.is_bounded:
            return True
        if kind != "number" or not isinstance(value, int | float):
            return False
        above = value > self.low or (value == self.low and not self.low_open)
        return above and (value < self.high or (value == self.high and not self.high_open))


Alternative = Mapping[Reference, Span]
Region = Sequence[Alternative]

EVERYTHING: Region = ({},)
NOTHING: Region = ()


def meet(one: Region, other: Region) -> Region:
    """Where both are true."""
    found: list[Alternative] = []
    for left in one:
        for right in other:
            both = dict(left)
            for reference, span in right.items():
                both[reference] = both[reference].meet(span) if reference in both else span
            if not any(both[reference].is_empty for reference in right):
                found.append(both)
            if len(found) > MAXIMUM_ALTERNATIVES:
                return EVERYTHING
    return found


def join(regions: Iterable[Region]) -> Region:
    """Where any is true."""
    found = [alternative for region in regions for alternative in region]
    return EVERYTHING if len(found) > MAXIMUM_ALTERNATIVES or {} in found else found


def forget(region: Region, key: str) -> Region:
    """The region after a transform has changed the value of `key`."""
    return join([[{ref: span for ref, span in alternative.items() if ref.key != key}] for alternative in region])


def where_true(config: object, depth: int = 0) -> Region:
    """Where a filter that compiles is true."""
    return _where(config, True, depth)


def where_false(config: object, depth: int = 0) -> Region:
    """Where it is false although everything has a value: what is missing or of the wrong kind is left aside."""
    return _where(config, False, depth)


def _where(config: object, wanted: bool, depth: int) -> Region:
    if not isinstance(config, Mapping) or depth > MAX_DEPTH:
        return EVERYTHING
    parts = config.get("expressions")
    if not isinstance(parts, list):
        return _leaf(config, wanted)
    regions = [_where(part, wanted, depth + 1) for part in parts]
    if (config.get("type") == "AND") is not wanted:
        return join(regions)
    found: Region = EVERYTHING
    for region in regions:
        found = meet(found, region)
    return found


def reference_of(leaf: Mapping[str, object]) -> Reference:
    return Reference(str(leaf.get("sourceType")), str(leaf.get("UUID")).lower(), str(leaf.get("key")))


def _leaf(leaf: Mapping[str, object], wanted: bool) -> Region:
    span = _span(leaf, wanted)
    return EVERYTHING if span is None else ({reference_of(leaf): span},)


# A comparison over time is about more than the value now. With `for` it is true now as well; with a dead band only beyond the
# value at which that ends. Of those, and of all others, nothing is known about when they are false.
_OVER_TIME = {"times", "within", "per", "increase", "median"}


def _span(leaf: Mapping[str, object], wanted: bool) -> Span | None:
    """The span of one comparison; None when nothing can be said."""
    keys = leaf.keys()
    if keys & _OVER_TIME or (not wanted and keys & {"for", *RELEASE_KEYS}):
        return None
    make = (_TRUE if wanted else _FALSE).get(str(leaf.get("operator")))
    value = leaf.get("value")
    if make is None:
        return None
    span = make(value)
    release_key = next((key for key in RELEASE_KEYS if key in leaf), None)
    return _widened(span, leaf[release_key]) if release_key and span else span


def _widened(span: Span, release_at: object) -> Span | None:
    """A dead band stays true until the value is beyond `release_at`."""
    if not is_number(release_at):
        return None
    if span.low > -math.inf:
        return replace(span, low=min(span.low, release_at), low_open=False)
    return replace(span, high=max(span.high, release_at), high_open=False)


def _above(*, open: bool) -> Callable[[object], Span | None]:
    return lambda value: Span(low=value, low_open=open) if is_number(value) else None


def _below(*, open: bool) -> Callable[[object], Span | None]:
    return lambda value: Span(high=value, high_open=open) if is_number(value) else None


def _between(value: object) -> Span | None:
    if not isinstance(value, list) or len(value) != 2 or not all(is_number(end) for end in value):
        return None
    return Span(low=value[0], high=value[1])


def _one_of(value: object) -> Span | None:
    return Span(only=_atoms(value)) if isinstance(value, list) else None


def _none_of(value: object) -> Span | None:
    return Span(never=_atoms(value)) if isinstance(value, list) else None


def _atoms(values: Iterable[object]) -> frozenset[Atom]:
    return frozenset(
        ("number" if is_number(value) else type(value).__name__, value)
        for value in values
        if isinstance(value, str | bool | int | float)
    )


_Makers = Mapping[str, Callable[[object], Span | None]]
_TRUE: _Makers = {
    ">": _above(open=True),
    ">=": _above(open=False),
    "<": _below(open=True),
    "<=": _below(open=False),
    "==": lambda value: _one_of([value]),
    "!=": lambda value: _none_of([value]),
    "between": _between,
    "in": _one_of,
    "notIn": _none_of,
    **dict.fromkeys(("valueOlderThan", "valueNewerThan", "valueInLast"), lambda value: _one_of([value])),
}
_FALSE: _Makers = {
    ">": _TRUE["<="],
    ">=": _TRUE["<"],
    "<": _TRUE[">="],
    "<=": _TRUE[">"],
    "==": _TRUE["!="],
    "!=": _TRUE["=="],
    "in": _TRUE["notIn"],
    "notIn": _TRUE["in"],
}
