"""Latest values: what sensors measured and devices were set to last, in Redis; the newer timestamp wins, whoever comes last."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.db.models import OuterRef, Subquery
from django.db.models.functions import Coalesce
from django.utils import timezone

from aemos.lib import keys, redis
from devices.models import DeviceState, Reading, Variable

# How long a variable without any reading is not looked for again in the database.
UNKNOWN_SECONDS = 10.0
MAXIMUM_UNKNOWN = 100_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Latest(NamedTuple):
    """A value and when it was true, in microseconds since 1970.

    `received_us` is when its source last said something of it, if only something older; 0 where that is the same. Of a variable
    with limits the value is the last good one: `suspect_us` is the time of the newest reading that was suspect, for the
    `reason`, and `since_us` is since when the value has been the same.
    """

    value: Any
    timestamp_us: int
    received_us: int = 0
    suspect_us: int = 0
    reason: str = ""
    since_us: int = 0

    @property
    def heard_us(self) -> int:
        return self.received_us or self.timestamp_us

    @property
    def suspicion(self) -> str:
        """Why the newest reading is not believed; empty when it is."""
        return self.reason if self.suspect_us > self.timestamp_us else ""


Key = tuple[str, str, str]  # source type, uuid, name of the variable or state

_unknown: dict[Key, float] = {}
"""What the database does not have either -> until when it is not asked again, on the monotonic clock."""

# What it does: sets each field unless it holds something newer; then at most what is held was received later than it says. A
# field's text is "<timestamp in us> <received in us> <JSON>", of before there were received times "<timestamp in us> <JSON>".
# With limits a tab follows, and "<suspect in us> <since in us> <reason>".
# KEYS: hash of one source. ARGV: by fours field, timestamp in us, received in us, JSON. Returns: nothing of interest.
_SET_IF_NEWER = """
for i = 1, #ARGV, 4 do
  local at, received, value = ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  if held then
    local held_at, held_received, held_value = string.match(held, '^(-?%d+) (%d+) (.+)$')
    if not held_at then
      held_at, held_value = string.match(held, '^(-?%d+) (.+)$')
      held_received = held_at
    end
    if tonumber(held_at) > tonumber(at) then
      at, value = held_at, held_value
    end
    if tonumber(held_received) > tonumber(received) then
      received = held_received
    end
  end
  redis.call('HSET', KEYS[1], ARGV[i], at .. ' ' .. received .. ' ' .. value)
