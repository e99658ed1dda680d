"""Migrations only add, so that the version before goes on working on the new tables (docs/upgrade.md)."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection, models
from django.db.migrations import operations
from django.db.migrations.loader import MigrationLoader

# The newest migration of each app that a release cannot be asked to be the version before of.
FIRST = {"devices": "0008_people", "notifications": "0004_unpublished", "rules": "0005_circuit_hold"}
# A migration that takes away what no release uses any more: its name, and since which release nothing uses it.
CONTRACTS: dict[str, str] = {}


def newer() -> list[tuple[str, str]]:
    names = MigrationLoader(connection, ignore_no_migrations=True).disk_migrations
    return sorted(key for key in names if key[0] in FIRST and key[1] > FIRST[key[0]])


@pytest.mark.django_db
@pytest.mark.parametrize("app", sorted(FIRST))
def test_the_first_ones_exist(app: str) -> None:
    assert (app, FIRST[app]) in MigrationLoader(connection, ignore_no_migrations=True).disk_migrations


@pytest.mark.django_db
def test_new_migrations_only_add() -> None:
    loader = MigrationLoader(connection, ignore_no_migrations=True)
    problems = [
        f"{app}.{name}: {problem}"
        for app, name in newer()
        if f"{app}.{name}" not in CONTRACTS
        for operation in loader.disk_migrations[app, name].operations
        if (problem := problem_of(operation))
    ]
    assert ("devices", "0009_audit_log") in newer()
    assert problems == []


def problem_of(operation: Any) -> str:
    """What the version before could stumble over; empty when it could not."""
    if isinstance(operation, operations.CreateModel | operations.AddIndex | operations.AlterModelOptions):
        return ""
    if isinstance(operation, operations.AddField):
        field = operation.field
        has_value = field.null or field.many_to_many or field.has_db_default()
        return (
            "" if has_value else f"{operation.model_name}.{operation.name} has no db_default: old code does not fill it"
        )
    return f"{operation.describe()}: take away in a later version, and name it in CONTRACTS"


@pytest.mark.parametrize(
    ("operation", "is_safe"),
    [
        (operations.AddField("Sensor", "site", models.TextField(null=True)), True),
        (operations.AddField("Sensor", "site", models.TextField(db_default="")), True),
        (operations.AddField("Sensor", "site", models.TextField(default="")), False),
        (operations.RemoveField("Sensor", "name"), False),
        (operations.RenameField("Sensor", "name", "title"), False),
        (operations.DeleteModel("Sensor"), False),
        (operations.AlterField("Sensor", "name", models.TextField()), False),
    ],
)
def test_what_old_code_would_stumble_over_is_found(operation: Any, is_safe: bool) -> None:
    assert (problem_of(operation) == "") is is_safe
