"""Try a rule chain on what was stored: when it would have run in a span of time, and what it would have done.

The chain is compiled and run as a worker runs it: with each stored reading, when time alone changes something, and at the times
of its schedule. What it sets counts as done, so that later runs see it. What is not played: interlocks, what other chains and
people would have done in answer, and runs with readings that were suspect.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import reduce
from typing import Any, NamedTuple

from django.conf import settings

from devices.latest import Latest
from devices.models import DeviceState, Reading, StateChange, Variable
from devices.values import measured, value_problem
from rules import events
from rules.authoring import describe
from rules.authoring.sentences import ChainDescriber
from rules.effects import perform
from rules.engine import chains
from rules.engine.chains import Chain
from rules.engine.context import Trigger
from rules.engine.effect_types import ClearAlarm, DeviceCommand, Effect, RaiseAlarm
from rules.engine.exceptions import ChainFailed
from rules.engine.values import Reference, Sample, Source, Value
from rules.events import CHAIN
from rules.models import RuleChain, RuleNode
from rules.processing import condition_memory, loading
from rules.processing.quality import sample_of

MAXIMUM_READINGS = 20_000
MAXIMUM_SECONDS = 4.0
TURN_SECONDS, REST_SECONDS = 0.02, 0.002
MAXIMUM_SHOWN = 100
EVENT_ID = "backtest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One action at one time, in words."""

    at: datetime
    text: str


@dataclass(slots=True, kw_only=True)
class Backtest:
    """What a chain would have done from `begin` to `end`.

    `done` has at most the first hundred actions, `count` says how many there were; `held` those of which nothing would have
    come. `failures` are texts, each once. `is_cut`: there were more readings, or it took longer, than one answer may.
    """

    begin: datetime
    end: datetime
    readings: int = 0
    runs: int = 0
    count: int = 0
    held: int = 0
    done: list[Done] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_cut: bool = False


class Given(NamedTuple):
    """A reading that somebody gives: uuid of the sensor, name of the variable, what it measured and when."""

    uuid: str
    key: str
    value: Value
    at: datetime


class NotRead(ValueError):
    """A given reading, counted from 0, is of no variable that the chain reads, or no value of its datatype."""

    def __init__(self, position: int, field: str, text: str) -> None:
        super().__init__(text)
        self.position, self.field = position, field


class _Happened(NamedTuple):
    """What becomes known of a source at a time, all of it at once; of a schedule and of a timer nothing."""

    at_us: int
    order: int
    source: Source
    values: Mapping[str, Value]
    runs: bool


def run(
    chain: RuleChain,
    nodes: Sequence[RuleNode],
    *,
    begin: datetime,
    end: datetime,
    given: Sequence[Given] | None = None,
    teller: ChainDescriber | None = None,
) -> Backtest:
    """Raises InvalidChain, and NotRead. `given`: readings in the place of those that are stored, before the span as well.
    `teller`: says what was done, and knows all that the nodes mention.
    """
    compiled = chains.compile(loading.spec_of(chain, nodes))
    played = _Played(compiled, teller or describe.teller_of(chain.organization_id, nodes))
    found = _Stored(chain, compiled).happened(begin, end, given)
    result = Backtest(begin=found.begin, end=end, readings=found.readings, is_cut=found.is_cut)
    played.remember(found.before, since_us=events.microseconds(found.begin), with_stored=given is None)
    began = rested = time.monotonic()
    for happened in played.in_order(found.events, until_us=events.microseconds(end)):
        now = time.monotonic()
        if now - began > MAXIMUM_SECONDS:
            result.is_cut, result.end = True, events.moment(happened.at_us)
            break
        if now - rested > TURN_SECONDS:
            time.sleep(REST_SECONDS)  # other requests of this process have their turn: an alarm may be among them
            rested = time.monotonic()
        played.take_in(happened, result)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    begin: datetime
    events: list[_Happened]
    before: dict[Reference, Latest]
    readings: int
    is_cut: bool


