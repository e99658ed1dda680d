"""Readings on their way into their table, and a variable that is deleted meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import pytest
from django.db import connection, transaction

from devices.models import Reading, Variable
from devices.row_locks import Deleted
from rules.processing import readings
from rules.processing.readings import Row
from tests import builders

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ph() -> Variable:
    return Variable.objects.get(sensor=builders.sensor(builders.organization()), name="ph")


def test_only_what_is_new_is_stored(ph: Variable) -> None:
    first, second = Row(ph.pk, 1_000_000, 6.1, None), Row(ph.pk, 2_000_000, 6.2, None)

    assert readings.store([first]) == {first[:2]}
    assert readings.store([second, first]) == {second[:2]}
    assert set(Reading.objects.values_list("number", flat=True)) == {6.1, 6.2}


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
