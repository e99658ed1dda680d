"""Store readings in bulk, without an ORM object per row; a reading that is there already is not stored again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from django.db import connection

from aemos.lib.batched import batched
from devices import row_locks
from devices.catalogue import Field
from devices.models import Reading, Variable
from devices.values import measured
from rules import events

# SQLite takes 32,766 parameters in one statement, and a row has four.
SQLITE_ROWS = 8_000


class Row(NamedTuple):
    """One measured value: a number (true and false are 1 and 0) or a text."""

    variable_id: int
    timestamp_us: int
    number: float | None
    text: str | None


def row_of(variable_id: int, timestamp_us: int, value: float | str | bool) -> Row:
    if isinstance(value, str):
        return Row(variable_id, timestamp_us, None, value)
    return Row(variable_id, timestamp_us, float(value), None)


def store(rows: Sequence[Row]) -> set[tuple[int, int]]:
    """Stores the rows in the current transaction; gives (variable id, timestamp in us) of those that were new.

    Raises Deleted when a variable does not exist any more.
    """
    if not rows:
        return set()
    row_locks.hold(Variable, {row.variable_id for row in rows})
    # Always in the same order, so that two workers that store the same readings wait for each other instead of deadlocking.
    ordered = sorted(rows, key=itemgetter(0, 1))
    return _store_postgresql(ordered) if connection.vendor == "postgresql" else _store_sqlite(ordered)


def recent(field: Field, *, since_us: int, maximum: int) -> list[tuple[int, float | str | bool | None]]:
    """(timestamp in us, value) of the variable's newest readings from then on, at most so many, in ascending order."""
    rows = Reading.objects.filter(variable_id=field.id, timestamp__gte=events.moment(max(since_us, 0)))
    newest = rows.order_by("-timestamp").values_list("timestamp", "number", "text")[:maximum]
    return [(events.microseconds(at), measured(number, text, field.datatype)) for at, number, text in reversed(newest)]


_POSTGRESQL = """
INSERT INTO devices_reading (variable_id, "timestamp", number, text)
SELECT v, timestamptz 'epoch' + t * interval '1 microsecond', n, s
FROM unnest(%b::bigint[], %b::bigint[], %b::float8[], %b::text[]) AS incoming(v, t, n, s)
ON CONFLICT (variable_id, "timestamp") DO NOTHING
RETURNING variable_id, (extract(epoch FROM "timestamp") * 1000000)::bigint
"""


def _store_postgresql(rows: Sequence[Row]) -> set[tuple[int, int]]:
    import psycopg

    # Not Django's cursor, which writes the parameters into the statement in Python: arrays go to the server in binary.
    with psycopg.Cursor(connection.connection) as cursor:
        cursor.execute(_POSTGRESQL, [list(column) for column in zip(*rows, strict=True)])
        return set(cursor.fetchall())


_SQLITE = """
INSERT INTO devices_reading (variable_id, "timestamp", number, text) VALUES ROWS
ON CONFLICT (variable_id, "timestamp") DO NOTHING RETURNING variable_id, "timestamp"
"""


def _store_sqlite(rows: Sequence[Row]) -> set[tuple[int, int]]:
    new: set[tuple[int, int]] = set()
    for batch in batched(rows, SQLITE_ROWS):
        new |= _store_sqlite_chunk(batch)
    return new


def _store_sqlite_chunk(rows: Sequence[Row]) -> set[tuple[int, int]]:
    texts = {_sqlite_time(row.timestamp_us): row.timestamp_us for row in rows}
    statement = _SQLITE.replace("ROWS", ",".join(["(%s, %s, %s, %s)"] * len(rows)))
    parameters = [
        value for row in rows for value in (row.variable_id, _sqlite_time(row.timestamp_us), row.number, row.text)
    ]
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return {(variable_id, texts[str(text)]) for variable_id, text in cursor.fetchall()}


def _sqlite_time(timestamp_us: int) -> str:
    """The text that Django stores for a moment in SQLite, so that the ORM finds what is written here."""
    return str(events.moment(timestamp_us).replace(tzinfo=None))
