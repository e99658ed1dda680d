"""Decide what a batch's events lead to: run the chains of each event, in the order of the batch."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from django.conf import settings

from aemos.lib import tracing
from devices.catalogue import Field
from devices.latest import Key, Latest
from rules import events, traces
from rules.effects import interlocks, perform, states
from rules.effects.perform import Applied
from rules.engine.bound import DeployedChain
from rules.engine.chains import Outcome
from rules.engine.context import Trigger, refuses_nothing
from rules.engine.effect_types import DeviceCommand, Effect
from rules.engine.exceptions import ChainFailed, ErrorCode
from rules.engine.values import Reference, Sample, TemporalCondition, Value
from rules.events import Event
from rules.models import RuleChain
from rules.processing import statistics, timers
from rules.processing.condition_memory import ConditionStateStore
from rules.processing.failures import Failure
from rules.processing.quality import QualityJudge, sample_of
from rules.processing.stages.collect import Audiences, Inputs
from rules.processing.stages.store import Stored
from rules.processing.timers import Waiting

log = logging.getLogger(__name__)

OnEventStart = Callable[[Event | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """`values`: the newest of all that was looked at. `completed`: events of which no chain failed. `effects`: what is still to
    be applied. `applied`: what was applied already, because a chain of a later event reads it. `latest`: the newest values of
    sensors, for Redis. `next_timers`: when time alone may change an outcome, in microseconds since 1970.
    """

    values: Mapping[Key, Latest]
    completed: Sequence[Event]
    failures: Sequence[Failure]
    effects: Sequence[perform.ResolvedEffect]
    applied: Applied
    latest: dict[Key, Latest]
    next_timers: dict[Waiting, int]
    chain_runs: statistics.Runs
    late_events: Sequence[Event]


def decide(
    stored: Stored, inputs: Inputs, *, on_event_start: OnEventStart | None = None, redelivered: bool = False
) -> Decided:
    """Runs in the current transaction. A chain that fails neither stops the others nor undoes the reading.

    For each event: 1. what it says becomes known, 2. its conditions over time observe it, 3. its chains run on what is known.
    A duplicate runs no chain; if it was `redelivered`, only its conditions over time and timers are brought up to date. Of a late
    event only the second is done: it is history, and runs none but the chains that mean to hear of it.
    """
    known = KnownValues(inputs, stored.quality, redelivered=redelivered)
    pending = PendingEffects(known)
    progress = Progress(known=known, pending=pending)
    completed: list[Event] = []
    late_events: list[Event] = []
    has_suspects = stored.quality.has_suspects
    for event, names in stored.events:
        if on_event_start:
            on_event_start(event)
        late = known.update(event, names)
        suspects = stored.quality.suspects(event) if has_suspects else ()
        if names is None:
            if redelivered:
                progress.next_timers.update(_replay_condition_state(event, known, suspects))
            continue
        audience = inputs.audiences.of(event, names)
        pending.apply_if_read(audience.references)
        _observe(event, audience.watches, inputs.memory, but=suspects)
        failed_before = len(progress.failures)
        if late or suspects:
            for part, chains in _parts(event, names, late, suspects, inputs.audiences):
                decide_event(part, chains, progress)
        else:
            decide_event(event, audience.chains, progress)
        if len(progress.failures) == failed_before:
            completed.append(event)
        if late:
            late_events.append(event)
    return Decided(
        values=known.values,
        completed=completed,
        failures=progress.failures,
        effects=pending.effects,
        applied=pending.applied,
        latest=known.of_sensors,
        next_timers=progress.next_timers,
        chain_runs=progress.chain_runs,
        late_events=late_events,
    )


class KnownValues:
    """The latest values as the events of a batch see them one after the other: those ahead must not see what is behind.

    `of_sensors`: the part that is written to Redis after the commit.
    """

    def __init__(self, inputs: Inputs, quality: QualityJudge, *, redelivered: bool) -> None:
        self.inputs = inputs
        self._redelivered = redelivered
        self.clock_us = inputs.now_us
        """When ages are asked for."""
        self._quality = quality
        self.of_sensors: dict[Key, Latest] = {}
        self._latest = dict(inputs.latest)
        self._refusals: dict[tuple[str, str, type, Value], str] = {}

    def look_up(self, reference: Reference) -> Sample | None:
        found = self._latest.get(reference)
        if found is None:
            return None
        maximum_age_us = self.inputs.maximum_ages.get(reference) if self.inputs.maximum_ages else None
        return sample_of(found, clock_us=self.clock_us, maximum_age_us=maximum_age_us)

    def update(self, event: Event, names: Sequence[str] | None) -> Collection[str]:
        """Takes in what the event says, and gives the names of its values that are late.

        Of telemetry also when it is a duplicate: the run that stored it may have died before it wrote to Redis. What a device
        reports reaches Redis with the change that it is.
        """
        older = self._hear(event, names or ()) if event.source_type == "sensor" else self._report(event, names or ())
        late_us = event.received_us - event.timestamp_us
        # Of another attempt they were new when they came. What is replayed is late, and a person has decided what it may do.
        # What is not dated, or dated ahead, is of now.
        if late_us <= 0 or event.chains is not None or event.command_deadline_us or events.is_run(event):
            return ()
        originator = self.inputs.originator(event)
        late_after_us = originator.late_after_us if originator else None
        return (
            event.values if late_us > (self.inputs.late_after_us if late_after_us is None else late_after_us) else older
        )

    def _hear(self, event: Event, new: Sequence[str]) -> Collection[str]:
        """Gives the names of values of which something newer is known: also something older says that its source lives."""
        older: tuple[str, ...] = ()
        # Dated ahead it counts from when it was received; its sender's copy of it is received later, and is not newer for that.
        may_be_copy = event.claimed_us and not self._redelivered
        at_us, received_us = event.timestamp_us, event.received_us
        judged = self._quality.known_after(event)
        for name, value in event.values.items():
            key = (event.source_type, event.originator_uuid, name)
            before = self._latest.get(key)
            if before is not None and (before.timestamp_us > at_us or (may_be_copy and name not in new)):
                older += (name,)
                latest = before._replace(received_us=max(before.heard_us, received_us))
            elif name in judged:
                latest = judged[name]
            else:
                latest = Latest(value, at_us, received_us)
            self._latest[key] = self.of_sensors[key] = latest
        return older

    def _report(self, event: Event, changed: Sequence[str]) -> Collection[str]:
        """Gives the names of values of which something newer is known."""
        if event.source_type != "device" or event.chains is not None:
            return ()
        at_us = event.timestamp_us
        older: tuple[str, ...] = ()
        for name, value in event.values.items():
            key = (event.source_type, event.originator_uuid, name)
            before = self._latest.get(key)
            if before is not None and before.timestamp_us > at_us:
                older += (name,)
            elif name in changed:
                self._latest[key] = Latest(value, min(at_us, self.inputs.now_us))
        return older

    def refuses(self, device_uuid: str, state_name: str, value: Value) -> str:
        """As `perform.refuses`, which a batch is asked for few different values."""
        key = (device_uuid, state_name, type(value), value)
        found = self._refusals.get(key)
        if found is None:
            found = self._refusals[key] = perform.refuses(device_uuid, state_name, value)
        return found

    def field(self, source_type: str, uuid: str, name: str) -> Field | None:
        """As the catalogue knows it."""
        originator = self.inputs.originators.get((source_type, uuid))
        return originator.fields.get(name) if originator else None

    @property
    def values(self) -> Mapping[Key, Latest]:
        return self._latest

    def update_states(self, changes: Iterable[states.Change]) -> None:
        self._latest.update(states.latest_of(change.row.state) for change in changes)


class PendingEffects:
    """The effects that are not applied yet: together they cost few queries, but a chain must see what was set before it."""

    def __init__(self, known: KnownValues) -> None:
        self.effects: list[perform.ResolvedEffect] = []
        self.applied = Applied()
        self._known = known
        self._sets: set[Reference] = set()
        self._settled = states.SettledStates(known.inputs.commanded)

    def add(self, effects: Iterable[Effect], bound: DeployedChain, event: Event) -> None:
        """Those of one run, all or none: raises ChainFailed when what one of them needs does not exist any more."""
        self.effects += [perform.resolve(effect, bound, event) for effect in effects if not self._is_so(effect, bound)]

    def vetoes(self, device_uuid: str, state_name: str, value: Value) -> str:
        """Why an interlock does not let this happen now, after all that the events so far have led to; empty when it does."""
        field = self._known.field("device", device_uuid, state_name)
        if field is None or not field.is_guarded or self._settled.has(field.id, value, always=field.is_momentary):
            return ""
        self.apply_if_read(frozenset({Reference("device", device_uuid, state_name)}))
        found = interlocks.veto_now(field.id, value, self._known.values)
        return found.detail if found else ""

    def _is_so(self, effect: Effect, bound: DeployedChain) -> bool:
        """Whether it sets a state to what that is already, which no effect before it changes."""
        if not isinstance(effect, DeviceCommand):
            return False
        target = (effect.device_uuid, effect.state_name)
        if self._settled.has(bound.states.get(target), effect.value, always=effect.force):
            return True
        self._sets.add(Reference("device", *target))
        return False

    def apply_if_read(self, references: frozenset[Reference]) -> None:
        """`references`: what the chains of the next event read."""
        if self._sets.isdisjoint(references):
            return
        applied = perform.apply(self.effects, self._known.values)
        self._known.update_states(applied.changes)
        self.applied += applied
        self.effects, self._sets = [], set()
        self._settled.forget()


def _parts(
    event: Event, names: tuple[str, ...], late: Collection[str], suspects: Collection[str], audiences: Audiences
) -> Iterator[tuple[Event, Sequence[DeployedChain]]]:
    """What of the event is for which chains: without what is late, but for chains that mean to hear that; without what is
    suspect, which runs those alone that ask whether it is.
    """
    believed = tuple(name for name in names if name not in suspects)
    in_time = tuple(name for name in believed if name not in late)
    questioned = {
        Reference(event.source_type, event.originator_uuid, name)
        for name in names
        if name in suspects and name not in late
    }
    due = {bound.id for bound in audiences.of(event, in_time).chains if not bound.hears_late} if in_time else set()
    chains = audiences.of(event, names).chains
    if now := [bound for bound in chains if bound.id in due or not questioned.isdisjoint(bound.compiled.questioned)]:
        yield _only(event, in_time), now
    hearing = [bound for bound in audiences.of(event, believed).chains if bound.hears_late] if believed else []
    ran = {bound.id for bound in now}
    if hearing := [bound for bound in hearing if bound.id not in ran]:
        yield _only(event, believed), hearing


def _only(event: Event, names: tuple[str, ...]) -> Event:
    return msgspec.structs.replace(event, values={name: event.values[name] for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the events so far have led to."""

    known: KnownValues
    pending: PendingEffects
    failures: list[Failure] = field(default_factory=list)
    next_timers: dict[Waiting, int] = field(default_factory=dict)
    chain_runs: statistics.Runs = field(default_factory=statistics.Runs)