class _Stored:
    """What the database has of the variables and states that the chain reads."""

    def __init__(self, chain: RuleChain, compiled: Chain) -> None:
        self._chain, self._compiled = chain, compiled
        of_sensors = [each for each in compiled.references if each.source_type == "sensor"]
        rows = Variable.objects.filter(
            sensor__organization_id=chain.organization_id, sensor__uuid__in={each.uuid for each in of_sensors}
        )
        wanted = {each[1:]: each for each in of_sensors}
        named = {row: wanted.get((str(row.sensor.uuid), row.name)) for row in rows.select_related("sensor")}
        self._variables = {row.pk: (reference, row.datatype) for row, reference in named.items() if reference}
        self._commanded = {Reference("device", each.device_uuid, each.state_name) for each in compiled.commands}

    def happened(self, begin: datetime, end: datetime, given: Sequence[Given] | None = None) -> _Found:
        rows = self._readings(begin, end) if given is None else list(self._given(given, begin, end))
        is_cut = len(rows) > MAXIMUM_READINGS
        if is_cut:
            rows = rows[1:]
            begin = rows[0][1]
        happened = [*self._of_sensors(rows), *self._of_devices(begin, end), *self._of_schedule(begin, end)]
        happened.sort(key=lambda each: (each.at_us, each.order))
        before = self._before(begin, of_sensors=given is None)
        return _Found(begin=begin, events=happened, before=before, readings=len(rows), is_cut=is_cut)

    def _readings(self, begin: datetime, end: datetime) -> list[tuple[int, datetime, float | None, str | None]]:
        """The newest of the span, one more than are played, in ascending order."""
        believed = Reading.objects.filter(variable_id__in=self._variables, timestamp__gte=begin, timestamp__lte=end)
        believed = believed.exclude(suspect__gt="").order_by("-timestamp", "-id")
        return list(believed.values_list("variable_id", "timestamp", "number", "text")[: MAXIMUM_READINGS + 1])[::-1]

    def _given(
        self, given: Sequence[Given], begin: datetime, end: datetime
    ) -> Iterator[tuple[int, datetime, float | None, str | None]]:
        """As if they were stored. Raises NotRead."""
        known = {reference[1:]: (pk, datatype) for pk, (reference, datatype) in self._variables.items()}
        for position, each in enumerate(given):
            pk, datatype = known.get((each.uuid, each.key), (0, ""))
            if not pk:
                raise NotRead(position, "key", f"The chain reads no variable {each.key!r} of a sensor {each.uuid}.")
            if problem := value_problem(each.value, datatype):
                raise NotRead(position, "value", f"It {problem}.")
            if begin <= each.at <= end:
                text = each.value if isinstance(each.value, str) else None
                yield pk, each.at, None if text is not None else float(each.value), text  # type: ignore[arg-type]

    def _of_sensors(self, rows: Sequence[tuple[int, datetime, float | None, str | None]]) -> Iterator[_Happened]:
        together: defaultdict[tuple[int, Source], dict[str, Value]] = defaultdict(dict)
        for variable, timestamp, number, text in rows:
            reference, datatype = self._variables[variable]
            values = together[events.microseconds(timestamp), reference[:2]]
            values[reference.key] = measured(number, text, datatype)
        for (at_us, source), values in together.items():
            yield _Happened(at_us, 0, source, values, not self._is_by_schedule_only)

    def _of_devices(self, begin: datetime, end: datetime) -> Iterator[_Happened]:
        """Changes of states that the chain reads and does not set; those that a device reported run it."""
        for reference in self._states():
            changes = StateChange.objects.filter(timestamp__gt=begin, timestamp__lte=end, **_about(reference))
            for value, timestamp, source in changes.values_list("value", "timestamp", "source")[:MAXIMUM_READINGS]:
                runs = source == StateChange.Source.DEVICE and not self._is_by_schedule_only
                yield _Happened(events.microseconds(timestamp), 0, reference[:2], {reference.key: value}, runs)

    def _of_schedule(self, begin: datetime, end: datetime) -> Iterator[_Happened]:
        at, schedule = begin, self._chain.schedule
        while schedule and (due := schedule.next_after(at)) and due <= end:
            at = due
            yield _Happened(events.microseconds(due), 1, (CHAIN, str(self._chain.uuid)), {}, True)

    def _before(self, begin: datetime, *, of_sensors: bool) -> dict[Reference, Latest]:
        known = {}
        for variable, (reference, datatype) in self._variables.items() if of_sensors else ():
            older = Reading.objects.filter(variable_id=variable, timestamp__lt=begin).exclude(suspect__gt="")
            if row := older.order_by("-timestamp").values_list("timestamp", "number", "text").first():
                at, number, text = row
                known[reference] = Latest(measured(number, text, datatype), events.microseconds(at))
        for reference in self._states() | self._commanded:
            changes = StateChange.objects.filter(timestamp__lte=begin, **_about(reference))
            if change := changes.order_by("-timestamp", "-id").first():
                known[reference] = Latest(change.value, events.microseconds(change.timestamp))
        return known

    def _states(self) -> set[Reference]:
        return {each for each in self._compiled.references if each.source_type == "device"} - self._commanded

    @property
    def _is_by_schedule_only(self) -> bool:
        return self._chain.execution_type == RuleChain.ExecutionType.SCHEDULE_ONLY


