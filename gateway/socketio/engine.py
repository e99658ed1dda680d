"""What Socket.IO stands on: WSGI requests in, packets of connected clients out; python-socketio with its gaps closed.

simple-websocket hands a frame to `socket.send` once and ignores how much of it was taken, so a full send buffer cuts
frames in two; it reads messages of any size; and a closed connection lasts as long as the peer likes. Engine.IO waits
for ever when it ends the session of a client that does not poll. Socket.IO keeps as many attachments as are announced, and
handles packets as fast as they come. And what waits for a polling client goes into one answer, which the Python client
refuses when it holds more than 16 packets; the server refuses as many in a request, which JavaScript sends at will.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from typing import Any

import engineio
import gevent
import simple_websocket  # type: ignore[import-untyped]
import socketio
from engineio.async_drivers.gevent import WebSocketWSGI
from engineio.payload import Payload
from gevent.lock import Semaphore
from gevent.pywsgi import WSGIHandler
from gevent.queue import Empty, JoinableQueue
from socketio.exceptions import ConnectionRefusedError
from socketio.packet import Packet
from wsproto.utilities import ProtocolError

from aemos.lib import metrics

log = logging.getLogger(__name__)
# A client whose connection takes nothing for so long is cut off; its messages wait in its own queue until then.
WRITE_SECONDS = 20.0
# How long a request may pause, and the next one on the same connection wait: a client that says nothing costs a socket.
REQUEST_SECONDS = 20.0
# Packets of one client. The burst lets it join every room it may be in at once.
PACKETS_PER_SECOND, PACKETS_AT_ONCE = 20.0, 300.0
# What clients of python-engineio take in one answer; those of JavaScript take any number.
PACKETS_PER_ANSWER = 16
# Files that connections leave to Redis, the database, the broker and logs.
OTHER_FILES = 200
Payload.max_decode_packets = int(PACKETS_AT_ONCE)


class WholeWrites:
    """A socket whose `send` sends everything or breaks the connection: half a frame spoils all that come after it."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._turn = Semaphore()  # answers to pings are written by another greenlet than messages
        self._broken = False

    def send(self, data: bytes) -> None:
        with self._turn:
            if self._broken:
                raise BrokenPipeError
            try:
                with gevent.Timeout(WRITE_SECONDS, TimeoutError("the client takes nothing")):
                    self._socket.sendall(data)
            except OSError as error:
                self._broken = True
                self.end()
                raise BrokenPipeError from error

    def recv(self, count: int) -> bytes:
        received: bytes = self._socket.recv(count)
        return received

    def end(self) -> None:
        """Ends both directions; who waits in `recv` gets the end of the stream."""
        with suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)

    def close(self) -> None:
        self.end()  # the web server holds the connection, too, and would wait for another request on it
        self._socket.close()


class _Connection(simple_websocket.Server):
    def handshake(self) -> None:
        self.sock.settimeout(None)  # from here on pings show whether somebody is there
        self.sock: Any = WholeWrites(self.sock)
        super().handshake()

    def close(self, reason: int | None = None, message: str | None = None) -> None:
        try:
            super().close(reason, message)
        finally:
            self.sock.end()


class BoundedWebSocket(WebSocketWSGI):
    """What Engine.IO calls for a WebSocket request."""

    def __init__(self, handler: Any, server: Any) -> None:
        super().__init__(handler, server)
        self.server_args["max_message_size"] = server.max_http_buffer_size

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        try:
            self.ws = _Connection(environ, **self.server_args)
        except (ProtocolError, simple_websocket.ConnectionError):
            start_response("400 BAD REQUEST", [("Content-Type", "text/plain")])
            return [b"not a WebSocket handshake"]
        return self.app(self)


class RequestHandler(WSGIHandler):
    """One connection of the web server."""

    def handle(self) -> None:
        self.socket.settimeout(REQUEST_SECONDS)
        # A client that leaves before it has its answer needs no log line.
        with suppress(OSError):
            super().handle()

    def handle_one_response(self) -> None:
        super().handle_one_response()
        if self.status is None:  # it was a WebSocket: what still comes from it is no further request
            self.close_connection = True

    def handle_error(self, t: Any, v: Any, tb: Any) -> None:
        """One line, because a stranger can cause as many as it likes; gevent would print the whole traceback."""
        log.warning("A Socket.IO request failed: %r", v)
        self._send_error_response_if_possible(500)  # type: ignore[attr-defined]  # the stubs leave it out


