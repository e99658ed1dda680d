"""Collect what a batch needs besides its events, before its transaction begins: a lock must not wait for Redis."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from django.conf import settings
from django.utils import timezone

from aemos.lib import metrics
from aemos.lib.batched import batched
from devices import catalogue
from devices import latest as latest_values
from devices.catalogue import Originator
from devices.latest import Key, Latest
from notifications import live_channel
from rules import events
from rules.engine.bound import DeployedChain
from rules.engine.values import Reference, Source, TemporalCondition
from rules.events import Event
from rules.processing import index
from rules.processing.condition_memory import ConditionStateStore

# Values asked of Redis in one round trip; between two of them the time is looked at.
RECALL_AT_ONCE = 1_000


class Audience(NamedTuple):
    """What events with the same new values of one source reach: chains to run, and conditions over time that observe them.

    `references`: all that the chains read.
    """

    chains: Sequence[DeployedChain]
    watches: Sequence[TemporalCondition]
    references: frozenset[Reference]


class Audiences:
    """Of the events of a batch, looked up once for all events that are alike."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Audience] = {}

    def of(self, event: Event, names: tuple[str, ...]) -> Audience:
        """`names`: the values that are new. The chains that the event names, or those that wait for one of these values."""
        key = (event.originator_uuid, names, event.source_type, event.chains, event.organization_id)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _audience(event, names)
        return found

    def chains(self) -> dict[int, DeployedChain]:
        """All chains that were found, by id."""
        return {bound.id: bound for audience in self._found.values() for bound in audience.chains}


def _audience(event: Event, names: tuple[str, ...]) -> Audience:
    named, source = events.named(event), (event.source_type, event.originator_uuid)
    if named is None:
        chains = index.shared().triggered(source, names, organization_id=event.organization_id)
    else:
        chains = index.shared().named(named, organization_id=event.organization_id)
    watches: dict[str, TemporalCondition] = {}
    if event.chains is None:  # another attempt, or a timer's: its values were observed
        watches = {
            watch.key: watch
            for bound in chains
            for watch in bound.compiled.watches
            if watch.reference[:2] == source and watch.reference.key in names
        }
    references = frozenset(reference for bound in chains for reference in bound.compiled.references)
    return Audience(chains, tuple(watches.values()), references)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A batch with what is known before it.

    `latest`: values of what its chains read, of its variables that have limits, and of what the interlocks of the states require
    that they may set. `maximum_ages`: after how many microseconds
    a value that its chains read is missing, of those that have such an age. `unread`: references that
    DATA_COLLECTION_TIMEOUT_MS left no time to read; a chain that needs one fails with that code. `commanded`: ids of the states
    that its chains may set. `watched`: ids of the variables that people look at right now. `now_us`: when the batch began, in
    microseconds since 1970. `late_after_us`: what came later than this after it was taken is history, where its sensor does not
    say otherwise. `chain_seconds`: how long one chain may run.
    """

    batch: Sequence[Event]
    originators: Mapping[tuple[str, str], Originator]
    latest: Mapping[Key, Latest]
    maximum_ages: Mapping[Key, int]
    unread: frozenset[Key]
    memory: ConditionStateStore
    commanded: frozenset[int]
    watched: frozenset[int]
    now_us: int
    late_after_us: int
    chain_seconds: float
    audiences: Audiences

    def originator(self, event: Event) -> Originator | None:
        return self.originators.get((event.source_type, event.originator_uuid))


def collect(batch: Sequence[Event], memory: ConditionStateStore) -> Inputs:
    """Raises RedisError when latest values cannot be read, and what the database raises."""
    began = time.monotonic()
    index.shared().refresh_if_missing(uuid for event in batch for uuid in events.named(event) or ())
    audiences = Audiences()
    for event in batch:
        audiences.of(event, tuple(event.values))
    chains = audiences.chains()
    sources = {(event.source_type, event.originator_uuid) for event in batch}
    references = dict.fromkeys(reference for bound in chains.values() for reference in bound.compiled.references)
    # With the devices that the chains may set, which are asked for one by one later.
    commanded = {("device", command.device_uuid) for bound in chains.values() for command in bound.compiled.commands}
    named = {reference[:2] for reference in references}
    originators = catalogue.shared().originators(sources | commanded | named)
    deadline = began + settings.DATA_COLLECTION_TIMEOUT_MS / 1_000
    looked_at = [*references, *_limited(sources, originators), *_required(chains.values(), originators)]
    latest, unread = _read_latest([*dict.fromkeys(looked_at)], deadline=deadline)
    watches: dict[str, TemporalCondition] = {
        watch.key: watch for bound in chains.values() for watch in bound.compiled.watches
    }
    if watches:
        memory.collect(watches.values(), since_us=min(event.timestamp_us for event in batch), latest=latest)
    inputs = Inputs(
        batch=batch,
        originators=originators,
        latest=latest,
        maximum_ages=_maximum_ages(references, originators),
        unread=unread,
        memory=memory,
        commanded=frozenset(state_id for bound in chains.values() for state_id in bound.commanded),
        watched=live_channel.shared().ids(),
        now_us=events.microseconds(timezone.now()),
        late_after_us=settings.LATE_AFTER_SECONDS * 1_000_000,
        chain_seconds=settings.RULE_CHAIN_TIMEOUT_MS / 1_000,
        audiences=audiences,
    )
    metrics.COLLECTION_SECONDS.observe(time.monotonic() - began)
    return inputs


def _limited(sources: Iterable[Source], originators: Mapping[Source, Originator]) -> Iterator[Key]:
    """The variables of these sources that have limits."""
    for source in sources:
        if source in originators:
            yield from ((*source, name) for name, field in originators[source].fields.items() if field.limits)


def _required(chains: Iterable[DeployedChain], originators: Mapping[Source, Originator]) -> Iterator[Key]:
    """What interlocks look at before the states change that the chains may set."""
    for command in (command for bound in chains for command in bound.compiled.commands):
        device = originators.get(("device", command.device_uuid))
        state = device.fields.get(command.state_name) if device else None
        if state:
            yield from state.requires


def _maximum_ages(references: Iterable[Reference], originators: Mapping[Source, Originator]) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for reference in references:
        originator = originators.get(reference[:2])
        field = originator.fields.get(reference.key) if originator else None
        if field and field.maximum_age_us:
            found[reference] = field.maximum_age_us
    return found


def _read_latest(references: Sequence[Key], *, deadline: float) -> tuple[dict[Key, Latest], frozenset[Key]]:
    """The latest values of these, and what was not read before the deadline."""
    latest: dict[Key, Latest] = {}
    for position, some in enumerate(batched(references, RECALL_AT_ONCE)):
        if time.monotonic() > deadline:
            return latest, frozenset(references[position * RECALL_AT_ONCE :])
        latest |= latest_values.recall(some)
    return latest, frozenset()
