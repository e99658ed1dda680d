"""The state of conditions over time: read it before a batch, update it with each event, keep it with the acknowledgement.

It is kept in Redis, in the same step that acknowledges the events it comes from. So after a crash the events are observed
again on what was remembered before them, exactly once. What Redis has lost is observed again from the stored readings, and
so is what has missed some: the conditions of a chain that is switched off, or that only the clock runs, see no event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import msgspec

from aemos.lib import keys, redis
from devices import catalogue
from devices.latest import Key, Latest
from rules.effects import states
from rules.engine.values import Sample, TemporalCondition
from rules.journal import slots
from rules.journal.lease import ConditionStateUpdate
from rules.processing import readings

# Longer than what a condition looks back, so that it lives on through a pause of its sensor.
SHORTEST_LIFETIME_MS = 86_400_000
LONGEST_LIFETIME_MS = 400 * 86_400_000

# What it does: keeps what is remembered, unless it is not any more what the caller has read. KEYS: what is remembered. ARGV: what
# was read ('' for nothing), what is to be kept, for how many ms. Returns: 1; 0 when nothing was kept.
_REPLACE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""


class ConditionState(msgspec.Struct, array_like=True):
    """As Redis holds it. `seen_us` is the time of the newest reading that was observed, 0 for none."""

    seen_us: int
    value: Any

    def observe(self, watch: TemporalCondition, sample: Sample) -> ConditionState:
        return ConditionState(max(self.seen_us, sample.timestamp_us), watch.observe(self.value, sample))


class ConditionStateStore:
    """Of the batch that a worker is at. `values`: by the key of a watch, what is remembered, as conditions see it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._was: dict[str, bytes] = {}
        self._seen_us: dict[str, int] = {}
        self._observed: dict[str, tuple[TemporalCondition, list[Sample]]] = {}

    def collect(self, watches: Iterable[TemporalCondition], *, since_us: int, latest: Mapping[Key, Latest]) -> None:
        """Reads what is not known yet; `since_us` is the time of the earliest event, `latest` what is known before the batch.

        Raises RedisError, django.db.Error.
        """
        unknown = {watch.key: watch for watch in watches if watch.key not in self.values}
        for partition, group in _by_partition(unknown.values()).items():
            held = redis.journal_client(partition).mget([_key(watch) for watch in group])
            for watch, raw in zip(group, held, strict=True):
                newest = latest.get(watch.reference)
                found = _up_to_date(watch, raw, since_us=since_us, seen_us=newest.timestamp_us if newest else 0)
                self._take(watch, found, _decoded(found))

    def _take(self, watch: TemporalCondition, raw: bytes, kept: ConditionState) -> None:
        self._was[watch.key] = raw
        self._seen_us[watch.key], self.values[watch.key] = kept.seen_us, kept.value

    def observe(self, watch: TemporalCondition, sample: Sample) -> None:
        """Tells the watch of a sample of its own source."""
        key = watch.key
        observed = self._observed.get(key)
        if observed is None:
            observed = self._observed[key] = (watch, [])
        observed[1].append(sample)
        self._seen_us[key] = max(self._seen_us[key], sample.timestamp_us)
        self.values[key] = watch.observe(self.values[key], sample)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Forgets what was observed inside when that raises, as the database does."""
        values, seen_us = dict(self.values), dict(self._seen_us)
        counts = {key: len(samples) for key, (_, samples) in self._observed.items()}
        try:
            yield
        except BaseException:
            self.values, self._seen_us = values, seen_us
            for key, (_, samples) in self._observed.items():
                del samples[counts.get(key, 0) :]
            raise

    def changes(self) -> list[ConditionStateUpdate]:
        return [
            ConditionStateUpdate(_key(watch), self._was[key], self._encoded(key), _lifetime_ms(watch))
            for key, (watch, samples) in self._observed.items()
            if samples
        ]

    def _encoded(self, key: str) -> bytes:
        return msgspec.json.encode(ConditionState(self._seen_us[key], self.values[key]))

    def reapply(self) -> None:
        """Observes the same samples on what is remembered by now. Raises RedisError, django.db.Error."""
        for watch, samples in self._observed.values():
            if not samples:
                continue
            raw = redis.journal_client(slots.partition_of(watch.reference.uuid)).get(_key(watch))
            if raw is None:
                raw = _remember_anew(watch, b"", since_us=min(sample.timestamp_us for sample in samples))
            self._take(watch, raw, reduce(lambda kept, sample: kept.observe(watch, sample), samples, _decoded(raw)))


def _decoded(raw: bytes) -> ConditionState:
    return msgspec.json.decode(raw, type=ConditionState)


def _by_partition(watches: Iterable[TemporalCondition]) -> Mapping[int, list[TemporalCondition]]:
    found: defaultdict[int, list[TemporalCondition]] = defaultdict(list)
    for watch in watches:
        found[slots.partition_of(watch.reference.uuid)].append(watch)
    return found


def _key(watch: TemporalCondition) -> str:
    return keys.condition_state(slots.partition_of(watch.reference.uuid), watch.key)


def _lifetime_ms(watch: TemporalCondition) -> int:
    return min(max(2 * watch.window_us // 1_000, SHORTEST_LIFETIME_MS), LONGEST_LIFETIME_MS)


def _up_to_date(watch: TemporalCondition, raw: bytes | None, *, since_us: int, seen_us: int) -> bytes:
    """What is remembered, if it has seen the newest reading that is known of; else what is stored leads to."""
    if raw is not None and _decoded(raw).seen_us >= seen_us:
        return raw
    return _remember_anew(watch, raw or b"", since_us=since_us, seen_us=seen_us)


def _remember_anew(watch: TemporalCondition, was: bytes, *, since_us: int, seen_us: int = 0) -> bytes:
    """What is stored of the source leads to; kept at once, so that a source that is silent is not looked up by every batch.

    `seen_us` is the newest reading that is known of: it may be older than what is looked at, and is not missed then.
    """
    kept = reduce(
        lambda kept, sample: kept.observe(watch, sample),
        stored(watch, since_us=since_us - watch.window_us),
        ConditionState(seen_us, None),
    )
    raw = msgspec.json.encode(kept)
    client, key = redis.journal_client(slots.partition_of(watch.reference.uuid)), _key(watch)
    if client.eval(_REPLACE, 1, key, was, raw, _lifetime_ms(watch)):
        return raw
    faster: bytes = client.get(key) or raw  # another worker
    return faster


def stored(watch: TemporalCondition, *, since_us: int) -> list[Sample]:
    """Readings of a sensor or changes of a device, the newest in ascending order; none of what does not exist any more."""
    source_type, uuid, name = watch.reference
    source = catalogue.shared().originators([(source_type, uuid)]).get((source_type, uuid))
    field = source.fields.get(name) if source else None
    if field is None:
        return []
    recent = readings.recent if source_type == "sensor" else states.recent
    return [Sample(value, at_us) for at_us, value in recent(field, since_us=since_us, maximum=watch.maximum)]
