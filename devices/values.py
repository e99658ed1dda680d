"""The datatypes of variables and states, and whether a value fits one."""

from __future__ import annotations

import math

from django.db import models

MAXIMUM_TEXT_LENGTH = 1_000
# Readings are kept as floats of 64 bits: beyond this not every whole number is one.
MAXIMUM_INTEGER = 2**53


class Datatype(models.TextChoices):
    NUMBER = "number"
    STRING = "string"
    BOOLEAN = "boolean"


# A member of an enumeration takes longer to look up than the value takes to judge.
_NUMBER, _BOOLEAN = Datatype.NUMBER.value, Datatype.BOOLEAN.value


def value_problem(value: object, datatype: str) -> str:
    """Why the value is not of the datatype, as the end of a sentence; empty when it is."""
    if datatype == _NUMBER:
        return _number_problem(value)
    if datatype == _BOOLEAN:
        return "" if isinstance(value, bool) else f"must be true or false, not {_kind(value)}"
    if not isinstance(value, str):
        return f"must be a string, not {_kind(value)}"
    if len(value) > MAXIMUM_TEXT_LENGTH:
        return f"is longer than {MAXIMUM_TEXT_LENGTH} characters"
    # PostgreSQL stores no NUL in a text: refused now, rather than after the event was accepted.
    return "holds a NUL character" if "\x00" in value else ""


def measured(number: float | None, text: str | None, datatype: str) -> float | str | bool | None:
    """The value of a reading, which is stored as a number (1 and 0 for true and false) or a text."""
    if number is None:
        return text
    return bool(number) if datatype == Datatype.BOOLEAN else number


def _number_problem(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else "is not a finite number"
    if isinstance(value, bool) or not isinstance(value, int):
        return f"must be a number, not {_kind(value)}"
    return "" if abs(value) <= MAXIMUM_INTEGER else "cannot be kept exactly: a whole number has at most 53 bits"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
