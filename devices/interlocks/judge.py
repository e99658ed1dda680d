"""Whether a state may be set to a value now: pure, of rows that the caller has locked and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from devices.interlocks.models import Interlock, Requirement, StateRun, Veto
from devices.latest import Key, Latest
from devices.models import DeviceState

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
Values = Mapping[Key, Latest]
NO_VALUES: Values = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vetoed:
    """Why not, as a sentence. `until`: when it may be possible again, if that is known."""

    kind: Veto.Kind
    detail: str
    until: datetime | None = None


@dataclass(slots=True, kw_only=True)
class Situation:
    """What is known of a state at the moment it is asked to change.

    `runs`: of the last 24 hours and the one that goes on, by beginning. `rivals`: the states that must not be on beside it.
    `requirements`: with their variables and sensors. `values`: the newest of those variables.
    """

    state: DeviceState
    now: datetime
    interlock: Interlock | None = None
    runs: list[StateRun] = field(default_factory=list)
    rivals: Sequence[DeviceState] = ()
    requirements: Sequence[Requirement] = ()
    values: Values = field(default_factory=dict)

    @property
    def running(self) -> StateRun | None:
        """The run that goes on."""
        return next((run for run in reversed(self.runs) if run.ended_at is None), None)


def veto(situation: Situation, value: Any) -> Vetoed | None:
    """Why the state must not be set to the value; None when it may. The state allows the value as such."""
    if locked := _lock(situation):
        return locked
    if situation.state.is_momentary or situation.state.is_on(value):
        return next(_vetoes(situation, value), None)
    return _minimum_on(situation, situation.interlock) if situation.interlock else None


def _vetoes(situation: Situation, value: Any) -> Iterator[Vetoed]:
    """Of a command that makes the state go on, keeps it on, or doses. Another state's interlock may exclude it, too."""
    for rival in situation.rivals:
        if is_perhaps_on(rival):
            yield Vetoed(kind=Veto.Kind.EXCLUDES, detail=f"{rival} is on")
    interlock = situation.interlock
    if interlock is None:
        return
    yield from _must_be_off(situation, interlock, starting=True)
    if situation.running is None:
        yield from _rest(situation, interlock)
        yield from _runs(situation, interlock)
        yield from _on_time(situation, interlock)
    if situation.state.is_momentary:
        yield from _amount(situation, interlock, value)


def _must_be_off(situation: Situation, interlock: Interlock, *, starting: bool) -> Iterator[Vetoed]:
    """Why the state must not be on at this moment, however it came to be; with what is needed only to go on, if `starting`."""
    if not _is_allowed_at(situation.now, interlock):
        yield Vetoed(kind=Veto.Kind.HOURS, detail=f"only from {_hours(interlock)}")
    for requirement in situation.requirements:
        problem = _problem_with(requirement, situation) if starting or requirement.holds_while_on else ""
        if problem:
            yield Vetoed(kind=Veto.Kind.REQUIRES, detail=problem)


def overdue(situation: Situation) -> str:
    """Why a state that is on has to go to its safe value now, whoever wanted it on; empty when it may stay."""
    run, interlock = situation.running, situation.interlock
    if run is None or interlock is None:
        return ""
    lasted = max(situation.now - run.began_at, timedelta())
    if interlock.maximum_on_seconds is not None and lasted >= timedelta(seconds=interlock.maximum_on_seconds):
        return f"it was on for {_time(interlock.maximum_on_seconds)}, its maximum"
    for spent in _on_time(situation, interlock):
        return spent.detail
    if run.off_wanted and lasted >= timedelta(seconds=interlock.minimum_on_seconds or 0):
        return "asked to go off, and its minimum time on is over"
    for why in _must_be_off(situation, interlock, starting=False):
        return why.detail
    return ""


def is_perhaps_on(state: DeviceState) -> bool:
    """Whether it should be on, or its device says that it still is."""
    return state.is_on(state.value) or state.is_on(state.reported_value)


def _lock(situation: Situation) -> Vetoed | None:
    state = situation.state
    if state.locked_until is None or situation.now >= state.locked_until:
        return None
    reason = f": {state.lock_reason}" if state.lock_reason else ""
    detail = f"{state.locked_by} holds it until {_moment(state.locked_until)}{reason}"
    return Vetoed(kind=Veto.Kind.LOCK, detail=detail, until=state.locked_until)


