"""A CoAP server on gevent (RFC 7252, 7641, 7959): one handler turns each CoapRequest into a CoapResponse.

One greenlet reads the socket and never waits for anything else. Handlers and notifications run in bounded pools, one
more greenlet keeps the time for acknowledgements and retransmissions. Whatever a peer can make this server remember has
a limit and a lifetime (Limits), and is kept by tuples of source and token or message id.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gevent
import gevent.pool
import gevent.socket

from gateway.coap import codec
from gateway.coap.blockwise import Clock, Downloads, ExpiringMap, Uploads
from gateway.coap.codec import (
    OVERHEAD_BYTES,
    CoapRequest,
    CoapResponse,
    Code,
    Header,
    Kind,
    Malformed,
    Message,
    Reply,
    Source,
    Unacceptable,
)
from gateway.coap.limits import DEFAULT_LIMITS, Limits, Stats
from gateway.coap.observe import Notifications, Sequence
from gateway.coap.peers import AddressValidation, ConcurrencyLimit, RateLimit
from gateway.coap.retransmission import Outgoing

__all__ = ["CoapRequest", "CoapResponse", "Code", "Endpoint", "Handler", "Limits", "Stats"]

logger = logging.getLogger(__name__)

DISCOVERY_PATH = (".well-known", "core")
LINK_FORMAT = 40  # application/link-format, RFC 6690
DATAGRAM_BYTES = 65535
# Datagrams read before other greenlets get their turn: a flood must not keep finished handlers from answering.
READ_BATCH = 64
LOG_INTERVAL_SECONDS = 10.0


Handler = Callable[[CoapRequest], CoapResponse]


@dataclass(slots=True, eq=False)
class Exchange:
    """What is remembered of a request, so that its duplicate is answered and not handled."""

    source: Source
    header: Header
    received_at: float
    room: int  # the bytes that may be sent in answer to it
    acknowledged: bool = False
    answer: bytes | None = None


class Endpoint:
    """A CoAP server bound to one address; `links` is the RFC 6690 document for /.well-known/core.

    The handler runs in a greenlet of its own per request and may wait; what it raises is answered with 5.00.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        handler: Handler,
        limits: Limits = DEFAULT_LIMITS,
        clock: Clock = time.monotonic,
        links: str = "",
    ) -> None:
        self._address, self._handler, self._limits, self._clock, self._links = address, handler, limits, clock, links
        self._socket: gevent.socket.socket | None = None
        self._loops: list[gevent.Greenlet[..., None]] = []
        self._handlers = gevent.pool.Pool(limits.max_handlers)
        self._counts = Stats()
        self._complained_at = -math.inf
        self._sequence = Sequence(clock)
        self._rates = RateLimit(limits, clock=clock)
        self._proofs = AddressValidation(limits, clock=clock)
        self._shares = ConcurrencyLimit(most=limits.max_handlers_per_source)
        self._unanswered: dict[tuple[Source, int], Exchange] = {}  # confirmable, and their ACK not gone yet

        def kept(max_entries: int, lifetime_seconds: float) -> ExpiringMap[Any, Any]:
            return ExpiringMap(max_entries=max_entries, lifetime_seconds=lifetime_seconds, clock=clock)

        lifetime_seconds = limits.transfer_lifetime_seconds
        self._uploads = Uploads(kept(limits.max_uploads, lifetime_seconds), max_body_bytes=limits.max_body_bytes)
        self._downloads = Downloads(kept(limits.max_downloads, lifetime_seconds), block_bytes=limits.block_bytes)
        self._exchanges: ExpiringMap[tuple[Source, int], Exchange]
        self._exchanges = kept(limits.max_exchanges, limits.exchange_lifetime_seconds)
        self._outgoing = Outgoing(self._send, limits=limits, clock=clock)
        self._notifications = Notifications(
            self._outgoing, represent=self._represent, proofs=self._proofs, limits=limits, clock=clock
        )

    @property
    def stats(self) -> Stats:
        notifications = self._notifications
        return dataclasses.replace(
            self._counts,
            observers=len(notifications.observers),
            notifications=notifications.sent,
            timeouts=self._outgoing.timeouts,
            errors=self._counts.errors + notifications.failed,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port bound; the wanted ones before the start."""
        if self._socket is None:
            return self._address
        host, port = self._socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Binds and serves; raises OSError when the address cannot be had."""
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        bound = gevent.socket.socket(family, socket.SOCK_DGRAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # a burst waits in the kernel
            bound.bind(self._address)
        except OSError:
            bound.close()
            raise
        bound.setblocking(False)
        self._socket = bound
        self._loops = [gevent.spawn(loop) for loop in (self._listen, self._keep_time, self._notifications.run)]

    def stop(self, *, timeout_seconds: float = 5.0) -> None:
        """Takes no more requests, lets the running handlers answer for `timeout_seconds`, then ends them."""
        gevent.killall(self._loops)
        self._handlers.join(timeout_seconds)
        self._handlers.kill()
        self._notifications.stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def notify(self, path: tuple[str, ...]) -> int:
        """Has every observer of the path sent the newest representation, and returns how many there are; never waits.

        To be called in the thread that started the endpoint. News that come while one is on its way are sent as one.
        """
        return self._notifications.notify(path)

    def observations(self) -> list[CoapRequest]:
        """The requests that observers registered with."""
        return [each.message.to_request(body=b"", observe=True) for each in self._notifications.observers]

    # Datagrams in

    def _listen(self) -> None:
        while self._socket is not None:
            gevent.socket.wait_read(self._socket.fileno())
            for _ in range(READ_BATCH):
                try:
                    datagram, address = self._socket.recvfrom(DATAGRAM_BYTES)
                except BlockingIOError:
                    break
                except OSError as error:  # an ICMP answer to something sent earlier, or the network is down
                    self._complain("CoAP socket: %r", error)
                    gevent.sleep(0.01)  # an error that stays must not become a busy loop
                    break
                self._receive(datagram, address)

    def _receive(self, datagram: bytes, address: tuple[str, int] | tuple[str, int, int, int]) -> None:
        """One datagram, to its end; nothing in it may stop the loop."""
        source = address[0], address[1]
        try:
            self._take(datagram, source)
        except Malformed as error:
            self._counts.malformed += 1
            logger.debug("CoAP datagram from %s: %s", source, error)
            if error.reset is not None:
                self._reset(source, error.reset)
        except Exception as error:  # noqa: BLE001  the listener outlives any datagram
            self._counts.errors += 1
            self._complain("CoAP datagram from %s failed: %r", source, error, exc_info=True)

    def _take(self, datagram: bytes, source: Source) -> None:
        header = codec.read_header(datagram)
        if header.is_request:
            self._request(header, datagram, source)
        elif header.code != codec.EMPTY:
            raise header.malformed("a response to nothing this server asked")
        elif header.kind is Kind.CON:
            self._reset(source, header.mid)  # a ping
        elif header.kind is not Kind.NON:
            self._notifications.settle(source, header.mid, reset=header.kind is Kind.RST)

    def _reset(self, source: Source, mid: int) -> None:
        if not self._rates.wait_seconds(source[0]):
            self._send(codec.write_empty(Kind.RST, mid), source)

    def _request(self, header: Header, datagram: bytes, source: Source) -> None:
        wait_seconds = self._rates.wait_seconds(source[0])
        known = self._exchanges.get((source, header.mid))
        if known is not None:
            self._counts.duplicates += 1
            if not wait_seconds:  # a captured request sent again and again must not be answered without end
                self._repeat(known)
            return
        room = self._proofs.room(source, received_bytes=len(datagram))
        exchange = Exchange(source, header, self._clock(), room)
        if wait_seconds:
            self._counts.rate_limited += 1
            self._refuse(exchange, Code.TOO_MANY_REQUESTS, "too many requests", retry_seconds=math.ceil(wait_seconds))
            return
        try:
            message = codec.read_request(header, datagram, source=source)
        except Unacceptable as error:
            self._counts.malformed += 1
            if header.kind is Kind.CON or error.code is not Code.BAD_OPTION:  # RFC 7252 5.4.1: such a NON is ignored
                self._refuse(exchange, error.code, str(error))
            return
        self._counts.requests += 1
        if self._handlers.full() or not self._shares.take(source[0]):
            self._counts.refused_busy += 1
            self._refuse(exchange, Code.UNAVAILABLE, "busy", retry_seconds=self._limits.busy_retry_seconds)
            return
        self._exchanges.put((source, header.mid), exchange)
        if header.kind is Kind.CON:
            self._unanswered[source, header.mid] = exchange
        self._handlers.spawn(self._serve, message, exchange)

    def _refuse(self, exchange: Exchange, code: Code, diagnostic: str, *, retry_seconds: int | None = None) -> None:
        self._reply(exchange, Reply(code=code, payload=diagnostic.encode(), max_age=retry_seconds))

    def _repeat(self, exchange: Exchange) -> None:
        """A duplicate gets what its original got; one whose answer is still being made gets it when it is there."""
        if exchange.header.kind is not Kind.CON:
            return  # RFC 7252 4.5: to be ignored
        if exchange.answer is not None:
            self._send(exchange.answer, exchange.source)

    # Requests: from message to reply

    def _serve(self, message: Message, exchange: Exchange) -> None:
        try:
            self._serve_one(message, exchange)
        finally:
            self._shares.give_back(exchange.source[0])

    def _serve_one(self, message: Message, exchange: Exchange) -> None:
        observer = self._notifications.track(message) if self._concerns_observation(message) else None
        try:
            reply = self._answer(message, observe=observer is not None)
        except Exception as error:  # noqa: BLE001  one request must not take another with it
            self._fail(message, error)
            reply = Reply(code=Code.INTERNAL_ERROR)
        if observer is None:
            self._reply(exchange, reply)
            return
        if reply.observe is None:
            self._notifications.forget(observer)
        elif not self._notifications.observers.is_current(observer):  # ended while the handler was at work
            reply = dataclasses.replace(reply, observe=None)
        self._reply(exchange, reply)
        self._notifications.begin(observer)

    @staticmethod
    def _concerns_observation(message: Message) -> bool:
        """Fetching a later block of a notification is a plain GET, whatever its Observe option says (RFC 7959 2.6)."""
        later_block = message.block2 is not None and message.block2.number > 0
        return message.is_get and message.observe in (0, 1) and not later_block and message.path != DISCOVERY_PATH

    def _answer(self, message: Message, *, observe: bool) -> Reply:
        if message.path == DISCOVERY_PATH:
            return self._downloads.cut(message, self._discover(message), room=self._room(message))
        held = self._downloads.held_for(message)
        if held is not None:
            return self._cut(message, held)
        reply = self._first_look(message)
        if reply is None:
            body = self._uploads.add(message)
            if isinstance(body, Reply):
                return body
            reply = self._represent(message, body=body, observe=observe)
        if message.block1 is not None:
            reply = dataclasses.replace(reply, block1=dataclasses.replace(message.block1, more=False))
        return reply

    def _first_look(self, message: Message) -> Reply | None:
        """The handler's answer to a block that others follow; None to gather them, which only the handler can allow."""
        if message.block1 is None or not message.block1.more:
            return None
        response = self._call(message.to_request(body=message.payload, observe=False, more=True))
        return None if response.code is Code.CONTINUE else self._reply_to(message, response)

    def _represent(self, message: Message, *, body: bytes = b"", observe: bool = True) -> Reply:
        """What the handler says now, cut to a block; it carries an Observe number if the observation is to last."""
        # Taken before the handler reads: of two answers made at the same time the one that read earlier must lose.
        sequence = self._sequence.next()
        response = self._call(message.to_request(body=body, observe=observe))
        lasts = observe and response.observable and not response.code.is_error
        return self._reply_to(message, response, observe=sequence if lasts else None)

    def _reply_to(self, message: Message, response: CoapResponse, *, observe: int | None = None) -> Reply:
        reply = Reply(
            code=response.code,
            payload=bytes(response.payload),  # the codec writes nothing else unchanged
            content_format=response.content_format,
            max_age=response.max_age,
            observe=observe,
        )
        return self._cut(message, reply.within(self._limits.max_error_bytes + OVERHEAD_BYTES))

    def _cut(self, message: Message, reply: Reply) -> Reply:
        if self._downloads.is_cramped(message, reply, room=self._room(message)):
            self._ask_for_proof(message.source)
        return self._downloads.cut(message, reply, room=self._room(message))

    def _ask_for_proof(self, source: Source) -> None:
        """Waits, but not for ever: an answer that is larger than its sender may be sent goes out in small blocks then."""
        self._outgoing.ping(source)
        self._proofs.wait(source, seconds=self._limits.ack_timeout_seconds)

    def _room(self, message: Message) -> int:
        return self._proofs.room(message.source, received_bytes=message.received_bytes)

    def _call(self, request: CoapRequest) -> CoapResponse:
        try:
            response = self._handler(request)
            if not response.code.is_error and len(response.payload) > self._limits.max_body_bytes:
                raise ValueError(f"the handler answered with {len(response.payload)} bytes")
            return response
        except (Exception, gevent.Timeout) as error:  # noqa: BLE001  the handler is the application's
            self._fail(request, error)
            return CoapResponse(code=Code.INTERNAL_ERROR, payload=b"internal error")

    def _discover(self, message: Message) -> Reply:
        if not message.is_get:
            return Reply(code=Code.METHOD_NOT_ALLOWED, payload=b"use GET")
        if message.accept not in (None, LINK_FORMAT):
            return Reply(code=Code.NOT_ACCEPTABLE, payload=b"there is only link format (40)")
        return Reply(code=Code.CONTENT, payload=self._links.encode(), content_format=LINK_FORMAT)

    # Datagrams out

    def _reply(self, exchange: Exchange, reply: Reply) -> None:
        """Piggybacked in the ACK if that is not gone yet, else a message of its own, confirmable like the request."""
        source, header = exchange.source, exchange.header
        self._unanswered.pop((source, header.mid), None)
        reply = reply.within(exchange.room)
        if header.kind is Kind.CON and not exchange.acknowledged:
            exchange.answer = codec.write_reply(reply, kind=Kind.ACK, mid=header.mid, token=header.token)
            self._send(exchange.answer, source)
            return
        self._outgoing.send(reply, kind=header.kind, peer=(source, header.token), room=exchange.room)

    def _keep_time(self) -> None:
        while True:
            gevent.sleep(self._limits.tick_seconds)
            try:
                self._tick(self._clock())
            except Exception as error:  # noqa: BLE001  without this loop nothing would be sent again
                self._counts.errors += 1
                self._complain("CoAP timer failed: %r", error, exc_info=True)

    def _tick(self, now: float) -> None:
        for key, exchange in list(self._unanswered.items()):
            if now - exchange.received_at < self._limits.ack_delay_seconds:
                break  # in order of arrival
            exchange.acknowledged = True
            exchange.answer = codec.write_empty(Kind.ACK, exchange.header.mid)
            self._send(exchange.answer, exchange.source)
            del self._unanswered[key]
        for transmission in self._outgoing.due(now):
            self._notifications.repeat(transmission, now=now)
        self._notifications.refresh(now=now)
        for kept in (self._exchanges, self._uploads.kept, self._downloads.kept, self._rates.kept, self._proofs.kept):
            kept.expire()
        self._notifications.notified.expire()

    def _send(self, datagram: bytes, source: Source) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(datagram, source)
        except OSError as error:  # a lost datagram, which CoAP is made for; waiting here would hold up the listener
            logger.debug("CoAP datagram to %s not sent: %r", source, error)

    def _fail(self, request: CoapRequest | Message, error: BaseException) -> None:
        self._counts.errors += 1
        self._complain("CoAP request for %s from %s failed: %r", request.path, request.source, error, exc_info=True)

    def _complain(self, text: str, *values: object, exc_info: bool = False) -> None:
        """A warning at most every ten seconds, since peers can cause any number; the rest is for debugging."""
        now = self._clock()
        level = logging.WARNING if now - self._complained_at >= LOG_INTERVAL_SECONDS else logging.DEBUG
        if level == logging.WARNING:
            self._complained_at = now
        logger.log(level, text, *values, exc_info=exc_info)
