"""Durations as people write them, such as "10s", "5m", "2h" or "1d", as microseconds."""

from __future__ import annotations

import re

MAX_DAYS = 366
"""Longer than a year is a slip of the finger, and far beyond what readings are kept for."""

SECOND_US = 1_000_000
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
MAX_US = MAX_DAYS * _SECONDS["d"] * SECOND_US
_FORM = re.compile(r"([1-9][0-9]{0,8})([smhd])")


def check_duration(value: object) -> str | None:
    """Refuse what is not a whole positive number with its unit, at most 366 days."""
    if not isinstance(value, str) or not _FORM.fullmatch(value):
        return "must be a duration such as 10s, 5m, 2h or 1d"
    return None if microseconds_of(value) <= MAX_US else f"must not be longer than {MAX_DAYS}d"


def microseconds_of(text: str) -> int:
    """The length in microseconds; raises ValueError for a text that `check_duration` refuses for its form."""
    if not (form := _FORM.fullmatch(text)):
        raise ValueError(f"{text!r} is no duration")
    number, unit = form.groups()
    return int(number) * _SECONDS[unit] * SECOND_US
