"""One batch of events through rules to effects, in one database transaction: events in, how each of them ended out."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from django.db import transaction
from django.utils import timezone

from aemos.lib import metrics
from devices import catalogue
from devices import latest as latest_values
from devices.catalogue import Originator
from devices.latest import Latest
from devices.models import StateChange
from notifications import telemetry
from notifications.telemetry import Reading
from rules import effects, events, index, readings, schedules, states
from rules.effects import Performed
from rules.events import Event
from rules.exceptions import ChainFailed
from rules.index import BoundChain
from rules.readings import Row
from rules.scope import Reference, Sample, Trigger

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One event that could not be finished: by which chain and node, if any, and whether another attempt can help."""

    event: Event
    error: str
    chain: BoundChain | None = None
    node: str = ""
    permanent: bool = False
    traceback: str = ""

    @classmethod
    def of(cls, event: Event, error: Exception) -> Failure:
        """The failure that an unforeseen exception is."""
        text = f"{type(error).__name__}: {error}"
        return cls(event=event, error=text, traceback="".join(traceback.format_exception(error)))


@dataclass(slots=True, kw_only=True)
class Ended:
    """How the events of a batch ended. Counts are events; `latest`, `performed` and `watched` are for after the commit."""

    processed: int = 0
    duplicate: int = 0
    failures: list[Failure] = field(default_factory=list)
    latest: dict[latest_values.Key, Latest] = field(default_factory=dict)
    performed: Performed = field(default_factory=Performed)
    watched: list[Reading] = field(default_factory=list)

    def add(self, other: Ended) -> None:
        self.processed += other.processed
        self.duplicate += other.duplicate
        self.failures += other.failures
        self.latest |= other.latest
        self.performed += other.performed
        self.watched += other.watched


RecordFailures = Callable[[Sequence[Failure]], None]
Begin = Callable[[Event], None]


def process(batch: Sequence[Event], record_failures: RecordFailures, begin: Begin | None = None) -> Ended:
    """Stores, decides and acts for a batch, whole or not at all.

    `record_failures` is called inside the transaction, so that a dead letter is kept exactly when its batch is; `begin`
    before each event is decided. Raises what the database raises, and RedisError when latest values cannot be read.
    """
    run = _Run(batch)
    run.collect_latest()
    with transaction.atomic():
        for event, names in run.store():
            if begin:
                begin(event)
            run.decide(event, names)
        run.act()
        record_failures(run.ended.failures)
    return run.ended


