"""Rows as lines of CSV, one at a time, so that a file of any length needs the memory of one row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


class _Echo:
    """A file that gives back what is written to it: csv writes, and the response streams."""

    def write(self, text: str) -> str:
        return text


def csv_lines(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    writer = csv.writer(_Echo())
    yield writer.writerow(header)
    for row in rows:
        yield writer.writerow([_cell(value) for value in row])


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text: whoever sends events writes these cells."""
    text = json.dumps(value, default=str) if isinstance(value, dict | list) else value
    return f"'{text}" if isinstance(text, str) and text.lstrip(" ")[:1] in _FORMULA_STARTS else text
