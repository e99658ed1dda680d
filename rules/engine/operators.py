"""The table of operators: what each accepts, what it means, and how its leaf is compiled.

`docs/operators.md` is made from this table: `python -m rules.engine.operators_page`.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from rules.engine import ages, comparisons
from rules.engine.comparisons import Make
from rules.engine.fields import (
    MAX_LIST,
    MAX_TEXT,
    Check,
    check_list,
    check_number,
    check_range,
    check_text,
    not_an_item,
    not_comparable,
)
from rules.engine.patterns import MAX_PATTERN, check_pattern


class Operand(NamedTuple):
    """What an operator accepts as `value`, as a check and in words."""

    check: Check
    words: str


NUMBER = Operand(check_number, "a number")
SCALAR = Operand(not_comparable, "a number, text, true or false")
RANGE = Operand(check_range, "[low, high], two numbers")
TEXT = Operand(check_text, f"text of 1 to {MAX_TEXT:,} characters")
PATTERN = Operand(check_pattern, f"a regular expression of at most {MAX_PATTERN} characters")
CHOICES = Operand(check_list(not_comparable), f"a list of 1 to {MAX_LIST} numbers, texts, true or false")
ITEMS = Operand(check_list(not_an_item), f"a list of 1 to {MAX_LIST} texts without commas")


class Operator(NamedTuple):
    """One operator: `make` gives its leaf, `operand` says what its `value` must be (None: it takes none).

    `meaning` completes "true when the value ..."; `odd` are the cases in which people expect different things; `example` are
    the keys that follow the operator in a leaf; `predicate` completes a sentence about a sensor, with places for the operand.
    All four are shown to people. One that `turns_by_itself` may turn true without an event. One that `asks_quality` is also asked
    at a reading that is suspect, at which no other is.
    """

    make: Make
    operand: Operand | None
    meaning: str
    odd: str
    example: dict[str, Any]
    predicate: str
    takes_duration: bool = False
    turns_by_itself: bool = False
    asks_quality: bool = False

    @property
    def is_numeric(self) -> bool:
        """Whether it is never true of a text or of true and false."""
        return self.operand is NUMBER or self.operand is RANGE

    @property
    def compares(self) -> bool:
        """Whether it compares values with a value, and so has an answer for each reading, which conditions over time ask for."""
        return self.operand is not None and not self.takes_duration


def _ordering(symbol: str, words: str, predicate: str) -> Operator:
    compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}[symbol]
    odd = 'Text and true/false are neither above nor below a number: false, also for the text "7".'
    return Operator(
        comparisons.ordering(compare), NUMBER, f"is a number {words} `value`", odd, {"value": 6.5}, predicate
    )


def _age(make: Make, meaning: str, odd: str, predicate: str, **value: Any) -> Operator:
    operand = SCALAR if value else None
    example = {**value, "duration": "10m"}
    is_older = make is ages.older or make is ages.value_older
    return Operator(make, operand, meaning, odd, example, predicate, takes_duration=True, turns_by_itself=is_older)


def _plain(make: Make, meaning: str, odd: str, predicate: str) -> Operator:
    return Operator(make, None, meaning, odd, {}, predicate)


_KINDS = '6 and 6.0 are equal; values of different kinds never are: the text "6.5" is not 6.5, true is not 1.'
_TEXT = "Upper and lower case differ. A number or true/false has no text in it: false."
_ITEMS = 'The text is read as a list with commas: "low, leak" has the items `low` and `leak`; "low" has one.'

SECTIONS: dict[str, dict[str, Operator]] = {
    "Comparing": {
        ">": _ordering(">", "above", predicate="is above {value}"),
        ">=": _ordering(">=", "above or equal to", predicate="is at least {value}"),
        "<": _ordering("<", "below", predicate="is below {value}"),
        "<=": _ordering("<=", "below or equal to", predicate="is at most {value}"),
        "==": Operator(
            comparisons.equality(wanted=True),
            SCALAR,
            "equals `value`",
            f"{_KINDS} Upper and lower case differ.",
            {"value": "on"},
            predicate="is {value}",
        ),
        "!=": Operator(
            comparisons.equality(wanted=False),
            SCALAR,
            "does not equal `value`",
            "True for every value for which == is false. False while there is no value.",
            {"value": "on"},
            predicate="is not {value}",
        ),
        "between": Operator(
            comparisons.between,
            RANGE,
            "is a number from low to high, both included",
            "Text and true/false are in no range: false.",
            {"value": [5.5, 6.5]},
            predicate="is between {value}",
        ),
        "in": Operator(
            comparisons.judging(comparisons.one_of_them),
            CHOICES,
            "equals one of the list",
            "Equal as for ==.",
            {"value": ["on", "auto"]},
            predicate="is one of {value}",
        ),
        "notIn": Operator(
            comparisons.judging(comparisons.one_of_them, wanted=False),
            CHOICES,
            "equals none of the list",
            "True for every value for which `in` is false. False while there is no value.",
            {"value": ["off", "fault"]},
            predicate="is none of {value}",
        ),
    },
    "Text": {
        "contains": Operator(
            comparisons.judging(comparisons.contains),
            TEXT,
            "is text that has `value` in it",
            _TEXT,
            {"value": "leak"},
            predicate="contains {value}",
        ),
        "notContains": Operator(
            comparisons.judging(comparisons.contains, wanted=False),
            TEXT,
            "does not have `value` in it",
            "True for every value for which contains is false, so for every number. False while there is no value.",
            {"value": "ok"},
            predicate="does not contain {value}",
        ),
        "startsWith": Operator(
            comparisons.judging(comparisons.starts_with),
            TEXT,
            "is text that begins with `value`",
            _TEXT,
            {"value": "E"},
            predicate="starts with {value}",
        ),
        "endsWith": Operator(
            comparisons.judging(comparisons.ends_with),
            TEXT,
            "is text that ends with `value`",
            _TEXT,
            {"value": "fault"},
            predicate="ends with {value}",
        ),
        "matches": Operator(
            comparisons.judging(comparisons.matches),
            PATTERN,
            "is text in which the regular expression finds something",
            "Anywhere in the text: write ^ and $ to mean the whole. The syntax is RE2's, which has neither look-around nor "
            "back-references. " + _TEXT,
            {"value": "^E[0-9]{2}$"},
            predicate="matches {value}",
        ),
    },
    "Text that lists things": {
        "hasAll": Operator(
            comparisons.judging(comparisons.has_all),
            ITEMS,
            "lists all of `value`",
            f"{_ITEMS} A number or true/false lists nothing: false.",
            {"value": ["low", "leak"]},
            predicate="has all of {value}",
        ),
        "hasAny": Operator(
            comparisons.judging(comparisons.has_any),
            ITEMS,
            "lists at least one of `value`",
            f"{_ITEMS} A number or true/false lists nothing: false.",
            {"value": ["low", "leak"]},
            predicate="has any of {value}",
        ),
        "hasNone": Operator(
            comparisons.judging(comparisons.has_any, wanted=False),
            ITEMS,
            "lists none of `value`",
            "True for every value for which hasAny is false, so for every number. False while there is no value.",
            {"value": ["fault"]},
            predicate="has none of {value}",
        ),
    },
    "Whether there is a value": {
        "isNull": _plain(
            comparisons.absent,
            "is null or was never seen",
            "Never seen is not reported as missing.",
            predicate="has no value",
        ),
        "isNotNull": _plain(
            comparisons.judging(comparisons.present), "is there", "The opposite of isNull.", predicate="has a value"
        ),
        "isEmpty": _plain(
            comparisons.empty,
            "is null, was never seen, or is text of no characters",
            "0 and false are values, and blanks are characters: not empty.",
            predicate="is empty",
        ),
        "isNotEmpty": _plain(
            comparisons.judging(comparisons.not_empty),
            "is there and is not text of no characters",
            "The opposite of isEmpty.",
            predicate="is not empty",
        ),
    },
    "Whether the value is believed": {
        "isSuspect": Operator(
            comparisons.suspicious(wanted=True),
            None,
            "is outside the limits of its variable, jumped, or is stuck",
            "Asked of the newest reading, while all other operators see the last one that was believed. A state of a device is "
            "never suspect. False while there is no value.",
            {},
            predicate="is suspect",
            asks_quality=True,
        ),
        "isNotSuspect": Operator(
            comparisons.suspicious(wanted=False),
            None,
            "is believed",
            "The opposite of isSuspect, but false while there is no value.",
            {},
            predicate="is believed",
            asks_quality=True,
        ),
    },
    "What kind of value": {
        "isNumber": _plain(
            comparisons.judging(comparisons.kind(int, float)),
            "is a number",
            'The text "6.5" and true are no numbers.',
            predicate="is a number",
        ),
        "isString": _plain(
            comparisons.judging(comparisons.kind(str)), "is text", "Text of no characters is text.", predicate="is text"
        ),
        "isBoolean": _plain(
            comparisons.judging(comparisons.kind(bool)),
            "is true or false",
            'The numbers 0 and 1 and the text "true" are not.',
            predicate="is true or false",
        ),
        "isArray": _plain(
            comparisons.judging(comparisons.kind(list)),
            "is an array",
            "No sensor or device can send an array today, so this is false. For text that lists things see hasAny.",
            predicate="is a list",
        ),
    },
    "Age": {
        "olderThan": _age(
            ages.older,
            "was reported `duration` ago or longer, or never",
            "Turns true by itself when nothing is reported, without waiting for an event. A null is a report too.",
            predicate="was not reported for {duration}",
        ),
        "newerThan": _age(
            ages.newer,
            "was reported less than `duration` ago",
            "The opposite of olderThan. Nothing runs when it turns false: to act on silence, use olderThan.",
            predicate="was reported less than {duration} ago",
        ),
        "inLast": _age(
            ages.in_last,
            "was reported at most `duration` ago",
            "As newerThan, and still true at exactly `duration`.",
            predicate="was reported in the last {duration}",
        ),
        "valueOlderThan": _age(
            ages.value_older,
            "equals `value` and was reported `duration` ago or longer",
            "Turns true by itself. For a device it means: has been so for that long. Of a sensor the latest reading counts: "
            "it is true when the sensor said so and fell silent; for readings that go on, use `for`.",
            value="on",
            predicate="is {value}, reported {duration} ago or longer",
        ),
        "valueNewerThan": _age(
            ages.value_newer,
            "equals `value` and was reported less than `duration` ago",
            "For a device it means: was changed to it in that time.",
            value="on",
            predicate="is {value}, reported less than {duration} ago",
        ),
        "valueInLast": _age(
            ages.value_in_last,
            "equals `value` and was reported at most `duration` ago",
            "As valueNewerThan, and still true at exactly `duration`.",
            value="on",
            predicate="is {value}, reported in the last {duration}",
        ),
    },
}

OPERATORS: dict[str, Operator] = {
    symbol: described for section in SECTIONS.values() for symbol, described in section.items()
}
