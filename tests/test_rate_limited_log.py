"""One message of each kind per interval, and how many were suppressed."""

from __future__ import annotations

import logging

import pytest

from aemos.lib.rate_limited_log import RateLimitedLog


def test_a_kind_is_written_once_per_interval_with_a_count_of_the_suppressed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    limited = RateLimitedLog(logging.getLogger("tests"), seconds=30, clock=lambda: now[0])
    assert limited.is_due("topic")
    for topic in ("a", "b", "c"):
        limited.log("topic", logging.WARNING, "foreign topic %s", topic)
        assert not limited.is_due("topic")
    limited.log("report", logging.WARNING, "unreadable report")
    now[0] = 30.0
    assert limited.is_due("topic")
    limited.log("topic", logging.WARNING, "foreign topic %s", "d")
    assert caplog.messages == ["foreign topic a", "unreadable report", "foreign topic d (and 2 times before)"]


def test_a_recovery_is_logged_once_and_the_next_failure_at_once(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(logging.getLogger("tests"))
    limited.recovered("redis", "Redis answers again")
    for _ in range(2):
        limited.log("redis", logging.WARNING, "Redis is unavailable")
    for _ in range(2):
        limited.recovered("redis", "Redis answers again")
    limited.log("redis", logging.WARNING, "Redis is unavailable")
    assert caplog.messages == ["Redis is unavailable", "Redis answers again", "Redis is unavailable"]


def test_the_traceback_is_added_on_request(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(logging.getLogger("tests"))
    try:
        raise LookupError("of a test")
    except LookupError:
        limited.log("fault", logging.ERROR, "failed", trace=True)
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[0] is LookupError
