"""Readings on their way into their table, and a variable that is deleted meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import pytest
from django.db import connection, transaction

from devices.models import Reading, Variable
from devices.row_locks import Deleted
from rules import events
from rules.processing import readings
from rules.processing.readings import Row
from tests import builders

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ph() -> Variable:
    return Variable.objects.get(sensor=builders.sensor(builders.organization()), name="ph")


def test_only_what_is_new_is_stored(ph: Variable) -> None:
    first, second = Row(ph.pk, 1_000_000, 6.1, None), Row(ph.pk, 2_000_000, 6.2, None)

    assert readings.store([first]) == [first]
    assert readings.store([second, first]) == [second, None]
    assert set(Reading.objects.values_list("number", flat=True)) == {6.1, 6.2}


def test_another_value_at_the_same_time_is_another_reading_at_the_next_free_microsecond(ph: Variable) -> None:
    """Many senders date to the second."""

    def rows(*values: float, at_us: int = 1_000_000) -> list[Row | None]:
        return [Row(ph.pk, at_us, value, None) for value in values]

    def stored() -> list[tuple[int, float | None]]:
        found = Reading.objects.order_by("timestamp").values_list("timestamp", "number")
        return [(events.microseconds(at), number) for at, number in found]

    assert store(rows(6.1, 6.2, 6.1, 9.9)) == [6.1, 6.2, None, 9.9]
    assert store(rows(6.1, 6.2, 6.1, 9.9)) == [None] * 4, "a worker died after it had stored them"
    assert store(rows(6.2, 5.5)) == [None, 5.5]
    assert store(rows(7.0, at_us=1_000_002)) == [7.0]
    at = [(1_000_000, 6.1), (1_000_001, 6.2), (1_000_002, 9.9), (1_000_003, 5.5), (1_000_004, 7.0)]
    assert stored() == at


def test_a_thousand_values_of_one_moment_are_kept_twice_sent_or_not(ph: Variable) -> None:
    rows = [Row(ph.pk, 1_000_000, float(number), None) for number in range(1_000)]

    assert sum(row is not None for row in readings.store(rows)) == 1_000
    assert readings.store(rows) == [None] * 1_000
    assert Reading.objects.count() == 1_000


def store(rows: Any) -> list[float | None]:
    """The values that were new, None for the others."""
    return [row and row.number for row in readings.store(rows)]


def test_readings_of_a_variable_that_was_deleted_are_not_stored(ph: Variable) -> None:
    gone = ph.pk
    ph.delete()

    with pytest.raises(Deleted):
        readings.store([Row(gone, 1_000_000, 6.1, None)])
    assert not Reading.objects.exists()


def test_who_deletes_a_variable_waits_for_readings_that_are_being_stored_and_leaves_none(ph: Variable) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite lets one transaction write at a time")

    def delete() -> None:
        try:
            Variable.objects.get(pk=ph.pk).delete()
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic():
            readings.store([Row(ph.pk, 1_000_000, 6.1, None)])
            deleting = pool.submit(delete)
            with pytest.raises(NotYet):
                deleting.result(timeout=0.5)
        deleting.result(timeout=10)

    assert not Reading.objects.exists()
    assert not Variable.objects.filter(pk=ph.pk).exists()