class MeasuredQueue(JoinableQueue):  # type: ignore[type-arg]  # its items are packets, and None at the end
    """A queue of packets that knows how many characters wait in it, and gives out as many at once as an answer may hold.

    The first packet of an answer is waited for, the others are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.characters = 0
        self._given = 0

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self._given = 1 if block else self._given + 1
        if self._given > PACKETS_PER_ANSWER:
            raise Empty
        return super().get(block, timeout)

    def clear(self) -> None:
        while not self.empty():
            super().get(False)

    def _put(self, item: Any) -> None:
        self.characters += _length(item)
        super()._put(item)  # type: ignore[misc]  # the stubs leave it out

    def _get(self) -> Any:
        item = super()._get()  # type: ignore[misc]
        self.characters -= _length(item)
        return item


def _length(packet: Any) -> int:
    data = getattr(packet, "data", None)
    return len(data) if isinstance(data, (str, bytes)) else 0


class Engine(engineio.Server):
    """The connections; `sockets` is a dict by connection id."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._async: Any = {**self._async, "websocket": BoundedWebSocket}  # there is no setting for it

    def disconnect(self, sid: str | None = None) -> None:
        """Ends one session, or all, without waiting for the client to fetch what waits for it."""
        for each in [sid] if sid is not None else list(self.sockets):
            connection = self.sockets.pop(each, None)
            if connection is not None:
                connection.close(wait=False)

    def create_queue(self, *_: Any, **__: Any) -> MeasuredQueue:
        return MeasuredQueue()

    def load(self, sid: str) -> tuple[int, int]:
        """How many packets, and characters in them, wait for the client; none when it is gone."""
        connection = self.sockets.get(sid)
        return (connection.queue.qsize(), connection.queue.characters) if connection is not None else (0, 0)

    def cut_off(self, sid: str) -> None:
        """Ends a session and forgets what waits for the client."""
        connection = self.sockets.pop(sid, None)
        if connection is None:
            return
        connection.close(wait=False, abort=True)
        connection.queue.clear()
        connection.queue.put(None)  # what the writer takes for the end


class TextPacket(Packet):
    """A packet without attachments: clients have no reason to send any."""

    def decode(self, encoded_packet: str) -> int:
        if super().decode(encoded_packet):
            raise ValueError("attachments are not accepted")
        return 0


@dataclass(slots=True)
class Pace:
    """How many packets a client may still send: it fills up with time (a token bucket)."""

    left: float = PACKETS_AT_ONCE
    at: float = field(default_factory=time.monotonic)

    def allows(self, now: float) -> bool:
        self.left = min(PACKETS_AT_ONCE, self.left + (now - self.at) * PACKETS_PER_SECOND)
        self.at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


class Server(socketio.Server):
    """Socket.IO on gevent over this Engine; `eio` is the Engine. Handlers log their own errors.

    `on_excess` is called with a connection's id when its client has sent faster than it may; from then on the connection is
    not listened to.
    """

    def __init__(self, *, on_excess: Callable[[str], None], **options: Any) -> None:
        self._on_excess = on_excess
        self._paces: dict[str, Pace] = {}
        super().__init__(
            async_mode="gevent",
            namespaces=["/"],
            # Requests of one client are handled one after the other, in its own greenlet: it cannot ask faster.
            async_handlers=False,
            serializer=TextPacket,
            logger=silent_log(),
            engineio_logger=silent_log(),
            **options,
        )

    def _handle_eio_connect(self, eio_sid: str, environ: dict[str, Any]) -> None:
        self._paces[eio_sid] = Pace()
        super()._handle_eio_connect(eio_sid, environ)

    def _handle_eio_message(self, eio_sid: str, data: Any) -> None:
        pace = self._paces.get(eio_sid)
        if pace is None:
            return
        if pace.allows(time.monotonic()):
            super()._handle_eio_message(eio_sid, data)
        else:
            del self._paces[eio_sid]
            self._on_excess(eio_sid)

    def _handle_event(self, eio_sid: str, namespace: str, id: int | None, data: list[Any]) -> None:
        """The library would take an event named `connect` or `disconnect` for its own: a session without its rooms' rights."""
        if isinstance(data[0], str) and data[0] not in self.reserved_events:
            super()._handle_event(eio_sid, namespace, id, data)

    def _trigger_event(self, event: str, namespace: str, *args: Any) -> Any:
        try:
            return super()._trigger_event(event, namespace, *args)
        except ConnectionRefusedError:
            raise
        except Exception:  # per event: the library would say nothing of it, because its log is silent
            log.exception("The handler of the Socket.IO event %r failed", event)
            metrics.GATEWAY_FAILURES.labels("socketio").inc()
            raise

    def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        self._paces.pop(eio_sid, None)
        super()._handle_eio_disconnect(eio_sid, reason)

    def _engineio_server_class(self) -> type[Engine]:
        return Engine


def connections_within_limits(wanted: int) -> int:
    """How many connections this process can hold, at most so many. Raises its limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + OTHER_FILES
    if soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(hard, files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allowed = max(min(soft - OTHER_FILES, wanted), 1)
    if allowed < wanted:
        log.warning(
            "Only %d connections of Socket.IO at a time: raise the limit of open files, %d, to %d (ulimit -n, LimitNOFILE)",
            allowed, soft, files,
        )  # fmt: skip
    return allowed


def silent_log() -> logging.Logger:
    """The libraries log whole packets, tokens included, and an error for whatever a stranger sends."""
    logger = logging.getLogger(f"{__name__}.silent")
    logger.setLevel(logging.CRITICAL)
    return logger
