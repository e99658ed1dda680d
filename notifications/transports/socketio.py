"""Socket.IO: access tokens of people and messages in, events in the rooms of their organizations out.

Rooms: `organization-{uuid}` holds everything an organization is told and is joined on connection for every membership;
`device-uuid-{uuid}` and `telemetry-{variable uuid}` are asked for with `subscribe`, and any room is left with
`unsubscribe`. A client in several rooms of a message receives it once; one that wants a single device leaves the room of
the organization. Rooms are granted here and nowhere else, and rights are looked at again every few seconds.

The token comes in the handshake (`auth={"token": ...}` or `Authorization: Bearer ...`), never in a cookie, so a foreign
page has nothing to misuse: without SOCKETIO_ORIGINS every origin may connect. With it, the listed origins and the
server's own host may, because other clients than browsers send that as their Origin.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import gevent
import socketio
from django.conf import settings
from django.db import DatabaseError, close_old_connections
from gevent.pywsgi import WSGIServer
from socketio.exceptions import ConnectionRefusedError as Refused

from devices.exceptions import Unauthorized
from devices.models import Device, Variable
from notifications import messages
from notifications.messages import Message, Protocol
from notifications.transports.base import Delivered, TransportError
from notifications.transports.people import organizations_of, person
from notifications.transports.socketio_engine import Engine, RequestHandler, Server, silent_log

log = logging.getLogger(__name__)
# Clients send room names and tokens, nothing larger.
MAXIMUM_REQUEST_BYTES = 64 * 1024
MAXIMUM_ROOMS = 200
# Messages that wait for one client; a healthy one is a few behind. More means that it does not read: it is cut off.
MAXIMUM_QUEUED = 5_000
SWEEP_SECONDS = 1.0
RIGHTS_SECONDS = 5.0
# A connection that has shown no token by then is closed.
HANDSHAKE_SECONDS = 10.0
_ORGANIZATION, _DEVICE, _TELEMETRY = "organization-", "device-uuid-", "telemetry-"
_NOT_YOURS = "There is no such room, or you have no right to it."


@dataclass(slots=True, kw_only=True)
class Session:
    """One connected person: the organizations whose rooms may be joined, and the joined rooms with their organization."""

    user_id: int
    expires_at: float
    organizations: frozenset[str]
    rooms: dict[str, str] = field(default_factory=dict)


class SocketIoTransport:
    """The server. A slow client only fills its own queue (MAXIMUM_QUEUED) and never holds up another."""

    protocol = Protocol.SOCKETIO

    def __init__(self, host: str = "", port: int | None = None) -> None:
        self._host = host or settings.SOCKETIO_HOST
        self._port = settings.SOCKETIO_PORT if port is None else port
        self._sessions: dict[str, Session] = {}
        self._strangers: dict[str, float] = {}
        self._rights_at = time.monotonic()
        self._sweeper: gevent.Greenlet[..., None] | None = None
        self._server = Server(
            cors_allowed_origins=_is_allowed_origin if settings.SOCKETIO_ORIGINS else "*",
            cors_credentials=False,
            max_http_buffer_size=MAXIMUM_REQUEST_BYTES,
        )
        self._engine: Engine = self._server.eio
        for event in (self.connect, self.disconnect, self.subscribe, self.unsubscribe):
            self._server.on(event.__name__, event)
        self._server.on("join", self.subscribe)
        self._listener = WSGIServer(
            (self._host, self._port),
            socketio.WSGIApp(self._server),
            log=None,
            error_log=silent_log(),
            handler_class=RequestHandler,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port bound; the wanted ones before the start."""
        return self._listener.server_host or self._host, self._listener.server_port or self._port

    def start(self) -> None:
        """Listens; OSError when the address cannot be had."""
        self._listener.start()
        self._sweeper = gevent.spawn(self._sweep_for_ever)

    def stop(self, *, timeout_seconds: float) -> None:
        """Closes every connection; clients come back by themselves, to another gateway."""
        if self._sweeper is not None:
            self._sweeper.kill()
        self._listener.stop_accepting()
        self._engine.disconnect()
        self._server.shutdown()
        self._listener.stop(timeout=min(timeout_seconds, 1.0))

    def deliver(self, message: Message, delivered: Delivered) -> None:
        rooms = [_ORGANIZATION + message.organization_uuid]
        if message.device_uuid:
            rooms.append(_DEVICE + message.device_uuid)
        try:
            self._server.emit(message.event, messages.body(message), to=rooms)
        except (TypeError, ValueError) as error:
            raise TransportError(f"the message cannot be written as JSON: {error}", permanent=True) from error
        delivered(message)

    def connect(self, sid: str, environ: Mapping[str, Any], auth: object = None) -> None:
        """Lets a person with a live access token in; the refusal tells the client why."""
        try:
            who = person(_token(environ, auth))
        except Unauthorized as refusal:
            raise Refused(refusal.detail) from None
        except DatabaseError as error:
            log.warning("A client was refused because the database is away: %s", error)
            raise Refused("The server cannot check the token now, try again.") from None
        finally:
            close_old_connections()
        # No greenlet switch from here to the end: the first message must not come before the connection is confirmed.
        session = Session(user_id=who.user_id, expires_at=who.expires_at, organizations=who.organizations)
        self._sessions[sid] = session
        for organization in who.organizations:
            self._enter(sid, session, _ORGANIZATION + organization, organization)

    def disconnect(self, sid: str, reason: str = "") -> None:
        self._sessions.pop(sid, None)

    def subscribe(self, sid: str, *arguments: object) -> dict[str, Any]:
        """The acknowledgement of `subscribe` {"room": ...}: {"ok": true} or {"ok": false, "error": a sentence}."""
        room = _canonical(arguments)
        try:
            organization = _organization_of(room)
        except DatabaseError as error:
            log.warning("A room was refused because the database is away: %s", error)
            return _refusal("The server cannot check the room now, try again.")
        finally:
            close_old_connections()
        # Looked up last, with no greenlet switch before the room is entered: the session may be gone, or its rights.
        session = self._sessions.get(sid)
        if session is None or organization is None or organization not in session.organizations:
            return _refusal(_NOT_YOURS)
        if len(session.rooms) >= MAXIMUM_ROOMS and room not in session.rooms:
            return _refusal(f"One connection can be in {MAXIMUM_ROOMS} rooms at most.")
        self._enter(sid, session, room, organization)
        return {"ok": True}

    def unsubscribe(self, sid: str, *arguments: object) -> dict[str, Any]:
        """The acknowledgement of `unsubscribe` {"room": ...}."""
        room, session = _canonical(arguments), self._sessions.get(sid)
        if session is None or session.rooms.pop(room, None) is None:
            return _refusal("You are not in that room.")
        self._server.leave_room(sid, room)
        return {"ok": True}

    def watched_variables(self) -> set[str]:
        """The uuids of the variables in whose room somebody is."""
        rooms = {room for session in self._sessions.values() for room in session.rooms}
        return {room.removeprefix(_TELEMETRY) for room in rooms if room.startswith(_TELEMETRY)}

    def tell_watchers(self, variable_uuid: str, event: str, body: dict[str, Any]) -> None:
        """Live readings of a variable, to those in its room. Not part of the notifications that can be resumed."""
        self._server.emit(event, body, to=_TELEMETRY + variable_uuid)

    def _enter(self, sid: str, session: Session, room: str, organization: str) -> None:
        session.rooms[room] = organization
        self._server.enter_room(sid, room)

    def _sweep_for_ever(self) -> None:
        while True:
            gevent.sleep(SWEEP_SECONDS)
            try:
                self._sweep(time.time(), time.monotonic())
            except Exception:  # the process loop: without it nobody would be cut off any more
                log.exception("Looking after Socket.IO connections failed")
            finally:
                close_old_connections()

    def _sweep(self, wall_clock: float, now: float) -> None:
        for sid, session in list(self._sessions.items()):
            if session.expires_at <= wall_clock:
                self._end(sid, "token-expired", "The access token has expired: connect again with a new one.")
        self._cut_off_the_slow()
        self._cut_off_strangers(now)
        if self._sessions and now - self._rights_at >= RIGHTS_SECONDS:
            self._rights_at = now
            self._check_rights()

    def _end(self, sid: str, reason: str, sentence: str) -> None:
        if sid in self._sessions:
            self._server.emit("session-ended", {"reason": reason, "message": sentence}, to=sid)
            self._server.disconnect(sid)

    def _check_rights(self) -> None:
        asked = {session.user_id for session in self._sessions.values()}
        try:
            current = organizations_of(asked)
        except DatabaseError as error:
            log.warning("Rights of connected people cannot be checked now: %s", error)
            return
        for sid, session in list(self._sessions.items()):
            if session.user_id in current:
                self._apply(sid, session, current[session.user_id])
            elif session.user_id in asked:  # else connected, and was checked, during the query
                self._end(sid, "user-inactive", "The user does not exist any more or is not active.")

    def _apply(self, sid: str, session: Session, organizations: frozenset[str]) -> None:
        for room, organization in list(session.rooms.items()):
            if organization not in organizations:
                del session.rooms[room]
                self._server.leave_room(sid, room)
        for organization in organizations - session.organizations:
            self._enter(sid, session, _ORGANIZATION + organization, organization)
        session.organizations = organizations

    def _cut_off_the_slow(self) -> None:
        for connection, count in self._engine.waiting().items():
            if count > MAXIMUM_QUEUED:
                log.warning("Cut off a Socket.IO client that does not read: %d messages waited", count)
                self._engine.cut_off(connection)

    def _cut_off_strangers(self, now: float) -> None:
        known = {self._server.manager.eio_sid_from_sid(sid, "/") for sid in self._sessions}
        strangers = self._engine.sockets.keys() - known
        self._strangers = {connection: self._strangers.get(connection, now) for connection in strangers}
        for connection, since in self._strangers.items():
            if now - since >= HANDSHAKE_SECONDS:
                self._engine.cut_off(connection)


