"""Durations as growers write them, `10s`, `5m`, `2h`, `1d`: text in, microseconds out. Pure."""

from __future__ import annotations

import re

MAX_DAYS = 366
_MICROSECONDS = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])")


def not_a_duration(value: object) -> str | None:
    """Refuse what is not a whole positive number with a unit, or is longer than a year."""
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        return "must be a duration such as 10s, 5m, 2h or 1d"
    if microseconds_of(value) > MAX_DAYS * _MICROSECONDS["d"]:
        return f"must not be longer than {MAX_DAYS}d"
    return None


def microseconds_of(text: str) -> int:
    """Of a text that `not_a_duration` has nothing against."""
    return int(text[:-1]) * _MICROSECONDS[text[-1]]
