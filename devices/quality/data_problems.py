"""What sensors and devices send that cannot be used or believed, counted in memory and written now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import uuid4

import gevent
from django.db import Error as DatabaseError
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from aemos.lib.per_process import per_process
from aemos.lib.text import storable
from devices.models import DataProblem, Organization

log = logging.getLogger(__name__)
Kind = DataProblem.Kind
FLUSH_SECONDS = 2.0
# What waits to be written at most, of all senders together.
MAXIMUM_WAITING = 5_000
MAXIMUM_PAYLOAD = 1_000
MAXIMUM_DETAIL = 500


class Key(NamedTuple):
    """Of one row; `name` is empty where no variable or state is meant, so that a sender cannot make up rows."""

    source_type: str
    originator_uuid: str
    name: str
    kind: str


@dataclass(slots=True)
class _Seen:
    organization_id: int
    count: int
    detail: str
    payload: str
    first_seen_at: datetime
    last_seen_at: datetime


class DataProblems:
    """What this process has seen and not yet written."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._flushed_at = float("-inf")
        self._waiting: dict[Key, _Seen] = {}
        self._is_due = False

    def note(self, key: Key, organization_id: int, *, detail: str, payload: str) -> None:
        now = timezone.now()
        seen = self._waiting.get(key)
        if seen is None:
            if len(self._waiting) >= MAXIMUM_WAITING:
                log.warning("a problem of the data of %s %s is not recorded: too many at once", *key[:2])
                return
            seen = self._waiting[key] = _Seen(organization_id, 0, "", "", now, now)
        seen.count += 1
        seen.detail, seen.payload = storable(detail, MAXIMUM_DETAIL), storable(payload, MAXIMUM_PAYLOAD)
        seen.last_seen_at = now

    def flush_soon(self) -> None:
        """In a process whose greenlets take turns: once for all that is noted in the next two seconds."""
        if self._waiting and not self._is_due:
            self._is_due = True
            gevent.spawn_later(FLUSH_SECONDS, self._flush_alone)

    def _flush_alone(self) -> None:
        self._is_due = False
        try:
            self.flush(force=True)
        finally:
            connection.close()  # a greenlet outside a request must not keep its connection
            self.flush_soon()  # what the database did not take

    def flush(self, *, force: bool = False) -> None:
        """Writes what is new; at most every two seconds unless `force`. While the database is away it waits."""
        now = self._clock()
        if not self._waiting or (not force and now - self._flushed_at < FLUSH_SECONDS):
            return
        self._flushed_at = now
        taken, self._waiting = self._waiting, {}
        try:
            _write(taken)
        except DatabaseError as error:
            log.warning("%d problems of data wait for the database: %s", len(taken), error)
            connection.close()  # a broken connection must not be used again
            self._put_back(taken)

    def _put_back(self, taken: dict[Key, _Seen]) -> None:
        """With what was noted while they were being written: the counts add up, the newest stays the newest."""
        for key, later in self._waiting.items():
            if earlier := taken.get(key):
                later.count += earlier.count
                later.first_seen_at = earlier.first_seen_at
        self._waiting = taken | self._waiting


@per_process
def shared() -> DataProblems:
    """The one of this process."""
    return DataProblems()


_COLUMNS = "source_type, originator_uuid, name, kind, organization_id, count, detail, payload, first_seen_at, last_seen_at, uuid"
_UPSERT = f"""
INSERT INTO devices_dataproblem AS kept ({_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (originator_uuid, name, kind) DO UPDATE SET
    count = kept.count + excluded.count, detail = excluded.detail, payload = excluded.payload,
    last_seen_at = excluded.last_seen_at
"""  # noqa: S608  nothing in it comes from outside


def _write(seen: dict[Key, _Seen]) -> None:
    """Always in the same order, so that two processes wait for each other instead of deadlocking."""
    rows = [_row(key, seen[key]) for key in sorted(seen)]
    try:
        _insert(rows)
    except IntegrityError:  # an organization was deleted a moment ago
        there = set(Organization.objects.values_list("pk", flat=True))
        _insert([row for row in rows if row[4] in there])


def _insert(rows: list[tuple[Any, ...]]) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.executemany(_UPSERT, rows)


def _row(key: Key, seen: _Seen) -> tuple[Any, ...]:
    adapt = connection.ops.adapt_datetimefield_value
    uuids = [key.originator_uuid, str(uuid4())]
    if not connection.features.has_native_uuid_field:
        uuids = [each.replace("-", "") for each in uuids]
    originator, own = uuids
    about = (key.source_type, originator, key.name, key.kind, seen.organization_id)
    times = (adapt(seen.first_seen_at), adapt(seen.last_seen_at))
    return (*about, seen.count, seen.detail, seen.payload, *times, own)