def _about(reference: Reference) -> dict[str, Any]:
    return {"state__device__uuid": reference.uuid, "state__name": reference.key}


class _Played:
    """The chain as it goes through the span: what it knows, what its conditions over time remember, what it has done."""

    def __init__(self, compiled: Chain, teller: ChainDescriber) -> None:
        self._compiled = compiled
        self._latest: dict[Reference, Latest] = {}
        self._memory: dict[str, Any] = {}
        self._watches = defaultdict(list)
        for watch in compiled.watches:
            self._watches[watch.reference].append(watch)
        self._wakes: dict[Source, int] = {}
        self._effects = _Effects(compiled)
        self._teller = teller
        self._texts = {spec.name: teller.node(spec) for spec in compiled.spec.nodes}
        rows = Variable.objects.filter(sensor__uuid__in={each.uuid for each in compiled.references})
        ages = rows.values_list("sensor__uuid", "name", "maximum_age_seconds")
        self._maximum_ages = {Reference("sensor", str(uuid), name): age and age * 1_000_000 for uuid, name, age in ages}

    def remember(self, known: Mapping[Reference, Latest], *, since_us: int, with_stored: bool) -> None:
        """What was before the span, conditions over time included unless readings are given."""
        self._latest.update(known)
        self._effects.remember(known)
        if not with_stored:
            return
        for watch in self._compiled.watches:
            earlier = condition_memory.stored(watch, since_us=since_us - watch.window_us)
            before = (sample for sample in earlier if sample.timestamp_us < since_us)
            self._memory[watch.key] = reduce(watch.observe, before, None)

    def in_order(self, stored: Sequence[_Happened], *, until_us: int) -> Iterator[_Happened]:
        """What is stored and, where it is due before, what a run asked to be woken for."""
        for happened in stored:
            yield from self._due(happened.at_us)
            yield happened
        yield from self._due(until_us)

    def _due(self, until_us: int) -> Iterator[_Happened]:
        while self._wakes and (due := min((at_us, source) for source, at_us in self._wakes.items()))[0] < until_us:
            at_us, source = due
            del self._wakes[source]
            yield _Happened(at_us, 2, source, {}, True)

    def take_in(self, happened: _Happened, result: Backtest) -> None:
        for key, value in happened.values.items():
            self._observe(Reference(*happened.source, key), value, happened.at_us)
        if happened.runs:
            self._run(happened, result)

    def _observe(self, reference: Reference, value: Value, at_us: int) -> None:
        self._latest[reference] = Latest(value, at_us)
        for watch in self._watches.get(reference, ()):
            self._memory[watch.key] = watch.observe(self._memory.get(watch.key), Sample(value, at_us))

    def _run(self, happened: _Happened, result: Backtest) -> None:
        trigger = Trigger(
            event_id=EVENT_ID,
            source_type=happened.source[0],
            uuid=happened.source[1],
            values=happened.values,
            timestamp_us=happened.at_us,
            lookup=lambda reference: self._look_up(reference, happened.at_us),
            memory=self._memory,
            refuses=perform.refuses,
            originator=self._teller.name_of(*happened.source),
            deadline=time.monotonic() + settings.RULE_CHAIN_TIMEOUT_MS / 1_000,
        )
        result.runs += 1
        try:
            outcome = self._compiled.run(trigger)
        except ChainFailed as error:
            text = f"{error.node}: {error.cause}"
            if text not in result.failures and len(result.failures) < MAXIMUM_SHOWN:
                result.failures.append(text)
            return
        self._wakes.update(outcome.wakes)
        for effect in outcome.effects:
            self._do(effect, happened, result)

    def _look_up(self, reference: Reference, clock_us: int) -> Sample | None:
        known = self._latest.get(reference)
        maximum_age_us = self._maximum_ages.get(reference)
        return None if known is None else sample_of(known, clock_us=clock_us, maximum_age_us=maximum_age_us)

    def _do(self, effect: Effect, happened: _Happened, result: Backtest) -> None:
        if not self._effects.take_effect(effect, happened):
            result.held += 1
            return
        result.count += 1
        if len(result.done) < MAXIMUM_SHOWN:
            result.done.append(Done(at=events.moment(happened.at_us), text=self._texts[effect.node]))
        if isinstance(effect, DeviceCommand):
            reference = Reference("device", effect.device_uuid, effect.state_name)
            self._observe(reference, effect.value, happened.at_us)
            if reference in self._compiled.references:
                self._wakes[reference[:2]] = happened.at_us + 1


