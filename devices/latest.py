"""Latest values: what sensors measured and devices were set to last, in Redis; the newer timestamp wins, whoever comes last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from aemos.lib import keys, redis


class Latest(NamedTuple):
    """A value and when it was true, in microseconds since 1970."""

    value: Any
    timestamp_us: int


Key = tuple[str, str, str]  # source type, uuid, name of the variable or state

# What it does: sets each field unless it already holds something newer; a field's text is "<timestamp in us> <JSON>".
# KEYS: hash of one source. ARGV: triples of field, timestamp in us, text. Returns: nothing of interest.
_SET_IF_NEWER = """
for i = 1, #ARGV, 3 do
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  if not held or tonumber(string.match(held, '^-?%d+')) <= tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2])
  end
end
"""


def remember(values: Mapping[Key, Latest]) -> None:
    """Raises RedisError."""
    by_source: dict[tuple[str, str], list[Any]] = {}
    for (source_type, uuid, name), latest in values.items():
        text = f"{latest.timestamp_us} {json.dumps(latest.value)}"
        by_source.setdefault((source_type, uuid), []).extend((name, latest.timestamp_us, text))
    if not by_source:
        return
    with redis.client().pipeline(transaction=False) as pipeline:
        for (source_type, uuid), args in by_source.items():
            pipeline.eval(_SET_IF_NEWER, 1, keys.latest(source_type, uuid), *args)
        pipeline.execute()


def recall(wanted: Iterable[Key]) -> dict[Key, Latest]:
    """The latest values of those that have one, in one round trip. Raises RedisError."""
    wanted = list(wanted)
    if not wanted:
        return {}
    with redis.client().pipeline(transaction=False) as pipeline:
        for source_type, uuid, name in wanted:
            pipeline.hget(keys.latest(source_type, uuid), name)
        answers = pipeline.execute()
    return {key: _parsed(text) for key, text in zip(wanted, answers, strict=True) if text is not None}


def _parsed(text: bytes) -> Latest:
    timestamp_us, value = text.split(b" ", 1)
    return Latest(json.loads(value), int(timestamp_us))
