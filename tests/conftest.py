"""Fixtures that take the place of a plugin's own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from django.db import connections

from deploy.local import LocalSystem
from tests.waiting import until


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test of a whole system that fails shows what the system's processes had to say."""
    report = yield
    if report.failed:
        systems = [each for each in getattr(item, "funcargs", {}).values() if isinstance(each, LocalSystem)]
        report.sections += [("logs of the system", system.newest_logs()) for system in systems]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Generator[None]:
    """A thread or greenlet that keeps a connection to PostgreSQL takes it from the others for good: its test fails for it."""
    yield
    connection = connections["default"]
    pool = getattr(connection, "pool", None)  # SQLite has none
    if pool and connection.connection is None and nextitem is not None:  # after the last test it is closed
        until(lambda: pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"], seconds=5)


@pytest.fixture(scope="session")
def django_db_modify_db_settings_xdist_suffix() -> None:
    """Each process of a parallel run has servers and databases of its own, so the names need no suffix."""


@pytest.fixture
def _old_times_count(settings: Any) -> None:
    """For tests whose readings have times of their own, of long ago: none is too old."""
    settings.LATE_AFTER_SECONDS, settings.MAX_EVENT_AGE_DAYS = 10**9, 36_500


# The same for the processes of a system.
OLD_TIMES_COUNT = {"LATE_AFTER_SECONDS": "1000000000", "MAX_EVENT_AGE_DAYS": "36500"}