class _Effects:
    """What was done, as far as it decides what is done next: values of states, alarms that are active, cooldowns."""

    def __init__(self, compiled: Chain) -> None:
        commands = compiled.commands
        rows = DeviceState.objects.filter(device__uuid__in={each.device_uuid for each in commands})
        self._momentary = {(str(row.device.uuid), row.name): row.is_momentary for row in rows.select_related("device")}
        self._values: dict[tuple[str, str], Value] = {}
        self._alarms: set[tuple[Source | None, str]] = set()
        self._done_at: dict[tuple[Any, ...], int] = {}
        self._main_source = compiled.main_source

    def remember(self, known: Mapping[Reference, Latest]) -> None:
        self._values = {each[1:]: value.value for each, value in known.items() if each.source_type == "device"}

    def take_effect(self, effect: Effect, happened: _Happened) -> bool:
        """Whether something comes of it, which is then remembered: not while it rests, or when it is so already."""
        if self._is_so(effect):
            return False
        key = self._cooldown_key(effect, happened.source)
        done_at = self._done_at.get(key)
        if effect.cooldown_us and done_at is not None and happened.at_us < done_at + effect.cooldown_us:
            return False
        self._done_at[key] = happened.at_us
        self._remember(effect)
        return True

    def _is_so(self, effect: Effect) -> bool:
        if isinstance(effect, DeviceCommand):
            target = (effect.device_uuid, effect.state_name)
            same = target in self._values and self._values[target] == effect.value
            return same and not (effect.force or self._momentary.get(target, False))
        if isinstance(effect, RaiseAlarm):
            return (self._main_source, effect.alarm) in self._alarms
        if isinstance(effect, ClearAlarm):
            return (self._main_source, effect.alarm) not in self._alarms
        return False

    def _remember(self, effect: Effect) -> None:
        if isinstance(effect, DeviceCommand):
            self._values[effect.device_uuid, effect.state_name] = effect.value
        elif isinstance(effect, RaiseAlarm):
            self._alarms.add((self._main_source, effect.alarm))
        elif isinstance(effect, ClearAlarm):
            self._alarms.discard((self._main_source, effect.alarm))

    def _cooldown_key(self, effect: Effect, source: Source) -> tuple[Any, ...]:
        """As rules.effects.cooldowns: of a command its state and value, of another action its node and the originator."""
        if isinstance(effect, DeviceCommand):
            target = (effect.device_uuid, effect.state_name)
            return target if self._momentary.get(target) else (*target, effect.value)
        return (effect.node, source)
