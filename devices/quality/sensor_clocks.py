"""By how much the clocks of sensors are off, from what they claim and when it was received; written now and then."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from statistics import median
from typing import Any

from django.db import Error as DatabaseError
from django.db import connection, transaction
from django.utils import timezone

from aemos.lib.per_process import per_process
from devices.models import Sensor

log = logging.getLogger(__name__)
FLUSH_SECONDS = 10.0
# One for each batch of a sensor; the median of so many passes over events that waited for the network.
SAMPLES = 31
# Sensors whose samples are kept in memory; all are forgotten when there are more.
MAXIMUM_SENSORS = 20_000
LATE, AHEAD = "late", "ahead"


class SensorClocks:
    """What this process has measured and counted. A sensor is named by its uuid."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._flushed_at = float("-inf")
        self._offsets: dict[str, deque[int]] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._measured: set[str] = set()

    def measure(self, uuid: str, offset_us: int) -> None:
        """`offset_us`: when an event of it was received minus when it says that it happened."""
        if uuid not in self._offsets and len(self._offsets) >= MAXIMUM_SENSORS:
            self._offsets.clear()
        self._offsets.setdefault(uuid, deque(maxlen=SAMPLES)).append(offset_us)
        self._measured.add(uuid)

    def count(self, uuid: str, what: str) -> None:
        """`what`: LATE or AHEAD."""
        self._counts.setdefault(uuid, Counter())[what] += 1

    def flush(self, *, force: bool = False) -> None:
        """Writes what is new; at most every ten seconds unless `force`. While the database is away the counts wait."""
        now = self._clock()
        if not (self._measured or self._counts) or (not force and now - self._flushed_at < FLUSH_SECONDS):
            return
        self._flushed_at = now
        measured, self._measured = self._measured, set()
        counts, self._counts = self._counts, {}
        try:
            self._write(measured, counts)
        except DatabaseError as error:
            log.warning("what is known of %d clocks waits for the database: %s", len(measured | counts.keys()), error)
            connection.close()  # a broken connection must not be used again
            self._measured |= measured
            for uuid, counted in counts.items():
                self._counts.setdefault(uuid, Counter()).update(counted)

    def _write(self, measured: set[str], counts: dict[str, Counter[str]]) -> None:
        now = connection.ops.adapt_datetimefield_value(timezone.now())
        ids = dict(Sensor.objects.filter(uuid__in=measured | counts.keys()).values_list("uuid", "pk"))
        rows: list[tuple[Any, ...]] = []
        for uuid, pk in sorted(ids.items(), key=lambda item: item[1]):
            offsets, counted = self._offsets.get(str(uuid)), counts.get(str(uuid), Counter())
            offset_ms = round(median(offsets) / 1_000) if offsets else None
            rows.append((pk, offset_ms, counted[LATE], counted[AHEAD], now))
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.executemany(_UPSERT, rows)


_UPSERT = """
INSERT INTO devices_sensorclock AS kept (sensor_id, offset_ms, late, ahead, updated_at) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (sensor_id) DO UPDATE SET
    offset_ms = COALESCE(excluded.offset_ms, kept.offset_ms), late = kept.late + excluded.late,
    ahead = kept.ahead + excluded.ahead, updated_at = excluded.updated_at
"""


@per_process
def shared() -> SensorClocks:
    """The one of this process."""
    return SensorClocks()
