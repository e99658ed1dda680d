"""The CoAP endpoint in bad company: random datagrams, a network that loses a third of them, observers that are silent."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest

from gateway.coap.endpoint import CoapRequest, CoapResponse, Code, Endpoint
from tests.coap_peers import (
    ACK,
    CON,
    GET,
    HASTY,
    NON,
    OBSERVE,
    POST,
    RST,
    STATE,
    URI_PATH,
    Farm,
    ManualClock,
    Packet,
    Peer,
    encode,
    random_datagram,
    serving,
    until,
)

SEEDS = range(20)
LOSS = 0.3
PONG = b"\x70\x00\xfe\xfe"
# A round trip of a loopback takes under a millisecond, so that everything may go twenty times as fast as RFC 7252 has it.
QUICK: dict[str, Any] = {
    "ack_delay_seconds": 0.1,
    "ack_timeout_seconds": 0.1,
    "refresh_seconds": 0.6,
    "requests_per_second": 1e6,
    "request_burst": 10**6,
}
MAX_AGE_SECONDS = 1.0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


class Fuzzer:
    """Four peers that send rubbish, and answer some of what comes back."""

    def __init__(self, endpoint: Endpoint, farm: Farm) -> None:
        self.endpoint, self.farm, self.dice = endpoint, farm, random.Random(20)
        self.peers = itertools.cycle([Peer(endpoint, proven=proven) for proven in (True, True, False, False)])

    def send(self, datagrams: int) -> None:
        for round_ in range(datagrams // 25):
            peer = next(self.peers)
            for _ in range(25):
                peer.send(random_datagram(self.dice))
            if round_ % 10 == 0:
                self.farm.state = self.dice.randbytes(self.dice.choice((3, 2000)))
                self.farm.requests.clear()
                self.endpoint.notify(("state",))
            peer.send(b"\x40\x00\xfe\xfe")
            self._read(peer)

    def _read(self, peer: Peer) -> None:
        while (data := peer.socket.recv(65535)) != PONG:
            if self.dice.random() < 0.3:
                peer.acknowledge(Packet.decode(data), kind=self.dice.choice((ACK, RST)))


def test_a_hundred_thousand_random_datagrams_neither_kill_nor_fill_it(caplog: pytest.LogCaptureFixture) -> None:
    farm, sent = Farm(), 100_000
    bounds = {"max_exchanges": 300, "max_observers": 40, "max_uploads": 8, "max_downloads": 8}
    with serving(farm, **{**HASTY, **bounds, "requests_per_second": 1e6, "request_burst": 10**6}) as endpoint:
        fuzzer = Fuzzer(endpoint, farm)
        fuzzer.send(sent // 5)
        held, resident = objects(), resident_bytes()
        fuzzer.send(sent - sent // 5)
        caplog.clear()
        assert objects() < 1.05 * held
        assert resident_bytes() < resident + 8 * 2**20
        assert Peer(endpoint).ask(GET).code == Code.CONTENT
        stats = endpoint.stats
        assert stats.requests + stats.malformed > 0.8 * sent
        assert min(stats.requests, stats.malformed, stats.notifications) > 1000
        assert len(endpoint._exchanges) <= 300
        assert stats.observers == len(endpoint._notifications.observers) <= 40
        assert len(endpoint._notifications.notified) <= 160
        assert max(len(endpoint._uploads.kept), len(endpoint._downloads.kept)) <= 8
        assert len(endpoint._outgoing.waiting) <= 60
        assert len(endpoint._proofs.kept) <= 80
        assert not endpoint._proofs._awaited


class Relay:
    """Carries datagrams between one peer and the endpoint, and loses some of both directions."""

    def __init__(self, endpoint: Endpoint, seed: int) -> None:
        self._endpoint, self._dice = endpoint, random.Random(seed)
        self._near, self._far = (gevent.socket.socket(type=gevent.socket.SOCK_DGRAM) for _ in range(2))
        self._near.bind(("127.0.0.1", 0))
        self._far.connect(endpoint.address)
        self._client: tuple[str, int] = ("", 0)
        self.lost = self.carried = 0
        self._loops = [gevent.spawn(self._out), gevent.spawn(self._back)]

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._near.getsockname()
        return host, port

    def close(self) -> None:
        gevent.killall(self._loops)
        self._near.close()
        self._far.close()

    def _arrives(self) -> bool:
        arrives = self._dice.random() >= LOSS
        self.carried += arrives
        self.lost += not arrives
        return arrives

    def _out(self) -> None:
        while True:
            data, self._client = self._near.recvfrom(65535)
            if self._arrives():
                self._far.send(data)

    def _back(self) -> None:
        while True:
            data = self._far.recv(65535)
            if self._arrives():
                self._near.sendto(data, self._client)


class Device:
    """A client as RFC 7252 and 7641 want it, behind a relay: it sends again, acknowledges, and registers again in time."""

    def __init__(self, endpoint: Endpoint, seed: int) -> None:
        self.relay = Relay(endpoint, seed)
        self.socket = gevent.socket.socket(type=gevent.socket.SOCK_DGRAM)
        self.socket.connect(self.relay.address)
        self.mids = itertools.count(seed * 1000)
        self.newest, self.state, self.states = -1, b"", list[bytes]()
        self.registrations = 0

    def close(self) -> None:
        self.relay.close()
        self.socket.close()

    def exchange(self, code: int, **fields: object) -> Packet:
        """The answer to a confirmable request, which is sent again until there is one."""
        mid = next(self.mids) & 0xFFFF
        token = mid.to_bytes(2, "big")
        data = encode(code, mid=mid, token=token, **fields)  # type: ignore[arg-type]
        for attempt in range(12):
            self.socket.send(data)
            answer = self._answer(token, seconds=0.1 * 1.3**attempt)
            if answer is not None:
                return answer
        raise AssertionError("twelve attempts, and no answer")

    def observe(self, *, kind: int) -> None:
        """For ever: registers, and again when nothing was heard for as long as a state may be believed."""
        while True:
            self.registrations += 1
            mid = next(self.mids) & 0xFFFF
            options = [(OBSERVE, b""), *((URI_PATH, segment.encode()) for segment in STATE)]
            registration = encode(GET, kind=kind, mid=mid, token=b"ob", options=options)
            for attempt in range(5):
                self.socket.send(registration)
                if self._answer(b"ob", seconds=0.1 * 1.5**attempt) is not None:
                    break
            while self._answer(b"ob", seconds=MAX_AGE_SECONDS) is not None:
                pass

    def _answer(self, token: bytes, *, seconds: float) -> Packet | None:
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            self.socket.settimeout(remaining)
            with contextlib.suppress(TimeoutError):
                packet = Packet.decode(self.socket.recv(65535))
                self._reply(packet)
                if packet.code and packet.token == token:
                    self._note(packet)
                    return packet
        return None

    def _reply(self, packet: Packet) -> None:
        if packet.kind == CON:
            reply = ACK if packet.code else RST
            self.socket.send(bytes([0x40 | reply << 4, 0]) + packet.mid.to_bytes(2, "big"))

    def _note(self, packet: Packet) -> None:
        number = packet.number(OBSERVE)
        if number is not None and number > self.newest:  # the clock of a test does not come round
            self.newest, self.state = number, packet.payload
            self.states.append(packet.payload)


@pytest.mark.parametrize("kind", [CON, NON])
def test_observers_converge_on_the_latest_state_though_a_third_is_lost(kind: int) -> None:
    farm = Farm()
    with serving(farm, **QUICK) as endpoint:
        devices = [Device(endpoint, seed) for seed in SEEDS]
        watching = [gevent.spawn(device.observe, kind=kind) for device in devices]
        until(lambda: endpoint.stats.observers > 15)
        for number in range(30):
            farm.state = b"%03d" % number
            endpoint.notify(STATE)
            gevent.sleep(0.02)
        with gevent.Timeout(30):
            while {device.state for device in devices} != {b"029"}:
                gevent.sleep(0.05)
        gevent.killall(watching)
        for device in devices:
            device.close()
        assert sum(device.relay.lost for device in devices) > 100
        for device in devices:
            assert device.states == sorted(device.states, key=lambda state: (state != b"off", state))


def test_what_was_answered_has_happened_once_though_a_third_is_lost() -> None:
    farm = Farm()
    with serving(farm, **QUICK) as endpoint:
        devices = [Device(endpoint, seed) for seed in SEEDS]

        def post(device: Device, seed: int) -> None:
            for number in range(10):
                body = b"%d of %d" % (number, seed)
                answer = device.exchange(POST, options=[(URI_PATH, b"echo")], payload=body)
                assert (answer.code, answer.payload) == (Code.CHANGED, body)

        posting = [gevent.spawn(post, device, seed) for seed, device in zip(SEEDS, devices, strict=True)]
        gevent.joinall(posting, timeout=60, raise_error=True)
        for device in devices:
            device.close()
        handled = Counter(request.payload for request in farm.requests)
        assert handled == Counter(b"%d of %d" % (number, seed) for seed in SEEDS for number in range(10))
        assert endpoint.stats.duplicates > 20
        assert sum(device.relay.lost for device in devices) > 100


def test_one_silent_observer_among_a_hundred_holds_up_nobody_and_is_dropped() -> None:
    farm, clock = Farm(), ManualClock()
    with serving(farm, clock=clock, refresh_seconds=1e6, **HASTY) as endpoint:
        silent, *awake = [Peer(endpoint) for _ in range(100)]
        for peer in (silent, *awake):
            peer.observe()
        # The clock stands still: whoever waited for the silent one to be given up would wait for ever.
        for number in range(20):
            farm.state = b"%d" % number
            assert endpoint.notify(STATE) == 100
            for peer in awake:
                news = peer.receive()
                assert news.payload == farm.state
                peer.acknowledge(news)
        until(lambda: len(endpoint._outgoing.waiting) == 1)
        for _ in range(3):
            clock.now += 1
            gevent.sleep(0.05)
        until(lambda: endpoint.stats.observers == 99)
        assert endpoint.stats.timeouts == 1
        assert endpoint.notify(STATE) == 99
        assert {peer.receive().payload for peer in awake} == {b"19"}


def test_handlers_that_never_return_for_one_source_delay_no_other() -> None:
    never = gevent.event.Event()

    def handler(request: CoapRequest) -> CoapResponse:
        if request.source[0] == "127.0.0.1":
            never.wait()
        return CoapResponse(code=Code.CONTENT, payload=b"here")

    with serving(handler) as endpoint:
        greedy, other = Peer(endpoint), Peer(endpoint, host="127.0.0.2")
        for mid in range(300):
            greedy.send(encode(GET, mid=mid, options=[(URI_PATH, b"slow")]))
        assert [other.ask(GET).payload for _ in range(50)] == [b"here"] * 50
        assert endpoint.stats.refused_busy == 300 - 128
        assert never.ready() is False
