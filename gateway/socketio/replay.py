"""Send a client the messages it missed since its last position, and then put it among the live ones.

A session that is replayed to is in no room: the live messages of that time reach it from the stream, in their order. It
goes live at a moment when it has been given everything that the gateway has delivered, so nothing overtakes and nothing is
left out. What the stream holds no more is read from the table of notifications; what that has deleted is a gap, which is
sent to the client together with the states of its devices.

One greenlet serves all replays in turn, slice by slice, and rests as long as it works: clients that all come back at
once share what is read, and leave half of the processor to live messages. A client that does not fetch what it was given
is given no more.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import gevent
import msgspec
from django.db import DatabaseError, close_old_connections
from gevent.event import Event
from redis.exceptions import RedisError

from aemos.lib import metrics, redis
from aemos.lib.rate_limited_log import RateLimitedLog
from gateway import cursors
from gateway.cursors import Entry, StreamSlice
from gateway.socketio import history
from gateway.socketio.sessions import DEVICE, ORGANIZATION, Session
from notifications import messages
from notifications.messages import Message

log = logging.getLogger(__name__)
SLICE = 100
# The position of a client that has seen nothing: it is given the states of its devices.
BEGINNING = "0-0"
# Messages of one replay; whoever missed more is better served by the states as they are now.
MAXIMUM_REPLAYED = 100_000
# While every client has enough to fetch, or Redis or the database is away.
REST_SECONDS, RETRY_SECONDS = 0.05, 1.0


class Outlet(Protocol):
    """The transport as a replay sees it; `position` is that of the message delivered last. None of it waits."""

    sessions: dict[str, Session]
    position: str

    def send(self, event: str, body: Mapping[str, Any], sids: Sequence[str]) -> None: ...

    def has_room(self, sid: str) -> bool: ...

    def go_live(self, sid: str) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Replay:
    """One session and how far it has come.

    `past` is what the table still has to give, `rows` what it gave and the client has not; then the stream continues
    after `position`. `sent` are messages from the table that the stream may hold, too. `checked`: the table was asked, so
    the stream may begin anywhere.
    """

    sid: str
    session: Session
    position: str
    past: history.Published | None = None
    rows: deque[tuple[datetime, Message]] = field(default_factory=deque)
    states: history.States | None = None
    sent: set[UUID] = field(default_factory=set)
    checked: bool = False
    has_gap: bool = False
    count: int = 0

    @property
    def reads_the_stream(self) -> bool:
        return self.past is None and self.states is None


class Replayer:
    """All replays of one transport. `run` serves them for ever; everything else returns at once."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._replays: dict[str, Replay] = {}
        self._waiting: dict[str, str] = {}
        self._news = Event()
        self._log = RateLimitedLog(log)

    def begin(self, sid: str, position: str) -> None:
        """Replays what follows the position to a session that is not live any more."""
        self._waiting.pop(sid, None)
        self._replays[sid] = Replay(sid=sid, session=self._outlet.sessions[sid], position=position)
        self._news.set()

    def serves(self, sid: str) -> bool:
        """Whether the session is still being given what it missed."""
        return sid in self._replays

    def forget(self, sid: str) -> None:
        self._replays.pop(sid, None)
        self._waiting.pop(sid, None)

    def admit(self, position: str) -> None:
        """Lets in who waits for the message at this position, which is about to be delivered.

        Replays read ahead of the gateway: a session that was already given the message must not get it again, after
        later ones. A gateway that steps back in the stream (it was lost) is not waited for.
        """
        steps_back = not cursors.is_after(position, self._outlet.position)
        for sid, given in list(self._waiting.items()):
            if steps_back or cursors.is_after(position, given):
                del self._waiting[sid]
                self._outlet.go_live(sid)

    def run(self) -> None:
        while True:
            self._news.wait()
            started = time.monotonic()
            try:
                has_worked = self._serve_next()
            except (RedisError, DatabaseError) as error:
                why = redis.explain(error) if isinstance(error, RedisError) else error
                self._log.log(
                    "away",
                    logging.WARNING,
                    "%d Socket.IO clients wait for what they missed: %s",
                    len(self._replays),
                    why,
                )
                gevent.sleep(RETRY_SECONDS)
                continue
            except Exception:  # the process loop: without it nobody would be replayed to any more
                log.exception("A replay failed and is tried again")
                metrics.GATEWAY_FAILURES.labels("socketio").inc()
                gevent.sleep(RETRY_SECONDS)
                continue
            finally:
                close_old_connections()
            self._log.recovered("away")
            gevent.sleep(time.monotonic() - started if has_worked else REST_SECONDS)

    def _serve_next(self) -> bool:
        """One slice for the replay that was served longest ago and has room; False when none has."""
        for sid, replay in list(self._replays.items()):
            if self._outlet.has_room(sid):
                self._replays[sid] = self._replays.pop(sid)
                self._serve(replay)
                return True
        if not self._replays:
            self._news.clear()
        return False

    def _serve(self, replay: Replay) -> None:
        if replay.count >= MAXIMUM_REPLAYED:
            self._skip(replay, oldest=None)
        elif replay.states is not None:
            self._give_states(replay, replay.states)
        elif replay.past is not None:
            self._give_past(replay, replay.past)
        else:
            self._give_stream(replay)

    def _give_stream(self, replay: Replay) -> None:
        live, start = self._outlet.position, replay.position
        part = cursors.slice_after(redis.client(), start.encode(), count=SLICE)
        if not self._is_current(replay):
            return
        if not replay.checked and _reaches_further(start, part):
            self._look_back(replay, part)
            return
        # Who was not given all in between may share only what follows its own position without a hole.
        is_whole = part.follows(start.encode())
        readers = [each for each in self._replays.values() if _shares(each, start)] if is_whole else [replay]
        for entry in part.entries:
            self._give_entry(entry, readers)
        if len(part.entries) < SLICE:
            end = part.entries[-1].id.decode() if part.entries else start
            self._finish([each for each in readers if each.position == end], live=live)

    def _give_entry(self, entry: Entry, readers: list[Replay]) -> None:
        """Hands an entry to those who have not passed it; a reader that has no room any more stays behind."""
        readers[:] = [each for each in readers if self._outlet.has_room(each.sid)]
        position = entry.id.decode()
        due = [each for each in readers if cursors.is_after(position, each.position)]
        for each in due:
            each.position, each.checked = position, False
        message = _decoded(entry, position)
        if message is not None and messages.Protocol.SOCKETIO in message.protocols:
            self._send(message, [each for each in due if message.id not in each.sent])

    def _finish(self, replays: Sequence[Replay], *, live: str) -> None:
        """They were given all that the stream held when it was read, at which time `live` had been delivered.

        What was delivered since and not given is in the stream by now: then they read once more.
        """
        now = self._outlet.position
        for replay in replays:
            if now != live and cursors.is_after(now, replay.position):
                continue
            del self._replays[replay.sid]
            metrics.SOCKETIO_RESUMES.labels("gap" if replay.has_gap else "complete").inc()
            given = replay.position if cursors.is_after(replay.position, now) else now
            if given == now:
                self._outlet.go_live(replay.sid)
            else:
                self._waiting[replay.sid] = given
            self._outlet.send("position", {"position": given}, [replay.sid])

    def _look_back(self, replay: Replay, part: StreamSlice) -> None:
        """The stream does not reach back to the position, or not up to it: the table is asked first."""
        begins_later = not part.follows(replay.position.encode())
        since = history.moment_of(replay.position)
        if since is None or not history.is_kept(since):
            self._skip(replay, oldest=part.oldest)
            return
        until = history.moment_of(part.oldest.decode()) if begins_later and part.oldest else None
        replay.past = history.Published(
            protocol=messages.Protocol.SOCKETIO,
            since=since - history.margin(),
            until=until + history.margin() if until else None,
        )
        replay.checked = not begins_later
        # The stream continues from here when the table has given all.
        replay.position = (cursors.before(part.oldest) if begins_later and part.oldest else part.newest).decode()

    def _give_past(self, replay: Replay, past: history.Published) -> None:
        if not replay.rows:
            replay.rows.extend(past.slice(list(replay.session.organizations)))
            if not replay.rows:
                replay.past = None
        while replay.rows and self._is_current(replay) and self._outlet.has_room(replay.sid):
            moment, message = replay.rows.popleft()
            if message.id not in replay.sent:
                at = history.position_at(moment)
                self._send(msgspec.structs.replace(message, position=at), [replay])
            if past.until is None or moment >= past.until - 2 * history.margin():
                replay.sent.add(message.id)

    def _skip(self, replay: Replay, *, oldest: bytes | None) -> None:
        """Tells of the gap; then come the states, and what was published since they began to be read."""
        newest = cursors.newest_id(redis.client()).decode()
        if not self._is_current(replay):
            return
        rooms = replay.session.rooms
        replay.states = history.States(
            organizations=[owner for room, owner in rooms.items() if room.startswith(ORGANIZATION)],
            devices=[room.removeprefix(DEVICE) for room in rooms if room.startswith(DEVICE)],
        )
        gap = {"from": replay.position, "to": newest, "oldest": oldest.decode() if oldest else None}
        replay.has_gap = replay.position != BEGINNING
        replay.position, replay.checked, replay.count, replay.past = newest, True, 0, None
        replay.rows.clear()
        self._outlet.send("gap", gap, [replay.sid])

    def _give_states(self, replay: Replay, states: history.States) -> None:
        found = states.slice()
        if not self._is_current(replay):
            return
        is_complete = len(found) < history.STATES_SLICE
        body = {"states": found, "position": replay.position, "complete": is_complete}
        self._outlet.send("snapshot", body, [replay.sid])
        if is_complete:
            replay.states = None

    def _send(self, message: Message, replays: Iterable[Replay]) -> None:
        takers = [each for each in replays if each.session.receives(message)]
        for each in takers:
            each.count += 1
        self._outlet.send(message.event, body(message), [each.sid for each in takers])

    def _is_current(self, replay: Replay) -> bool:
        """Whether the session is still there, after the greenlet has waited for an answer."""
        return self._replays.get(replay.sid) is replay


def body(message: Message) -> dict[str, Any]:
    """What Socket.IO sends: the body of all protocols, and the position to resume from."""
    return {**messages.body(message), "position": message.position}


def _reaches_further(position: str, part: StreamSlice) -> bool:
    """Whether the stream alone does not hold all that followed the position."""
    begins_later = not part.follows(position.encode())
    return begins_later or position == BEGINNING or cursors.is_after(position, part.newest)


def _shares(replay: Replay, start: str) -> bool:
    """Whether the replay can be given entries that were read after `start`: it has passed that, without a hole."""
    is_under_way = replay.checked or replay.position != BEGINNING
    return replay.reads_the_stream and is_under_way and not cursors.is_after(start, replay.position)


def _decoded(entry: Entry, position: str) -> Message | None:
    try:
        return messages.decode(entry.message or b"", position=position)
    except msgspec.MsgspecError:
        return None  # the reader of the stream has counted and logged it
