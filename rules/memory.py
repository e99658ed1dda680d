"""What conditions over time remember: watches and samples in, the memory that they see and what is to be kept of it out.

It is kept in Redis, in the same step that acknowledges the events it comes from. So after a crash the events are observed
again on what was remembered before them, exactly once. What Redis has lost is observed again from the stored readings.
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
from rules import journal, readings, states
from rules.journal import Remembered
from rules.scope import Sample, Watch

# Longer than what a condition looks back, so that it lives on through a pause of its sensor.
SHORTEST_LIFETIME_MS = 86_400_000
LONGEST_LIFETIME_MS = 400 * 86_400_000


class Memory:
    """Of the batch that a worker is at. `values`: by the key of a watch, what is remembered, as conditions see it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._was: dict[str, bytes] = {}
        self._observed: dict[str, tuple[Watch, list[Sample]]] = {}

    def collect(self, watches: Iterable[Watch], *, since_us: int) -> None:
        """Reads what is not known yet; `since_us` is the time of the earliest event. Raises RedisError, django.db.Error."""
        unknown = {watch.key: watch for watch in watches if watch.key not in self.values}
        for partition, group in _by_partition(unknown.values()).items():
            held = redis.journal_client(partition).mget([keys.remembered(partition, watch.key) for watch in group])
            for watch, raw in zip(group, held, strict=True):
                self._was[watch.key] = raw or _remember_anew(watch, since_us=since_us)
                self.values[watch.key] = msgspec.json.decode(self._was[watch.key])

    def observe(self, watch: Watch, sample: Sample) -> None:
        """Tells the watch of a sample of its own source."""
        _, samples = self._observed.setdefault(watch.key, (watch, []))
        samples.append(sample)
        self.values[watch.key] = watch.observe(self.values.get(watch.key), sample)

    @contextmanager
    def provisionally(self) -> Iterator[None]:
        """Forgets what was observed inside when that raises, as the database does."""
        values, counts = dict(self.values), {key: len(samples) for key, (_, samples) in self._observed.items()}
        try:
            yield
        except BaseException:
            self.values = values
            for key, (_, samples) in self._observed.items():
                del samples[counts.get(key, 0) :]
            raise

    def changes(self) -> list[Remembered]:
        return [
            Remembered(_key(watch), self._was[key], msgspec.json.encode(self.values[key]), _lifetime_ms(watch))
            for key, (watch, samples) in self._observed.items()
            if samples
        ]

    def catch_up(self) -> None:
        """Observes the same samples on what is remembered by now. Raises RedisError."""
        for key, (watch, samples) in self._observed.items():
            partition = journal.partition_of(watch.reference.uuid)
            raw = redis.journal_client(partition).get(_key(watch))
            self._was[key] = raw or b""
            self.values[key] = reduce(watch.observe, samples, msgspec.json.decode(raw) if raw else None)


def _by_partition(watches: Iterable[Watch]) -> Mapping[int, list[Watch]]:
    found: defaultdict[int, list[Watch]] = defaultdict(list)
    for watch in watches:
        found[journal.partition_of(watch.reference.uuid)].append(watch)
    return found


def _key(watch: Watch) -> str:
    return keys.remembered(journal.partition_of(watch.reference.uuid), watch.key)


def _lifetime_ms(watch: Watch) -> int:
    return min(max(2 * watch.window_us // 1_000, SHORTEST_LIFETIME_MS), LONGEST_LIFETIME_MS)


def _remember_anew(watch: Watch, *, since_us: int) -> bytes:
    """What is stored of the source leads to; kept at once, so that a source that is silent is not looked up by every batch."""
    value = reduce(watch.observe, stored(watch, since_us=since_us - watch.window_us), None)
    raw = msgspec.json.encode(value)
    client, key = redis.journal_client(journal.partition_of(watch.reference.uuid)), _key(watch)
    if client.set(key, raw, px=_lifetime_ms(watch), nx=True):
        return raw
    earlier: bytes = client.get(key) or raw  # another worker was faster
    return earlier


def stored(watch: Watch, *, since_us: int) -> list[Sample]:
    """Readings of a sensor or changes of a device, the newest in ascending order; none of what does not exist any more."""
    source_type, uuid, name = watch.reference
    source = catalogue.shared().originators([(source_type, uuid)]).get((source_type, uuid))
    field = source.fields.get(name) if source else None
    if field is None:
        return []
    recent = readings.recent if source_type == "sensor" else states.recent
    return [Sample(value, at_us) for at_us, value in recent(field, since_us=since_us, maximum=watch.maximum)]