end
"""


def remember(values: Mapping[Key, Latest]) -> None:
    """Keeps what is newer, and has the scheduler look at chains that wait for time to pass over these devices: who switches a
    device is no event that would run them. Raises RedisError; to remember again is harmless.
    """
    by_source: dict[tuple[str, str], list[Any]] = {}
    for (source_type, uuid, name), latest in values.items():
        _unknown.pop((source_type, uuid, name), None)
        by_source.setdefault((source_type, uuid), []).extend(
            (name, latest.timestamp_us, latest.heard_us, _text(latest))
        )
    if not by_source:
        return
    with redis.client().pipeline(transaction=False) as pipeline:
        for (source_type, uuid), args in by_source.items():
            redis.script(_SET_IF_NEWER)(keys=[keys.latest(source_type, uuid)], args=args, client=pipeline)
            if source_type == "device":
                pipeline.sadd(keys.TIMERS_DIRTY, f"{source_type}|{uuid}")
        pipeline.execute()


def recall(wanted: Iterable[Key]) -> dict[Key, Latest]:
    """The latest values of those that have one, in one round trip. Raises RedisError and django.db.Error.

    What Redis does not have, because it was emptied, is looked for in the database: "never seen" must not be said in error.
    """
    wanted = list(wanted)
    if not wanted:
        return {}
    with redis.client().pipeline(transaction=False) as pipeline:
        for source_type, uuid, name in wanted:
            pipeline.hget(keys.latest(source_type, uuid), name)
        answers = pipeline.execute()
    found = {key: _parsed(text) for key, text in zip(wanted, answers, strict=True) if text is not None}
    if len(found) < len(wanted):
        found |= _restored([key for key in wanted if key not in found])
    return found


def _text(latest: Latest) -> str:
    """JSON, in which a tab is always escaped."""
    quality = f"\t{latest.suspect_us} {latest.since_us} {latest.reason}" if latest.suspect_us or latest.since_us else ""
    return json.dumps(latest.value) + quality


def _parsed(text: bytes) -> Latest:
    timestamp_us, received_us, *value = text.split(b" ", 2)
    if not value or not received_us.isdigit():  # of before there were received times
        return Latest(json.loads(text.split(b" ", 1)[1]), int(timestamp_us))
    document, _, quality = value[0].partition(b"\t")
    latest = Latest(json.loads(document), int(timestamp_us), int(received_us))
    if not quality:
        return latest
    suspect_us, since_us, reason = quality.split(b" ", 2)
    return latest._replace(suspect_us=int(suspect_us), since_us=int(since_us), reason=reason.decode())


def _restored(missing: Iterable[Key]) -> dict[Key, Latest]:
    now = time.monotonic()
    asked = [key for key in missing if _unknown.get(key, 0.0) < now]
    if not asked:
        return {}
    found = _stored("sensor", asked, _readings) | _stored("device", asked, _states)
    remember(found)
    if len(_unknown) > MAXIMUM_UNKNOWN:
        _unknown.clear()
    _unknown.update(dict.fromkeys((key for key in asked if key not in found), now + UNKNOWN_SECONDS))
    return found


Load = Callable[[set[str], set[str]], Iterator[tuple[UUID, str, Latest]]]


def _stored(source_type: str, asked: Sequence[Key], load: Load) -> dict[Key, Latest]:
    mine = {key for key in asked if key[0] == source_type}
    if not mine:
        return {}
    rows = load({uuid for _, uuid, _ in mine}, {name for _, _, name in mine})
    found = {(source_type, str(uuid), name): latest for uuid, name, latest in rows}
    return {key: found[key] for key in mine & found.keys()}


def _readings(uuids: set[str], names: set[str]) -> Iterator[tuple[UUID, str, Latest]]:
    """Of each variable the reading that was taken last; what its sender dated ahead counts from when it was received."""
    taken = Coalesce("received_at", "timestamp")
    of_variable, now = Reading.objects.filter(variable=OuterRef("pk")), timezone.now()
    # By the index: of what is not ahead the newest, and all that is ahead, which is almost always nothing.
    usual = of_variable.filter(timestamp__lte=now).order_by("-timestamp").values("pk")
    ahead = of_variable.filter(timestamp__gt=now).order_by(taken.desc()).values("pk")
    chosen = {
        "newest": usual,
        "good": usual.filter(suspect=None),
        "ahead": ahead,
        "good_ahead": ahead.filter(suspect=None),
    }
    variables = Variable.objects.filter(sensor__uuid__in=uuids, name__in=names)
    found = variables.annotate(**{name: Subquery(rows[:1]) for name, rows in chosen.items()}).values_list(*chosen)
    ids = {pk for rows in found for pk in rows if pk is not None}
    latest: dict[int, Latest] = {}
    for row in Reading.objects.filter(pk__in=ids).select_related("variable__sensor").order_by(taken):
        variable = row.variable
        at_us = _microseconds(min(row.received_at or row.timestamp, now))
        if row.suspect:
            known = latest.get(variable.pk, Latest(None, 0))
            latest[variable.pk] = known._replace(received_us=at_us, suspect_us=at_us, reason=row.suspect)
        else:
            latest[variable.pk] = Latest(row.value, at_us)
        yield variable.sensor.uuid, variable.name, latest[variable.pk]


def _states(uuids: set[str], names: set[str]) -> Iterator[tuple[UUID, str, Latest]]:
    for row in DeviceState.objects.filter(device__uuid__in=uuids, name__in=names).select_related("device"):
        value, said_at = row.newest
        if said_at is not None:
            yield row.device.uuid, row.name, Latest(value, _microseconds(said_at))


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
