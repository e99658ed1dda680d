"""Lanes that a person has paused: workers leave their events where they are, until somebody resumes the lane or time is up.

A pause is for those who mend something, such as a rule that does harm or a database that needs rest. Events are accepted as long
as the queue has room, keep their order, and are processed afterwards. It ends by itself, so that nobody can forget it, and it is
in Redis beside the events that it holds back. Urgent events cannot be paused: what stops a pump is among them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from aemos.lib import keys, redis
from rules.events import Lane

PAUSABLE = (Lane.NORMAL, Lane.LOW)
MAXIMUM_SECONDS = 24 * 3_600


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """Who paused a lane, why, and until when, in seconds since 1970."""

    by: str
    until: float
    note: str = ""

    @property
    def ends_at(self) -> datetime:
        return datetime.fromtimestamp(self.until, UTC)

    def __str__(self) -> str:
        return f"paused by {self.by} until {self.ends_at:%Y-%m-%d %H:%M} UTC" + (f": {self.note}" if self.note else "")


def pause(lane: str, *, by: str, seconds: float, note: str = "") -> Pause:
    """In place of the pause that there is. Raises ValueError for a lane or time that cannot be, and RedisError."""
    if lane not in PAUSABLE:
        raise ValueError(f"{lane!r} cannot be paused; {' and '.join(PAUSABLE)} can")
    if not 0 < seconds <= MAXIMUM_SECONDS:
        raise ValueError(f"a pause lasts at most {MAXIMUM_SECONDS // 3_600} hours")
    made = Pause(by=by, until=time.time() + seconds, note=note)
    redis.client().set(keys.paused(lane), msgspec.json.encode(made), px=max(1, int(seconds * 1_000)))
    return made


def resume(lane: str) -> bool:
    """Whether it was paused. Workers notice within half a second. Raises RedisError."""
    return bool(redis.client().delete(keys.paused(lane)))


def current() -> Mapping[str, Pause]:
    """Lane -> its pause. Raises RedisError."""
    found = redis.client().mget([keys.paused(lane) for lane in PAUSABLE])
    return {lane: msgspec.json.decode(each, type=Pause) for lane, each in zip(PAUSABLE, found, strict=True) if each}


def is_paused(lane: str) -> bool:
    """Raises RedisError."""
    return lane in PAUSABLE and bool(redis.client().exists(keys.paused(lane)))
