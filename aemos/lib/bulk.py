"""Insert, update or look for many rows in one statement and without an ORM object for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec
from django.db import connection

from aemos.lib.batched import batched

# SQLite takes 32,766 parameters in one statement.
SQLITE_PARAMETERS = 32_000


def insert(
    table: str,
    columns: Mapping[str, str],
    rows: Sequence[Sequence[Any]],
    *,
    conflict: str = "",
    returning: Sequence[str] = (),
) -> list[tuple[Any, ...]]:
    """Gives the `returning` columns of the rows that were inserted, as the database has them.

    `columns`: name -> bigint, text, uuid, timestamptz (an aware datetime) or jsonb (what JSON can hold). `conflict` is what
    follows ON CONFLICT. Raises django.db.Error. All names stand in the statement as they are: never one from outside.
    """
    names = ", ".join(f'"{name}"' for name in columns)
    ending = f" ON CONFLICT {conflict}" if conflict else ""
    ending += f" RETURNING {', '.join(returning)}" if returning else ""
    into = _into_postgresql if connection.vendor == "postgresql" else _into_sqlite
    return into(f'INSERT INTO "{table}" ({names})', columns, rows, ending) if rows else []


def update(table: str, columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> None:
    """Sets columns of rows that exist. The first of `columns` is the key; the rest as for `insert`. Raises django.db.Error."""
    if not rows:
        return
    key, *rest = columns
    if connection.vendor == "postgresql":
        types, data = _recordset(columns, rows)
        settings = ", ".join(f'"{name}" = incoming."{name}"' for name in rest)
        source = f"json_to_recordset(%s) AS incoming({types})"
        statement = f'UPDATE "{table}" SET {settings} FROM {source} WHERE "{table}"."{key}" = incoming."{key}"'  # noqa: S608  see `insert`
        with connection.cursor() as cursor:
            cursor.execute(statement, [data])
        return
    settings = ", ".join(f'"{name}" = %s' for name in rest)
    with connection.cursor() as cursor:
        for identifier, *values in _adapted(columns, rows):
            cursor.execute(f'UPDATE "{table}" SET {settings} WHERE "{key}" = %s', [*values, identifier])  # noqa: S608  see `insert`


def present(table: str, column: str, values: Sequence[str]) -> set[str]:
    """Which of these texts the column has. Raises django.db.Error."""
    elements = "json_array_elements_text(%s)" if connection.vendor == "postgresql" else "json_each(%s)"
    statement = f'SELECT "{column}" FROM "{table}" WHERE "{column}" IN (SELECT value FROM {elements})'  # noqa: S608  see `insert`
    with connection.cursor() as cursor:
        cursor.execute(statement, [msgspec.json.encode(values).decode()])
        return {found for (found,) in cursor.fetchall()}


def _into_postgresql(
    beginning: str, columns: Mapping[str, str], rows: Sequence[Sequence[Any]], ending: str
) -> list[tuple[Any, ...]]:
    types, data = _recordset(columns, rows)
    with connection.cursor() as cursor:
        statement = f"{beginning} SELECT * FROM json_to_recordset(%s) AS incoming({types}){ending}"  # noqa: S608  see `insert`
        cursor.execute(statement, [data])
        return cursor.fetchall() if cursor.description else []  # nothing but RETURNING gives rows


def _into_sqlite(
    beginning: str, columns: Mapping[str, str], rows: Sequence[Sequence[Any]], ending: str
) -> list[tuple[Any, ...]]:
    place = f"({', '.join(['%s'] * len(columns))})"
    found: list[tuple[Any, ...]] = []
    for some in batched(rows, SQLITE_PARAMETERS // len(columns)):
        places = ", ".join([place] * len(some))
        with connection.cursor() as cursor:
            cursor.execute(f"{beginning} VALUES {places}{ending}", [*chain.from_iterable(_adapted(columns, some))])
            found += cursor.fetchall() if cursor.description else []
    return found


def _recordset(columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> tuple[str, str]:
    """The rows as one JSON text, and its columns with their types: psycopg makes arrays element by element in Python."""
    types = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
    return types, msgspec.json.encode([dict(zip(columns, row, strict=True)) for row in rows]).decode()


def _adapted(columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    adapt = [_SQLITE.get(kind, _as_it_is) for kind in columns.values()]
    return [[to(value) for to, value in zip(adapt, row, strict=True)] for row in rows]


def _as_it_is(value: Any) -> Any:
    return value


# How Django stores what SQLite has no type for, so that the ORM finds it.
_SQLITE: Mapping[str, Callable[[Any], Any]] = {
    "uuid": lambda value: value and value.hex,
    "timestamptz": lambda value: value and connection.ops.adapt_datetimefield_value(value),
    "jsonb": lambda value: None if value is None else msgspec.json.encode(value).decode(),
}