def decide_event(event: Event, chains: Sequence[DeployedChain], progress: Progress) -> None:
    """Runs these chains for the event."""
    if event.chains is not None or event.source_type == events.CHAIN:
        progress.failures.extend(_not_run(event, chains))
    if not chains:
        return
    inputs = progress.known.inputs
    too_late = bool(event.command_deadline_us) and inputs.now_us > event.command_deadline_us
    trigger, originator = _trigger(event, progress.known, progress.pending.vetoes), inputs.originator(event)
    for bound in chains:
        began = time.monotonic()
        trigger.deadline = began + inputs.chain_seconds
        trigger.originator = originator.name if originator else bound.name
        try:
            if inputs.unread:
                _require_read(bound, event, inputs)
            outcome = bound.compiled.run(trigger)
            if outcome.effects and not too_late:
                progress.pending.add(outcome.effects, bound, event)
        except ChainFailed as error:
            progress.chain_runs.failed(bound, error, seconds=time.monotonic() - began, is_retry=event.attempt > 0)
            progress.failures.append(_failure(error, bound, event))
            if event.trace and tracing.is_on():
                traces.chain_ran(event, bound.name, seconds=time.monotonic() - began, error=error.cause)
            continue
        progress.chain_runs.completed(bound, outcome, seconds=time.monotonic() - began)
        if event.trace and tracing.is_on():
            traces.chain_ran(event, bound.name, seconds=time.monotonic() - began, effects=len(outcome.effects))
        if bound.timers:
            progress.next_timers.update(_next_timers(bound, outcome))
        if too_late:
            skipped = len(outcome.effects)
            log.info(
                "%s would have done %d actions for an event that is too old now",
                bound.name,
                skipped,
                extra=_fields(bound, event),
            )


