"""Import readings of before from a CSV file: lines in, stored readings and a report out.

A wide file has a column of times and one for each variable; a long one has `at`, `variable` and `value`, as our own export. What
is stored already is left as it is; what cannot be used is named by line and column, and costs nothing else of the file. Imported
readings are history: they run no rules.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

from django.db import transaction
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from devices import row_locks
from devices.models import Reading, Sensor, Variable
from devices.values import Datatype, value_problem

TIME_COLUMNS = ("at", "timestamp", "time", "date", "datetime")
BATCH = 2_000
SHOWN_PROBLEMS = 20
_TRUE, _FALSE = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})


class UnusableFile(ValueError):
    """Says what the file lacks as a whole."""


class Problem(NamedTuple):
    """What could not be used: `line` counts from 1, the header included."""

    line: int
    column: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.column}: {self.text}"


@dataclass(slots=True, kw_only=True)
class Report:
    """How an import went; `problems` has the first of them, `refused` counts all."""

    lines: int = 0
    stored: int = 0
    duplicates: int = 0
    refused: int = 0
    empty: int = 0
    problems: list[Problem] = field(default_factory=list)
    by_variable: Counter[str] = field(default_factory=Counter)

    def refuse(self, problem: Problem) -> None:
        self.refused += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append(problem)


class _Cell(NamedTuple):
    variable: Variable
    at: datetime
    value: Any


def read(
    lines: Iterable[str], sensor: Sensor, *, dry_run: bool = False, columns: Mapping[str, str] | None = None
) -> Iterator[Report]:
    """Yields the report after each batch, the last one whole. `columns`: column of the file -> variable, where they differ.

    Times without a zone are UTC. Raises UnusableFile, and django.db.Error; each batch is stored or not in one transaction.
    """
    report = Report()
    rows = csv.reader(lines)
    header = [each.strip().lstrip("\ufeff") for each in next(rows, [])]
    cells = _cells(header, rows, sensor, report, columns or {})
    while batch := list(islice(cells, BATCH)):
        _store(batch, report, dry_run=dry_run)
        yield report
    yield report


def _cells(
    header: list[str], rows: Iterator[list[str]], sensor: Sensor, report: Report, columns: Mapping[str, str]
) -> Iterator[_Cell]:
    known = {row.name: row for row in sensor.variables.all()}
    time_column = next((each for each in header if each.lower() in TIME_COLUMNS), None)
    if time_column is None:
        raise UnusableFile(f"The first line names no column of times: one of {', '.join(TIME_COLUMNS)}.")
    is_long = {"variable", "value"} <= set(header)
    named = {each: columns.get(each, each) for each in header}
    wide = {each: known[name] for each, name in named.items() if name in known}
    if not is_long and not wide:
        raise UnusableFile(
            f"No column is a variable of {sensor}; it has {', '.join(known) or 'none'}, the file {', '.join(header)}."
        )
    for number, row in enumerate(_readable(rows), start=2):
        report.lines += 1
        line = dict(zip(header, row, strict=False))
        at = _time(line.get(time_column, ""))
        if isinstance(at, str):
            report.refuse(Problem(number, time_column, at))
            continue
        if not is_long:
            for column, variable in wide.items():
                yield from _cell(number, column, variable, at, line.get(column, ""), report)
        elif variable_of := known.get(columns.get(line.get("variable", ""), line.get("variable", ""))):
            yield from _cell(number, "value", variable_of, at, line.get("value", ""), report)
        else:
            report.refuse(Problem(number, "variable", f"{line.get('variable', '')!r} is no variable of this sensor"))


def _readable(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise UnusableFile(f"It is no CSV from here on: {error}.") from error


def _cell(number: int, column: str, variable: Variable, at: datetime, text: str, report: Report) -> Iterator[_Cell]:
    if not text.strip():
        report.empty += 1
        return
    value = _value(text.strip(), variable.datatype)
    if problem := value_problem(value, variable.datatype):
        report.refuse(Problem(number, column, f"{text.strip()[:50]!r} {problem}"))
    else:
        yield _Cell(variable, at, value)


def _time(text: str) -> datetime | str:
    """In UTC; a sentence about what is wrong with it."""
    try:
        at = parse_datetime(text.strip())
    except ValueError:
        at = None
    if at is None:
        return f"{text.strip()[:50]!r} is no time: write 2026-05-01T12:00:00Z"
    try:
        at = at.astimezone(UTC) if timezone.is_aware(at) else at.replace(tzinfo=UTC)
    except OverflowError:
        return f"{text.strip()[:50]!r} is out of range"
    return at if at <= timezone.now() else f"{text.strip()[:50]!r} is in the future"


def _value(text: str, datatype: str) -> Any:
    if datatype == Datatype.NUMBER:
        try:
            return float(text)
        except ValueError:
            return text
    if datatype == Datatype.BOOLEAN:
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else text
    return text


@transaction.atomic
def _store(cells: list[_Cell], report: Report, *, dry_run: bool) -> None:
    ids = {cell.variable.pk for cell in cells}
    row_locks.hold(Variable, ids)
    wanted = {(cell.variable.pk, cell.at): cell for cell in cells}
    report.duplicates += len(cells) - len(wanted)
    times = [cell.at for cell in cells]
    stored = Reading.objects.filter(variable_id__in=ids, timestamp__gte=min(times), timestamp__lte=max(times))
    for key in stored.values_list("variable_id", "timestamp"):
        if wanted.pop(key, None):
            report.duplicates += 1
    report.stored += len(wanted)
    report.by_variable.update(cell.variable.name for cell in wanted.values())
    if not dry_run:
        # Somebody else may store one of them at this moment: it stays theirs.
        Reading.objects.bulk_create(map(_reading, wanted.values()), ignore_conflicts=True)


def _reading(cell: _Cell) -> Reading:
    is_text = cell.variable.datatype == Datatype.STRING
    return Reading(
        variable=cell.variable,
        timestamp=cell.at,
        number=None if is_text else float(cell.value),
        text=cell.value if is_text else None,
    )