def _is_allowed_origin(origin: str, environ: Mapping[str, Any]) -> bool:
    own_hosts = {environ.get("HTTP_HOST"), environ.get("HTTP_X_FORWARDED_HOST")}
    return origin in settings.SOCKETIO_ORIGINS or urlsplit(origin).netloc in own_hosts


def _token(environ: Mapping[str, Any], auth: object) -> str:
    token = auth.get("token") if isinstance(auth, Mapping) else None
    if isinstance(token, str) and token:
        return token
    scheme, _, credential = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    if scheme.lower() == "bearer" and credential:
        return credential.strip()
    raise Unauthorized('Send an access token with the handshake: auth={"token": ...}.')


def _canonical(arguments: tuple[object, ...]) -> str:
    """The room that the client names, with its uuid as the server writes it; empty when it names none."""
    named = arguments[0] if arguments else None
    room = named.get("room") if isinstance(named, Mapping) else named
    if isinstance(room, str):
        for prefix in (_ORGANIZATION, _DEVICE, _TELEMETRY):
            if room.startswith(prefix):
                return prefix + _uuid(room.removeprefix(prefix))
    return ""


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        return ""


def _organization_of(room: str) -> str | None:
    """The uuid of the organization that a room belongs to; None when there is no such room."""
    kind, uuid = room[:-36], room[-36:]
    if kind == _ORGANIZATION:
        return uuid
    if kind == _DEVICE:
        found = Device.objects.filter(uuid=uuid).values_list("organization__uuid", flat=True).first()
    elif kind == _TELEMETRY:
        found = Variable.objects.filter(uuid=uuid).values_list("sensor__organization__uuid", flat=True).first()
    else:
        found = None
    return str(found) if found else None


def _refusal(sentence: str) -> dict[str, Any]:
    return {"ok": False, "error": sentence}
