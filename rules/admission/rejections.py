"""Refusals: counted always, and kept for people as RejectedEvent rows as far as a bounded buffer can take them.

Overload must not become one INSERT per event. What is refused waits in memory, bounded by rows and by bytes; a greenlet
writes it in chunks and adds the counts of the time between to a hash in Redis. What the buffer cannot take is counted as
unrecorded, so that always: counted = recorded + unrecorded + what still waits in a process.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import gevent
from django.db import Error as DatabaseError
from django.db import InterfaceError, OperationalError, connection, transaction
from django.utils import timezone
from gevent.lock import RLock
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis
from aemos.lib.per_process import per_process
from aemos.lib.rate_limited_log import RateLimitedLog
from devices.catalogue import Credential
from devices.exceptions import Overloaded, Refusal
from rules import events
from rules.events import Event
from rules.models import Status

log = logging.getLogger(__name__)
MAXIMUM_ROWS = 5_000
MAXIMUM_BUFFERED_BYTES = 16 * 1_048_576
MAXIMUM_PAYLOAD = 4_096
# What a waiting event costs besides its texts: the objects of its id, its values and its times.
ROW_BYTES = 1_000
FLUSH_SECONDS = 0.5
# A chunk is written without a pause, and nobody is answered meanwhile: so it is small, and the pause after it is longer.
CHUNK_ROWS = 40
PAUSE_SHARE = 19.0
WARN_EVERY_SECONDS = 5.0
# SQLite waits for its lock without letting other greenlets run; better to try again later than to stand still.
SQLITE_BUSY_MS = 50
# The field of the hash beside one field for each reason.
UNRECORDED = "unrecorded"

Build = Callable[[], "Row"]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row to be: made only when it is written, because under overload most refusals never get that far."""

    build: Build
    size_bytes: int


class Recorder:
    """Counts and keeps the refusals of one process. Any greenlet may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._counted: Counter[str] = Counter()
        self._overflow = 0
        self._log = RateLimitedLog(log, seconds=WARN_EVERY_SECONDS, clock=self._clock)
        self._running = False
        # One at a time: a flush at exit waits for the chunk that the greenlet is writing.
        self._lock = RLock()

    @property
    def waiting(self) -> int:
        """Rows that are not in the database yet."""
        return len(self._waiting)

    def count(self, reason: str, number: int) -> None:
        self._counted[reason] += number
        self._start()

    def has_room(self) -> bool:
        return len(self._waiting) < MAXIMUM_ROWS and self._bytes < MAXIMUM_BUFFERED_BYTES

    def add(self, build: Build, size_bytes: int) -> None:
        """Only while `has_room`."""
        self._waiting.append(_Waiting(build, size_bytes))
        self._bytes += size_bytes

    def overflow(self, number: int) -> None:
        """Notes refusals, counted before, for which there was no room."""
        self._counted[UNRECORDED] += number
        self._overflow += number
        metrics.UNRECORDED.inc(number)

    def flush(self) -> None:
        """Writes rows and counts until nothing waits; both stay when this raises django.db.Error or RedisError."""
        try:
            while self._write_chunk():
                pass
        finally:
            self._warn()
            self._publish_counts()

    def close(self) -> None:
        """At the end of the process: writes what waits, as far as database and Redis allow."""
        try:
            self.flush()
        except (DatabaseError, RedisError) as error:
            log.error("%d refused events could not be recorded before the end: %s", len(self._waiting), error)
        finally:
            connection.close()

    def _start(self) -> None:
        if not self._running:
            self._running = True
            gevent.spawn_later(FLUSH_SECONDS, self._run)

    def _run(self) -> None:
        """Works in the background until nothing is left; then the next refusal starts it again."""
        try:
            self._attempt(self._write_slowly)
            self._attempt(self._publish_counts)
            self._warn()
        finally:
            connection.close()  # a greenlet outside a request must not keep its connection
            self._running = False
            if self._waiting or self._counted:
                self._start()

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except DatabaseError as error:
            self._log.log(
                "database", logging.WARNING, "%d refused events wait to be recorded: %s", len(self._waiting), error
            )
        except RedisError as error:
            self._log.log("redis", logging.WARNING, "counts of refused events wait: %s", redis.explain(error))

    def _write_slowly(self) -> None:
        """At most a twentieth of the time goes into recording: what waits for it is the slowest of all answers."""
        if self._waiting and connection.vendor == "sqlite":
            with connection.cursor() as cursor:
                cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_MS}")
        published_at = began = self._clock()
        while self._write_chunk():
            now = self._clock()
            if now - published_at >= FLUSH_SECONDS:
                self._attempt(self._publish_counts)
                self._warn()
                published_at = now
            gevent.sleep(PAUSE_SHARE * (now - began))
            began = self._clock()

    def _write_chunk(self) -> bool:
        """False when nothing waits. Taken rows go back to their place when the database does not take them."""
        with self._lock:
            chunk = [self._waiting.popleft() for _ in range(min(CHUNK_ROWS, len(self._waiting)))]
            if not chunk:
                return False
            try:
                _insert([one.build() for one in chunk], self._lost)
            except DatabaseError:
                self._waiting.extendleft(reversed(chunk))
                raise
            self._bytes -= sum(one.size_bytes for one in chunk)
            return True

    def _lost(self, row: Row, error: DatabaseError) -> None:
        log.error("a refused event (%s) is counted but cannot be kept: %s", row.reason, error)
        self.overflow(1)

    def _publish_counts(self) -> None:
        with self._lock:
            counted, self._counted = self._counted, Counter()
            if not counted:
                return
            try:
                with redis.client().pipeline() as pipeline:
                    for name, number in counted.items():
                        pipeline.hincrby(keys.REJECTED, name, number)
                    pipeline.execute()
            except RedisError:
                self._counted.update(counted)
                raise

    def _warn(self) -> None:
        if self._overflow and self._log.is_due("overflow"):
            self._log.log(
                "overflow",
                logging.WARNING,
                "%d refused events were counted but not kept: too many at once",
                self._overflow,
            )
            self._overflow = 0


class Row(NamedTuple):
    """A RejectedEvent as it is stored, without the cost of a model's object: the columns in the order of the statement."""

    event_id: str | None
    organization_id: int | None
    protocol: str
    source_type: str
    originator_uuid: str
    type: str
    priority: int | None
    lane: str
    timestamp: datetime | None
    reason: str
    detail: str
    payload: str
    queue_depth: int | None
    threshold: int | None
    circuit_state: str
    received_at: datetime


