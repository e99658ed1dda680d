"""Positions in the notification stream: a cursor gives the entries that one transport of this gateway has to deliver.

Fan-out: each gateway reads everything from its start on, because each has its own clients. Group: one gateway reads, and
an entry stays pending until it is done; what a dead gateway left pending the next one takes over.
Every method may raise RedisError; after one, `open` has to succeed before the next `read`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import gevent
from gevent.event import Event
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from aemos.lib import keys
from aemos.lib.leader import Leader

log = logging.getLogger(__name__)
READ_COUNT = 500
# The position before every entry, and the newest id of a stream that does not exist.
NOTHING = b"0-0"
# How long a read waits for news; a gateway that is to stop notices within this time.
BLOCK_MS = 1_000
# A stream that lost its newest entries, or is a new one behind a clock that is late, is read again from this far back.
REWIND_MS = 60_000
# How far back a new group begins. Not at the first entry: a broker that is added after a month would otherwise get
# the whole history, and pumps would follow it. Not at the newest: workers may have started minutes before the gateway.
GROUP_BEGINS_MS = 600_000
ASK_TO_LEAD_SECONDS = 1.0
STAND_BY_SECONDS = 0.25
# Entries read and not yet done; more are not read meanwhile, they wait in the stream. So many, because an urgent one can
# overtake only what was read.
MAXIMUM_IN_FLIGHT = 10_000
# Acknowledgements that come in this time share one round trip.
GATHER_SECONDS = 0.02


class Entry(NamedTuple):
    """`message` is the encoded message, None when the entry holds none."""

    id: bytes
    message: bytes | None


class Cursor(Protocol):
    def open(self) -> None:
        """Finds the position at the start, and again after every RedisError."""

    def read(self, *, wait: bool = True) -> list[Entry]:
        """The next entries. Without any it is empty, after about a second or, if it is not to wait, at once."""

    def owns(self, entry_id: bytes) -> bool:
        """Whether an entry that was read is still this reader's to deliver."""

    def done(self, entry_id: bytes) -> None:
        """The entry needs nothing more. Never waits."""

    def release(self, entry_ids: Iterable[bytes]) -> None:
        """The entries were read but will not be delivered by this reader."""


