"""Keep variables from being deleted while their readings are stored.

This is what a foreign key of each reading would do, row by row, at a third of the cost of the row; here it is one statement for
all rows of a transaction.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from django.db import connection
from django.db.models.signals import pre_delete

from devices.models import Variable


class VariableDeleted(Exception):
    """A variable was deleted after its readings were accepted."""


def hold(ids: Collection[int]) -> None:
    """Until the end of the transaction none of these variables can be deleted. Raises VariableDeleted when one is gone."""
    found = _lock(ids) if connection.vendor == "postgresql" else Variable.objects.filter(pk__in=ids).count()
    if found < len(ids):
        raise VariableDeleted("a variable was deleted after its readings were accepted")


# In one order, so that no two transactions wait for each other. Not the lock of an update: a variable may be renamed meanwhile.
_LOCK = "SELECT id FROM devices_variable WHERE id = ANY(%b::bigint[]) ORDER BY id FOR KEY SHARE"


def _lock(ids: Collection[int]) -> int:
    import psycopg

    # Not Django's cursor, which writes the parameters into the statement in Python.
    with psycopg.Cursor(connection.connection) as cursor:
        cursor.execute(_LOCK, [[*ids]])
        return cursor.rowcount


def connect_signals() -> None:
    pre_delete.connect(_wait_for_readings, sender=Variable, dispatch_uid="variable locks")


def _wait_for_readings(instance: Variable, **_: Any) -> None:
    """Before its readings are deleted: those that are being stored are then among them, and nobody stores more."""
    Variable.objects.select_for_update().filter(pk=instance.pk).first()
