"""What the rule engine finds wrong, in the language of the page.

The engine writes English and knows no languages; its sentences are recognized here by what is fixed in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop as noop

from rules.engine.exceptions import Problem

# Those that a form can lead to. What stands before the places of another sentence comes first.
SENTENCES = (
    noop("is required"),
    noop("must be a finite number, text, true or false"),
    noop("must be a finite number"),
    noop("is not a finite number"),
    noop("must be a number, not {kind}"),
    noop("must be a number"),
    noop("must be true or false, not {kind}"),
    noop("must be true or false"),
    noop("must be a string, not {kind}"),
    noop("cannot be kept exactly: a whole number has at most 53 bits"),
    noop("must be a whole number from 1 to {maximum}"),
    noop("must be an odd whole number from 3 to {maximum}"),
    noop("must not be zero"),
    noop("must not be longer than {maximum} characters"),
    noop("is longer than {maximum} characters"),
    noop("must be non-empty text"),
    noop("must be printable text without blanks around it"),
    noop("must be printable text"),
    noop("must be one line"),
    noop("must have neither a comma nor blanks around it"),
    noop("must be a list of 1 to {maximum} entries"),
    noop("must be one of {allowed}"),
    noop("must be [low, high], two finite numbers"),
    noop("must be [low, high] with low not above high"),
    noop("must be a duration such as 10s, 5m, 2h or 1d"),
    noop("must not be longer than {days}d"),
    noop("must be below value, {value}, for {operator}"),
    noop("must be above value, {value}, for {operator}"),
    noop("is for sensors: the state of a device stands until it is changed, and has no readings"),
    noop("is made by a transform before it, which a condition over time does not see: ask for the original value"),
    noop("is the name that it has already"),
    noop("is no regular expression that RE2 can use: {reason}"),
    noop("has a single {brace}: write {two} for a brace, and {name} for a value"),
    noop("has a place without a name, {place}: write {name} for a value"),
    noop("is the name of an earlier node"),
    noop("names no node of this chain"),
    noop("closes a cycle of 1 node: {names}"),
    noop("closes a cycle of {count} nodes: {names}"),
    noop("must have one start, but no other node points to {count} nodes: {names}"),
    noop("must have a filter, or nothing can trigger the chain"),
    noop("must not have more than {maximum} nodes"),
    noop("must not read more than {maximum} variables"),
    noop("is nested deeper than {maximum} groups"),
    noop("is one more than the {maximum} leaves a filter may have"),
    noop("is no sensor of this organization"),
    noop("is no device of this organization"),
    noop("is no variable of this sensor; {names}"),
    noop("is no state of this device; {names}"),
    noop("must have five fields, minute hour day month weekday, such as {example}"),
    noop("must be a time zone by its name, such as Europe/Berlin"),
    noop("never comes due"),
)  # fmt: skip
_PLACE = re.compile(r"\{(\w+)\}")


def translated(message: str) -> str:
    """The sentence itself where nobody has translated it."""
    for pattern, sentence in _patterns().items():
        if match := pattern.fullmatch(message):
            return _(sentence).format(**match.groupdict())
    return message


def with_place(problem: Problem) -> str:
    """For a problem that belongs to no field."""
    if problem.path == "nodes":
        return _("The rule {what}.").format(what=translated(problem.message))
    return f"{problem.path}: {translated(problem.message)}"


@cache
def _patterns() -> Mapping[re.Pattern[str], str]:
    return {re.compile("".join(_parts(sentence)), re.DOTALL): sentence for sentence in SENTENCES}


def _parts(sentence: str) -> Iterator[str]:
    """Every second part of the split is the name of a place."""
    for number, part in enumerate(_PLACE.split(sentence)):
        yield f"(?P<{part}>.*?)" if number % 2 else re.escape(part)
