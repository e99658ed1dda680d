"""Store readings in bulk, without an ORM object per row; a reading that is there already is not stored again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, NamedTuple

from django.db import connection

from aemos.lib.batched import batched
from devices import row_locks
from devices.catalogue import Field
from devices.models import Reading, Variable
from devices.values import measured
from rules import events

# SQLite takes 32,766 parameters in one statement, and a row has six.
SQLITE_ROWS = 5_000


# Different values of one variable that claim one microsecond are kept in the ones after it: as many as a request may hold.
SHIFT_US = 1_000


class Row(NamedTuple):
    """One measured value: a number (true and false are 1 and 0) or a text.

    `received_us` is None but where its own time was ahead of when it was received. `suspect` is why rules do not believe it.
    """

    variable_id: int
    timestamp_us: int
    number: float | None
    text: str | None
    received_us: int | None = None
    suspect: str | None = None

    @property
    def value(self) -> float | str | None:
        return self.number if self.text is None else self.text


def row_of(
    variable_id: int,
    timestamp_us: int,
    value: float | str | bool,
    received_us: int | None = None,
    suspect: str | None = None,
) -> Row:
    if isinstance(value, str):
        return Row(variable_id, timestamp_us, None, value, received_us, suspect)
    return Row(variable_id, timestamp_us, float(value), None, received_us, suspect)


def store(rows: Sequence[Row]) -> list[Row | None]:
    """Stores the rows in the current transaction; gives each as it is stored, and None in the place of a duplicate.

    The same value at the same time is a duplicate. Another value is another reading, which some sender dated to the second: it
    is stored at the next free microsecond. Raises Deleted when a variable does not exist any more.
    """
    if not rows:
        return []
    row_locks.hold(Variable, {row.variable_id for row in rows})
    stored: Sequence[Row | None] = rows
    if len(set(map(key, rows))) < len(rows):
        stored = _placed(rows, {})
    new = _insert(stored)
    if len(new) < sum(row is not None for row in stored):
        old = [row for row in stored if row is not None and key(row) not in new]
        again = [None if row is None or key(row) in new else rows[place] for place, row in enumerate(stored)]
        moved = _placed(again, _there(old))
        _insert(moved)
        stored = [
            row if row is not None and key(row) in new else other for row, other in zip(stored, moved, strict=True)
        ]
    return list(stored)


Key = tuple[int, int]
"""Variable id and timestamp in microseconds: each is there once."""


key: Callable[[Row], Key] = itemgetter(0, 1)


def _placed(rows: Sequence[Row | None], taken: dict[Key, float | str | None]) -> list[Row | None]:
    """Each at the first moment from its own that is not taken by another value, which it then takes; None for a duplicate."""
    placed: list[Row | None] = []
    for row in rows:
        found = row
        while found is not None and key(found) in taken:
            is_same = taken[key(found)] == found.value
            found = None if is_same else found._replace(timestamp_us=found.timestamp_us + 1)
        if found is not None:
            taken[key(found)] = found.value
        placed.append(found)
    return placed


def _insert(rows: Iterable[Row | None]) -> set[Key]:
    """Gives the keys of those that were not there."""
    # Always in the same order, so that two workers that store the same readings wait for each other instead of deadlocking.
    ordered = sorted((row for row in rows if row is not None), key=key)
    if not ordered:
        return set()
    return _insert_postgresql(ordered) if connection.vendor == "postgresql" else _insert_sqlite(ordered)


def _there(rows: Sequence[Row]) -> dict[Key, float | str | None]:
    """What is stored at the moments of the rows and shortly after them."""
    return _there_postgresql(rows) if connection.vendor == "postgresql" else _there_sqlite(rows)


def recent(field: Field, *, since_us: int, maximum: int) -> list[tuple[int, float | str | bool | None]]:
    """(when it counts as taken in us, value) of the variable's newest readings from then on that are believed, at most so many,
    ascending.
    """
    rows = Reading.objects.filter(variable_id=field.id, timestamp__gte=events.moment(max(since_us, 0)), suspect=None)
    newest = rows.order_by("-timestamp").values_list("timestamp", "received_at", "number", "text")[:maximum]
    found = [
        (events.microseconds(received_at or at), measured(number, text, field.datatype))
        for at, received_at, number, text in reversed(newest)
    ]
    return sorted(found, key=itemgetter(0))


_POSTGRESQL = """
INSERT INTO devices_reading (variable_id, "timestamp", number, text, received_at, suspect)
SELECT v, timestamptz 'epoch' + t * interval '1 microsecond', n, s, timestamptz 'epoch' + r * interval '1 microsecond', q
FROM unnest(%b::bigint[], %b::bigint[], %b::float8[], %b::text[], %b::bigint[], %b::text[]) AS incoming(v, t, n, s, r, q)
ON CONFLICT (variable_id, "timestamp") DO NOTHING
RETURNING variable_id, (extract(epoch FROM "timestamp") * 1000000)::bigint
"""


def _insert_postgresql(rows: Sequence[Row]) -> set[Key]:
    import psycopg

    # Not Django's cursor, which writes the parameters into the statement in Python: arrays go to the server in binary.
    with psycopg.Cursor(connection.connection) as cursor:
        cursor.execute(_POSTGRESQL, [list(column) for column in zip(*rows, strict=True)])
        return set(cursor.fetchall())


_THERE_POSTGRESQL = """
SELECT variable_id, (extract(epoch FROM "timestamp") * 1000000)::bigint, number, text
FROM unnest(%b::bigint[], %b::bigint[]) AS wanted(v, t) JOIN devices_reading ON variable_id = v
AND "timestamp" BETWEEN timestamptz 'epoch' + t * interval '1 microsecond'
AND timestamptz 'epoch' + (t + %s) * interval '1 microsecond'
"""


def _there_postgresql(rows: Sequence[Row]) -> dict[Key, float | str | None]:
    import psycopg

    with psycopg.Cursor(connection.connection) as cursor:
        columns = [[row.variable_id for row in rows], [row.timestamp_us for row in rows], SHIFT_US]
        cursor.execute(_THERE_POSTGRESQL, columns)
        return {(variable, at): number if text is None else text for variable, at, number, text in cursor.fetchall()}


_SQLITE = """
INSERT INTO devices_reading (variable_id, "timestamp", number, text, received_at, suspect) VALUES ROWS
ON CONFLICT (variable_id, "timestamp") DO NOTHING RETURNING variable_id, "timestamp"
"""


def _insert_sqlite(rows: Sequence[Row]) -> set[Key]:
    new: set[Key] = set()
    for batch in batched(rows, SQLITE_ROWS):
        new |= _insert_sqlite_chunk(batch)
    return new


def _insert_sqlite_chunk(rows: Sequence[Row]) -> set[Key]:
    texts = {_sqlite_time(row.timestamp_us): row.timestamp_us for row in rows}
    statement = _SQLITE.replace("ROWS", ",".join(["(%s, %s, %s, %s, %s, %s)"] * len(rows)))
    parameters = [
        value
        for row in rows
        for value in (
            row.variable_id,
            _sqlite_time(row.timestamp_us),
            row.number,
            row.text,
            row.received_us and _sqlite_time(row.received_us),
            row.suspect,
        )
    ]
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return {(variable_id, texts[str(text)]) for variable_id, text in cursor.fetchall()}


_THERE_SQLITE = """
WITH wanted(v, begins, ends) AS (VALUES ROWS) SELECT variable_id, "timestamp", number, text
FROM wanted JOIN devices_reading ON variable_id = v AND "timestamp" BETWEEN begins AND ends
"""


def _there_sqlite(rows: Sequence[Row]) -> dict[Key, float | str | None]:
    found: dict[Key, float | str | None] = {}
    for batch in batched(rows, SQLITE_ROWS):
        statement = _THERE_SQLITE.replace("ROWS", ",".join(["(%s, %s, %s)"] * len(batch)))
        parameters: list[Any] = []
        for variable_id, timestamp_us, *_ in batch:
            parameters += (variable_id, _sqlite_time(timestamp_us), _sqlite_time(timestamp_us + SHIFT_US))
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            for variable_id, text_of_time, number, text in cursor.fetchall():
                at = datetime.fromisoformat(str(text_of_time)).replace(tzinfo=UTC)
                found[variable_id, events.microseconds(at)] = number if text is None else text
    return found


def _sqlite_time(timestamp_us: int) -> str:
    """The text that Django stores for a moment in SQLite, so that the ORM finds what is written here."""
    return str(events.moment(timestamp_us).replace(tzinfo=None))