class _Run:
    """The stages of one batch, in the order in which `process` calls them."""

    def __init__(self, batch: Sequence[Event]) -> None:
        self.ended = Ended()
        self._batch = batch
        self._wanted = telemetry.shared().ids()  # before the transaction: a lock must not wait for Redis
        self._index = index.shared()
        self._known = catalogue.shared().originators({(event.source_type, event.originator_uuid) for event in batch})
        self._latest: dict[latest_values.Key, Latest] = {}
        self._wishes: list[effects.Wish] = []
        self._failed: set[int] = set()
        self._ran: list[Event] = []
        self._now_us = events.microseconds(timezone.now())

    def collect_latest(self) -> None:
        """Reads what chains need besides the events themselves, before the transaction: a lock must not wait for Redis."""
        began = time.perf_counter()
        wanted: set[latest_values.Key] = set()
        for event in self._batch:
            for bound in self._chains_of(event, event.values):
                wanted |= bound.compiled.references
        self._latest = latest_values.recall(wanted)
        metrics.COLLECTION_SECONDS.observe(time.perf_counter() - began)

    def store(self) -> list[tuple[Event, Sequence[str]]]:
        """Stores readings and device reports; gives what rules have to see: events with the names that are new in them."""
        over = schedules.already_ran(self._batch)
        rows, keys = self._reading_rows()
        new = readings.store(rows)
        self.ended.watched += telemetry.choose(rows, new, wanted=self._wanted)
        reported = self._apply_reports()
        fresh: list[tuple[Event, Sequence[str]]] = []
        for position, event in enumerate(self._batch):
            if position in self._failed:
                continue
            if schedules.is_run(event) and position not in over:
                fresh.append((event, ()))
                continue
            self._note_latest(event)
            names = list(event.values) if event.chains is not None else reported.get(position, [])
            for name, key in keys.get(position, {}).items():
                if key in new:
                    new.discard(key)  # of two events of one batch with the same reading, the second is the duplicate
                    names.append(name)
            if names:
                fresh.append((event, names))
            else:
                self.ended.duplicate += 1
        return fresh

    def decide(self, event: Event, names: Sequence[str]) -> None:
        """Runs the chains of one event. A chain that fails neither stops the others nor undoes the reading."""
        failures = [failure for bound in self._chains_of(event, names) if (failure := self._run_chain(bound, event))]
        if failures:
            self.ended.failures += failures
        else:
            self.ended.processed += 1
            self._ran.append(event)

    def act(self) -> None:
        """Does what the chains asked for."""
        self.ended.performed += effects.perform(self._wishes)
        schedules.note_runs(self._ran)

    def _chains_of(self, event: Event, names: Sequence[str] | dict[str, object]) -> list[BoundChain]:
        if schedules.is_run(event):
            return self._index.for_run(event.originator_uuid, organization_id=event.organization_id)
        if event.chains is None:
            return self._index.triggered(
                (event.source_type, event.originator_uuid), names, organization_id=event.organization_id
            )
        return [bound for uuid in event.chains if (bound := self._index.by_uuid(uuid))]

    def _reading_rows(self) -> tuple[list[Row], dict[int, dict[str, tuple[int, int]]]]:
        """Rows of all telemetry, and per position in the batch: name -> key of its row."""
        rows: list[Row] = []
        keys: dict[int, dict[str, tuple[int, int]]] = {}
        for position, event in enumerate(self._batch):
            if schedules.is_run(event):
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
        changes = states.apply(requests)
        self.ended.performed.changes += changes
        changed: dict[int, list[str]] = {}
        for change in changes:
            position, name = places[change.row.effect_key]
            changed.setdefault(position, []).append(name)
        return changed

    def _note_latest(self, event: Event) -> None:
        """Of telemetry, also when it is a duplicate: the run that stored it may have died before it told Redis."""
        if event.source_type != "sensor":
            return
        for name, value in event.values.items():
            key = (event.source_type, event.originator_uuid, name)
            for known in (self.ended.latest, self._latest):
                if key not in known or known[key].timestamp_us <= event.timestamp_us:
                    known[key] = Latest(value, event.timestamp_us)

    def _look_up(self, reference: Reference) -> Sample | None:
        found = self._latest.get(reference)
        return Sample(*found) if found else None

    def _run_chain(self, bound: BoundChain, event: Event) -> Failure | None:
        trigger = Trigger(
            event_id=str(event.id),
            source_type=event.source_type,
            uuid=event.originator_uuid,
            values=event.values,
            timestamp_us=event.timestamp_us,
            lookup=self._look_up,
        )
        began = time.perf_counter()
        try:
            outcome = bound.compiled.run(trigger)
            wishes = [effects.wish(effect, bound, event) for effect in outcome.effects]
        except ChainFailed as error:
            metrics.RULE_EXECUTIONS.labels("failed").inc()
            trace = traceback.format_exc()
            return Failure(event=event, error=error.cause, chain=bound, node=error.node, traceback=trace)
        metrics.RULE_EXECUTIONS.labels("completed").inc()
        metrics.RULE_SECONDS.observe(time.perf_counter() - began)
        if wishes:
            metrics.RULE_ACTIONS.inc(len(wishes))
        if event.command_deadline_us and self._now_us > event.command_deadline_us:
            log.info("%s would have switched %d states for an event that is too old now", bound.name, len(wishes))
        else:
            self._wishes += wishes
        return None


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