_INSERT = f"""
INSERT INTO rules_rejectedevent (uuid, status, decided_by, {", ".join(f'"{name}"' for name in Row._fields)})
VALUES (%s, '{Status.OPEN.value}', '', {", ".join(["%s"] * len(Row._fields))})
"""  # noqa: S608  column names of our own


def _insert(rows: Sequence[Row], lost: Callable[[Row, DatabaseError], None]) -> None:
    """All rows at once; one by one when one of them cannot be stored, such as that of an organization just deleted.

    Raises OperationalError or InterfaceError when the database is away.
    """
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.executemany(_INSERT, [_parameters(row) for row in rows])
        return
    except (OperationalError, InterfaceError):
        raise
    except DatabaseError as error:
        if len(rows) == 1:
            lost(rows[0], error)
            return
    for row in rows:
        _insert([row], lost)


def _parameters(row: Row) -> list[Any]:
    adapt = connection.ops.adapt_datetimefield_value
    timestamp = adapt(row.timestamp) if row.timestamp else None
    row = row._replace(timestamp=timestamp, received_at=adapt(row.received_at))  # type: ignore[arg-type]
    if connection.features.has_native_uuid_field:
        return [uuid4(), *row]
    return [uuid4().hex, row.event_id and row.event_id.replace("-", ""), *row[1:]]


@per_process
def shared() -> Recorder:
    """The recorder of this process."""
    return Recorder()


def counts() -> dict[str, int]:
    """Refused events since Redis was set up: reason -> events, and "unrecorded" of them. Raises RedisError."""
    found: dict[bytes, bytes] = redis.client().hgetall(keys.REJECTED)
    return {name.decode(): int(number) for name, number in found.items()}


def record(refusal: Refusal, payload: bytes, *, credential: Credential | None, protocol: str, uuid: str | None) -> None:
    """Counts a request in which no event could be recognised, and keeps the first 4 KB of what was sent."""
    metrics.INGESTED.labels(protocol, refusal.reason).inc()
    recorder = shared()
    recorder.count(refusal.reason, 1)
    if not recorder.has_room():
        recorder.overflow(1)
        return
    cut = payload[:MAXIMUM_PAYLOAD]
    now = timezone.now()

    recorder.add(partial(_request_row, refusal, cut, credential, protocol, uuid, now), ROW_BYTES + len(cut))


def count_unrecorded(refusal: Refusal, *, protocol: str) -> None:
    """Counts a request of which nothing is kept, on purpose."""
    metrics.INGESTED.labels(protocol, refusal.reason).inc()
    recorder = shared()
    recorder.count(refusal.reason, 1)
    recorder.count(UNRECORDED, 1)


def _request_row(
    refusal: Refusal, cut: bytes, credential: Credential | None, protocol: str, uuid: str | None, now: datetime
) -> Row:
    originator = credential.originator if credential else None
    return Row(
        event_id=None,
        organization_id=originator.organization_id if originator else None,
        protocol=protocol,
        source_type="",
        originator_uuid=(originator.uuid if originator else uuid or "")[:36],
        type="",
        priority=None,
        lane="",
        timestamp=None,
        reason=refusal.reason,
        detail=_printable(refusal.detail[:500])[:500],
        payload=_printable(cut.decode("utf-8", "backslashreplace"))[:MAXIMUM_PAYLOAD],
        queue_depth=None,
        threshold=None,
        circuit_state="",
        received_at=now,
    )


def record_events(refused: Sequence[Event], refusal: Overloaded) -> None:
    """Counts refused events and keeps each of them whole, as far as there is room, so that it can be replayed."""
    if not refused:
        return
    metrics.INGESTED.labels(refused[0].protocol, refusal.reason).inc(len(refused))
    recorder = shared()
    recorder.count(refusal.reason, len(refused))
    for position, event in enumerate(refused):
        if not recorder.has_room():
            recorder.overflow(len(refused) - position)
            return
        recorder.add(partial(_event_row, event, refusal), _size_bytes(event))


def _size_bytes(event: Event) -> int:
    texts = sum(len(value) for value in event.values.values() if isinstance(value, str))
    return ROW_BYTES + 50 * len(event.values) + 4 * texts


def _event_row(event: Event, refusal: Overloaded) -> Row:
    return Row(
        event_id=event.id,
        organization_id=event.organization_id,
        protocol=event.protocol,
        source_type=event.source_type,
        originator_uuid=event.originator_uuid,
        type=event.type,
        priority=event.priority,
        lane=event.lane,
        timestamp=events.moment(event.stored_us),
        reason=refusal.reason,
        detail=refusal.detail[:500],
        payload=events.as_sent(event).decode(),
        queue_depth=refusal.queue_depth,
        threshold=refusal.threshold,
        circuit_state=refusal.circuit_state,
        received_at=events.moment(event.received_us),
    )


def _printable(text: str) -> str:
    """PostgreSQL stores no NUL."""
    return text.replace("\x00", "\\x00")
