"""Keep variables and states from being deleted while rows that belong to them are written.

This is what foreign keys would do row by row, at a third of the cost of a reading; here it is one statement for all rows of a
transaction. Who writes changes of states has locked the states already, because it changes them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from django.db import connection
from django.db.models.signals import pre_delete

from devices.models import DeviceState, Variable


class VariableDeleted(Exception):
    """A variable was deleted after its readings were accepted."""


def hold_variables(ids: Collection[int]) -> None:
    """Until the end of the transaction none of them can be deleted. Raises VariableDeleted when one is gone."""
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
    for model in (Variable, DeviceState):
        pre_delete.connect(_wait_for_writers, sender=model, dispatch_uid="row locks")


def _wait_for_writers(sender: type[Variable | DeviceState], instance: Variable | DeviceState, **_: Any) -> None:
    """Before what belongs to the row is deleted: what is being written is then among it, and nobody writes more."""
    sender.objects.select_for_update().filter(pk=instance.pk).first()
