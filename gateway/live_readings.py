"""Send people the readings of variables they watch, at most one event per variable and second.

One or two readings are sent as they are (`new-datastream`), more as count, least, greatest, average and latest
(`datastream-batch`), so that a variable that is measured a hundred times a second does not flood a phone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

import msgspec
from django.db import DatabaseError, close_old_connections
from gevent.event import Event
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis
from aemos.lib.rate_limited_log import RateLimitedLog
from devices.models import Variable
from devices.values import Datatype
from notifications import live_channel
from notifications.live_channel import Reading

log = logging.getLogger(__name__)
NEW_DATASTREAM, DATASTREAM_BATCH = "new-datastream", "datastream-batch"
GATHER_SECONDS = 1.0
AS_THEY_ARE = 2
# Watched at the same time through one gateway; what is over it is not sent live.
MAXIMUM_VARIABLES = 10_000
SAY_AGAIN_SECONDS = 5.0
RETRY_SECONDS = 1.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Audience(Protocol):
    """Who watches, and how to send to them. Called from one greenlet; sending never waits."""

    def watched_variables(self) -> set[str]:
        """The uuids of the variables that somebody watches now."""

    def send_to_watchers(self, variable_uuid: str, event: str, body: dict[str, Any]) -> None: ...


class Watched(NamedTuple):
    """What clients get of a variable beside its readings."""

    uuid: str
    sensor: str
    name: str
    unit: str
    datatype: str

    def value(self, reading: Reading) -> float | str | bool | None:
        _, _, number, text, _ = reading
        if number is None:
            return text
        return bool(number) if self.datatype == Datatype.BOOLEAN else number


@dataclass(slots=True)
class Gathered:
    """The readings of one variable within a second: the first few as they are, of all together what sums them up."""

    first: list[Reading] = field(default_factory=list)
    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    greatest: float = float("-inf")
    earliest_us: int = 0
    latest: Reading | None = None

    def add(self, reading: Reading) -> None:
        _, timestamp_us, number, _, _ = reading
        self.count += 1
        if len(self.first) < AS_THEY_ARE:
            self.first.append(reading)
        if number is not None:
            self.total += number
            self.least, self.greatest = min(self.least, number), max(self.greatest, number)
        self.earliest_us = timestamp_us if self.latest is None else min(self.earliest_us, timestamp_us)
        if self.latest is None or timestamp_us >= self.latest[1]:
            self.latest = reading

    def events(self, watched: Watched) -> list[tuple[str, dict[str, Any]]]:
        """(event, body) to send, in the order of time."""
        about = {"variable": watched.uuid, "sensor": watched.sensor, "name": watched.name, "unit": watched.unit}
        if self.count <= AS_THEY_ARE:
            ordered = sorted(self.first, key=lambda reading: reading[1])
            return [(NEW_DATASTREAM, {**about, **_shown(reading, watched)}) for reading in ordered]
        assert self.latest is not None  # noqa: S101  there is one as soon as something was added
        return [(DATASTREAM_BATCH, {**about, **self._summary(watched), "latest": _shown(self.latest, watched)})]

    def _summary(self, watched: Watched) -> dict[str, Any]:
        assert self.latest is not None  # noqa: S101  see above
        numeric = watched.datatype == Datatype.NUMBER
        return {
            "from": _iso(self.earliest_us),
            "to": _iso(self.latest[1]),
            "count": self.count,
            "min": self.least if numeric else None,
            "max": self.greatest if numeric else None,
            "average": self.total / self.count if numeric else None,
        }


class LiveReadings:
    """The loop of one gateway."""

    def __init__(self, audience: Audience, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._audience = audience
        self._clock = clock
        self._watched: dict[int, Watched] = {}
        self._ids: dict[str, int] = {}
        self._gathered: dict[int, Gathered] = {}
        self._due = clock() + GATHER_SECONDS
        self._said_at = float("-inf")
        self._log = RateLimitedLog(log)

    def run(self, stopping: Event) -> None:
        """Gathers and sends until `stopping`; Redis may be unavailable meanwhile."""
        channel = redis.blocking_client().pubsub(ignore_subscribe_messages=True)
        try:
            channel.subscribe(keys.LIVE_READINGS)
            while not stopping.is_set():
                self._step(channel, stopping)
        except RedisError as error:
            self._redis_failed(error, stopping)
        finally:
            channel.close()

    def _step(self, channel: Any, stopping: Event) -> None:
        try:
            message = channel.get_message(timeout=max(self._due - self._clock(), 0.0))
            if message is not None:
                self.gather(message["data"])
            if self._clock() >= self._due:
                self._due = self._clock() + GATHER_SECONDS
                self.send()
                self.look()
            self._log.recovered("redis")
        except RedisError as error:
            self._redis_failed(error, stopping)

    def _redis_failed(self, error: RedisError, stopping: Event) -> None:
        self._log.log("redis", logging.WARNING, "Live readings of this moment are lost: %s", redis.explain(error))
        self._said_at = float("-inf")
        stopping.wait(RETRY_SECONDS)

    def gather(self, data: bytes) -> None:
        try:
            readings = live_channel.decode(data)
        except msgspec.MsgspecError as error:
            log.error("Skipped a message of live readings that is none: %s", error)
            return
        for reading in readings:
            if reading[0] in self._watched:
                self._gathered.setdefault(reading[0], Gathered()).add(reading)

    def send(self) -> None:
        """Sends what was gathered since the last time, and forgets it."""
        gathered, self._gathered = self._gathered, {}
        for variable_id, each in gathered.items():
            watched = self._watched.get(variable_id)
            if watched is None:
                continue
            for event, body in each.events(watched):
                self._audience.send_to_watchers(watched.uuid, event, body)
            metrics.LIVE_READINGS.labels("delivered").inc(each.count)

    def look(self) -> None:
        """Looks who watches what, and says so to the workers when it has changed or is due. Raises RedisError."""
        wanted = self._audience.watched_variables()
        gone, added = self._ids.keys() - wanted, wanted - self._ids.keys()
        for uuid in gone:
            del self._watched[self._ids.pop(uuid)]
        found = self._learn(added)
        if found or self._clock() - self._said_at >= SAY_AGAIN_SECONDS:
            live_channel.subscribe(list(self._watched), now=time.time())
            self._said_at = self._clock()

    def _learn(self, uuids: set[str]) -> bool:
        room = MAXIMUM_VARIABLES - len(self._watched)
        if len(uuids) > room:
            metrics.LIVE_READINGS.labels("over-limit").inc(len(uuids) - room)
            log.warning("%d variables are not sent live: %d are watched", len(uuids) - room, MAXIMUM_VARIABLES)
        if not uuids or room <= 0:
            return False
        try:
            rows = _rows(sorted(uuids)[:room])
        except DatabaseError as error:
            log.warning("Who begins to watch waits, the database is away: %s", error)
            return False
        finally:
            close_old_connections()
        for variable_id, watched in rows:
            self._watched[variable_id], self._ids[watched.uuid] = watched, variable_id
        return bool(rows)


def _rows(uuids: Iterable[str]) -> list[tuple[int, Watched]]:
    found = Variable.objects.filter(uuid__in=uuids).values_list(
        "id", "uuid", "sensor__uuid", "name", "unit", "datatype"
    )
    return [
        (variable_id, Watched(str(uuid), str(sensor), name, unit, datatype))
        for variable_id, uuid, sensor, name, unit, datatype in found
    ]


def _shown(reading: Reading, watched: Watched) -> dict[str, Any]:
    shown = {"timestamp": _iso(reading[1]), "value": watched.value(reading)}
    return {**shown, "suspect": reading[4]} if reading[4] else shown


def _iso(timestamp_us: int) -> str:
    return (_EPOCH + timedelta(microseconds=timestamp_us)).isoformat()
