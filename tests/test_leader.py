"""Leadership among equal processes, on a real Redis."""

from __future__ import annotations

import time
from typing import Any

import pytest

from aemos.lib import leader, redis
from aemos.lib.leader import Leader
from tests.test_monitoring import redis_away
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("empty_redis")


@pytest.fixture(autouse=True)
def _short_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "TERM_MS", 400)


def candidates() -> tuple[Leader, Leader]:
    """The first leads, and the second knows."""
    one, two = Leader("aemos:test:leader"), Leader("aemos:test:leader")
    assert one.leads()
    assert not two.leads()
    return one, two


def test_one_leads_as_long_as_it_asks() -> None:
    one, two = candidates()
    for _ in range(8):
        assert one.leads()
        assert not two.leads()
        time.sleep(0.1)


def test_a_leader_that_asks_no_more_is_replaced_at_the_end_of_its_term() -> None:
    one, two = candidates()
    began = time.monotonic()
    until(two.leads, seconds=5)
    assert time.monotonic() - began > 0.3
    assert not one.leads()


def test_who_resigns_is_replaced_at_once_and_may_lead_again() -> None:
    one, two = candidates()
    one.resign()
    assert two.leads()
    assert not one.leads()
    one.resign()
    assert two.leads(), "it was not the other's to give up"
    two.resign()
    assert one.leads()


def test_an_emptied_redis_does_not_make_two_leaders() -> None:
    one, two = candidates()
    redis.client().flushdb()
    assert not two.leads(), "the first still takes itself for the leader"
    assert one.leads()
    assert not two.leads()


def test_a_leader_that_dies_while_redis_is_emptied_is_replaced_after_its_term() -> None:
    _, two = candidates()
    redis.client().flushdb()
    began = time.monotonic()
    until(two.leads, seconds=5)
    assert 0.2 < time.monotonic() - began < 3


def test_while_redis_is_away_the_fallback_counts_and_it_is_logged_once(
    settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = candidates()
    with redis_away(settings):
        assert [one.leads_or(False), one.leads_or(True)] == [False, True]
        assert len(caplog.records) == 1
        one.resign()
    assert one.leads_or(False)
