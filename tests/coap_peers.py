"""Bare CoAP peers for tests: datagrams written and read by the tests themselves, and a handler that remembers."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import aiocoap as untyped_aiocoap
import gevent
import gevent.event
import gevent.socket

from gateway.coap.endpoint import CoapRequest, CoapResponse, Code, Endpoint, Handler, Limits

aiocoap: Any = untyped_aiocoap
Options = list[tuple[int, bytes]]

CON, NON, ACK, RST = range(4)
GET, POST, PUT, DELETE = range(1, 5)
OBSERVE, URI_PATH, CONTENT_FORMAT, MAX_AGE, URI_QUERY, ACCEPT, BLOCK2, BLOCK1, SIZE1 = 6, 11, 12, 14, 15, 17, 23, 27, 60
STATE = ("devices", "4f6e", "state")
# Retransmissions after 40, 80 and 160 ms, then given up.
HASTY: dict[str, Any] = {
    "ack_delay_seconds": 0.1,
    "ack_timeout_seconds": 0.04,
    "ack_random_factor": 1.0,
    "max_retransmits": 2,
}


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def encode(
    code: int,
    *,
    kind: int = CON,
    mid: int = 1,
    token: bytes = b"\x01",
    options: Options | None = None,
    payload: bytes = b"",
) -> bytes:
    """An encoder of the tests' own, so that it cannot share a mistake with the endpoint."""
    data = bytes([0x40 | kind << 4 | len(token), code]) + mid.to_bytes(2, "big") + token
    last = 0
    for number, value in sorted(options or [], key=lambda option: option[0]):
        (delta, delta_bytes), (length, length_bytes) = _nibble(number - last), _nibble(len(value))
        data += bytes([delta << 4 | length]) + delta_bytes + length_bytes + value
        last = number
    return data + (b"\xff" + payload if payload else b"")


def _nibble(value: int) -> tuple[int, bytes]:
    if value < 13:
        return value, b""
    return (13, bytes([value - 13])) if value < 269 else (14, (value - 269).to_bytes(2, "big"))


@dataclass(frozen=True)
class Packet:
    kind: int
    code: int
    mid: int
    token: bytes
    options: dict[int, bytes]
    payload: bytes
    data: bytes = field(repr=False)

    @classmethod
    def decode(cls, data: bytes) -> Packet:
        message = aiocoap.Message.decode(data)  # an independent reading of what the endpoint writes
        options = {int(option.number): option.encode() for option in message.opt.option_list()}
        header = data[0] >> 4 & 3, data[1], int.from_bytes(data[2:4], "big"), data[4 : 4 + (data[0] & 15)]
        return cls(*header, options, message.payload, data)

    def number(self, option: int) -> int | None:
        return int.from_bytes(self.options[option], "big") if option in self.options else None


class Peer:
    """A bare UDP client in the test's own greenlet: while it waits, the endpoint works."""

    opened: ClassVar[list[Peer]] = []

    def __init__(self, endpoint: Endpoint, *, host: str = "127.0.0.1", proven: bool = True) -> None:
        self.endpoint = endpoint
        self.socket = gevent.socket.socket(gevent.socket.AF_INET, gevent.socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.opened.append(self)
        self.mid = 100
        if proven:
            endpoint._proofs.add(self.address)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()
        return host, port

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, self.endpoint.address)

    def receive(self, *, seconds: float = 3.0) -> Packet:
        self.socket.settimeout(seconds)
        return Packet.decode(self.socket.recv(65535))

    def receive_until(self, condition: Callable[[], bool]) -> list[bytes]:
        received: list[bytes] = []
        with gevent.Timeout(10):
            while not condition():
                with contextlib.suppress(TimeoutError):
                    received.append(self.receive(seconds=0.02).data)
        return received

    def ask(self, code: int, path: tuple[str, ...] = STATE, **fields: Any) -> Packet:
        """Sends a request under a new message id; returns what comes next."""
        self.mid += 1
        options = [(URI_PATH, segment.encode()) for segment in path] + fields.pop("options", [])
        self.send(encode(code, mid=fields.pop("mid", self.mid), options=options, **fields))
        return self.receive()

    def observe(self, path: tuple[str, ...] = STATE, *, value: bytes = b"", **fields: Any) -> Packet:
        return self.ask(GET, path, options=[(OBSERVE, value)], **fields)

    def acknowledge(self, packet: Packet, *, kind: int = ACK) -> None:
        self.send(bytes([0x40 | kind << 4, 0]) + packet.mid.to_bytes(2, "big"))

    def expect_nothing_but_pong(self) -> None:
        """The listener answers in order: when the next datagram is the answer to a ping, nothing came before."""
        self.send(b"\x40\x00\xfe\xfe")
        assert self.receive().data == b"\x70\x00\xfe\xfe"


