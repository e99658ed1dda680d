"""Regular expressions of rules, on RE2: the time of a match grows with the length of the text and no faster."""

from __future__ import annotations

from collections.abc import Callable

import re2

from rules.engine.fields import MAX_TEXT, check_text

MAX_PATTERN = 200
"""Characters of a pattern."""

MAX_MEMORY = 256 * 1024
"""Bytes that one compiled pattern may take; RE2 refuses what needs more."""


def check_pattern(value: object) -> str | None:
    """Refuse what RE2 cannot compile within the memory that it gets, and say why; also an empty or overlong pattern."""
    if (complaint := check_text(value)) is not None:
        return complaint
    pattern = str(value)
    if len(pattern) > MAX_PATTERN:
        return f"must not be longer than {MAX_PATTERN} characters"
    try:
        _compiled(pattern)
    except UnicodeEncodeError:
        return "holds half of a surrogate pair"
    except re2.error as error:
        return f"is no regular expression that RE2 can use: {_reason(error)}"
    return None


def searching(pattern: str) -> Callable[[str], bool]:
    """Make a test whether a text of at most MAX_TEXT characters holds the pattern anywhere; a longer one holds nothing."""
    search = _compiled(pattern).search

    def holds(text: str) -> bool:
        # Half of a surrogate pair, which UTF-8 does not have, passes as one character, as in Python's own strings.
        return len(text) <= MAX_TEXT and search(text.encode("utf-8", "surrogatepass")) is not None

    return holds


def _compiled(pattern: str) -> re2._Regexp:
    """As bytes, because the wrapper would otherwise translate every position in the text back to characters."""
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.never_capture = True
    options.log_errors = False
    return re2.compile(pattern.encode(), options)


def _reason(error: re2.error) -> str:
    reason = error.args[0]
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