def _trigger(event: Event, known: KnownValues, vetoes: Callable[[str, str, Value], str]) -> Trigger:
    """One for all chains of the event; the name of the originator and the deadline are still to be set for each."""
    known.clock_us = _clock_us(event)
    return Trigger(
        event_id=event.id,
        source_type=event.source_type,
        uuid=event.originator_uuid,
        values=event.values,
        timestamp_us=event.timestamp_us,
        clock_us=known.clock_us,
        lookup=known.look_up,
        memory=known.inputs.memory.values,
        refuses=known.refuses,
        vetoes=vetoes,
    )


def _clock_us(event: Event) -> int:
    """When ages are asked for: now, but of what a person replays, or time brings about, when it happened."""
    return event.timestamp_us if events.is_run(event) or event.command_deadline_us else event.received_us


def _next_timers(bound: DeployedChain, outcome: Outcome) -> dict[Waiting, int]:
    return {timers.of(bound.compiled, source): due_us for source, due_us in outcome.wakes.items()}


def _require_read(bound: DeployedChain, event: Event, inputs: Inputs) -> None:
    """Raises ChainFailed when a value that the chain needs, and the event does not bring, was not read in time."""
    missed = [
        f"{source_type} {uuid} {name}"
        for source_type, uuid, name in bound.compiled.references & inputs.unread
        if uuid != event.originator_uuid or name not in event.values
    ]
    if missed:
        cause = f"not read within {settings.DATA_COLLECTION_TIMEOUT_MS} ms: the latest values of "
        named = ", ".join(sorted(missed)[:10])
        raise ChainFailed(bound.uuid, "", cause + named, code=ErrorCode.DATA_COLLECTION_TIMEOUT)


