"""The Socket.IO transport: people log in with access tokens and receive events in the rooms of their organizations.

Rooms: `organization-{uuid}` receives everything for an organization and is joined on connection for every membership;
`device-uuid-{uuid}` and `telemetry-{variable uuid}` are asked for with `subscribe`, and any room is left with
`unsubscribe`. A client in several rooms of a message receives it once; one that wants a single device leaves the room of
the organization. Rooms are granted here and nowhere else, and rights are looked at again every few seconds. A message
whose payload names `roles` reaches only members with one of them.

Every message carries its `position`. A client that was away gives the last one it has seen, in the handshake
(`auth={"token": ..., "position": ...}`) or with `resume` {"position": ...}, to any gateway, and is replayed what followed.

The token comes in the handshake (`auth={"token": ...}` or `Authorization: Bearer ...`), never in a cookie, so a foreign
page has nothing to misuse: without SOCKETIO_ALLOWED_ORIGINS every origin may connect. With it, the listed origins and the
server's own host may, because other clients than browsers send that as their Origin.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import gevent
import socketio
from django.conf import settings
from django.db import DatabaseError, close_old_connections
from django.utils import timezone
from gevent.pywsgi import WSGIServer
from socketio.exceptions import ConnectionRefusedError as Refused

from aemos.lib import metrics
from devices.exceptions import BadPayload, Unauthorized
from gateway.live_readings import LiveReadings
from gateway.people import organizations_of, person
from gateway.socketio import history
from gateway.socketio.engine import Engine, RequestHandler, Server, connections_within_limits, silent_log
from gateway.socketio.replay import Replayer, body
from gateway.socketio.sessions import (
    ORGANIZATION,
    TELEMETRY,
    Session,
    canonical_room,
    organization_of,
    roles_of,
    rooms_of,
)
from gateway.transport import BackgroundTask, DeliveryReport, OnReport, Transport, TransportError
from notifications.messages import Message, Protocol

log = logging.getLogger(__name__)
# Clients send room names and tokens, nothing larger.
MAXIMUM_REQUEST_BYTES = 64 * 1024
MAXIMUM_ROOMS = 200
# One gateway's, and one person's at it: a page that connects again and again must not keep everybody else out.
MAXIMUM_SESSIONS, SESSIONS_PER_PERSON = 10_000, 50
# Who is beyond them waits to be accepted: each session has one, and those without a session end by themselves.
MAXIMUM_CONNECTIONS = 12_000
# Messages, and characters of them, that wait for one client; a healthy one is a few behind. More means that it does not
# read: it is cut off.
MAXIMUM_QUEUED, MAXIMUM_QUEUED_CHARACTERS = 5_000, 16_000_000
# A replay waits while so much waits for the client.
REPLAY_QUEUED, REPLAY_QUEUED_CHARACTERS = 500, 1_000_000
SWEEP_SECONDS = 1.0
RIGHTS_SECONDS = 5.0
# A connection that has shown no token by then is closed.
HANDSHAKE_SECONDS = 10.0
_NOT_YOURS = "There is no such room, or you have no right to it."
_POSITION = re.compile(r"\d{1,15}-\d{1,20}", re.ASCII)


class SocketIoTransport(Transport):
    """The server. A slow client only fills its own queue (MAXIMUM_QUEUED) and never holds up another.

    `sessions` are those that were let in; `position` is that of the message delivered last.
    """

    protocol = Protocol.SOCKETIO

    def __init__(self, host: str = "", port: int | None = None) -> None:
        self._host = host or settings.SOCKETIO_HOST
        self._port = settings.SOCKETIO_PORT if port is None else port
        self.sessions: dict[str, Session] = {}
        # Before the first message: the gateway delivers all that is published from its start on, by Redis' clock.
        self.position = history.position_at(timezone.now())
        self._replayer = Replayer(self)
        self._strangers: dict[str, float] = {}
        self._rights_at = time.monotonic()
        self._greenlets: list[gevent.Greenlet[..., None]] = []
        self._server = Server(
            cors_allowed_origins=_is_allowed_origin if settings.SOCKETIO_ALLOWED_ORIGINS else "*",
            cors_credentials=False,
            max_http_buffer_size=MAXIMUM_REQUEST_BYTES,
            on_excess=self._end_busy,
        )
        self._engine: Engine = self._server.eio
        for event in (self.connect, self.disconnect, self.subscribe, self.unsubscribe, self.resume):
            self._server.on(event.__name__, event)
        self._server.on("join", self.subscribe)
        self._listener = WSGIServer(
            (self._host, self._port),
            socketio.WSGIApp(self._server),
            log=None,
            error_log=silent_log(),
            handler_class=RequestHandler,
            spawn=connections_within_limits(MAXIMUM_CONNECTIONS),
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port bound; the wanted ones before the start."""
        return self._listener.server_host or self._host, self._listener.server_port or self._port

    def background_tasks(self) -> Mapping[str, BackgroundTask]:
        return {"live readings": LiveReadings(self).run}

    def start(self) -> None:
        """Listens; OSError when the address cannot be had."""
        self._listener.start()
        self._greenlets = [gevent.spawn(self._sweep_for_ever), gevent.spawn(self._replayer.run)]

    def stop(self, *, timeout_seconds: float) -> None:
        """Closes every connection; clients come back by themselves, to another gateway."""
        gevent.killall(self._greenlets)
        self._listener.stop_accepting()
        self._engine.disconnect()
        self._server.shutdown()
        self._listener.stop(timeout=min(timeout_seconds, 1.0))

    def deliver(self, message: Message, on_report: OnReport) -> None:
        position = message.position or self.position
        self._replayer.admit(position)
        try:
            self.send(message.event, body(message), self._recipients(message))
        except (TypeError, ValueError) as error:
            raise TransportError(f"the message cannot be written as JSON: {error}", permanent=True) from error
        finally:
            self.position = position
        on_report(DeliveryReport(message))

    def _recipients(self, message: Message) -> Sequence[str]:
        """Rooms, or single sessions where the roles of the members matter."""
        if not roles_of(message):
            return rooms_of(message)
        return [sid for sid, session in self.sessions.items() if session.is_live and session.receives(message)]

    def send(self, event: str, data: Mapping[str, Any], recipients: Sequence[str]) -> None:
        """Puts an event into the queues of rooms or sessions, encoded once. Never waits."""
        if recipients:  # the library takes an empty list for everybody
            self._server.emit(event, data, to=list(recipients))

    def has_room(self, sid: str) -> bool:
        count, characters = self._engine.load(self._server.manager.eio_sid_from_sid(sid, "/"))
        return count < REPLAY_QUEUED and characters < REPLAY_QUEUED_CHARACTERS

    def go_live(self, sid: str) -> None:
        """From the next message on the session is given what is delivered."""
        session = self.sessions[sid]
        session.is_live = True
        for room in session.rooms:
            self._server.enter_room(sid, room)

    def connect(self, sid: str, environ: Mapping[str, Any], auth: object = None) -> None:
        """Lets a person with a live access token in; the refusal says why."""
        try:
            returns = isinstance(auth, Mapping) and auth.get("position") is not None
            position = _position(auth) if returns else None
            who = person(_token(environ, auth))
        except (Unauthorized, BadPayload) as refusal:
            raise Refused(refusal.detail) from None
        except DatabaseError as error:
            log.warning("A client was refused because the database is away: %s", error)
            raise Refused("The server cannot check the token now, try again.") from None
        finally:
            close_old_connections()
        # No greenlet switch from here to the end: the first message must not come before the connection is confirmed.
        self._refuse_too_many(who.login.user_id)
        session = Session(login=who.login, expires_at=who.expires_at, organizations=who.organizations)
        self.sessions[sid] = session
        session.is_live = position is None
        for organization in who.organizations:
            self._enter(sid, session, ORGANIZATION + organization, organization)
        if position is None:
            gevent.spawn(self._tell_position, sid)  # not before the connection is confirmed
        else:
            self._replayer.begin(sid, position)

    def _refuse_too_many(self, user_id: int) -> None:
        if len(self.sessions) >= MAXIMUM_SESSIONS:
            raise Refused("This gateway has all the clients that it can serve, try another one.")
        if sum(session.login.user_id == user_id for session in self.sessions.values()) >= SESSIONS_PER_PERSON:
            raise Refused(f"One person can have {SESSIONS_PER_PERSON} connections to a gateway at most.")

    def _tell_position(self, sid: str) -> None:
        """A client that is cut off before its first message needs to know where to resume, too."""
        if sid in self.sessions:
            self.send("position", {"position": self.position}, [sid])

    def disconnect(self, sid: str, reason: str = "") -> None:
        self.sessions.pop(sid, None)
        self._replayer.forget(sid)

    def resume(self, sid: str, *arguments: object) -> dict[str, Any]:
        """The acknowledgement of `resume` {"position": ...}: from then on what followed it comes in order, then live."""
        session = self.sessions.get(sid)
        try:
            position = _position(arguments[0] if arguments else None)
        except BadPayload as refusal:
            return _refusal(refusal.detail)
        if session is None or not session.is_live:
            return _refusal("What you missed is being sent already.")
        self._replay(sid, session, position)
        return {"ok": True}

    def on_gap(self) -> None:
        """The stream has lost messages after `position`: everybody is given them from the table, as after an absence."""
        for sid, session in self.sessions.items():
            if not self._replayer.serves(sid):  # a replay sees the hole by itself
                self._replay(sid, session, self.position)

    def _replay(self, sid: str, session: Session, position: str) -> None:
        for room in session.rooms:
            self._server.leave_room(sid, room)
        session.is_live = False
        self._replayer.begin(sid, position)

    def subscribe(self, sid: str, *arguments: object) -> dict[str, Any]:
        """The acknowledgement of `subscribe` {"room": ...}: {"ok": true} or {"ok": false, "error": a sentence}."""
        room = canonical_room(arguments)
        try:
            organization = organization_of(room)
        except DatabaseError as error:
            log.warning("A room was refused because the database is away: %s", error)
            return _refusal("The server cannot check the room now, try again.")
        finally:
            close_old_connections()
        # Looked up last, with no greenlet switch before the room is entered: the session may be gone, or its rights.
        session = self.sessions.get(sid)
        if session is None or organization is None or organization not in session.organizations:
            return _refusal(_NOT_YOURS)
        if len(session.rooms) >= MAXIMUM_ROOMS and room not in session.rooms:
            return _refusal(f"One connection can be in {MAXIMUM_ROOMS} rooms at most.")
        self._enter(sid, session, room, organization)
        return {"ok": True}

    def unsubscribe(self, sid: str, *arguments: object) -> dict[str, Any]:
        """The acknowledgement of `unsubscribe` {"room": ...}."""
        room, session = canonical_room(arguments), self.sessions.get(sid)
        if session is None or room not in session.rooms:
            return _refusal("You are not in that room.")
        self._leave(sid, session, room)
        return {"ok": True}

    def watched_variables(self) -> set[str]:
        """The uuids of the variables in whose room somebody is."""
        rooms = {room for session in self.sessions.values() for room in session.rooms}
        return {room.removeprefix(TELEMETRY) for room in rooms if room.startswith(TELEMETRY)}

    def send_to_watchers(self, variable_uuid: str, event: str, body: dict[str, Any]) -> None:
        """Live readings of a variable, to those in its room. Not part of the notifications that can be resumed."""
        self._server.emit(event, body, to=TELEMETRY + variable_uuid)

    def _enter(self, sid: str, session: Session, room: str, organization: str) -> None:
        session.rooms[room] = organization
        if session.is_live:
            self._server.enter_room(sid, room)

    def _leave(self, sid: str, session: Session, room: str) -> None:
        del session.rooms[room]
        self._server.leave_room(sid, room)

    def _sweep_for_ever(self) -> None:
        while True:
            gevent.sleep(SWEEP_SECONDS)
            try:
                self._sweep(time.time(), time.monotonic())
            except Exception:  # the process loop: without it nobody would be cut off any more
                log.exception("Looking after Socket.IO connections failed")
                metrics.GATEWAY_FAILURES.labels("socketio").inc()
            finally:
                close_old_connections()

    def _sweep(self, wall_clock: float, now: float) -> None:
        for sid, session in list(self.sessions.items()):
            if session.expires_at <= wall_clock:
                self._end(sid, "token-expired", "The access token has expired: connect again with a new one.")
        self._forget_the_gone()
        self._cut_off_the_slow()
        self._cut_off_strangers(now)
        if self.sessions and now - self._rights_at >= RIGHTS_SECONDS:
            self._rights_at = now
            self._check_rights()

    def _end(self, sid: str, reason: str, sentence: str) -> None:
        if sid in self.sessions:
            metrics.SOCKETIO_ENDED.labels(reason).inc()
            self._server.emit("session-ended", {"reason": reason, "message": sentence}, to=sid)
            self._server.disconnect(sid)

    def _end_busy(self, connection: str) -> None:
        """A client that sends more than it may gets an error; one that was not let in is cut off."""
        sid = self._server.manager.sid_from_eio_sid(connection, "/")
        if sid in self.sessions:
            self._end(sid, "too-many-events", "The client sent too much: connect again and ask less often.")
            self._engine.disconnect(connection)
        else:
            self._engine.cut_off(connection)

    def _check_rights(self) -> None:
        asked = {session.login for session in self.sessions.values()}
        try:
            current = organizations_of(asked)
        except DatabaseError as error:
            log.warning("Rights of connected people cannot be checked now: %s", error)
            return
        for sid, session in list(self.sessions.items()):
            if session.login in current:
                self._apply(sid, session, current[session.login])
            elif session.login in asked:  # else connected, and was checked, during the query
                self._end(
                    sid, "user-inactive", "The user does not exist any more, is not active, or has a new password."
                )

    def _apply(self, sid: str, session: Session, organizations: Mapping[str, str]) -> None:
        for room, organization in list(session.rooms.items()):
            if organization not in organizations:
                self._leave(sid, session, room)
        for organization in organizations.keys() - session.organizations.keys():
            self._enter(sid, session, ORGANIZATION + organization, organization)
        session.organizations = organizations

    def _forget_the_gone(self) -> None:
        """The library does not report a connection that ended while its token was checked."""
        for sid in list(self.sessions):
            if self._server.manager.eio_sid_from_sid(sid, "/") not in self._engine.sockets:
                self.disconnect(sid)
                self._server.manager.disconnect(sid, "/", ignore_queue=True)

    def _cut_off_the_slow(self) -> None:
        for connection in list(self._engine.sockets):
            count, characters = self._engine.load(connection)
            if count > MAXIMUM_QUEUED or characters > MAXIMUM_QUEUED_CHARACTERS:
                log.warning("Cut off a Socket.IO client that does not read: %d messages waited", count)
                metrics.SOCKETIO_ENDED.labels("unread").inc()
                self._engine.cut_off(connection)

    def _cut_off_strangers(self, now: float) -> None:
        known = {self._server.manager.eio_sid_from_sid(sid, "/") for sid in self.sessions}
        strangers = self._engine.sockets.keys() - known
        self._strangers = {connection: self._strangers.get(connection, now) for connection in strangers}
        for connection, since in self._strangers.items():
            if now - since >= HANDSHAKE_SECONDS:
                self._engine.cut_off(connection)


def _is_allowed_origin(origin: str, environ: Mapping[str, Any]) -> bool:
    own_hosts = {environ.get("HTTP_HOST"), environ.get("HTTP_X_FORWARDED_HOST")}
    return origin in settings.SOCKETIO_ALLOWED_ORIGINS or urlsplit(origin).netloc in own_hosts


def _token(environ: Mapping[str, Any], auth: object) -> str:
    token = auth.get("token") if isinstance(auth, Mapping) else None
    if isinstance(token, str) and token:
        return token
    scheme, _, credential = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    if scheme.lower() == "bearer" and credential:
        return credential.strip()
    raise Unauthorized('Send an access token with the handshake: auth={"token": ...}.')


def _position(named: object) -> str:
    """The position that a client names; BadPayload when it is none."""
    position = named.get("position") if isinstance(named, Mapping) else None
    if isinstance(position, str) and _POSITION.fullmatch(position) and int(position.partition("-")[2]) < 2**64:
        return position  # Redis takes no greater number
    raise BadPayload("position must be that of a message, such as 1767323045000-0.")


def _refusal(sentence: str) -> dict[str, Any]:
    return {"ok": False, "error": sentence}
