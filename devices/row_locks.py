"""Keep rows from being deleted while others are written that belong to them.

This is what foreign keys would do row by row, at a third of the cost of a reading; here it is one statement for all rows of a
transaction. Who writes changes of states has locked the states already, because it changes them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from django.db import IntegrityError, connection
from django.db.models import Model
from django.db.models.signals import pre_delete

from devices.models import Device, DeviceState, Organization, Variable

HELD: tuple[type[Model], ...] = (Organization, Device, DeviceState, Variable)


class Deleted(IntegrityError):
    """A row was deleted to which others were about to belong."""


def hold(model: type[Model], ids: Collection[int]) -> None:
    """Until the end of the transaction none of these rows can be deleted. Raises Deleted when one is gone."""
    if not ids:
        return
    rows = model._default_manager.filter(pk__in=ids)
    found = _lock(model, ids) if connection.vendor == "postgresql" else rows.count()
    if found < len(ids):
        raise Deleted(f"a {model._meta.verbose_name} was deleted meanwhile")


def _lock(model: type[Model], ids: Collection[int]) -> int:
    import psycopg

    # In one order, so that no two transactions wait for each other. Not the lock of an update: a row may be renamed meanwhile.
    statement = f"SELECT id FROM {model._meta.db_table} WHERE id = ANY(%b::bigint[]) ORDER BY id FOR KEY SHARE"  # noqa: S608
    connection.ensure_connection()
    # Not Django's cursor, which writes the parameters into the statement in Python.
    with psycopg.Cursor(connection.connection) as cursor:
        cursor.execute(statement, [[*ids]])
        return cursor.rowcount


def connect_signals() -> None:
    for model in HELD:
        pre_delete.connect(_wait_for_writers, sender=model, dispatch_uid="row locks")


def _wait_for_writers(sender: type[Model], instance: Model, **_: Any) -> None:
    """Before what belongs to the row is deleted: what is being written is then among it, and nobody writes more."""
    sender._default_manager.select_for_update().filter(pk=instance.pk).first()
