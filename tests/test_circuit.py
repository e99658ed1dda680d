"""The circuit line by line: what is accepted in which state at which depth, and how the state moves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.admission import circuit, rates
from rules.admission.circuit import Samples, State, Thresholds
from rules.admission.rates import Rate

THRESHOLDS = Thresholds(recovery=5_000, warning=10_000, critical=50_000)
PRIORITIES = range(1, 11)
ORDER = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
# One depth inside every band that a threshold begins.
BANDS = (0, 2_999, 3_001, 5_000, 9_999, 10_000, 39_999, 40_000, 49_999, 50_000, 59_999, 60_000, 99_999)


def judged(state: State, priority: int, depth: int, **options: bool) -> tuple[bool, str]:
    verdict = circuit.decide(state, priority, depth=depth, thresholds=THRESHOLDS, hard=THRESHOLDS.hard, **options)
    assert (verdict.queue_depth, verdict.circuit_state) == (depth, state)
    return verdict.accept, verdict.reason


def expected(state: State, priority: int, depth: int) -> tuple[bool, str]:
    """The rules again in other words, as they are documented."""
    if depth >= 60_000:
        return False, "hard-limit"
    if priority <= 2:
        return True, "high-priority-override" if state == "OPEN" or depth >= 50_000 else "accepted"
    if state == "OPEN":
        return False, "circuit-open"
    if state == "HALF_OPEN" and depth >= 10_000:
        return False, "circuit-reopened"
    if depth >= 50_000:
        return False, "queue-critical"
    if priority > 5 and (depth >= 40_000 or state == "HALF_OPEN"):
        return False, "low-priority-shed"
    return True, "accepted"


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("depth", BANDS)
@pytest.mark.parametrize("priority", PRIORITIES)
def test_every_state_depth_and_priority_has_its_verdict(state: State, depth: int, priority: int) -> None:
    assert judged(state, priority, depth) == expected(state, priority, depth)


def test_open_circuit_rejects_normal_but_accepts_critical() -> None:
    assert judged(State.OPEN, 5, 20_000) == (False, "circuit-open")
    assert judged(State.OPEN, 1, 20_000) == (True, "high-priority-override")


def test_priority_1_is_accepted_between_recovery_and_critical_in_an_open_circuit() -> None:
    assert judged(State.OPEN, 1, 30_000)[0]


def test_low_priority_is_shed_before_normal() -> None:
    assert judged(State.CLOSED, 10, 40_000) == (False, "low-priority-shed")
    assert judged(State.CLOSED, 5, 40_000) == (True, "accepted")


def test_disabled_backpressure_accepts_everything_below_the_hard_cap() -> None:
    for state in State:
        assert judged(state, 10, 59_999, enabled=False) == (True, "backpressure-disabled")
        assert judged(state, 1, 60_000, enabled=False) == (False, "hard-limit")


@given(state=st.sampled_from(State), depth=st.integers(0, THRESHOLDS.hard - 1))
def test_priority_1_is_accepted_at_every_depth_below_the_hard_cap_in_every_state(state: State, depth: int) -> None:
    assert judged(state, 1, depth)[0]


@given(st.sampled_from(State), st.sampled_from(PRIORITIES), st.integers(0, 70_000), st.integers(0, 70_000))
def test_more_depth_never_accepts_what_less_depth_refuses(state: State, priority: int, one: int, other: int) -> None:
    less, more = sorted((one, other))
    assert judged(state, priority, less)[0] or not judged(state, priority, more)[0]


@given(st.sampled_from(State), st.sampled_from(PRIORITIES), st.sampled_from(PRIORITIES), st.integers(0, 70_000))
def test_a_less_urgent_event_is_never_accepted_where_a_more_urgent_is_not(
    state: State, one: int, other: int, depth: int
) -> None:
    urgent, patient = sorted((one, other))
    assert judged(state, urgent, depth)[0] or not judged(state, patient, depth)[0]


class Run:
    """A circuit fed with depths, one sample every quarter of a second."""

    def __init__(self, state: State = State.CLOSED) -> None:
        self.state, self.since, self.now, self.samples = state, -math.inf, 0.0, Samples()
        self.reason = ""
        self.opened: list[float] = []

    def feed(self, depths: Sequence[int]) -> Run:
        for depth in depths:
            self.now += 0.25
            self.samples = self.samples.seen(depth, thresholds=THRESHOLDS, now=self.now)
            to, reason = circuit.next_state(
                self.state, depth, thresholds=THRESHOLDS, samples=self.samples, now=self.now, since=self.since
            )
            if to != self.state:
                self.state, self.since, self.reason = to, self.now, reason
                self.opened += [self.now] if to == State.OPEN else []
        return self


def test_the_circuit_opens_at_the_second_critical_sample() -> None:
    assert Run().feed([50_000]).state == State.CLOSED
    run = Run().feed([50_000, 50_000])
    assert (run.state, run.reason) == (State.OPEN, "queue-critical")


def test_the_circuit_opens_at_once_far_above_critical() -> None:
    assert Run().feed([60_000]).state == State.OPEN


def test_a_burst_that_is_worked_off_does_not_open_the_circuit() -> None:
    assert Run().feed([50_000, 49_999] * 50).state == State.CLOSED


def test_an_open_circuit_stays_open_at_least_five_seconds() -> None:
    run = Run().feed([60_000]).feed([0] * 19)
    assert run.state == State.OPEN
    run.feed([0])
    assert (run.state, run.reason) == (State.HALF_OPEN, "queue-recovering")


def test_an_open_circuit_waits_for_recovery() -> None:
    assert Run().feed([60_000]).feed([5_001] * 100).state == State.OPEN
    assert Run().feed([60_000]).feed([5_000] * 100).state == State.HALF_OPEN


def test_a_half_open_circuit_closes_at_60_percent_of_recovery() -> None:
    assert Run(State.HALF_OPEN).feed([3_001]).state == State.HALF_OPEN
    run = Run(State.HALF_OPEN).feed([3_000])
    assert (run.state, run.reason) == (State.CLOSED, "queue-recovered")


def test_a_half_open_circuit_opens_again_at_warning() -> None:
    assert Run(State.HALF_OPEN).feed([9_999]).state == State.HALF_OPEN
    run = Run(State.HALF_OPEN).feed([10_000])
    assert (run.state, run.reason) == (State.OPEN, "circuit-reopened")


DEPTHS = st.lists(st.sampled_from((0, 3_000, 4_000, 5_000, 9_000, 10_000, 45_000, 50_000, 60_000)), max_size=480)


@given(DEPTHS)
def test_no_sequence_of_depths_makes_the_circuit_open_more_than_12_times_a_minute(depths: list[int]) -> None:
    opened = Run().feed(depths).opened
    for moment in opened:
        assert sum(1 for other in opened if moment <= other < moment + 60) <= 12


def test_swinging_between_recovery_and_critical_opens_at_most_12_times_a_minute() -> None:
    opened = Run().feed([60_000, 0, 0, 0] * 240).opened
    assert 1 <= sum(1 for moment in opened if moment < 60) <= 12


@pytest.mark.parametrize("priority", PRIORITIES)
@given(depths=DEPTHS)
def test_a_heavier_load_is_never_in_a_milder_state_at_the_same_clock(priority: int, depths: list[int]) -> None:
    """Depth by depth at least as much: the circuit of the heavier load is as far open or farther, once both have settled."""
    lighter, heavier = Run().feed(depths), Run().feed([depth + 1_000 for depth in depths])
    for run in (lighter, heavier):
        run.feed([(depths[-1] if depths else 0) + (1_000 if run is heavier else 0)] * 40)
    assert ORDER[lighter.state] <= ORDER[heavier.state]


@pytest.mark.parametrize(
    ("limit", "critical", "warning", "recovery"),
    [
        (math.inf, 50_000, 10_000, 5_000),
        (200 * 30, 6_000, 3_000, 1_500),
        (30_000, 30_000, 10_000, 5_000),
        (0, 5_000, 2_500, 1_250),
    ],
)
def test_thresholds_shrink_to_what_drains_within_the_budget(
    limit: float, critical: int, warning: int, recovery: int
) -> None:
    shrunk = THRESHOLDS.within(min(limit, 10**9))

    assert (shrunk.critical, shrunk.warning, shrunk.recovery) == (critical, warning, recovery)


@pytest.mark.parametrize(
    ("organizations", "held", "limit"),
    [
        ({1: 900}, 900, 900),
        ({1: 900, 2: 100}, 900, 500),
        ({1: 400, 2: 200, 3: 200, 4: 100, 5: 100}, 400, 250),
        ({2: 10}, 0, 10),
        ({}, 0, 0),
    ],
)
def test_an_organization_may_hold_a_quarter_or_an_equal_share(
    organizations: dict[int, int], held: int, limit: int
) -> None:
    assert circuit.share_of(1, organizations) == (held, limit)


def observed(samples: Sequence[tuple[float, int]]) -> Rate:
    rate = Rate()
    for now, count in samples:
        rate.observe(now, count)
    return rate


def test_a_rate_is_unknown_until_two_seconds_were_observed() -> None:
    assert observed([(0, 0), (1, 100)]).value is None
    assert observed([(0, 0), (1, 100), (2, 200)]).value == pytest.approx(100)


def test_a_collapse_shows_within_two_seconds() -> None:
    steady = [(second / 4, second * 25) for second in range(41)]
    stopped = [(10 + second / 4, 1000) for second in range(1, 10)]
    rate = observed(steady + stopped)

    assert rate.value == pytest.approx(100 * math.exp(-9 / 40), rel=0.05)
    assert rate.cautious == 0


def test_time_without_a_backlog_does_not_lower_the_rate() -> None:
    rate = observed([(0, 0), (1, 100), (2, 200), (3, 300)])
    rate.observe(60, 300, counts=False)
    rate.observe(61, 400)

    assert rate.value == pytest.approx(100)


def test_a_lane_waits_for_the_lanes_before_it() -> None:
    found = rates.delays(
        ("critical", "normal", "low"),
        depths={"critical": 100, "normal": 900, "low": 0},
        drain_rate=200.0,
        arrivals={"critical": 50.0, "normal": 150.0, "low": None},
    )

    assert found == {"critical": 0.5, "normal": pytest.approx(1000 / 150), "low": math.inf}


def test_without_a_backlog_there_is_no_delay_and_without_a_rate_none_is_known() -> None:
    found = rates.delays(("a", "b"), depths={"a": 0, "b": 5}, drain_rate=None, arrivals={"a": None, "b": None})

    assert found == {"a": 0.0, "b": None}


@given(
    depth=st.integers(0, 10**6),
    rate=st.none() | st.floats(0, 10**5),
    arrivals=st.floats(0, 10**5),
    budget=st.sampled_from((2.0, 30.0, 120.0)),
)
def test_retry_after_is_whole_seconds_from_1_to_300(
    depth: int, rate: float | None, arrivals: float, budget: float
) -> None:
    wait = rates.retry_after(depth, drain_rate=rate, arrivals=arrivals, budget_seconds=budget)

    assert isinstance(wait, int)
    assert 1 <= wait <= 300


def test_retry_after_follows_the_backlog_and_is_spread() -> None:
    waits = {rates.retry_after(20_000, drain_rate=500.0, arrivals=0.0, budget_seconds=30.0) for _ in range(200)}

    assert min(waits) >= 25
    assert max(waits) <= 38
    assert len(waits) > 5
