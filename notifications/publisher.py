"""Publish committed messages on the notification stream; of one state, never an older change after a newer one.

Redis compares and appends in one step, so it does not matter which worker, or the sweep, comes first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from django.conf import settings

from aemos.lib import keys, redis
from notifications import messages
from notifications.messages import Message

# KEYS: stream, hash of the device. ARGV: field, number, unless above, seconds to keep the hash, length, message.
_APPEND = """
local last = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
if last > tonumber(ARGV[3]) then return 0 end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], '*', 'm', ARGV[6])
if last < tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
    redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return 1
"""
# Longer than a worker stands still between its look into the outbox and its writing to the stream; not so long that numbers of
# before a database was restored keep those after it from being published.
KEPT_SECONDS = 120


class Entry(NamedTuple):
    """A message for the stream. `number`, its row's id, orders the changes of one state; 0 where order does not matter.

    It is left out when the stream has a change of the same state whose number is above `unless_above`.
    """

    message: Message
    number: int = 0
    unless_above: int = 0


def append(entries: Iterable[Entry]) -> list[bool]:
    """Whether each was appended. Raises RedisError; then some of them may be on the stream."""
    with redis.client().pipeline(transaction=False) as pipeline:
        for entry in entries:
            _add(pipeline, entry)
        return [bool(answer) for answer in pipeline.execute()]


def state_of(message: Message) -> tuple[str, str]:
    """The device and the state that a change is of. What a device reports is no wish: neither supersedes the other."""
    kind = "wish" if messages.is_desired_change(message) else "report"
    return message.device_uuid or "", f"{kind} {message.payload.get('stateName', '')}"


def expiry(message: Message, now: float) -> float:
    """When it comes too late, in epoch seconds: that of a new message is counted from now."""
    return message.expires_at if message.expires_at is not None else now + lifetime(message.event)


def lifetime(event: str) -> float:
    is_command = event == messages.DEVICE_STATE_CHANGE
    return settings.COMMAND_EXPIRY_SECONDS if is_command else settings.NOTIFICATION_EXPIRY_SECONDS


def _add(pipeline: Any, entry: Entry) -> None:
    message, length = entry.message, settings.NOTIFICATION_STREAM_LENGTH
    encoded = messages.encode(msgspec.structs.replace(message, expires_at=expiry(message, time.time())))
    if not entry.number:
        pipeline.xadd(keys.NOTIFICATIONS, {"m": encoded}, maxlen=length, approximate=True)
        return
    device, state = state_of(message)
    numbers = (entry.number, entry.unless_above, KEPT_SECONDS, length)
    names = [keys.NOTIFICATIONS, keys.last_published(device)]
    redis.script(_APPEND)(keys=names, args=[state, *numbers, encoded], client=pipeline)
