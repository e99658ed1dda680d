"""One batch of events through rules to effects, in one database transaction: events in, how each of them ended out."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from aemos.lib import metrics
from devices import catalogue
from devices import latest as latest_values
from devices.catalogue import Originator
from devices.latest import Latest
from devices.models import StateChange
from notifications import live_channel
from notifications.live_channel import Reading
from rules import events
from rules.effects import perform, states
from rules.effects.perform import Performed
from rules.engine.bound import BoundChain
from rules.engine.chains import Outcome
from rules.engine.context import Trigger
from rules.engine.effect_types import DeviceCommand
from rules.engine.exceptions import ChainFailed, ErrorCode
from rules.engine.values import Reference, Sample, Watch
from rules.events import Event
from rules.models import RuleChain
from rules.processing import index, readings, schedules, statistics, timers
from rules.processing.condition_memory import Memory
from rules.processing.failures import Failure
from rules.processing.readings import Row
from rules.processing.timers import Waiting

log = logging.getLogger(__name__)
# Values asked of Redis in one round trip; between two of them the time is looked at.
RECALL_AT_ONCE = 1_000


@dataclass(slots=True, kw_only=True)
class Ended:
    """How the events of a batch ended. Counts are events; all that is not a count or a failure is for after the commit."""

    processed: int = 0
    duplicate: int = 0
    failures: list[Failure] = field(default_factory=list)
    latest: dict[latest_values.Key, Latest] = field(default_factory=dict)
    wakes: dict[Waiting, int] = field(default_factory=dict)
    performed: Performed = field(default_factory=Performed)
    watched: list[Reading] = field(default_factory=list)

    def add(self, other: Ended) -> None:
        self.processed += other.processed
        self.duplicate += other.duplicate
        self.failures += other.failures
        self.latest |= other.latest
        self.wakes |= other.wakes
        self.performed += other.performed
        self.watched += other.watched


RecordFailures = Callable[[Sequence[Failure]], None]
Begin = Callable[[Event | None], None]


def process(
    batch: Sequence[Event],
    record_failures: RecordFailures,
    *,
    memory: Memory,
    begin: Begin | None = None,
    taken_over: bool = False,
) -> Ended:
    """Stores, decides and acts for a batch, whole or not at all.

    `record_failures` is called inside the transaction, so that a dead letter is kept exactly when its batch is; `begin`
    before each event is decided, and with None before their effects are made. What another worker may have stored but not
    acknowledged is `taken_over`: conditions over time observe it although its readings are there. Raises what the database
    raises, and RedisError when latest values cannot be read.
    """
    run = _Run(batch, memory)
    run.collect()
    with memory.provisionally(), transaction.atomic():
        for event, names in run.store():
            if begin:
                begin(event)
            run.note(event, names)
            if names is not None:
                run.decide(event, names)
            elif taken_over:
                run.make_up_for(event)
        if begin:
            begin(None)
        run.act()
        record_failures(run.ended.failures)
    statistics.shared().add(run.chain_runs)
    return run.ended


class _Run:
    """The stages of one batch, in the order in which `process` calls them."""

    def __init__(self, batch: Sequence[Event], memory: Memory) -> None:
        self.ended = Ended()
        self.chain_runs = statistics.Runs()
        self._batch = batch
        self._memory = memory
        self._wanted = live_channel.shared().ids()  # before the transaction: a lock must not wait for Redis
        self._index = index.shared()
        self._known = catalogue.shared().originators({(event.source_type, event.originator_uuid) for event in batch})
        self._latest: dict[latest_values.Key, Latest] = {}
        self._uncollected: frozenset[latest_values.Key] = frozenset()
        self._commanded: set[int] = set()
        self._wishes: list[perform.Wish] = []
        self._wished: set[Reference] = set()  # states that the wishes are about
        self._failed: set[int] = set()
        self._ran: list[Event] = []
        self._now_us = events.microseconds(timezone.now())

    def collect(self) -> None:
        """Reads what chains need besides the events themselves, before the transaction: a lock must not wait for Redis.

        What DATA_COLLECTION_TIMEOUT leaves no time for is missed by the chains that need it, and they fail by its name.
        """
        began = time.monotonic()
        self._index.look_for(uuid for event in self._batch for uuid in events.named(event) or ())
        chains = {bound.id: bound for event in self._batch for bound in self._chains_of(event, event.values)}
        references: dict[latest_values.Key, None] = {}
        watches: dict[str, Watch] = {}
        for bound in chains.values():
            references |= dict.fromkeys(bound.compiled.references)
            watches |= {watch.key: watch for watch in bound.compiled.watches}
            self._commanded |= bound.commanded
        wanted = list(references)
        for start in range(0, len(wanted), RECALL_AT_ONCE):
            if time.monotonic() - began > settings.DATA_COLLECTION_TIMEOUT_MS / 1_000:
                self._uncollected = frozenset(wanted[start:])
                break
            self._latest |= latest_values.recall(wanted[start : start + RECALL_AT_ONCE])
        if watches:
            since_us = min(event.timestamp_us for event in self._batch)
            self._memory.collect(watches.values(), since_us=since_us, latest=self._latest)
        metrics.COLLECTION_SECONDS.observe(time.monotonic() - began)

    def store(self) -> list[tuple[Event, Sequence[str] | None]]:
        """Stores readings and device reports; gives the events with the names that are new in them, None for a duplicate."""
        over = schedules.already_ran(self._batch)
        rows, keys = self._reading_rows()
        new = readings.store(rows)
        self.ended.watched += live_channel.choose(rows, new, wanted=self._wanted)
        reported = self._apply_reports()
        stored: list[tuple[Event, Sequence[str] | None]] = []
        for position, event in enumerate(self._batch):
            if position in self._failed:
                continue
            names: list[str] | None
            if events.is_run(event):
                names = None if position in over else []
            else:
                names = list(event.values) if event.chains is not None else reported.get(position, [])
                for name, key in keys.get(position, {}).items():
                    if key in new:
                        # Of two events of one batch with the same reading, the second is the duplicate.
                        new.discard(key)
                        names.append(name)
                names = names or None
            self.ended.duplicate += names is None
            stored.append((event, names))
        return stored

    def decide(self, event: Event, names: Sequence[str]) -> None:
        """Runs the chains of one event. A chain that fails neither stops the others nor undoes the reading."""
        bound_chains = self._chains_of(event, names)
        if self._wished and any(self._wished & bound.compiled.references for bound in bound_chains):
            self._perform()
        if event.chains is None:
            self._observe(event, names, bound_chains)
        failures = [failure for bound in bound_chains if (failure := self._run_chain(bound, event))]
        failures += _stopped(event, bound_chains)
        if failures:
            self.ended.failures += failures
        else:
            self.ended.processed += 1
            self._ran.append(event)

    def make_up_for(self, event: Event) -> None:
        """The worker that stored the event and had its effects died before it could note this: nothing else is left to do."""
        names = list(event.values)
        bound_chains = [
            bound for bound in self._chains_of(event, names) if bound.compiled.watches or bound.compiled.timers
        ]
        self._observe(event, names, bound_chains)
        for bound in bound_chains:
            with contextlib.suppress(ChainFailed):  # the first run has dealt with it
                self._note_wakes(bound, bound.compiled.run(self._trigger(bound, event)))

    def act(self) -> None:
        """Does what the chains asked for."""
        self._perform()
        schedules.note_runs(self._ran)

    def _perform(self) -> None:
        """At the end, and before an event whose chains read what one before it has switched."""
        performed = perform.perform(self._wishes)
        self._latest.update(states.latest_of(change.row.state) for change in performed.changes)
        self.ended.performed += performed
        self._wishes, self._wished = [], set()

    def _chains_of(self, event: Event, names: Sequence[str] | dict[str, object]) -> Sequence[BoundChain]:
        chains = events.named(event)
        if chains is not None:
            return self._index.named(chains, organization_id=event.organization_id)
        source = (event.source_type, event.originator_uuid)
        return self._index.triggered(source, names, organization_id=event.organization_id)

    def _observe(self, event: Event, names: Sequence[str], bound_chains: Sequence[BoundChain]) -> None:
        """Tells conditions over time of the event, each once, whatever way the chains then take."""
        source = (event.source_type, event.originator_uuid)
        watches = {
            watch.key: watch
            for bound in bound_chains
            for watch in bound.compiled.watches
            if watch.reference[:2] == source and watch.reference.key in names
        }
        for watch in watches.values():
            self._memory.observe(watch, Sample(event.values[watch.reference.key], event.timestamp_us))

    def _reading_rows(self) -> tuple[list[Row], dict[int, dict[str, tuple[int, int]]]]:
        """Rows of all telemetry, and per position in the batch: name -> key of its row."""
        rows: list[Row] = []
        keys: dict[int, dict[str, tuple[int, int]]] = {}
        for position, event in enumerate(self._batch):
            if events.is_run(event):
                continue
            originator = self._originator(position, event)
            if originator is None or event.source_type != "sensor" or event.chains is not None:
                continue
            keys[position] = {}
            for name, value in event.values.items():
                row = readings.row_of(originator.fields[name].id, event.timestamp_us, value)
                rows.append(row)
                keys[position][name] = row[:2]
        return rows, keys

    def _originator(self, position: int, event: Event) -> Originator | None:
        """Its originator, unless that or a variable was deleted after the event was accepted: then the event has failed."""
        originator = self._known.get((event.source_type, event.originator_uuid))
        if originator is None:
            error = f"{event.source_type} {event.originator_uuid} was deleted after the event was accepted"
        elif unknown := event.values.keys() - originator.fields.keys():
            error = f"{', '.join(sorted(unknown))} of {originator.name} was deleted after the event was accepted"
        else:
            return originator
        self._failed.add(position)
        self.ended.failures.append(Failure(event=event, error=error, permanent=True))
        return None

    def _apply_reports(self) -> dict[int, list[str]]:
        """What devices say of themselves becomes their state; gives, per position, the names that changed."""
        requests: list[states.Request] = []
        places: dict[str, tuple[int, str]] = {}
        for position, event in enumerate(self._batch):
            originator = self._originator(position, event) if event.source_type == "device" else None
            if originator is None or event.chains is not None:
                continue
            for name, value in event.values.items():
                request = _report(event, originator.fields[name].id, name, value)
                requests.append(request)
                places[request.effect_key] = (position, name)
        changes = states.apply(requests, to_come=self._commanded)
        self.ended.performed.changes += changes
        changed: dict[int, list[str]] = {}
        for change in changes:
            position, name = places[change.row.effect_key]
            changed.setdefault(position, []).append(name)
        return changed

    def note(self, event: Event, names: Sequence[str] | None) -> None:
        """What the event says is the latest from here on, not before: those ahead of it in the batch must not see it.

        Of telemetry also when it is a duplicate: the run that stored it may have died before it told Redis. What a device
        reports is told to Redis with the change that it is.
        """
        if event.source_type == "sensor":
            for name, value in event.values.items():
                for known in (self.ended.latest, self._latest):
                    _put_if_newer(known, (event.source_type, event.originator_uuid, name), value, event.timestamp_us)
        elif event.source_type == "device" and event.chains is None:
            for name in names or ():
                key = (event.source_type, event.originator_uuid, name)
                _put_if_newer(self._latest, key, event.values[name], min(event.timestamp_us, self._now_us))

    def _look_up(self, reference: Reference) -> Sample | None:
        found = self._latest.get(reference)
        return Sample(*found) if found else None

    def _run_chain(self, bound: BoundChain, event: Event) -> Failure | None:
        began = time.perf_counter()
        try:
            self._demand_collected(bound, event)
            outcome = bound.compiled.run(self._trigger(bound, event))
            wishes = [perform.wish(effect, bound, event) for effect in outcome.effects]
        except ChainFailed as error:
            self.chain_runs.failed(bound, error, seconds=time.perf_counter() - began, is_retry=event.attempt > 0)
            return _failure(error, bound, event)
        self.chain_runs.completed(bound, outcome, seconds=time.perf_counter() - began)
        self._note_wakes(bound, outcome)
        if event.command_deadline_us and self._now_us > event.command_deadline_us:
            log.info("%s would have done %d actions for an event that is too old now", bound.name, len(wishes))
        else:
            self._wishes += wishes
            self._wished |= {
                Reference("device", effect.device_uuid, effect.state_name)
                for effect in outcome.effects
                if isinstance(effect, DeviceCommand)
            }
        return None

    def _trigger(self, bound: BoundChain, event: Event) -> Trigger:
        originator = self._known.get((event.source_type, event.originator_uuid))
        return Trigger(
            event_id=str(event.id),
            source_type=event.source_type,
            uuid=event.originator_uuid,
            values=event.values,
            timestamp_us=event.timestamp_us,
            lookup=self._look_up,
            memory=self._memory.values,
            refuses=perform.refuses,
            originator=originator.name if originator else bound.name,
            deadline=time.monotonic() + settings.RULE_CHAIN_TIMEOUT_MS / 1_000,
        )

    def _demand_collected(self, bound: BoundChain, event: Event) -> None:
        if not self._uncollected:
            return
        missed = [
            f"{source_type} {uuid} {name}"
            for source_type, uuid, name in bound.compiled.references & self._uncollected
            if uuid != event.originator_uuid or name not in event.values
        ]
        if missed:
            cause = f"not read within {settings.DATA_COLLECTION_TIMEOUT_MS} ms: the latest values of "
            named = ", ".join(sorted(missed)[:10])
            raise ChainFailed(bound.uuid, "", cause + named, code=ErrorCode.DATA_COLLECTION_TIMEOUT)

    def _note_wakes(self, bound: BoundChain, outcome: Outcome) -> None:
        for source, due_us in outcome.wakes.items() if bound.timers else ():
            self.ended.wakes[timers.of(bound.compiled, source)] = due_us


def _put_if_newer(known: dict[latest_values.Key, Latest], key: latest_values.Key, value: Any, at_us: int) -> None:
    if key not in known or known[key].timestamp_us <= at_us:
        known[key] = Latest(value, at_us)


def _stopped(event: Event, ran: Sequence[BoundChain]) -> list[Failure]:
    """Failures of the chains that the event names and that do not run any more; those that were deleted, nobody misses."""
    left = set(events.named(event) or ()) - {bound.uuid for bound in ran}
    if not left:
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


def _failure(error: ChainFailed, bound: BoundChain, event: Event) -> Failure:
    text = f"{error.code}: {error.cause}" if error.code else error.cause
    if error.code:
        log.warning("rule chain %s (%s) at %r: %s", bound.name, bound.uuid, error.node, text)
    return Failure(event=event, error=text, chain=bound, node=error.node, traceback=traceback.format_exc())


def _report(event: Event, state_id: int, name: str, value: object) -> states.Request:
    return states.Request(
        effect_key=f"{event.id}:report:{name}",
        state_id=state_id,
        value=value,
        source=StateChange.Source.DEVICE,
        actor="device",
        timestamp_us=event.timestamp_us,
        priority=event.priority,
        newer_only=True,
    )