class Farm:
    """A handler with a state to observe, a body to fetch and an echo; it remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[CoapRequest] = []
        self.state = b"off"
        self.code = Code.CONTENT
        self.gate = gevent.event.Event()
        self.gate.set()

    def __call__(self, request: CoapRequest) -> CoapResponse:
        if request.more:
            return CoapResponse(code=Code.CONTINUE)
        self.requests.append(request)
        if request.path[-1:] == ("state",):
            return CoapResponse(code=self.code, payload=self.state, observable=True)
        if request.path == ("slow",):
            self.gate.wait()
        if request.path == ("raise",):
            raise RuntimeError("the handler has a bug")
        return CoapResponse(code=Code.CHANGED, payload=request.payload, content_format=request.content_format)


def until(condition: Callable[[], bool]) -> None:
    with gevent.Timeout(5):
        while not condition():
            gevent.sleep(0.005)


@contextmanager
def serving(
    handler: Handler, *, clock: Callable[[], float] = time.monotonic, links: str = "", **limits: Any
) -> Iterator[Endpoint]:
    """An endpoint that runs until the end of the block; all peers are closed with it."""
    endpoint = Endpoint(("127.0.0.1", 0), handler=handler, limits=Limits(**limits), clock=clock, links=links)
    endpoint.start()
    try:
        yield endpoint
    finally:
        endpoint.stop(timeout_seconds=0)
        while Peer.opened:
            Peer.opened.pop().socket.close()


def random_datagram(dice: random.Random) -> bytes:
    """Random bytes, a registration, or a request that is nearly right: those get furthest into the endpoint."""
    fate = dice.random()
    if fate < 0.2:
        return dice.randbytes(dice.randrange(64))
    if fate < 0.3:
        registration = [(OBSERVE, b""), (URI_PATH, b"state"), (URI_QUERY, dice.randbytes(dice.randrange(3)))]
        token, kind = dice.randbytes(dice.choice((1, 8))), dice.choice((CON, NON))
        return encode(GET, kind=kind, mid=dice.randrange(65536), token=token, options=registration)
    numbers = [OBSERVE, URI_PATH, CONTENT_FORMAT, URI_QUERY, ACCEPT, BLOCK2, BLOCK1, SIZE1, dice.randrange(1, 65000)]
    options = [
        (dice.choice(numbers), dice.randbytes(dice.choice((0, 1, 1, 2, 3, 9)))) for _ in range(dice.randrange(4))
    ]
    options += [(URI_PATH, dice.choice((b"state", b"raise", b"echo")))] * dice.randrange(2)
    data = bytearray(
        encode(
            dice.choice((GET, GET, POST, PUT, DELETE, dice.randrange(256))),
            kind=dice.choice((CON, NON, NON, dice.randrange(4))),
            mid=dice.randrange(65536),
            token=dice.randbytes(dice.randrange(9)),
            options=options,
            payload=dice.randbytes(dice.choice((0, 16, 32, 1024))),
        )
    )
    if dice.random() < 0.3:
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data[: dice.randrange(len(data))] if dice.random() < 0.1 else data)