class FanOutCursor:
    """Everything that is published from the first `open` on.

    `on_gap` is called before entries are given in front of which others may have been lost: the stream was emptied, or
    is shorter than this reader is late.
    """

    def __init__(
        self,
        client: Redis,
        *,
        wall_clock: Callable[[], float] = time.time,
        on_gap: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._wall_clock = wall_clock
        self._on_gap = on_gap
        self._position: bytes | None = None

    def open(self) -> None:
        try:
            newest = newest_id(self._client)
        except RedisError:
            # Nothing is published while Redis is away, so its clock has passed this when the first entry comes.
            self._position = self._position or b"%d-0" % (self._wall_clock() * 1000)
            raise
        if self._position is None:
            self._position = newest
        elif _parts(newest) < _parts(self._position):
            self._position = b"%d-0" % max(_parts(self._position)[0] - REWIND_MS, 0)
            self._on_gap()

    def read(self, *, wait: bool = True) -> list[Entry]:
        position = self._position or NOTHING
        reply: Any = self._client.xread(
            {keys.NOTIFICATIONS: position}, count=READ_COUNT, block=BLOCK_MS if wait else None
        )
        entries = _entries(reply)
        if entries:
            if position != NOTHING and not self._holds(position):
                log.warning("The stream of notifications has a hole after %s", position.decode())
                self._on_gap()
            self._position = entries[-1].id
        return entries

    def _holds(self, position: bytes) -> bool:
        """Whether what follows the position is still there whole. Asked after the reading: nothing is cut off in between."""
        oldest: Any = self._client.xrange(keys.NOTIFICATIONS, count=1)
        return not oldest or _parts(before(oldest[0][0])) <= _parts(position)

    def owns(self, entry_id: bytes) -> bool:
        return True

    def done(self, entry_id: bytes) -> None:
        """Nothing to do: what was read is kept by the reader until it is delivered."""

    def release(self, entry_ids: Iterable[bytes]) -> None:
        """Nothing to do: the clients of this gateway go with it."""


class StreamSlice(NamedTuple):
    """Entries that follow one another; `oldest` and `newest` are ids of the whole stream, None and 0-0 without entries."""

    entries: list[Entry]
    oldest: bytes | None
    newest: bytes

    def follows(self, position: bytes) -> bool:
        """Whether nothing between the position and the entries was cut off the stream."""
        return self.oldest is None or _parts(before(self.oldest)) <= _parts(position)


def slice_after(client: Redis, position: bytes, *, count: int) -> StreamSlice:
    """At most `count` entries after the position. The oldest id is looked up last: nothing is cut off in between."""
    newest = newest_id(client)
    with client.pipeline(transaction=False) as pipeline:
        pipeline.xrange(keys.NOTIFICATIONS, min=b"(" + position, count=count)
        pipeline.xrange(keys.NOTIFICATIONS, count=1)
        found, first = pipeline.execute()
    entries = [Entry(entry_id, fields.get(b"m")) for entry_id, fields in found]
    # What was published between the two questions is in the entries.
    ids = [newest, *(entry.id for entry in entries[-1:])]
    return StreamSlice(entries, first[0][0] if first else None, max(ids, key=_parts))


def before(entry_id: bytes) -> bytes:
    """The greatest id below this one."""
    milliseconds, sequence = _parts(entry_id)
    return b"%d-%d" % ((milliseconds, sequence - 1) if sequence else (milliseconds - 1, 2**64 - 1))


def is_after(one: str | bytes, other: str | bytes) -> bool:
    """Compares two ids as the stream does."""
    return _parts(one) > _parts(other)


class GroupCursor:
    """One consumer of a group, of which one at a time leads and reads: two that shared the entries could not keep their order.

    `on_lead` is called when this one begins (True) or ceases (False) to lead, before it reads what others left undone.
    """

    def __init__(
        self,
        client: Redis,
        *,
        group: str,
        leader: Leader,
        clock: Callable[[], float] = time.monotonic,
        on_lead: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._client = client
        self._group = group
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._leader = leader
        self._clock = clock
        self._on_lead = on_lead
        self._leads = False
        self._in_flight: set[bytes] = set()
        self._done: list[bytes] = []
        self._news = Event()
        self._room = Event()
        # Where to look next for what nobody delivers; None when there is nothing to look for.
        self._left_behind_from: bytes | None = b"0-0"
        self._asked_at = float("-inf")

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def open(self) -> None:
        seconds, _ = self._client.time()
        begin = b"%d-0" % max(int(seconds) * 1000 - GROUP_BEGINS_MS, 0)
        try:
            self._client.xgroup_create(keys.NOTIFICATIONS, self._group, id=begin, mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._left_behind_from, self._asked_at = b"0-0", float("-inf")  # another one may lead by now

    def read(self, *, wait: bool = True) -> list[Entry]:
        if not self._holds_leadership():
            gevent.sleep(STAND_BY_SECONDS if wait else 0)
            return []
        if len(self._in_flight) >= MAXIMUM_IN_FLIGHT:
            self._room.clear()
            self._room.wait(BLOCK_MS / 1000 if wait else 0)
            return []
        entries = self._left_behind() or self._new(wait=wait)
        self._in_flight.update(entry.id for entry in entries)
        return entries

    def owns(self, entry_id: bytes) -> bool:
        """False once another gateway leads: it delivers what this one had read."""
        return entry_id in self._in_flight

    def release(self, entry_ids: Iterable[bytes]) -> None:
        """They come again before anything new: here, or in the gateway that leads next."""
        released = set(entry_ids)
        if released:
            self._in_flight -= released
            self._left_behind_from = b"0-0"

    def done(self, entry_id: bytes) -> None:
        self._done.append(entry_id)
        self._news.set()

    def acknowledge_until_stopped(self, stopping: Event) -> None:
        """Acknowledges what is done and goes on leading, also while the reader waits for its transport, until `stopping`."""
        while not stopping.is_set():
            if self._news.wait(ASK_TO_LEAD_SECONDS):
                stopping.wait(GATHER_SECONDS)
            self._news.clear()
            try:
                self._holds_leadership()
                self.acknowledge()
            except RedisError as error:
                log.debug("Acknowledgements wait for Redis: %s", error)  # the reader of the stream says so aloud
                stopping.wait(1.0)
                self._news.set()

    def acknowledge(self) -> None:
        """Acknowledges in Redis what is done, in one round trip."""
        done = self._done[:]
        if done:
            self._client.xack(keys.NOTIFICATIONS, self._group, *done)
            # Only after the reply: until then the entries are pending, and this gateway must know them as its own.
            del self._done[: len(done)]
            self._in_flight.difference_update(done)
            self._room.set()

    def close(self) -> None:
        """Acknowledges what is done and signs off; entries that are still in flight are left to the other gateways."""
        self.acknowledge()
        consumers: Any = self._client.xinfo_consumers(keys.NOTIFICATIONS, self._group)
        pending = {consumer["name"]: consumer["pending"] for consumer in consumers}
        if pending.get(self._consumer.encode()) == 0:  # a consumer that is deleted takes its pending entries with it
            self._client.xgroup_delconsumer(keys.NOTIFICATIONS, self._group, self._consumer)
        self._leader.resign()

    def _holds_leadership(self) -> bool:
        """Asks at most once a second; a leader that dies is replaced five seconds after it asked last."""
        if self._clock() - self._asked_at < ASK_TO_LEAD_SECONDS:
            return self._leads
        self._asked_at = self._clock()
        leads = self._leader.leads()
        if leads != self._leads:
            self._leads = leads
            self._in_flight.clear()
            self._left_behind_from = b"0-0"
            log.info("This gateway %s messages to the group %s", "delivers" if leads else "leaves", self._group)
            self._on_lead(leads)
        return leads

    def _new(self, *, wait: bool) -> list[Entry]:
        block = BLOCK_MS if wait else None
        reply: Any = self._client.xreadgroup(
            self._group, self._consumer, {keys.NOTIFICATIONS: ">"}, count=READ_COUNT, block=block
        )
        return _entries(reply)

    def _left_behind(self) -> list[Entry]:
        """What was read and is in nobody's hands: a dead gateway's, in the order of the stream, before anything new."""
        found: list[Entry] = []
        while self._left_behind_from is not None and not found:
            reply: Any = self._client.xautoclaim(
                keys.NOTIFICATIONS, self._group, self._consumer, 0, self._left_behind_from, count=READ_COUNT
            )
            position, claimed, *deleted = reply
            self._left_behind_from = None if position == b"0-0" else position
            if any(deleted):
                log.error("%d notifications were cut off the stream before they were delivered", len(deleted[0]))
            found = [
                Entry(entry_id, fields.get(b"m"))
                for entry_id, fields in claimed
                if entry_id is not None and entry_id not in self._in_flight
            ]
        if found:
            log.warning("Takes over %d notifications that were left undelivered", len(found))
        return found


def _entries(reply: Any) -> list[Entry]:
    return [Entry(entry_id, fields.get(b"m")) for _, found in reply or () for entry_id, fields in found]


def newest_id(client: Redis) -> bytes:
    """The id that the stream gave out last; 0-0 when there is no stream."""
    try:
        information: Any = client.xinfo_stream(keys.NOTIFICATIONS)
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return NOTHING
    newest: bytes = information["last-generated-id"]
    return newest


def _parts(entry_id: bytes | str) -> tuple[int, int]:
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    milliseconds, _, sequence = text.partition("-")
    return int(milliseconds), int(sequence or 0)
