"""What becomes of one alarm, without a database: raised, seen again, cleared, flapping, late and repeated requests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import events
from rules.effects.alarm_lifecycle import (
    CLOCK_TOLERANCE,
    AlarmEvent,
    AlarmLifecycle,
    Change,
    Clear,
    FlappingPolicy,
    Raise,
)
from rules.models import Alarm

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
SENSOR = "7b1c2f60-0a4e-4d2c-9a51-3f1f6d1f0002"
FLAPPING_TIMES = 3
_numbers = count(1)


def at(second: float) -> datetime:
    return NOON + timedelta(seconds=second)


def policy(**fields: Any) -> FlappingPolicy:
    known: dict[str, Any] = {"times": FLAPPING_TIMES, "window": timedelta(seconds=100), "now": at(10_000)}
    return FlappingPolicy(**{**known, **fields})


def about(second: float) -> dict[str, Any]:
    return {
        "effect_key": f"effect {next(_numbers)}", "organization_id": 1, "source_type": "sensor", "originator_uuid": SENSOR,
        "type": "high", "timestamp_us": events.microseconds(at(second)), "actor": "pH / alarm",
    }  # fmt: skip


def up(second: float, severity: str = "warning") -> Raise:
    return Raise(**about(second), severity=severity, message=f"at {second}", node="alarm")


def down(second: float) -> Clear:
    return Clear(**about(second))


class Table:
    """The rows of one alarm, as the database would hold them, and what was told."""

    def __init__(self, **fields: Any) -> None:
        self.rows: list[Alarm] = []
        self.alarm_events: list[AlarmEvent] = []
        self.policy = policy(**fields)

    def apply(self, *requests: Raise | Clear) -> None:
        case = AlarmLifecycle(self.rows, self.policy)
        case.apply(requests)
        for row in case.written.new:
            row.pk, row._state.adding = next(_numbers), False
            self.rows.append(row)
        self.alarm_events += case.alarm_events

    @property
    def told(self) -> list[str]:
        return [each.payload["change"] for each in self.alarm_events]

    @property
    def open(self) -> Alarm:
        (row,) = (row for row in self.rows if row.state != Alarm.State.CLEARED)
        return row

    def seen(self) -> list[Any]:
        return [
            (
                row.state,
                row.severity,
                row.is_flapping,
                row.raised_at,
                row.last_event_at,
                row.times_raised,
                row.cleared_at,
            )
            for row in self.rows
        ]


def acknowledge(row: Alarm) -> None:
    row.state, row.acknowledged_at, row.acknowledged_by = Alarm.State.ACKNOWLEDGED, NOON, "olga"


def clear_by_person(row: Alarm, second: float) -> None:
    row.state, row.cleared_at, row.cleared_by = Alarm.State.CLEARED, at(second), "olga"


def test_an_alarm_is_raised_once_and_seen_again() -> None:
    table = Table()
    table.apply(up(1), up(2), up(3))

    assert (table.open.times_raised, table.open.raised_at, table.open.last_raised_at) == (3, at(1), at(3))
    assert table.open.message == "at 1"
    assert table.told == ["raised"]
    assert table.alarm_events[0].payload["timesRaised"] == 1, "what is told is what was so at that moment"


def test_an_alarm_is_cleared_and_raised_as_a_new_one() -> None:
    table = Table()
    table.apply(up(1), down(2))
    table.apply(down(3), up(4))

    assert [(row.state, row.cleared_at, row.cleared_by) for row in table.rows] == [
        ("cleared", at(2), "pH / alarm"), ("active", None, ""),
    ]  # fmt: skip
    assert table.told == ["raised", "cleared", "raised"]


def test_a_higher_severity_is_told_and_takes_the_acknowledgement_away() -> None:
    table = Table()
    table.apply(up(1))
    acknowledge(table.open)
    table.apply(up(2), up(3, "critical"), up(4, "info"), up(5, "critical"))

    row = table.open
    assert (row.severity, row.state, row.acknowledged_at, row.acknowledged_by) == ("critical", "active", None, "")
    assert (row.message, row.times_raised) == ("at 3", 5)
    assert table.told == ["raised", "severity-raised"]
    assert table.alarm_events[1].severity == "critical"


def test_late_readings_neither_raise_nor_clear_what_newer_ones_decided() -> None:
    table = Table()
    table.apply(up(10), down(20))
    table.apply(up(10), up(15), down(20))
    assert table.told == ["raised", "cleared"]

    table.apply(up(30), up(40))
    table.apply(down(35), up(25, "critical"))
    assert (table.open.severity, table.open.times_raised) == ("warning", 2)
    assert table.told == ["raised", "cleared", "raised"]


@pytest.mark.parametrize("before", [(), (up(0),)])
def test_an_alarm_stays_that_one_event_raises_and_clears_in_whatever_order(before: tuple[Raise, ...]) -> None:
    for requests in ((up(1), down(1)), (down(1), up(1))):
        table = Table()
        table.apply(*before)
        table.apply(*requests)
        table.apply(*requests)
        assert table.open.last_raised_at == at(1)


def test_after_a_person_cleared_it_the_next_reading_raises_it_with_a_late_clock() -> None:
    table = Table()
    table.apply(up(1))
    clear_by_person(table.open, 3_600)
    table.apply(up(1))
    assert len(table.rows) == 1, "the same reading again does not"
    table.apply(up(2))
    assert [row.state for row in table.rows] == ["cleared", "active"]


def test_a_clock_that_is_ahead_does_not_turn_down_what_follows() -> None:
    table = Table(now=NOON)
    table.apply(up(86_400))
    assert table.open.raised_at == NOON + CLOCK_TOLERANCE

    table.policy = policy(now=at(301))
    table.apply(down(301))
    assert table.told == ["raised", "cleared"]


def swing(table: Table, times: int, since: int = 0) -> None:
    for number in range(times):
        table.apply(up(since + 2 * number), down(since + 2 * number + 1))


def test_an_alarm_that_comes_and_goes_is_marked_and_told_once() -> None:
    table = Table()
    swing(table, FLAPPING_TIMES)
    assert table.told == ["raised", "cleared"] * FLAPPING_TIMES

    swing(table, 20, since=10)
    assert table.told == [*["raised", "cleared"] * FLAPPING_TIMES, "flapping"]
    assert len(table.rows) == FLAPPING_TIMES + 1, "and keeps its row"
    assert (table.rows[-1].times_raised, table.rows[-1].state, table.rows[-1].is_flapping) == (20, "cleared", True)


def test_an_alarm_that_comes_and_goes_slowly_is_not_flapping() -> None:
    table = Table()
    for number in range(10):
        table.apply(up(100 * number), down(100 * number + 1))
    assert table.told == ["raised", "cleared"] * 10


def test_a_flapping_alarm_stays_acknowledged_but_a_higher_severity_is_told() -> None:
    table = Table()
    swing(table, FLAPPING_TIMES)
    table.apply(up(10))
    acknowledge(table.open)
    table.apply(down(11), up(12))
    assert (table.open.state, table.open.acknowledged_by) == ("acknowledged", "olga")

    table.apply(down(13), up(14, "critical"))
    assert (table.open.state, table.open.severity, table.told[-1]) == ("active", "critical", "severity-raised")


def test_a_flapping_alarm_that_was_quiet_begins_anew() -> None:
    table = Table()
    swing(table, FLAPPING_TIMES + 1)
    table.apply(up(1_000))

    assert (len(table.rows), table.open.is_flapping, table.told[-1]) == (FLAPPING_TIMES + 2, False, "raised")


@pytest.mark.parametrize("first", [(), (up(0),)])
def test_only_a_new_row_can_have_been_forestalled(first: tuple[Raise, ...]) -> None:
    table = Table()
    table.apply(*first)
    case = AlarmLifecycle(table.rows, policy())
    case.apply([up(1), down(2), up(3)])

    assert (case.contested is case.open) is (not first)


def test_an_action_that_rests_is_asked_only_for_what_would_be_told() -> None:
    asked: list[str] = []

    def permits(rest: object, effect_key: str) -> bool:
        asked.append(effect_key)
        return False

    table = Table()
    table.apply(up(1))
    table.policy = policy(permits=permits)
    worse, cleared = up(3, "critical"), down(4)
    table.apply(up(2), worse, cleared)

    assert asked == [worse.effect_key, cleared.effect_key]
    assert (table.open.times_raised, table.open.severity) == (3, "warning")


REQUESTS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 20), st.sampled_from(["info", "warning", "critical"])), max_size=40
)


def requests_of(drawn: Sequence[tuple[bool, int, str]]) -> list[Raise | Clear]:
    """In the order of their times, as one originator sends them; a number is the time since the one before."""
    second, found = 0, []
    for raised, gap, severity in drawn:
        second += gap
        found.append(up(second, severity) if raised else down(second))
    return found


@given(REQUESTS, st.lists(st.integers(1, 5), min_size=1))
def test_batches_of_any_size_and_each_of_them_twice_come_to_the_same(
    drawn: list[tuple[bool, int, str]], sizes: list[int]
) -> None:
    requests = requests_of(drawn)
    whole, split = Table(), Table()
    whole.apply(*requests)
    rest, turn = list(requests), 0
    while rest:
        size = sizes[turn % len(sizes)]
        for _ in range(2):
            split.apply(*rest[:size])
        rest, turn = rest[size:], turn + 1

    assert split.seen() == whole.seen()
    assert split.told == whole.told
    assert sum(row.state != Alarm.State.CLEARED for row in whole.rows) <= 1
    assert set(whole.told) <= set(Change)
