"""Texts with placeholders for values, such as `pH is {ph} at {originator}`. Pure.

A place names a value and nothing else: no attributes, no indices, no formats, because people write templates for systems
that are not theirs. `{{` and `}}` stand for braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rules.engine.fields import LARGEST, check_name
from rules.engine.values import Value

ORIGINATOR = "originator"
"""The place for the name of the sensor, device or chain that the event comes from."""

MAXIMUM_LENGTH = 500
UNKNOWN = "unknown"
_SHOWN_CHARACTERS = 100
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Template(NamedTuple):
    """A text cut at its places: `literals` has one entry more than `names`."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    def fill(self, values: Mapping[str, Value], originator: str, *, maximum: int = MAXIMUM_LENGTH) -> str:
        """The text, cut to `maximum` characters; a value that is missing is called unknown: the rest is worth sending."""
        parts = [self.literals[0]]
        for name, literal in zip(self.names, self.literals[1:], strict=True):
            parts += (_shown(originator if name == ORIGINATOR else values.get(name)), literal)
        return "".join(parts)[:maximum]


def check_template(value: object) -> str | None:
    """Refuse text that is empty, too long, or in which a brace or a name is out of place."""
    if not isinstance(value, str) or not value.strip():
        return "must be non-empty text"
    if len(value) > MAXIMUM_LENGTH:
        return f"must not be longer than {MAXIMUM_LENGTH} characters"
    if not all(character.isprintable() or character == "\n" for character in value):
        return "must be printable text"
    return next(_complaints(value), None)


def _complaints(text: str) -> Iterator[str]:
    for token in _TOKEN.finditer(text):
        if token[0] in ("{", "}"):
            yield f"has a single {token[0]}: write {token[0] * 2} for a brace, and {{name}} for a value"
        elif token[1] is not None and check_name(token[1]):
            yield f"has a place without a name, {token[0]}: write {{name}} for a value"


def compile_template(text: str) -> Template:
    """Of a text that `check_template` has nothing against."""
    literals, names, end = [""], [], 0
    for token in _TOKEN.finditer(text):
        literals[-1] += text[end : token.start()]
        end = token.end()
        if token[1] is None:
            literals[-1] += token[0][0]
        else:
            names.append(token[1])
            literals.append("")
    literals[-1] += text[end:]
    return Template(tuple(literals), tuple(names))


def _shown(value: Value) -> str:
    """A value as a person reads it: 6.9 and not 6.8999999999999995, one line, at most 100 characters."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(value)
    return "".join(character if character.isprintable() else " " for character in str(value)[:_SHOWN_CHARACTERS])


def _number(value: float) -> str:
    if not -LARGEST <= value <= LARGEST:
        return "no finite number"
    return str(value) if isinstance(value, int) and abs(value) < 10**15 else f"{value:.10g}"