def _minimum_on(situation: Situation, interlock: Interlock) -> Vetoed | None:
    run = situation.running
    if run is None or interlock.minimum_on_seconds is None:
        return None
    until = run.began_at + timedelta(seconds=interlock.minimum_on_seconds)
    if situation.now >= until:
        return None
    detail = f"it stays on for at least {_time(interlock.minimum_on_seconds)} and goes off at {_moment(until)}"
    return Vetoed(kind=Veto.Kind.MINIMUM_ON, detail=detail, until=until)


def _rest(situation: Situation, interlock: Interlock) -> Iterator[Vetoed]:
    ends = [run.ended_at for run in situation.runs if run.ended_at is not None]
    if interlock.minimum_off_seconds is None or not ends:
        return
    until = max(ends) + timedelta(seconds=interlock.minimum_off_seconds)
    if situation.now < until:
        detail = f"it rests for {_time(interlock.minimum_off_seconds)}, until {_moment(until)}"
        yield Vetoed(kind=Veto.Kind.MINIMUM_OFF, detail=detail, until=until)


def _runs(situation: Situation, interlock: Interlock) -> Iterator[Vetoed]:
    for limit, span, word in _limits(interlock.maximum_runs_per_hour, interlock.maximum_runs_per_day):
        begun = [run.began_at for run in situation.runs if run.began_at > situation.now - span]
        if len(begun) >= limit:
            until = begun[-int(limit)] + span if limit else None
            yield Vetoed(kind=Veto.Kind.RUNS, detail=f"it ran {len(begun)} times in {word}, of {limit:g}", until=until)


def _on_time(situation: Situation, interlock: Interlock) -> Iterator[Vetoed]:
    for limit, span, word in _limits(interlock.maximum_on_seconds_per_hour, interlock.maximum_on_seconds_per_day):
        spent = sum(_seconds_on(run, situation.now - span, situation.now) for run in situation.runs)
        if spent >= limit:
            yield Vetoed(kind=Veto.Kind.ON_TIME, detail=f"it was on for {_time(spent)} in {word}, of {_time(limit)}")


def _amount(situation: Situation, interlock: Interlock, value: Any) -> Iterator[Vetoed]:
    for limit, span, word in _limits(interlock.maximum_amount_per_hour, interlock.maximum_amount_per_day):
        dosed = sum(run.amount or 0.0 for run in situation.runs if run.began_at > situation.now - span)
        # Against what sums of decimal fractions lack to be exact.
        if dosed + abs(value) > limit * (1 + 1e-9):
            yield Vetoed(
                kind=Veto.Kind.AMOUNT, detail=f"{value:g} would be too much: {dosed:g} in {word}, of {limit:g}"
            )


def _limits(hour: float | None, day: float | None) -> Iterator[tuple[float, timedelta, str]]:
    if hour is not None:
        yield hour, HOUR, "an hour"
    if day is not None:
        yield day, DAY, "24 hours"


def _seconds_on(run: StateRun, since: datetime, now: datetime) -> float:
    return max((min(run.ended_at or now, now) - max(run.began_at, since)).total_seconds(), 0.0)


def _is_allowed_at(now: datetime, interlock: Interlock) -> bool:
    begin, end = interlock.allowed_from, interlock.allowed_until
    if begin is None or end is None:
        return True
    local: time = now.astimezone(ZoneInfo(interlock.timezone)).time()
    return begin <= local < end if begin < end else local >= begin or local < end


def _hours(interlock: Interlock) -> str:
    return f"{interlock.allowed_from:%H:%M} to {interlock.allowed_until:%H:%M} ({interlock.timezone})"


def _problem_with(requirement: Requirement, situation: Situation) -> str:
    """Why the requirement is not met; empty when it is."""
    found, name = situation.values.get(requirement.key), str(requirement.variable)
    if found is None or found.value is None:
        return f"{name} is not known, and must be {requirement.range}"
    if found.suspicion:
        return f"{name} is suspect ({found.suspicion}), and must be {requirement.range}"
    age = situation.now.timestamp() - found.timestamp_us / 1_000_000
    if age > requirement.fresh_seconds:
        return f"{name} is {_time(age)} old, and must not be older than {_time(requirement.fresh_seconds)}"
    value = found.value
    if requirement.equals is not None:
        is_met = type(value) is type(requirement.equals) and value == requirement.equals
    else:
        is_met = (requirement.minimum is None or value >= requirement.minimum) and (
            requirement.maximum is None or value <= requirement.maximum
        )
    return "" if is_met else f"{name} is {_written(value)}, and must be {requirement.range}"


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)


def _time(seconds: float) -> str:
    """ "90 s", "15 min", "2 h": in the largest unit that leaves no fraction."""
    whole = round(seconds)
    for size, unit in ((3600, "h"), (60, "min")):
        if whole and whole % size == 0:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"
