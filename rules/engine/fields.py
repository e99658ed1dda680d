"""Reading the JSON of a node: fields in, checked values out, and every problem noted with its path."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

from rules.engine.exceptions import Problem

LARGEST = sys.float_info.max
"""The largest double, about 1.8e308; integers go on beyond it, and other JSON readers take those for infinity."""

MAX_TEXT = 1_000
"""Characters of a configured text; no sensor or device may send a longer one either."""

MAX_LIST = 100
"""Entries of a configured list."""

Check = Callable[[object], str | None]
"""Says what is wrong with a configured value, or None."""

_UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or a float; True and False are not numbers, nor is the text "6.5"."""
    return type(value) is int or type(value) is float


def check_number(value: object) -> str | None:
    """Refuse what is not a number that a double can hold: NaN, the infinities and integers beyond 1.8e308 too."""
    if not is_number(value):
        return "must be a number"
    return None if -LARGEST <= value <= LARGEST else "must be a finite number"


def check_scalar(value: object) -> str | None:
    """Refuse what is neither text nor a bool nor a finite number."""
    if isinstance(value, str | bool):
        return None
    return None if check_number(value) is None else "must be a finite number, text, true or false"


def not_comparable(value: object) -> str | None:
    """Refuse what no value can equal: what is no scalar, and text that is longer than values can be."""
    if isinstance(value, str):
        return None if len(value) <= MAX_TEXT else f"must not be longer than {MAX_TEXT} characters"
    return check_scalar(value)


def check_text(value: object) -> str | None:
    """Refuse what is not text of 1 to MAX_TEXT characters."""
    if not isinstance(value, str) or not value:
        return "must be non-empty text"
    return not_comparable(value)


def check_list(check: Check) -> Check:
    """Make a check for a list of 1 to MAX_LIST entries that `check` accepts; it names the first entry that is refused."""

    def complaint(value: object) -> str | None:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_LIST:
            return f"must be a list of 1 to {MAX_LIST} entries"
        for position, entry in enumerate(value):
            if (problem := check(entry)) is not None:
                return f"entry {position + 1} {problem}"
        return None

    return complaint


def not_an_item(value: object) -> str | None:
    """Refuse what can be no item of a comma-separated list: what is no text, is empty, has blanks around it or a comma in it."""
    if (problem := check_text(value)) is not None:
        return problem
    text = str(value)
    return None if text == text.strip() and "," not in text else "must have neither a comma nor blanks around it"


def check_range(value: object) -> str | None:
    """Refuse what is not `[low, high]`, two finite numbers in ascending order."""
    if not isinstance(value, list) or len(value) != 2 or any(check_number(end) for end in value):
        return "must be [low, high], two finite numbers"
    return None if value[0] <= value[1] else "must be [low, high] with low not above high"


def check_name(value: object) -> str | None:
    """Refuse text that nobody can see is wrong: empty, with blanks around it, with characters that do not print."""
    if not isinstance(value, str) or not value:
        return "must be non-empty text"
    return None if value == value.strip() and value.isprintable() else "must be printable text without blanks around it"


def check_uuid(value: object) -> str | None:
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

    def only(self, keys: tuple[str, ...], *, misplaced: Mapping[str, str] | None = None) -> None:
        """Refuse every other key: a misspelt one that is passed over is a rule that silently does not do its work.

        `misplaced` says of keys that people put here by mistake what to do instead.
        """
        for key in self._config or ():
            if key not in keys:
                unknown = f"unknown key; known here: {', '.join(keys)}"
                self.refuse(key, (misplaced or {}).get(key, unknown))

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