def _observe(
    event: Event, watches: Iterable[TemporalCondition], memory: ConditionStateStore, *, but: Collection[str]
) -> None:
    """Shows the event's values to conditions over time, to each once, whatever way the chains then take."""
    for watch in watches:
        if watch.reference.key in but:
            continue
        memory.observe(watch, Sample(event.values[watch.reference.key], event.timestamp_us))


def _replay_condition_state(event: Event, known: KnownValues, suspects: Collection[str]) -> dict[Waiting, int]:
    """Conditions and timers of an event whose worker died after the commit: all else of it is done.

    The chains run for what they say of time alone, and their effects are dropped: the first run has had them.
    """
    audience = known.inputs.audiences.of(event, tuple(event.values))
    _observe(event, audience.watches, known.inputs.memory, but=suspects)
    if suspects:
        event = _only(event, tuple(name for name in event.values if name not in suspects))
    next_timers: dict[Waiting, int] = {}
    trigger = _trigger(event, known, refuses_nothing)
    for bound in audience.chains:
        if not bound.timers:
            continue
        trigger.deadline = time.monotonic() + known.inputs.chain_seconds
        with contextlib.suppress(ChainFailed):  # the first run has reported it
            next_timers |= _next_timers(bound, bound.compiled.run(trigger))
    return next_timers


def _not_run(event: Event, ran: Sequence[DeployedChain]) -> list[Failure]:
    """Failures of the chains that the event names and that do not run any more; a chain that was deleted is no failure."""
    named = events.named(event)
    if not named or not (left := set(named) - {bound.uuid for bound in ran}):
        return []
    rows = RuleChain.objects.filter(uuid__in=left, organization_id=event.organization_id).order_by("pk")
    return [
        Failure(
            event=event,
            error=f"{chain} was not run: it is {chain.stopped or 'not valid'}",
            chain=chain,
            permanent=bool(chain.stopped),
        )
        for chain in rows
    ]


def _fields(bound: DeployedChain, event: Event) -> dict[str, str]:
    return {"chain": bound.uuid, "event_id": event.id, **tracing.log_fields(event.trace)}


def _failure(error: ChainFailed, bound: DeployedChain, event: Event) -> Failure:
    text = f"{error.code}: {error.cause}" if error.code else error.cause
    if error.code:
        log.warning(
            "rule chain %s (%s) at %r: %s", bound.name, bound.uuid, error.node, text, extra=_fields(bound, event)
        )
    return Failure(event=event, error=text, chain=bound, node=error.node, traceback=traceback.format_exc())
